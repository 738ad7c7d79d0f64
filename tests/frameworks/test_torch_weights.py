"""attention_weights on torch tensors: gradients against plain torch, and under what traces or transforms a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import anyattn
from anyattn.frameworks import scores
from harness.plain_torch import plain_attention
from harness.tensors import close, leaf, normal, qkv

ROWS, KEYS, NHEADS = 5, 7, 4  # of harness.tensors.qkv
BATCH = 2

FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "causal": lambda: {"causal": True},
    "top_left": lambda: {"causal": True, "alignment": "top-left"},
    "queries_without_keys": lambda: {"window": (1, None), "offset": 6},
    "chunk": lambda: {"chunk": 3, "offset": -2},
    "scale": lambda: {"scale": -0.3},
    "softcap": lambda: {"softcap": 0.7, "causal": True},
    "bias": lambda: {"bias": leaf(BATCH, NHEADS, ROWS, KEYS, seed=5)},
    "bias_of_two_dimensions": lambda: {"bias": leaf(ROWS, KEYS, seed=5)},
    "bias_of_keys": lambda: {"bias": leaf(KEYS, seed=5), "softcap": 2.0},
    "mask": lambda: {"mask": normal(BATCH, 1, ROWS, KEYS, seed=6) > 0},
    "alibi": lambda: {"alibi_slopes": normal(BATCH, NHEADS, seed=7).abs()},
    "sink": lambda: {"sink": leaf(NHEADS, seed=8), "causal": True},
    "everything": lambda: {
        **{"causal": True, "window": (4, None), "softcap": 3.0, "scale": 0.5, "alibi_slopes": normal(NHEADS).abs()},
        **{"bias": leaf(1, NHEADS, ROWS, 1, seed=5), "mask": normal(BATCH, 1, 1, KEYS, seed=6) > -1},
        "sink": leaf(NHEADS, seed=8),
    },
}
QUERIES: dict[str, Any] = {"all": None, "slice": slice(1, -1), "list": [4, 0, 0], "tensor": torch.tensor([-1, 2])}


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Reset Dynamo before and after the test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def plain_weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Return the output of plain attention to the identity, which is its weights."""
    identity = torch.eye(k.shape[1], dtype=q.dtype)[:, None].expand(*k.shape[:3], -1)
    return plain_attention(q, k, identity, **options)[0].transpose(1, 2)


