"""Attention over several processes equals the attention of one, forward and backward, for every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from harness.distributed_jobs import Case, all_kept_entries, joined, sharding_of, whole
from harness.ranks import Ranks

CAUSAL = {"causal": True}
DROPOUT = {"dropout_p": 0.3, "seed": 5}
OPTIONS = {
    "plain": Case(),
    "causal": Case(CAUSAL),
    "top-left": Case(CAUSAL | {"alignment": "top-left"}, queries=29),
    "cross": Case(CAUSAL, queries=29, keys=50),
    "offset": Case(CAUSAL | {"offset": 4}, queries=29, keys=50),
    "window": Case({"window": (5, 3)}),
    "causal window": Case(CAUSAL | {"window": (7, None)}),
    "chunk": Case(CAUSAL | {"chunk": 6}),
    "chunk both ways": Case({"chunk": 10, "offset": 3}),
    "softcap": Case(CAUSAL | {"softcap": 2.0, "scale": 0.7}),
    "alibi": Case(CAUSAL, ("alibi_slopes",)),
    "sink": Case(CAUSAL, ("sink",), queries=50),
    "bias": Case(CAUSAL, ("bias",)),
    "bias of all heads": Case(CAUSAL, ("bias_heads",)),
    "bias of one row": Case({}, ("bias_row",)),
    "mask": Case({}, ("mask",)),
    "shard without visible keys": Case({}, ("mask_shard", "sink")),
    "lengths": Case(CAUSAL, ("seqused",)),
    "kv_indices": Case(CAUSAL, ("kv_indices",)),
    "grouped heads": Case(CAUSAL, nheads=12, nheads_kv=6),
    "queries without keys": Case(CAUSAL, queries=60, keys=20),
    "score functions": Case(CAUSAL, ("table",)),
    "dropout": Case(CAUSAL | DROPOUT),
    "dropout, mask": Case(DROPOUT, ("mask", "bias")),
    "everything": Case(
        CAUSAL | DROPOUT | {"window": (20, None), "softcap": 3.0, "scale": -0.3, "deterministic": True},
        ("alibi_slopes", "sink", "bias", "mask", "seqused"),
    ),
}
PACKED = (0, 5, 5, 21, 22, 37)
VARLEN = {
    "causal": Case(CAUSAL, cu_seqlens=PACKED),
    "window": Case({"window": (3, 2)}, cu_seqlens=PACKED),
    "sink": Case(CAUSAL, ("sink", "alibi_slopes"), cu_seqlens=PACKED),
    "dropout": Case(CAUSAL | DROPOUT, cu_seqlens=PACKED),
    "chunk": Case(CAUSAL | {"chunk": 4}, cu_seqlens=PACKED),
    "score functions": Case(CAUSAL, ("table", "sink"), cu_seqlens=PACKED),
}
STRIPED = ("alibi", "chunk", "chunk both ways", "lengths", "dropout", "dropout, mask", "everything", "causal")


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.full), 3, pytest.param(4, marks=pytest.mark.full)]
)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    found = Ranks(request.param)
    yield found
    found.close()


def assert_equal(case: Case, ranks: Ranks) -> None:
    """Compare with one process. Sums in another order differ by roundings of float64."""
    want, got = whole(case), joined(case, ranks.results("part", case))
    assert got.keys() == want.keys()
    for name, value in want.items():
        infinite = np.isinf(value)
        assert (np.isinf(got[name]) == infinite).all(), name
        size = np.abs(np.where(infinite, 0, value)).max(initial=1)
        np.testing.assert_allclose(got[name], value, rtol=0, atol=64 * 2**-52 * 10 * size, err_msg=name)


def heads_of(case: Case, ranks: Ranks) -> Case:
    """Return the case with heads that can be divided over the ranks."""
    factor = ranks.size if case.nheads % ranks.size or case.nheads_kv % ranks.size else 1
    return case._replace(nheads=case.nheads * factor, nheads_kv=case.nheads_kv * factor)


@pytest.mark.parametrize("schedule", ["ring", pytest.param("gather", marks=pytest.mark.full)])
@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_one_process(name: str, sharding: str, schedule: str, ranks: Ranks) -> None:
    assert_equal(OPTIONS[name]._replace(sharding=sharding, schedule=schedule), ranks)


@pytest.mark.parametrize("sharding", ["zigzag", pytest.param("striped", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("dropout, mask", "everything")])
def test_every_option_with_exchanged_heads_equals_one_process(name: str, sharding: str, ranks: Ranks) -> None:
    assert_equal(heads_of(OPTIONS[name]._replace(sharding=sharding, schedule="ulysses"), ranks), ranks)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in STRIPED] + ["causal"])
def test_striped_sharding_equals_one_process(name: str, ranks: Ranks) -> None:
    assert_equal(OPTIONS[name]._replace(sharding="striped"), ranks)


@pytest.mark.parametrize("schedule", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", VARLEN)
def test_packed_documents_equal_one_process(name: str, sharding: str, schedule: str, ranks: Ranks) -> None:
    case = VARLEN[name]._replace(sharding=sharding, schedule=schedule)
    assert_equal(heads_of(case, ranks) if schedule == "ulysses" else case, ranks)


@pytest.mark.parametrize("schedule", ["ring", "gather", "auto"])
def test_empty_and_uneven_shards_equal_one_process(schedule: str, ranks: Ranks) -> None:
    lengths = {2: (37, 0), 3: (30, 0, 7), 4: (1, 0, 36, 0)}[ranks.size]
    assert_equal(Case(CAUSAL, ("sink",), lengths=lengths, schedule=schedule), ranks)


@pytest.mark.parametrize("schedule", ["ring", "gather", "ulysses"])
def test_buffers_of_an_earlier_call_change_nothing(schedule: str, ranks: Ranks) -> None:
    case = Case(CAUSAL, nheads=12, nheads_kv=12, schedule=schedule)
    for part in ranks.run("part", case._replace(arrays=("nan",))):
        assert np.isnan(part["out"]).any()
    assert_equal(case, ranks)


def test_fewer_heads_than_ranks_use_the_ring(ranks: Ranks) -> None:
    """ "auto" takes the ring, and "ulysses" is refused on every rank."""
    assert_equal(Case(CAUSAL, nheads=1, nheads_kv=1, schedule="auto"), ranks)
    for error in ranks.run("part", Case(CAUSAL, nheads=1, nheads_kv=1, schedule="ulysses")):
        assert isinstance(error, ValueError) and "nheads must be a multiple" in str(error)


def test_empty_batches_and_sequences_equal_one_process(ranks: Ranks) -> None:
    assert_equal(Case(CAUSAL, batch=0), ranks)
    assert_equal(Case(CAUSAL, queries=0, keys=0), ranks)


DROPPED = {
    "contiguous ring": Case(DROPOUT),
    "zigzag ring": Case(CAUSAL | DROPOUT, sharding="zigzag"),
    "gathered keys": Case(CAUSAL | DROPOUT, sharding="zigzag", schedule="gather"),
    "exchanged heads": Case(DROPOUT, nheads=12, nheads_kv=12, schedule="ulysses"),
    "striped rows, exchanged heads": Case(DROPOUT, nheads=12, nheads_kv=12, sharding="striped", schedule="ulysses"),
    "packed ring": Case(DROPOUT, cu_seqlens=PACKED, sharding="zigzag"),
    "packed, exchanged heads": Case(DROPOUT, cu_seqlens=PACKED, nheads=12, nheads_kv=12, schedule="ulysses"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_entries_are_those_of_one_process(name: str, ranks: Ranks) -> None:
    case = DROPPED[name]
    want, axis = all_kept_entries(case), 0 if case.cu_seqlens else 1
    parts = [torch.from_numpy(one) for one in ranks.results("kept_entries", case)]
    got = sharding_of(case, case.queries, ranks.size).unshard(parts, axis).numpy()
    assert want.any() and not want.all()
    assert np.array_equal(got, want)


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag", "striped"])
def test_results_are_identical_from_run_to_run(sharding: str, ranks: Ranks) -> None:
    case = Case(CAUSAL, ("sink", "bias"), sharding=sharding, dtype="float32")
    first, second = (ranks.results("part", case) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_error_is_at_most_twice_that_of_one_process(dtype: str, schedule: str, ranks: Ranks) -> None:
    """Partial results are float32, so the error is at most twice the error of one process, plus a rounding."""
    case = heads_of(Case(CAUSAL, dtype=dtype, sharding="zigzag", schedule=schedule), ranks)
    exact = whole_of_rounded(case)
    want, got = whole(case), joined(case, ranks.results("part", case))
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for name, value in exact.items():
        limit = 2 * np.abs(want[name] - value).max() + 4 * eps * np.abs(value).max()
        assert np.abs(got[name] - value).max() <= limit, name


def whole_of_rounded(case: Case) -> dict[str, np.ndarray]:
    """Return the results in float64 of the inputs of a case, rounded to its dtype."""
    from harness import distributed_jobs

    given = {name: x.double() for name, x in distributed_jobs.arrays(case).items()}

    def call(q: Any, k: Any, v: Any, **flags: Any) -> Any:
        import anyattn

        return anyattn.attention(q, k, v, **flags)

    return distributed_jobs.differentiate(case, given, call)
