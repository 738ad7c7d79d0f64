"""flash_attn_with_kvcache of flash_attn 2 and 3: appended values, bit by bit, and the attention after them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn.compat import flash_attn, flash_attn_3
from harness.plain_torch import plain_attention
from harness.tensors import TOLERANCE, ints, normal

BATCH, SLOTS, NHEADS, NHEADS_KV, HEAD_DIM, HEAD_DIM_V = 3, 12, 4, 2, 8, 6
LENGTHS = (5, 0, 8)
FUNCTIONS = {"2": flash_attn.flash_attn_with_kvcache, "3": flash_attn_3.flash_attn_with_kvcache}
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Setup:
    """One call: storage of the keys, numbers of rows and new keys, and rotation."""

    place: str = "dense"  # or "entries", "paged", "leftpad"
    rows: int = 3
    new: int = 3  # 0: nothing is appended
    rotary: str = ""  # or "interleaved", "halves"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    options: dict[str, Any] = field(default_factory=dict)
    meaning: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        lead = {"entries": (5, SLOTS), "paged": (14, 3)}.get(self.place, (BATCH, SLOTS))
        shapes = {"q": (BATCH, self.rows, NHEADS, HEAD_DIM), "k_cache": (*lead, NHEADS_KV, HEAD_DIM)}
        shapes["v_cache"] = (*lead, NHEADS_KV, HEAD_DIM_V)
        if self.new:
            shapes |= {"k": (BATCH, self.new, NHEADS_KV, HEAD_DIM), "v": (BATCH, self.new, NHEADS_KV, HEAD_DIM_V)}
        given = {name: normal(*shape, seed=seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
        given["cache_seqlens"] = ints(*LENGTHS)
        if self.rotary:
            angles = normal(SLOTS, 3, seed=9)  # 6 of 8 values
            given |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
            given["rotary_interleaved"] = self.rotary == "interleaved"
        return given

    def call(self, version: str, given: dict[str, Any], **options: Any) -> Any:
        places: dict[str, dict[str, Any]] = {
            "entries": {"cache_batch_idx": ints(4, 0, 2)},
            "leftpad": {"cache_leftpad": ints(2, 0, 5)},
            "paged": {"block_table" if version == "2" else "page_table": PAGES},
        }
        mask = {"causal": self.causal, "window_size": self.window}
        return FUNCTIONS[version](**given, **places.get(self.place, {}), **mask, **{**self.options, **options})


PAGES = torch.tensor([[7, 1, 12, 3], [9, 5, 0, 13], [2, 6, 11, 4]], dtype=torch.int32)


def slots(setup: Setup, cache: Tensor, b: int, length: int) -> Tensor:
    """The first slots of a sequence's cache, as a copy."""
    if setup.place == "paged":
        return cache[PAGES[b].long()].flatten(0, 1)[:length]
    return cache[(4, 0, 2)[b] if setup.place == "entries" else b, :length].clone()


def rotate(x: Tensor, positions: Tensor, given: dict[str, Any]) -> Tensor:
    """Pairs turned as complex numbers. x (rows, nheads, head_dim)."""
    if "rotary_cos" not in given:
        return x
    turn = torch.complex(given["rotary_cos"][positions], given["rotary_sin"][positions])[:, None]
    if given["rotary_interleaved"]:
        pairs = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2)).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), x[..., 6:]), -1)
    turned = torch.complex(x[..., :3], x[..., 3:6]) * turn
    return torch.cat((turned.real, turned.imag, x[..., 6:]), -1)


Expected = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def expected(setup: Setup, given: dict[str, Any], first: tuple[int, ...] = LENGTHS) -> Expected:
    """(out, lse, the keys and values of each sequence) by the definition; `first`: rotary positions."""
    outs, lines, caches = [], [], []
    for b, length in enumerate(LENGTHS):
        k, v = (slots(setup, given[name], b, length) for name in ("k_cache", "v_cache"))
        q = given["q"][b]
        if setup.new:
            k = torch.cat((k, rotate(given["k"][b], first[b] + torch.arange(setup.new), given)))
            v = torch.cat((v, given["v"][b]))
            by_row = torch.arange(setup.rows) * (setup.causal or setup.window != (-1, -1))
            q = rotate(q, first[b] + by_row, given)
        caches.append((k, v))
        skip = (2, 0, 5)[b] if setup.place == "leftpad" else 0
        window = tuple(None if side < 0 else side for side in setup.window)
        out, lse = plain_attention(
            q[None], k[None, skip:], v[None, skip:], causal=setup.causal, window=window, **setup.meaning
        )
        outs.append(out[0])
        lines.append(lse[0])
    return torch.stack(outs), torch.stack(lines), caches