def with_output(q: Tensor, k: Tensor, v: Tensor, queries: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the output of attention, and its weights."""
    out, lse = anyattn.attention(q, k, v, **options, return_lse=True)
    return out, anyattn.attention_weights(q, k, lse, queries=queries, **options)


def total(*results: Tensor) -> Tensor:
    """Return a number whose gradients differ from entry to entry."""
    return sum((x * normal(*x.shape, seed=10 + n)).sum() for n, x in enumerate(results))  # type: ignore[return-value]


def leaves_of(given: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    return [x for x in (*given, *options.values()) if isinstance(x, Tensor) and x.requires_grad]


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_output_and_weights_add_up(feature: str, queries: str) -> None:
    """The part of a softmax's gradient that flows through lse adds to the gradients of the output."""
    options, chosen = FEATURES[feature](), QUERIES[queries]
    q, k, v = qkv(grad=True)
    leaves = leaves_of((q, k, v), options)
    out, got = with_output(q, k, v, chosen, **options)
    want = plain_weights(q, k, **options)
    want = want if chosen is None else want[:, :, chosen]
    close(got, want)
    plain = plain_attention(q, k, v, **options)[0]
    close(torch.autograd.grad(total(got, out), leaves), torch.autograd.grad(total(want, plain), leaves))


def test_gradcheck_passes() -> None:
    q, k, _ = qkv(rows=3, keys=4, grad=True)
    v, bias, sink = normal(2, 4, 2, 3), leaf(4, 1, 4, seed=5), leaf(4, seed=6)

    def call(q: Tensor, k: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        return with_output(q, k, v, [2, 0], bias=bias, sink=sink, causal=True, softcap=2.0)[1]

    assert torch.autograd.gradcheck(call, (q, k, bias, sink))


def test_gradcheck_in_lse_passes() -> None:
    """lse is an argument like the others: P = exp(s - lse)."""
    q, k, _ = qkv(rows=3, keys=4, grad=True)
    lse = leaf(2, 4, 3, seed=7)
    assert torch.autograd.gradcheck(lambda *arrays: anyattn.attention_weights(*arrays, causal=True), (q, k, lse))
    assert torch.autograd.gradgradcheck(lambda *arrays: anyattn.attention_weights(*arrays, causal=True), (q, k, lse))


def test_unused_memory_has_no_gradient() -> None:
    """NaN there reaches neither weights nor gradients."""
    used_q, used_k, leftpad = torch.tensor([5, 3]), torch.tensor([7, 4]), torch.tensor([2, 0])
    q, k, v = qkv()
    q[1, 3:], k[0, :2], k[1, 4:], v[0, :2], v[1, 4:] = (torch.nan,) * 5
    for x in (q, k, v):
        x.requires_grad_()
    options: dict[str, Any] = {"causal": True, "softcap": 2.0}
    tables = {"seqused_q": used_q, "seqused_k": used_k, "leftpad_k": leftpad}
    _, got = with_output(q, k, v, **options, **tables)
    gradients = torch.autograd.grad(total(got), (q, k))
    for b, (n_q, first, n_k) in enumerate(((5, 2, 7), (3, 0, 4))):
        part_q, part_k = q[b : b + 1, :n_q].detach(), k[b : b + 1, first:n_k].detach()
        part_q.requires_grad_(), part_k.requires_grad_()
        want = torch.zeros_like(got[b])
        want[:, :n_q, first:n_k] = plain_weights(part_q, part_k, **options)[0]
        close(got[b], want)
        weighted = (want * normal(*got.shape, seed=10)[b]).sum()
        dq, dk = torch.autograd.grad(weighted, (part_q, part_k))
        close(gradients[0][b, :n_q], dq[0])
        close(gradients[1][b, first:n_k], dk[0])
    assert not gradients[0][1, 3:].any() and not gradients[1][0, :2].any() and not gradients[1][1, 4:].any()


def test_lse_without_gradient_is_refused() -> None:
    """Gradients would lack their part through lse without a word."""
    q, k, v = qkv(grad=True)
    _, lse = anyattn.attention_forward(q, k, v)
    with pytest.raises(ValueError, match="lse must require a gradient because q does"):
        anyattn.attention_weights(q, k, lse)
    with pytest.raises(ValueError, match="lse must require a gradient because k does"):
        anyattn.attention_weights(q.detach(), k, lse)
    with pytest.raises(ValueError, match="lse must require a gradient because sink does"):
        anyattn.attention_weights(q.detach(), k.detach(), lse, sink=leaf(4))
    with torch.no_grad():
        close(anyattn.attention_weights(q, k, lse), plain_weights(q, k))
    close(anyattn.attention_weights(q.detach(), k.detach(), lse), plain_weights(q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_dtype_of_q(dtype: torch.dtype) -> None:
    """Rounded once, from float32; with gradients and without they are equal to rounding."""
    q, k, v = qkv(dtype=dtype)
    want = plain_weights(q.double(), k.double(), causal=True)
    with_grad = with_output(*(x.requires_grad_() for x in qkv(dtype=dtype)), causal=True)[1]
    for got in (with_output(q, k, v, causal=True)[1], with_grad):
        assert got.dtype is dtype
        close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_rounds_the_inputs_only() -> None:
    """Check that inputs are rounded as in attention, and that products are not."""
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = with_output(q, k, v, causal=True)
    low = [x.bfloat16() for x in (q, k, v)]
    want = with_output(*low, causal=True)[1]
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("feature", "queries"), [("dense", "list"), ("causal", "slice"), ("everything", "all"), ("everything", "tensor")]
)
def test_compiled_weights_equal_eager_weights(feature: str, queries: str, grad: bool) -> None:
    options, chosen = FEATURES[feature](), QUERIES[queries]
    if not grad:
        options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    compiled = torch.compile(with_output, fullgraph=True, backend="aot_eager")
    given = qkv(grad=grad)
    leaves = leaves_of(given, options)
    got, want = compiled(*given, chosen, **options), with_output(*given, chosen, **options)
    close(got, want)
    if grad:
        close(torch.autograd.grad(total(*got), leaves), torch.autograd.grad(total(*want), leaves))


@pytest.mark.usefixtures("dynamo")
def test_compile_makes_one_graph_for_all_lengths() -> None:
    compiled = torch.compile(
        lambda q, k, v: with_output(q, k, v, slice(-2, None), causal=True)[1], fullgraph=True, backend="aot_eager"
    )
    for rows in (5, 9, 12, 300):
        given = qkv(rows, rows + 2)
        close(compiled(*given), plain_weights(*given[:2], causal=True)[:, :, -2:])
    assert counters["stats"]["unique_graphs"] == 2, "one for the first length, and one for all others"


@pytest.mark.usefixtures("dynamo")
def test_compiled_code_checks_its_arguments() -> None:
    q, k, v = qkv()
    _, lse = anyattn.attention(q, k, v, return_lse=True)
    compiled = torch.compile(anyattn.attention_weights, backend="eager")
    with pytest.raises(ValueError, match="lse must have shape"):
        compiled(q, k, lse[:, :1])
    with pytest.raises(ValueError, match="bias must broadcast"):
        compiled(q, k, lse, bias=normal(ROWS, KEYS - 1))


def test_vmap_and_func_grad_equal_plain_torch() -> None:
    q, k, v = (torch.stack([x, 0.5 * x, 2 * x]) for x in qkv())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return with_output(q, k, v, [1, 3], causal=True)[1]

    close(torch.vmap(call)(q, k, v), torch.stack([call(*xs) for xs in zip(q, k, v, strict=True)]))
    got = torch.func.grad(lambda q: total(call(q, k[0], v[0])))(q[0])
    leaf_q = q[0].clone().requires_grad_()
    want = plain_weights(leaf_q, k[0], causal=True)[:, :, [1, 3]]
    close(got, torch.autograd.grad(total(want), leaf_q)[0])


def test_forward_mode_equals_plain_torch() -> None:
    """Compute with the tangents of q and of lse."""
    q, k, _ = qkv()
    tangent = normal(*q.shape, seed=9)
    lse = torch.func.jvp(lambda q: plain_attention(q, k, k)[1], (q,), (tangent,))
    got = torch.func.jvp(lambda q, lse: anyattn.attention_weights(q, k, lse), (q, lse[0]), (tangent, lse[1]))
    close(got, torch.func.jvp(lambda q: plain_weights(q, k), (q,), (tangent,)))


class Largest(TorchFunctionMode):
    """Records the largest number of bytes of a tensor that a function returns, but for the first of that many bytes."""

    def __init__(self, result: int) -> None:
        super().__init__()
        self.result, self.bytes, self.results = result, 0, set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            if storage.nbytes() >= self.result:
                self.results.add(storage.data_ptr())
            else:
                self.bytes = max(self.bytes, storage.nbytes())
        return found


@pytest.mark.parametrize("profiled", [False, True])
def test_memory_is_the_result_and_one_tile(profiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, n = 2**14, 512
    monkeypatch.setattr(scores, "TILE_ENTRIES", entries)
    q, k = (normal(1, n, 2, 16, dtype=torch.float32) for _ in range(2))
    _, lse = anyattn.attention(q, k, k, causal=True, return_lse=True)
    with (
        torch.profiler.profile(record_shapes=False) if profiled else torch.no_grad(),
        Largest(4 * 2 * n * n) as largest,
    ):
        anyattn.attention_weights(q, k, lse, causal=True)
    assert len(largest.results) == 1
    assert largest.bytes <= max(4 * entries, 4 * q.numel())


def test_meta_tensors_have_the_right_shape() -> None:
    q, k = torch.empty(2, 5, 4, 8, device="meta"), torch.empty(2, 7, 2, 8, device="meta")
    got = anyattn.attention_weights(q, k, torch.empty(2, 4, 5, device="meta"), queries=[0, 1, 2])
    assert got.shape == (2, 4, 3, 7) and got.is_meta
