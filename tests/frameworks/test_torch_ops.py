"""The torch operators under what watches or transforms a program: opcheck, compile, export, vmap, func, modes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import anyattn
from anyattn.definition.inputs import GRADIENTS
from anyattn.definition.options import Options
from anyattn.definition.passes import BACKWARD, FORWARD
from anyattn.frameworks.torch import autograd, fastpath, ops
from harness import tensors
from harness.tensors import ints

normal = partial(tensors.normal, dtype=torch.float32)
leaf = partial(tensors.leaf, dtype=torch.float32)
qkv = partial(tensors.qkv, dtype=torch.float32)
GRAPHS = "aot_eager"  # traces like Inductor, without its compiler
ATTENTION = "anyattn.forward.default"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def calls() -> dict[str, tuple[dict[str, Tensor], Options]]:
    """Arguments of the operators, one call for each kind of problem."""
    q, k, v = qkv()
    dense = {"q": q, "k": k, "v": v}
    packed = {"q": normal(8, 4, 8), "k": normal(12, 2, 8), "v": normal(12, 2, 6)}
    pages = {"q": q, "k": normal(6, 4, 2, 8), "v": normal(6, 4, 2, 6)}
    scores = {"bias": normal(1, 4, 1, 7), "mask": normal(2, 1, 5, 7) > -1, "alibi_slopes": normal(4).abs()}
    lengths = {"seqused_q": ints(5, 4), "seqused_k": ints(7, 6), "leftpad_k": ints(1, 0), "offset": ints(0, 2)}
    return {
        "dense": (dense, Options(right=0)),
        "scores": ({**dense, **scores, "sink": normal(4)}, Options(softcap=2.0, left=3, scale=0.3)),
        "lengths": ({**dense, **lengths}, Options(chunk=4, alignment="top-left")),
        "dropout": ({**dense, "rng_state": torch.tensor([3, 4])}, Options(dropout_p=0.2)),
        "packed": ({**packed, "cu_seqlens_q": ints(0, 3, 8), "cu_seqlens_k": ints(0, 5, 12)}, Options()),
        "kv_indices": ({**dense, "kv_indices": ints(0, 3, -1, 6, 6, 2).expand(2, 5, 6).contiguous()}, Options()),
        "paged": ({**pages, "block_table": ints(5, 0, 1, 2).view(2, 2), "seqused_k": ints(7, 3)}, Options()),
    }


@pytest.mark.parametrize("kind", calls())
def test_opcheck_passes(kind: str) -> None:
    given, options = calls()[kind]
    arrays = tuple(given.get(name) for name in FORWARD.inputs)
    torch.library.opcheck(torch.ops.anyattn.forward.default, (*arrays, *options, ""))
    out, lse = torch.ops.anyattn.forward(*arrays, *options)
    saved = {"out": out, "lse": lse, "dout": normal(*out.shape), "dlse": normal(*lse.shape)}
    arrays = tuple({**given, **saved}.get(name) for name in BACKWARD.inputs)
    for wanted in (True, False):
        backward = (*arrays, *options, "", *(wanted for _ in GRADIENTS))
        torch.library.opcheck(torch.ops.anyattn.backward.default, backward)


def test_schemas_declare_no_mutation() -> None:
    for op in (torch.ops.anyattn.forward, torch.ops.anyattn.backward, torch.ops.anyattn.cache_slots):
        assert not op.default._schema.is_mutable


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"causal": True},
    "return_lse": lambda: {"return_lse": True},
    "scores": lambda: {"bias": normal(4, 1, 1), "sink": leaf(4), "softcap": 3.0},
    "tables": lambda: {"offset": 1, "seqused_k": torch.tensor([4, 3]), "window": (3, 0)},
    "dropout": lambda: {"dropout_p": 0.25, "seed": 5},
}


def total(results: Any) -> Tensor:
    parts = results if isinstance(results, tuple) else (results,)
    return sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("feature", FEATURES)
def test_compile_makes_one_graph_for_all_lengths(feature: str) -> None:
    options = FEATURES[feature]()
    compiled = torch.compile(
        lambda q, k, v: anyattn.attention(q, k, v, **options), fullgraph=True, dynamic=True, backend=GRAPHS
    )
    for rows in (5, 9, 12):
        one, other = qkv(rows, rows + 2, grad=True), qkv(rows, rows + 2, grad=True)
        total(compiled(*one)).backward()
        total(anyattn.attention(*other, **options)).backward()
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_accepts_lists_of_any_length() -> None:
    compiled = torch.compile(
        lambda q, k, v, lists: anyattn.attention(q, k, v, kv_indices=lists),
        fullgraph=True, dynamic=True, backend=GRAPHS,
    )  # fmt: skip
    for rows, entries in ((5, 11), (9, 3), (12, 7)):
        lists = torch.randint(-1, rows, (2, rows, entries))
        one, other = qkv(rows, rows + 2, grad=True), qkv(rows, rows + 2, grad=True)
        total(compiled(*one, lists)).backward()
        total(anyattn.attention(*other, kv_indices=lists)).backward()
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_packed_sequences_compile() -> None:
    compiled = torch.compile(anyattn.attention_varlen, fullgraph=True, dynamic=True, backend=GRAPHS)
    for rows in (6, 10, 13):
        x = leaf(rows, 2, 8)
        cu = ints(0, rows // 3, rows)
        out = compiled(x, x, x, cu, cu, rows, rows, causal=True)
        torch.testing.assert_close(out, anyattn.attention_varlen(x, x, x, cu, cu, rows, rows, causal=True))
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_works_without_gradients() -> None:
    compiled = torch.compile(anyattn.attention, fullgraph=True, backend=GRAPHS)
    with torch.no_grad():
        assert torch.equal(compiled(*qkv()), anyattn.attention(*qkv()))
    assert torch.equal(compiled(*qkv()), anyattn.attention(*qkv()))


FIRST_CALL = """
import torch, anyattn
q = torch.randn(1, 4, 2, 8, requires_grad=True)
f = torch.compile(lambda q: anyattn.attention(q, q, q, causal=True), fullgraph=True, dynamic=True, backend="aot_eager")
f(q).sum().backward()
assert q.grad is not None and q.grad.isfinite().all()
torch._dynamo.config.error_on_recompile = True
with torch.no_grad():
    anyattn.attention(q, q, q)
    anyattn.attention(*[q.numpy()] * 3)