SLOPES = normal(NHEADS, seed=7).abs()
SETUPS = {
    "plain": Setup(),
    "one-row": Setup(rows=1, new=1),
    "not-causal": Setup(causal=False),
    "window": Setup(causal=False, window=(2, 1)),
    "causal-window": Setup(window=(2, 0), rotary="halves"),
    "more-rows-than-keys": Setup(rows=5, new=2),
    "read-only": Setup(new=0, rows=2),
    "entries": Setup(place="entries", rotary="interleaved"),
    "leftpad": Setup(place="leftpad"),
    "paged": Setup(place="paged", rotary="halves"),
    "paged-read-only": Setup(place="paged", new=0, rows=1),
    "interleaved": Setup(rotary="interleaved"),
    "halves": Setup(rotary="halves"),
    "rotary-at-one-position": Setup(rotary="interleaved", causal=False),
    "rotary-window": Setup(rotary="halves", causal=False, window=(3, 1)),
    "scale": Setup(options={"softmax_scale": -0.3}, meaning={"scale": -0.3}),
    "softcap": Setup(options={"softcap": 1.5}, meaning={"softcap": 1.5}, place="paged"),
    "splits": Setup(options={"num_splits": 4}, place="paged"),
}
ONLY_2 = {"alibi": Setup(options={"alibi_slopes": SLOPES}, meaning={"alibi_slopes": SLOPES}, rotary="halves")}
ONLY_3 = {
    "chunk": Setup(options={"attention_chunk": 4}, meaning={"chunk": 4}, place="entries"),
    "speed": Setup(options={"pack_gqa": True, "sm_margin": 4, "scheduler_metadata": ints(0, 0)}),
}
ALL = [
    pytest.param(version, setup, id=f"{version}-{name}")
    for version, more in (("2", ONLY_2), ("3", ONLY_3))
    for name, setup in (SETUPS | more).items()
]


def check(setup: Setup, given: dict[str, Any], want: Expected, out: Tensor, lse: Tensor, empty: float) -> None:
    torch.testing.assert_close(out, want[0], **TOLERANCE)
    torch.testing.assert_close(lse, torch.where(want[1] == -torch.inf, empty, want[1]), **TOLERANCE)
    for b, (k, v) in enumerate(want[2]):
        assert torch.equal(slots(setup, given["v_cache"], b, len(v)), v)
        written = slots(setup, given["k_cache"], b, len(k))
        torch.testing.assert_close(written, k, **TOLERANCE)
        if not setup.rotary:
            assert torch.equal(written, k)


