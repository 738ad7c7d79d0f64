"""Every parameter of every function of flash_attn 2, 3 and 4: it does what the formulas say, or raises, or is one of
those that only steer speed. In float64, against autograd through every score in memory; forward and backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn.compat.flash_attn import flash_attn_interface as two
from anyattn.compat.flash_attn_3 import flash_attn_interface as three
from anyattn.compat.flash_attn_4 import interface as four
from anyattn.definition.options import Options
from anyattn.frameworks.torch import functional
from harness.plain_torch import plain_attention
from harness.tensors import TOLERANCE, ints, leaf, normal

STATE = torch.tensor([1234, 0])  # what plain_attention() takes as seed 1234
BATCH, ROWS, KEYS, NHEADS, NHEADS_KV, HEAD_DIM = 2, 5, 7, 4, 2, 8


Dense = tuple[Tensor, Tensor, Tensor]


@dataclass
class Call:
    """A function, its tensors, its other required arguments, and its tensors as dense q, k, v."""

    function: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    dense: Callable[..., Dense] = lambda *tensors: tensors
    fixed: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [leaf(*shape, seed=seed) for seed, shape in enumerate(self.shapes.values())]

    def out(self, tensors: list[Tensor], arguments: dict[str, Any]) -> Tensor:
        result = self.function(**{**dict(zip(self.shapes, tensors, strict=True)), **self.fixed, **arguments})
        return result if isinstance(result, Tensor) else result[0]

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)


Q, K = (BATCH, ROWS, NHEADS, HEAD_DIM), (BATCH, KEYS, NHEADS_KV, HEAD_DIM)
QKV = {"q": Q, "k": K, "v": K}
PACKED = {name: (x[0] * x[1], *x[2:]) for name, x in QKV.items()}
CU_Q, CU_K = ints(0, ROWS, 2 * ROWS), ints(0, KEYS, 2 * KEYS)
VARLEN = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": ROWS, "max_seqlen_k": KEYS}
PLAIN = {"dropout_p": 0.0, "softmax_scale": None, "causal": False}
WINDOW = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def split(x: Tensor) -> Tensor:
    """Packed sequences of equal lengths as a batch."""
    return x.unflatten(0, (BATCH, -1))


def unpacked(*tensors: Tensor) -> Dense:
    q, k, v = (split(x) for x in tensors)
    return q, k, v


CALLS = {
    "2-dense": Call(two.flash_attn_func, QKV),
    "2-kv": Call(
        two.flash_attn_kvpacked_func,
        {"q": Q, "kv": (BATCH, KEYS, 2, NHEADS_KV, HEAD_DIM)},
        lambda q, kv: (q, kv[:, :, 0], kv[:, :, 1]),
    ),
    "2-qkv": Call(
        two.flash_attn_qkvpacked_func, {"qkv": (BATCH, ROWS, 3, NHEADS, HEAD_DIM)}, lambda qkv: qkv.unbind(2)
    ),
    "2-varlen": Call(two.flash_attn_varlen_func, PACKED, unpacked, VARLEN),
    "2-varlen-kv": Call(
        two.flash_attn_varlen_kvpacked_func,
        {"q": PACKED["q"], "kv": (BATCH * KEYS, 2, NHEADS_KV, HEAD_DIM)},
        lambda q, kv: unpacked(q, kv[:, 0], kv[:, 1]),
        VARLEN,
    ),
    "2-varlen-qkv": Call(
        two.flash_attn_varlen_qkvpacked_func,
        {"qkv": (BATCH * ROWS, 3, NHEADS, HEAD_DIM)},
        lambda qkv: unpacked(*qkv.unbind(1)),
        {"cu_seqlens": CU_Q, "max_seqlen": ROWS},
    ),
    "2-forward": Call(two._flash_attn_forward, QKV, fixed={**PLAIN, **WINDOW, "return_softmax": False}),
    "2-varlen-forward": Call(two._flash_attn_varlen_forward, PACKED, unpacked, {**VARLEN, **PLAIN}),
    "3-dense": Call(three.flash_attn_func, QKV),
    "3-qkv": Call(
        three.flash_attn_qkvpacked_func,
        {"qkv": (BATCH, ROWS, NHEADS + 2 * NHEADS_KV, HEAD_DIM)},
        lambda qkv: qkv.split([NHEADS, NHEADS_KV, NHEADS_KV], 2),
        {"num_heads_q": NHEADS},
    ),
    "3-varlen": Call(three.flash_attn_varlen_func, PACKED, unpacked, VARLEN),
    "4-dense": Call(four.flash_attn_func, QKV),
    "4-varlen": Call(four.flash_attn_varlen_func, PACKED, unpacked, {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}),
    "4-forward": Call(four._flash_attn_fwd, QKV),
    "4-varlen-forward": Call(four._flash_attn_fwd, PACKED, unpacked, VARLEN),
}

# A value, and what it means in the formulas.
SLOPES, SINK = normal(NHEADS, seed=7).abs(), normal(NHEADS, seed=8)
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax_scale": (-0.4, {"scale": -0.4}),
    "causal": (True, {"causal": True}),
    "window_size": ((2, 1), {"window": (2, 1)}),
    "window_size_left": (2, {"window": (2, None)}),
    "window_size_right": (1, {"window": (None, 1)}),
    "softcap": (1.5, {"softcap": 1.5}),
    "alibi_slopes": (SLOPES, {"alibi_slopes": SLOPES}),
    "attention_chunk": (3, {"chunk": 3}),
    "learnable_sink": (SINK, {"sink": SINK}),
    "dropout_p": (0.3, {"dropout_p": 0.3, "seed": int(STATE[0])}),
}
# Change no result on a CPU, bit for bit.
SPEED: dict[str, list[Any]] = {
    "deterministic": [True],
    "num_splits": [0, 2],
    "pack_gqa": [True, False],
    "sm_margin": [8],
    "zero_tensors": [True],
    "min_seqlen_k": [2],
    "scheduler_metadata": [ints(0, 0)],
    "seqlen_k_per_split": [64],
    "disable_scheduler_metadata": [True],
    "tile_mn": [(64, 64)],
    "mma_pv_is_rs": [True],
    "intra_wg_overlap": [True],
    "num_threads": [128],
    "_arch": [90],
}
REFUSED = {
    "score_mod",
    "score_mod_bwd",
    "mask_mod",
    "aux_tensors",
    "aux_scalars",
}
# Each has a separate test, below or with the other results of its function.
ELSEWHERE = {
    *("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens", "max_seqlen_q", "max_seqlen_k", "max_seqlen"),
    *("seqused_q", "seqused_k", "leftpad_k", "block_table", "page_table"),
    *("gather_kv_indices", "qv", "q_descale", "k_descale", "v_descale", "num_heads_q"),
    *("return_attn_probs", "return_softmax", "return_lse", "out", "lse"),
    *("block_sparse_tensors", "block_sparse_tensors_bwd", "gather_bwd_recompute_p", "gather_bwd_token_chunk"),
}


def pairs(names: Any) -> list[Any]:
    return [
        pytest.param(kind, name, id=f"{kind}-{name}")
        for kind, x in CALLS.items()
        for name in x.parameters
        if name in names
    ]


@pytest.fixture(autouse=True)
def _fixed_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda *_, **__: STATE.clone())


@pytest.mark.parametrize("kind", CALLS)
def test_every_parameter_is_tested(kind: str) -> None:
    call = CALLS[kind]
    assert set(call.parameters) <= {*call.shapes, *CHANGES, *SPEED, *REFUSED, *ELSEWHERE}


def check(call: Call, arguments: dict[str, Any], want: Callable[..., Tensor]) -> None:
    """Compare out and the gradients of the call with want(q, k, v), in dense tensors."""
    tensors = call.tensors()
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    got, expected = call.out(tensors, arguments), want(*call.dense(*leaves))
    expected = expected.reshape(got.shape)
    torch.testing.assert_close(got.detach(), expected.detach(), **TOLERANCE)
    if "forward" not in call.function.__name__ and "fwd" not in call.function.__name__:
        dout = normal(*got.shape, seed=9)
        grads = torch.autograd.grad(got, tensors, dout), torch.autograd.grad(expected, leaves, dout)
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    else:
        assert not got.requires_grad


@pytest.mark.parametrize("kind", CALLS)
def test_defaults_give_plain_attention(kind: str) -> None:
    check(CALLS[kind], {}, lambda q, k, v: plain_attention(q, k, v)[0])


@pytest.mark.parametrize("kind, name", pairs(CHANGES))
def test_parameter_changes_the_result_as_its_formula_states(kind: str, name: str) -> None:
    call, (value, meaning) = CALLS[kind], CHANGES[name]
    check(call, {name: value}, lambda q, k, v: plain_attention(q, k, v, **meaning)[0])
    tensors = call.tensors()
    assert not torch.allclose(call.out(tensors, {name: value}), call.out(tensors, {}))


@pytest.mark.parametrize("kind, name", pairs(SPEED))
def test_parameter_changes_only_the_speed(kind: str, name: str) -> None:
    call = CALLS[kind]
    want = call.out(call.tensors(), {})
    for value in SPEED[name]:
        assert torch.equal(call.out(call.tensors(), {name: value}), want)


@pytest.mark.parametrize("kind, name", pairs({"deterministic"}))
def test_deterministic_is_passed_to_the_backend(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], functional.attention

    def attention(arrays: Any, options: Options, *rest: Any, **named: Any) -> Any:
        asked.append(options.deterministic)
        return original(arrays, options, *rest, **named)

    monkeypatch.setattr(functional, "attention", attention)
    for value in (False, True):
        CALLS[kind].out(CALLS[kind].tensors(), {name: value})
    assert asked == [False, True]


@pytest.mark.parametrize("kind, name", pairs(REFUSED))
def test_unsupported_parameter_is_refused_with_a_reason(kind: str, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported: ."):
        CALLS[kind].out(CALLS[kind].tensors(), {name: object()})


@pytest.mark.parametrize("kind, name", pairs({"learnable_sink"}))
def test_the_sink_has_a_gradient(kind: str, name: str) -> None:
    if "forward" in kind:
        assert not CALLS[kind].out(CALLS[kind].tensors(), {name: SINK.clone().requires_grad_()}).requires_grad
        return
    call, sinks = CALLS[kind], [SINK.clone().requires_grad_() for _ in range(2)]
    got = call.out(call.tensors(), {name: sinks[0]})
    want = plain_attention(*call.dense(*call.tensors()), sink=sinks[1])[0].reshape(got.shape)
    one, other = (torch.autograd.grad(x.square().sum(), sink)[0] for x, sink in zip((got, want), sinks, strict=True))
    torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("kind, name", pairs({"qv"}))
def test_qv_is_a_second_product(kind: str, name: str) -> None:
    call = CALLS[kind]
    qv, other = (leaf(*call.shapes["q"], seed=5) for _ in range(2))

    def want(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(torch.cat((q, other.view_as(q)), -1), torch.cat((k, v), -1), v)[0]

    check(call, {name: qv}, want)
    if "forward" not in kind:
        out = call.out(call.tensors(), {name: qv})
        expected = want(*call.dense(*call.tensors())).reshape(out.shape)
        one, other = torch.autograd.grad(out.sum(), qv)[0], torch.autograd.grad(expected.sum(), other)[0]
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("kind, name", pairs({"q_descale", "k_descale", "v_descale"}))
def test_descales_multiply_their_tensor(kind: str, name: str) -> None:
    factor = normal(BATCH, NHEADS_KV, seed=6).abs()

    def want(*tensors: Tensor) -> Tensor:
        scaled = dict(zip("qkv", tensors, strict=True))
        x = scaled[name[0]]
        scaled[name[0]] = x * factor.repeat_interleave(x.shape[2] // NHEADS_KV, 1)[:, None, :, None]
        return plain_attention(*scaled.values())[0]

    check(CALLS[kind], {name: factor}, want)
    with pytest.raises(ValueError, match=name):
        CALLS[kind].out(CALLS[kind].tensors(), {name: factor[:1]})


def by_sequence(
    cu_q: list[int],
    cu_k: list[int],
    used_q: list[int] | None = None,
    used_k: list[int] | None = None,
    first: Any = (0, 0),
) -> Callable[..., Tensor]:
    """out of packed tensors, one sequence after the other; rows that are not in use are 0."""

    def want(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        ends_q, ends_k = (
            cu[1:] if used is None else [start + n for start, n in zip(cu, used, strict=False)]
            for cu, used in ((cu_q, used_q), (cu_k, used_k))
        )
        rows = [slice(*pair) for pair in zip(cu_q, ends_q, strict=False)]
        keys = [slice(start + skip, end) for start, end, skip in zip(cu_k, ends_k, first, strict=False)]
        out = torch.zeros_like(q)
        for i, j in zip(rows, keys, strict=True):
            index = torch.arange(i.start, i.stop)
            out = out.index_add(0, index, plain_attention(q[None, i], k[None, j], v[None, j], causal=True)[0][0])
        return out

    return want


TABLES = {
    "cu_seqlens_q": (ints(0, 3, 8), by_sequence([0, 3, 8], [0, 7, 14])),
    "cu_seqlens_k": (ints(0, 8, 12), by_sequence([0, 5, 10], [0, 8, 12])),
    "cu_seqlens": (ints(0, 3, 8), by_sequence([0, 3, 8], [0, 3, 8])),
    "seqused_q": (ints(2, 5), by_sequence([0, 5, 10], [0, 7, 14], used_q=[2, 5])),
    "seqused_k": (ints(2, 7), by_sequence([0, 5, 10], [0, 7, 14], used_k=[2, 7])),
    "leftpad_k": (ints(3, 0), by_sequence([0, 5, 10], [0, 7, 14], first=(3, 0))),
}


@pytest.mark.parametrize("kind, name", [x for x in pairs(TABLES) if "varlen" in x.values[0]])
def test_tables_set_the_bounds_of_sequences(kind: str, name: str) -> None:
    value, want = TABLES[name]
    longest = {"max_seqlen_q", "max_seqlen_k", "max_seqlen"} & set(CALLS[kind].parameters)
    check(CALLS[kind], {name: value, "causal": True, **dict.fromkeys(longest, 8)}, want)


@pytest.mark.parametrize(
    "kind, name", [x for x in pairs({"max_seqlen_q", "max_seqlen_k", "max_seqlen"}) if "varlen" in x.values[0]]
)
def test_maximum_lengths_are_checked_and_may_be_tensors(kind: str, name: str) -> None:
    call = CALLS[kind]
    want = call.out(call.tensors(), {})
    for value in (torch.tensor(9), ints(7)):
        assert torch.equal(call.out(call.tensors(), {name: value}), want)
    with pytest.raises(ValueError, match=r"max_seqlen_[qk] must be at least \d+, the longest length in cu_seqlens"):
        call.out(call.tensors(), {name: 4})
    with pytest.raises(TypeError, match=name):
        call.out(call.tensors(), {name: 7.5})


@pytest.mark.parametrize("kind, name", [x for x in pairs({"block_table", "page_table"}) if "varlen" in x.values[0]])
def test_pages_may_be_in_any_order(kind: str, name: str) -> None:
    """The keys of each sequence in pages of 3, in any order, with NaN where no sequence looks."""
    call, pages = CALLS[kind], torch.tensor([[4, 1, 6], [0, 2, 5]], dtype=torch.int32)
    tensors = call.tensors()
    stored = []
    for x in tensors[1:]:
        page = torch.full((7, 3, NHEADS_KV, HEAD_DIM), torch.nan, dtype=torch.float64)
        for b in range(BATCH):
            for j in range(KEYS):
                page[pages[b, j // 3], j % 3] = split(x)[b, j].detach()
        stored.append(page)
    want = call.out(tensors, {"causal": True})
    assert torch.equal(call.out([tensors[0], *stored], {"causal": True, name: pages}), want)


def test_the_number_of_heads_splits_packed_projections() -> None:
    qkv = normal(BATCH, ROWS, 3, NHEADS, HEAD_DIM)
    want = plain_attention(*qkv.unbind(2))[0]
    torch.testing.assert_close(three.flash_attn_qkvpacked_func(qkv), want, **TOLERANCE)
    for bad in (qkv.flatten(2, 3), qkv[:, :, :2]):
        with pytest.raises(ValueError, match="qkv"):
            three.flash_attn_qkvpacked_func(bad)
    with pytest.raises(ValueError, match="num_heads_q"):
        three.flash_attn_qkvpacked_func(qkv.flatten(2, 3), num_heads_q=3)