f(q)
"""


def test_compile_works_as_the_first_call_of_a_process() -> None:
    """And what eager calls import later makes nothing compile again."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_inductor_gives_the_gradients_of_eager_mode() -> None:
    compiled = torch.compile(lambda q, k, v: anyattn.attention(q.sin(), k, v, causal=True).cos(), fullgraph=True)
    one, other = qkv(grad=True), qkv(grad=True)
    compiled(*one).sum().backward()
    anyattn.attention(other[0].sin(), *other[1:], causal=True).cos().sum().backward()
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_transforms_inside_compile_keep_their_gradients() -> None:
    """Dynamo would drop the backward; so it gets a graph break there and, with fullgraph, an error."""
    q, k, v = qkv()
    gradient = torch.func.grad(lambda q: total(anyattn.attention(q, k, v)))
    torch.testing.assert_close(torch.compile(gradient, backend=GRAPHS)(q), gradient(q))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(gradient, backend=GRAPHS, fullgraph=True)(q)
    mapped = torch.vmap(lambda q: anyattn.attention(q, k, v))
    with torch.no_grad():
        many = normal(3, *q.shape)
        torch.testing.assert_close(torch.compile(mapped, backend=GRAPHS, fullgraph=True)(many), mapped(many))


def test_export_keeps_dynamic_lengths() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = anyattn.attention(q, k, v, causal=True)
            return out

    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"q": {1: rows}, "k": {1: rows}, "v": {1: rows}}
    program = torch.export.export(Module(), qkv(6, 6), dynamic_shapes=shapes)
    assert [node for node in program.graph.nodes if str(node.target) == ATTENTION]
    q, k, v = qkv(11, 11)
    torch.testing.assert_close(program.module()(q, k, v), anyattn.attention(q, k, v, causal=True))


def test_fake_and_meta_tensors_have_the_right_shapes_and_strides() -> None:
    want = [(x.shape, x.stride(), x.dtype) for x in anyattn.attention(*qkv(), return_lse=True)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in qkv()]
        assert [(x.shape, x.stride(), x.dtype) for x in anyattn.attention(*fake, return_lse=True)] == want
    q, k, v = (x.to("meta") for x in qkv())
    assert [(x.shape, x.stride(), x.dtype) for x in anyattn.attention(q, k, v, return_lse=True)] == want
    with pytest.raises(ValueError, match="head_dim"):
        anyattn.attention(q[..., 1:], k, v)