@pytest.mark.parametrize("version, setup", ALL)
def test_append_and_attention_equal_the_plain_computation(version: str, setup: Setup) -> None:
    given = setup.tensors()
    want = expected(setup, given)
    out, lse, *rest = setup.call(version, given, return_softmax_lse=True)
    check(setup, given, want, out, lse, torch.inf if version == "2" else -torch.inf)
    assert [x.numel() for x in rest] == ([] if version == "2" else [0, 0])
    if setup.new:
        assert torch.equal(setup.call(version, setup.tensors()), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("version", FUNCTIONS)
def test_appended_values_are_bit_equal(version: str, dtype: torch.dtype) -> None:
    setup = Setup(place="paged")
    given = setup.tensors(dtype)
    setup.call(version, given)
    for b, length in enumerate(LENGTHS):
        for name in ("k", "v"):
            written = slots(setup, given[f"{name}_cache"], b, length + setup.new)[length:]
            assert torch.equal(written, given[name][b])


@pytest.mark.parametrize("version", FUNCTIONS)
def test_every_parameter_is_tested(version: str) -> None:
    """Check that a call of this file passes every parameter."""
    used = {"q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "rotary_cos", "rotary_sin", "rotary_interleaved"}
    used |= {"causal", "window_size", "cache_batch_idx", "cache_leftpad", "return_softmax_lse"}
    used |= {"block_table"} if version == "2" else {"page_table", *PACKED, *BEYOND, "qv", "max_seqlen_q"}
    for setup in (SETUPS | (ONLY_2 if version == "2" else ONLY_3)).values():
        used |= set(setup.options)
    assert used == set(inspect.signature(FUNCTIONS[version]).parameters)


@pytest.mark.parametrize("version", FUNCTIONS)
def test_lengths_may_be_an_int_or_none(version: str) -> None:
    setup = Setup()
    got, want = ({**setup.tensors(), "cache_seqlens": length} for length in (4, ints(4, 4, 4)))
    assert torch.equal(setup.call(version, got), setup.call(version, want))
    setup = replace(setup, new=0)
    got, want = ({**setup.tensors(), "cache_seqlens": length} for length in (None, SLOTS))
    assert torch.equal(setup.call(version, got), setup.call(version, want))


@pytest.mark.parametrize("version", FUNCTIONS)
def test_caches_may_be_views_of_one_buffer(version: str) -> None:
    setup, given = Setup(), Setup().tensors()
    want = setup.call(version, given)
    buffer = torch.full((BATCH, SLOTS, 2, NHEADS_KV, HEAD_DIM), torch.nan, dtype=torch.float64)
    k_cache, v_cache = buffer[:, :, 0], buffer[:, :, 1, :, :HEAD_DIM_V]
    again = setup.tensors()
    k_cache.copy_(again["k_cache"])
    v_cache.copy_(again["v_cache"])
    assert torch.equal(setup.call(version, {**again, "k_cache": k_cache, "v_cache": v_cache}), want)
    assert torch.equal(k_cache, given["k_cache"])
    assert torch.equal(v_cache, given["v_cache"])


@pytest.mark.parametrize("kind", ["entries", "paged"])
def test_compiled_results_equal_eager_results(kind: str) -> None:
    """A layer's cache is a view, made inside the graph, of one buffer; lengths change between calls."""
    torch._dynamo.reset()
    setup = SETUPS[kind]
    eager, compiled = (
        {f"{name}_cache": torch.stack([setup.tensors()[f"{name}_cache"]] * 2) for name in "kv"} for _ in range(2)
    )

    tensors = setup.tensors()

    def layer(caches: dict[str, Tensor], n: int, lengths: Tensor) -> Tensor:
        given = {**tensors, "cache_seqlens": lengths, **{name: x[n] for name, x in caches.items()}}
        place = {"block_table": pages} if kind == "paged" else {"cache_batch_idx": entries}
        return flash_attn.flash_attn_with_kvcache(**given, **place, causal=True)

    pages, entries = PAGES, ints(4, 0, 2)
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (ints(5, 0, 8), ints(8, 3, 9)):
        torch.testing.assert_close(call(compiled, 1, lengths), layer(eager, 1, lengths), **TOLERANCE)
    for name, cache in eager.items():
        torch.testing.assert_close(compiled[name], cache, **TOLERANCE)


def test_results_do_not_require_gradients() -> None:
    given = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in Setup().tensors().items()}
    for version in FUNCTIONS:
        assert not Setup().call(version, given).requires_grad


OVERFLOW = {
    "append": (Setup(), ints(5, 0, SLOTS - 2)),
    "append-paged": (Setup(place="paged"), ints(5, 0, SLOTS - 2)),
    "read-paged": (Setup(place="paged", new=0), ints(5, 0, SLOTS + 1)),
}


@pytest.mark.parametrize("version", FUNCTIONS)
@pytest.mark.parametrize("kind", OVERFLOW)
def test_full_cache_raises_before_anything_is_written(kind: str, version: str) -> None:
    setup, lengths = OVERFLOW[kind]
    given = setup.tensors()
    message = "block_table" if setup.place == "paged" else "cache_seqlens"
    with pytest.raises(RuntimeError, match=message):
        setup.call(version, {**given, "cache_seqlens": lengths})
    with pytest.raises(ValueError, match=message):
        setup.call(version, {**given, "cache_seqlens": lengths})
    for name, x in setup.tensors().items():
        assert torch.equal(given[name], x)


ERRORS: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "strided-k": (AssertionError, "k_cache", lambda x: {"k_cache": x["k_cache"].mT.contiguous().mT}),
    "strided-v": (AssertionError, "v_cache", lambda x: {"v_cache": x["v_cache"].mT.contiguous().mT}),
    "no-lengths": (ValueError, "cache_seqlens", lambda x: {"cache_seqlens": None}),
    "no-v": (ValueError, "v", lambda x: {"v": None}),
    "one-table": (ValueError, "rotary_sin", lambda x: {"rotary_cos": normal(SLOTS, 3)}),
    "short-table": (ValueError, "rotary_cos", lambda x: dict.fromkeys(("rotary_cos", "rotary_sin"), normal(7, 3))),
    "rotary-alone": (ValueError, "rotary_cos", lambda x: {**x, "k": None, "v": None, **tables()}),
    "splits": (ValueError, "num_splits", lambda x: {"num_splits": 1000}),
    "entries": (ValueError, "cache_batch_idx", lambda x: {"cache_batch_idx": ints(0, 1, 3)}),
    "dtype": (TypeError, "dtype", lambda x: {"k": x["k"].float()}),
}


