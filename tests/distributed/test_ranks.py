"""Groups, messages and errors of distributed attention."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from harness.distributed_jobs import Case, joined, whole
from harness.ranks import Ranks

SIZE = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(SIZE)
    yield found
    found.close()


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 4)])
def test_mesh_of_rings_and_heads_equals_one_process(mesh: tuple[int, int], ranks: Ranks) -> None:
    arguments = {"causal": True, "window": (20, None), "dropout_p": 0.2, "seed": 3}
    case = Case(
        arguments, ("sink", "alibi_slopes"), mesh=mesh, schedule="ulysses+ring", sharding="zigzag", queries=45, keys=45
    )
    want, got = whole(case), joined(case, ranks.results("part", case))
    for name, value in want.items():
        assert abs(got[name] - value).max() < 1e-12, name


def causal_rows(length: int) -> list[int]:
    """Return the keys that each of SIZE zigzag ranks sends, if every rank has two parts of `length` keys.

    Rank r has the parts r and 2 P - 1 - r. Another rank s attends to part r if r < 2 P - 1 - s or s > r, which always
    holds, and to part 2 P - 1 - r only if 2 P - 1 - r <= 2 P - 1 - s, so if s < r.
    """
    return [length * ((SIZE - 1) + rank) for rank in range(SIZE)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ring_sends_the_bytes_of_the_formula(dtype: str, ranks: Ranks) -> None:
    size, wide = {"float32": (4, 4), "bfloat16": (2, 4)}[dtype]
    row = 2 * 4 * (8 + 6)  # batch, KV heads, head_dim + head_dim_v
    case = Case(dtype=dtype, queries=64, keys=64)
    for forward, backward in ranks.results("count_bytes", case):
        assert forward == (SIZE - 1) * 16 * row * size
        assert backward == (SIZE - 1) * 16 * row * (size + wide)
    causal = case._replace(arguments={"causal": True}, sharding="zigzag")
    found = ranks.results("count_bytes", causal)
    assert [forward for forward, _ in found] == [keys * row * size for keys in causal_rows(8)]
    assert sum(backward for _, backward in found) == sum(causal_rows(8)) * row * (size + wide)


def test_window_sends_only_its_keys(ranks: Ranks) -> None:
    row = 2 * 4 * (8 + 6) * 8
    case = Case({"causal": True, "window": (5, None)}, queries=64, keys=64)
    assert [forward for forward, _ in ranks.results("count_bytes", case)] == [5 * row] * (SIZE - 1) + [0]


def test_ulysses_sends_the_bytes_of_the_formula(ranks: Ranks) -> None:
    case = Case(queries=64, keys=64, schedule="ulysses")
    elements = 2 * 64 * 4 * (2 * 8 + 2 * 6)  # q, k, v and out of the whole sequence
    want = elements * (SIZE - 1) // SIZE**2 * 8
    for forward, backward in ranks.results("count_bytes", case):
        assert forward == backward == want


DIFFERENT = {
    "causal": {1: {"causal": True}},
    "scale": {2: {"scale": 0.5}},
    "schedule": {3: {"schedule": "gather"}},
    "right": {0: {"window": (3, 2)}},
    "return_lse": {1: {"return_lse": True}},
    "dropout_p": {1: {"dropout_p": 0.25}},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_arguments_that_differ_raise_on_every_rank(name: str, ranks: Ranks) -> None:
    for error in ranks.run("call_with", DIFFERENT[name]):
        assert isinstance(error, ValueError) and "must be equal on all ranks" in str(error), error


def test_shapes_that_differ_raise_on_every_rank(ranks: Ranks) -> None:
    for error in ranks.run("call_with", {}, {1: (1, 4, 2, 16)}):
        assert isinstance(error, ValueError) and str(error).startswith("k must be equal on all ranks")


def test_error_of_one_rank_raises_on_every_rank(ranks: Ranks) -> None:
    for error in ranks.run("call_with", {2: {"window": (-1, 0)}}):
        assert isinstance(error, ValueError) and "window must hold integers" in str(error)


def test_sharding_of_other_rows_raises_on_every_rank(ranks: Ranks) -> None:
    everywhere = {rank: {"sharding": "zigzag"} for rank in range(SIZE)}
    for error in ranks.run("call_with", everywhere, {1: (1, 5, 2, 8)}):
        assert isinstance(error, ValueError) and "sharding must match the ranks' rows [4, 5, 4, 4]" in str(error)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_invariant": True}, "batch_invariant must be False"),
        ({"sharding": "spiral"}, "sharding must be a Sharding or one of"),
        ({"schedule": "spiral"}, "schedule must be one of"),
        ({"query_start": 1}, "unexpected keyword argument 'query_start'"),
        ({"cu_seqlens_q": [0, 4]}, "Use attention_varlen"),
        ({"sharding": "striped", "chunk": 4, "schedule": "ring"}, "sharding must not be striped together with chunk"),
    ],
)
def test_unsupported_arguments_raise(arguments: dict[str, object], text: str, ranks: Ranks) -> None:
    for error in ranks.run("call_with", dict.fromkeys(range(SIZE), arguments)):
        assert isinstance(error, (ValueError, TypeError, NotImplementedError)) and text in str(error), error


def test_second_derivatives_are_refused(ranks: Ranks) -> None:
    for error in ranks.run("gradient_of_gradient"):
        assert isinstance(error, NotImplementedError) and "create_graph must be False" in str(error), error


def test_unmodified_model_trains_over_the_ranks(ranks: Ranks) -> None:
    for out, gradients in ranks.results("train_model"):
        assert out < 1e-12 and gradients < 1e-12


def test_dropout_without_seed_uses_the_state_of_rank_0(ranks: Ranks) -> None:
    assert all(ranks.results("seedless_dropout"))


def test_lost_peer_raises_within_the_timeout() -> None:
    small = Ranks(2, timeout=5.0)
    try:
        start = time.monotonic()
        error, _ = small.run("wait_for_lost_peer")
        assert isinstance(error, RuntimeError) and time.monotonic() - start < 30
    finally:
        small.close()