@torch.no_grad()  # torch without CUDA gives no gradient to a CUDA tensor
def test_fake_tensors_on_a_gpu_stay_on_their_device() -> None:
    """Forward, backward, export and compile see a device that is not here; torch 2.6 compiles for no fake tensor."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = anyattn.attention(q, k, v, causal=True)
        return out

    class Module(torch.nn.Module):
        forward = staticmethod(call)

    def described(*tensors: Tensor) -> list[Any]:
        return [(x.shape, x.stride(), x.dtype, str(x.device)) for x in tensors]

    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, dtype=torch.float16, device="cuda:1") for x in qkv())
        out, lse = anyattn.attention_forward(q, k, v, causal=True)
        assert [str(x.device) for x in (out, lse)] == ["cuda:1"] * 2
        grads = anyattn.attention_backward(out, q, k, v, out, lse, causal=True)
        assert described(*grads[:3]) == described(q, k, v)
        program = torch.export.export(Module(), (q, k, v))
        assert [node for node in program.graph.nodes if str(node.target) == ATTENTION]
        if compiles_for(q):
            compiled = torch.compile(call, backend=GRAPHS, fullgraph=True)
            assert described(compiled(q, k, v)) == described(out)


def compiles_for(x: Tensor) -> bool:
    """Return whether this version of torch compiles for such a tensor."""
    try:
        torch.compile(torch.neg, backend="aot_eager")(x)
    except torch._dynamo.exc.BackendCompilerFailed:
        return False
    return True


MAPPED: dict[str, tuple[tuple[int | None, ...], dict[str, Any]]] = {
    "queries": ((0, None, None), {}),
    "keys": ((None, 1, 0), {"causal": True}),
    "all": ((2, 0, 1), {"bias": normal(1, 4, 5, 7), "mask": normal(2, 1, 1, 7) > -1, "alibi_slopes": normal(4).abs()}),
    "tables": ((0, 0, 0), {"seqused_k": torch.tensor([7, 4]), "offset": torch.tensor([1, 2])}),
    "kv_indices": ((0, 0, None), {"kv_indices": torch.tensor([4, -1, 2, 2]).expand(2, 5, 4)}),
    "sink": ((0, 0, 0), {"sink": normal(4)}),
    "dropout": ((0, 0, 0), {"dropout_p": 0.5, "seed": 7}),
}


@pytest.mark.parametrize("kind", MAPPED)
def test_vmap_equals_a_loop(kind: str) -> None:
    """vmap, vmap of gradients, and gradients of vmap, against a loop."""
    dims, options = MAPPED[kind]
    arrays = tuple(
        x if dim is None else torch.stack([x * (n + 1) / 2 for n in range(3)], dim)
        for x, dim in zip(qkv(), dims, strict=True)
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = anyattn.attention(q, k, v, **options)
        return out

    def loop(function: Callable[..., Any]) -> list[Any]:
        def sample(n: int) -> list[Tensor]:
            return [x if dim is None else x.select(dim, n) for x, dim in zip(arrays, dims, strict=True)]

        return [function(*sample(n)) for n in range(3)]

    mapped = torch.vmap(call, in_dims=dims)
    torch.testing.assert_close(mapped(*arrays), torch.stack(loop(call)))
    gradient = torch.func.grad(lambda *xs: total(call(*xs)), argnums=(0, 1, 2))
    want = [torch.stack(parts) for parts in zip(*loop(gradient), strict=True)]
    for one, other in zip(torch.vmap(gradient, in_dims=dims)(*arrays), want, strict=True):
        torch.testing.assert_close(one, other)
    whole = torch.func.grad(lambda *xs: sum(total(x) for x in mapped(*xs)), argnums=(0, 1, 2))(*arrays)
    for one, parts, dim in zip(whole, want, dims, strict=True):
        torch.testing.assert_close(one, parts.sum(0) if dim is None else parts.movedim(0, dim))


def test_vmap_of_packed_sequences_equals_a_loop() -> None:
    x, cu = normal(3, 8, 2, 8), ints(0, 3, 8)
    mapped = torch.vmap(lambda x: anyattn.attention_varlen(x, x, x, cu, cu, causal=True))(x)
    torch.testing.assert_close(mapped, torch.stack([anyattn.attention_varlen(y, y, y, cu, cu, causal=True) for y in x]))


def test_func_grad_and_jacobian_equal_autograd() -> None:
    q, k, v = qkv(grad=True)
    (want,) = torch.autograd.grad(total(anyattn.attention(q, k, v)), q)
    torch.testing.assert_close(torch.func.grad(lambda q: total(anyattn.attention(q, k, v)))(q), want)
    jacobian = torch.func.jacrev(lambda q: anyattn.attention(q, k, v).sum((0, 1, 2)))(q)
    torch.testing.assert_close(jacobian.sum(0), torch.autograd.grad(anyattn.attention(q, k, v).sum(), q)[0])
    out = anyattn.attention(q, k, v)
    many = torch.autograd.grad(out, q, torch.ones_like(out).expand(2, *out.shape), is_grads_batched=True)[0]
    torch.testing.assert_close(many[1], jacobian.sum(0))


def test_autocast_rounds_the_inputs() -> None:
    q, k, v = qkv(grad=True)
    bias = leaf(2, 4, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = anyattn.attention(q, k, v, bias=bias)
        compiled = torch.compile(anyattn.attention, fullgraph=True, backend=GRAPHS)(q, k, v, bias=bias)
        assert anyattn.attention(*[x.double() for x in (q, k, v)]).dtype is torch.float64
    assert out.dtype is compiled.dtype is torch.bfloat16
    assert torch.equal(out, compiled)
    low = [x.detach().to(torch.bfloat16) for x in (q, k, v)]
    assert torch.equal(out, anyattn.attention(*low, bias=bias.detach()))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype is torch.float32
    assert bias.grad is not None
    assert bias.grad.dtype is torch.float32


def test_selective_checkpointing_finds_the_operator() -> None:
    seen: list[str] = []

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(op))
        save = op is torch.ops.anyattn.forward.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    one, other = qkv(grad=True), qkv(grad=True)
    context = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(lambda q, k, v: anyattn.attention(q.sin(), k, v), *one, use_reentrant=False, context_fn=context)
    out = checkpoint(lambda q, k, v: anyattn.attention(q.sin(), k, v), *one, use_reentrant=False, context_fn=context)
    assert ATTENTION in seen
    out.sum().backward()
    anyattn.attention(other[0].sin(), *other[1:]).sum().backward()
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_checkpointing_repeats_the_dropout() -> None:
    one, other = qkv(grad=True), qkv(grad=True)
    torch.manual_seed(3)
    checkpoint(lambda *xs: anyattn.attention(*xs, dropout_p=0.5), *one, use_reentrant=False).sum().backward()
    torch.manual_seed(3)
    anyattn.attention(*other, dropout_p=0.5).sum().backward()
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_flop_counter_counts_both_passes() -> None:
    q, k, v = qkv(rows=5, keys=7, grad=True)
    scores = 2 * 4 * 5 * 7  # batch, nheads, rows, keys
    with FlopCounterMode(display=False) as counter:
        anyattn.attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * scores * (8 + 6) + 2 * scores * (3 * 8 + 2 * 6)
    with FlopCounterMode(display=False) as counter:
        anyattn.attention(*qkv(), kv_indices=torch.zeros(2, 5, 3, dtype=torch.int32))
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 3) * (8 + 6)
    x, cu = normal(12, 2, 8), ints(0, 6, 12)
    with FlopCounterMode(display=False) as counter:
        anyattn.attention_varlen(x, x, x, cu, cu)
    assert counter.get_total_flops() == 2 * 2 * (6 * 6 * 2) * 16


def test_profiler_lists_the_operators() -> None:
    with torch.profiler.profile() as profile:
        anyattn.attention(*qkv(grad=True)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"anyattn::forward", "anyattn::backward"} <= names


def test_plain_eager_calls_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(ops, "forward", refuse)
    monkeypatch.setattr(ops, "backward", refuse)
    anyattn.attention(*qkv(grad=True), sink=torch.nn.Parameter(normal(4))).square().sum().backward()
    with pytest.raises(AssertionError), FlopCounterMode(display=False):
        anyattn.attention(*qkv())


def test_missing_private_names_of_torch_select_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    want = qkv(grad=True)
    anyattn.attention(*want).sum().backward()
    monkeypatch.setattr(fastpath, "AVAILABLE", False)
    monkeypatch.setattr(autograd, "_direct", None)
    got = qkv(grad=True)
    anyattn.attention(*got).sum().backward()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_lazily_negated_tensors_and_subclasses_use_the_operator() -> None:
    """A lazily negated tensor and a subclass take the operator."""
    q, k, v = qkv()

    class Logged(torch.Tensor):
        pass

    assert torch.equal(anyattn.attention(torch._neg_view(q), k, v), anyattn.attention(-q, k, v))
    out = anyattn.attention(q.as_subclass(Logged), k, v)
    assert torch.equal(out.as_subclass(Tensor), anyattn.attention(q, k, v))