def tables() -> dict[str, Tensor]:
    return dict.fromkeys(("rotary_cos", "rotary_sin"), normal(SLOTS, 3))


@pytest.mark.parametrize("version", FUNCTIONS)
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_refused_and_write_nothing(name: str, version: str) -> None:
    kind, message, change = ERRORS[name]
    given = Setup().tensors()
    with pytest.raises(kind, match=message):
        Setup().call(version, {**given, **change(given)})
    for key, x in Setup().tensors().items():
        assert torch.equal(given[key], x)


# What only flash_attn 3 has. Packed queries and new keys: rows of the dense ones, of several lengths.
PACKED = {"cu_seqlens_q": ints(0, 3, 4, 6), "cu_seqlens_k_new": ints(0, 2, 5, 6)}
BEYOND = {
    "rotary_seqlens": ints(1, 4, 2),
    "q_descale": normal(BATCH, NHEADS_KV, seed=11).abs(),
    "k_descale": normal(BATCH, NHEADS_KV, seed=12).abs(),
    "v_descale": normal(BATCH, NHEADS_KV, seed=13).abs(),
}


@pytest.mark.parametrize("place", ["dense", "entries", "paged"])
@pytest.mark.parametrize("rotary", ["", "interleaved", "halves"])
def test_packed_queries_and_new_keys_equal_separate_calls(place: str, rotary: str) -> None:
    """Each sequence as a call of its own with that many rows and keys."""
    whole = Setup(place=place, rotary=rotary, rows=6, new=6)
    tables = PACKED["cu_seqlens_q"].tolist(), PACKED["cu_seqlens_k_new"].tolist()
    for packed_q, packed_k in ((True, True), (True, False), (False, True)):
        setup = replace(whole, rows=6 if packed_q else 3, new=6 if packed_k else 2)
        given, want = setup.tensors(), []
        if packed_q:
            given["q"] = given["q"][0]
        if packed_k:
            given |= {"k": given["k"][0], "v": given["v"][0]}
        caches = {name: given[name].clone() for name in ("k_cache", "v_cache")}
        for b in range(BATCH):
            rows = slice(*tables[0][b : b + 2]) if packed_q else b
            keys = slice(*tables[1][b : b + 2]) if packed_k else b
            one = {**given, **caches, "cache_seqlens": given["cache_seqlens"][b : b + 1]}
            one |= {"q": given["q"][rows].reshape(1, -1, NHEADS, HEAD_DIM)}
            one |= {name: given[name][keys].unsqueeze(0) for name in "kv"}
            where = (
                {"page_table": PAGES[b : b + 1]}
                if place == "paged"
                else {"cache_batch_idx": ints((4, 0, 2)[b] if place == "entries" else b)}
            )
            want.append(flash_attn_3.flash_attn_with_kvcache(**one, **where, causal=True)[0])
        packing = {name: PACKED[name] for name, on in zip(PACKED, (packed_q, packed_k), strict=True) if on}
        out = setup.call("3", given, **packing, **({"max_seqlen_q": 3} if packed_q else {}))
        torch.testing.assert_close(out, torch.cat(want) if packed_q else torch.stack(want), **TOLERANCE)
        for name, cache in caches.items():
            torch.testing.assert_close(given[name], cache, **TOLERANCE)


@pytest.mark.parametrize("name", ["rotary_seqlens", "q_descale", "k_descale", "v_descale", "qv", "attention_chunk"])
@pytest.mark.parametrize("place", ["dense", "paged"])
def test_arguments_of_flash_attn_3_are_applied(place: str, name: str) -> None:
    setup = Setup(place=place, rotary="halves")
    given, clean = setup.tensors(), setup.tensors()
    first = LENGTHS
    if name == "rotary_seqlens":
        first, options = (1, 4, 2), {name: BEYOND[name]}
    elif name == "qv":
        options = {name: normal(BATCH, setup.rows, NHEADS, HEAD_DIM_V, seed=5)}
    elif name == "attention_chunk":
        options, setup = (
            {},
            replace(setup, causal=False, options={name: 4}, meaning={"chunk": 4}, window=(SLOTS - 2, -1)),
        )
    else:
        options = {name: BEYOND[name]}
    want = expected(setup, clean, first)
    outs = []
    for b, (k, v) in enumerate(want[2]):
        x = {"q": rotate(clean["q"][b], first[b] + torch.arange(setup.rows), clean), "k": k, "v": v}
        if name == "qv":
            x |= {"q": torch.cat((x["q"], options[name][b]), -1), "k": torch.cat((k, v), -1)}
        elif "descale" in name:
            factor = options[name][b]
            x[name[0]] = x[name[0]] * (factor.repeat_interleave(2) if name == "q_descale" else factor)[:, None]
        tensors = [array[None] for array in x.values()]
        outs.append(plain_attention(*tensors, causal=setup.causal, **setup.meaning)[0][0])
    if name == "attention_chunk":  # unbounded window: only the chunk makes queries turn row by row
        setup = replace(setup, window=(-1, -1))
    torch.testing.assert_close(setup.call("3", given, **options), torch.stack(outs), **TOLERANCE)
    for b, (k, v) in enumerate(want[2]):
        torch.testing.assert_close(slots(setup, given["k_cache"], b, len(k)), k, **TOLERANCE)
        assert torch.equal(slots(setup, given["v_cache"], b, len(v)), v)


@pytest.mark.parametrize("version", ["2", "3"])
def test_windows_as_wide_as_the_cache_rotate_queries_at_one_position(version: str) -> None:
    setup = Setup(rotary="halves", causal=False)
    want = setup.call(version, setup.tensors())
    wide = replace(setup, window=(SLOTS, SLOTS))
    assert torch.equal(wide.call(version, wide.tensors()), want)
    narrow = replace(setup, window=(SLOTS // 2, SLOTS // 2))
    assert not torch.allclose(narrow.call(version, narrow.tensors()), want)


@pytest.mark.parametrize("place", ["dense", "paged"])
def test_fp8_cache_is_appended_exactly_and_computed_in_float32(place: str) -> None:
    """Appended bit by bit; computed in float32 from the values, with scales; out is bfloat16."""
    setup = Setup(place=place)
    given = {name: x.to(FP8) if x.is_floating_point() else x for name, x in setup.tensors().items()}
    wide = {name: x.float() if x.dtype is FP8 else x for name, x in given.items()}
    factors = {name: x.float() for name, x in BEYOND.items() if "descale" in name}
    want = setup.call("3", wide, **factors)
    out = setup.call("3", given, **factors)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, want.bfloat16())
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].float(), wide[name])
    with pytest.raises(ValueError, match="rotary_cos"):
        setup.call("3", {**given, **tables()})


REFUSED_3: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary_seqlens": ("rotary_seqlens", {"rotary_seqlens": ints(0, 0, 0)}),
    "nothing-new": ("cu_seqlens_k_new", {"k": None, "v": None, **PACKED, "q": normal(6, NHEADS, HEAD_DIM)}),
    "qv-shape": ("qv", {"qv": normal(BATCH, 3, NHEADS, HEAD_DIM_V + 1)}),
    "qv-descale": ("qv", {"qv": normal(BATCH, 3, NHEADS, HEAD_DIM_V), "v_descale": BEYOND["v_descale"]}),
    "positions": ("rotary_cos", {**tables(), "rotary_seqlens": ints(0, SLOTS, 0)}),
    "batch": ("k must have q's batch", {"cu_seqlens_k_new": ints(0, 3), "k": normal(3, 2, 8), "v": normal(3, 2, 6)}),
}


@pytest.mark.parametrize("name", REFUSED_3)
def test_wrong_arguments_of_flash_attn_3_are_refused(name: str) -> None:
    message, options = REFUSED_3[name]
    given = Setup().tensors()
    with pytest.raises(ValueError, match=message):
        Setup().call("3", {**given, **options})
    with pytest.raises(TypeError, match="scheduler_metadata"):
        Setup().call("3", given, scheduler_metadata=normal(2))
