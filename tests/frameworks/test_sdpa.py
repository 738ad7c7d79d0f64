"""anyattn.sdpa against torch's math path in float64, and anyattn as torch's own scaled_dot_product_attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattn
import anyattn.compat.torch
from anyattn.frameworks.torch.aten import Override
from anyattn.runtime import execute
from harness.tensors import close, leaf, normal

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def leaves(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def results(function: Callable[..., Tensor], inputs: list[Tensor], **arguments: Any) -> list[Tensor]:
    """The output, and the gradients of every input (and of attn_mask, if it has one) of some weighted sum of it."""
    out = function(*inputs, **arguments)
    wanted = [*inputs, *(x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad)]
    weights = normal(*out.shape, seed=99).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, weights)]


def math_path(*inputs: Tensor, **arguments: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*inputs, **arguments)


def equal(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


SHAPES = {  # query, key, value
    "plain": ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
    "cross": ((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 6)),
    "long query": ((1, 2, 9, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
    "no heads": ((3, 5, 8), (3, 9, 8), (3, 9, 6)),
    "one matrix": ((5, 8), (9, 8), (9, 6)),
    "two batches": ((2, 3, 4, 5, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8)),
    "broadcast batches": ((2, 1, 4, 5, 8), (1, 3, 4, 9, 8), (1, 3, 1, 9, 8)),
    "broadcast ranks": ((2, 4, 5, 8), (9, 8), (1, 9, 8)),
    "one query head": ((2, 1, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "one key head": ((2, 4, 5, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_shapes_equal_the_math_path(shapes: tuple[tuple[int, ...], ...], is_causal: bool) -> None:
    arguments: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3}
    close(results(anyattn.sdpa, leaves(shapes), **arguments), results(math_path, leaves(shapes), **arguments))


MASKS = {  # for scores (2, 4, 5, 9)
    "bool": normal(5, 9, seed=5) > -1,
    "bool rows": normal(2, 1, 1, 9, seed=5) > -1,
    "bool heads": normal(4, 5, 9, seed=5) > -1,
    "float": normal(5, 9, seed=5),
    "float32": normal(5, 9, seed=5, dtype=torch.float32),
    "float per key": normal(9, seed=5),
    "float heads": normal(1, 4, 1, 9, seed=5),
    "hidden": torch.where(normal(2, 4, 5, 9, seed=5) > -1, normal(2, 4, 5, 9, seed=6), -math.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_equal_the_math_path(mask: Tensor) -> None:
    """Gradients of a float mask too; in the math path it has to have query's dtype."""
    inputs = leaves(SHAPES["cross"])
    differentiable = mask.dtype is torch.float64 and bool(mask.isfinite().all())
    mask = mask.clone().requires_grad_(differentiable)
    want = results(math_path, inputs, attn_mask=mask if mask.dtype is torch.bool else mask.double())
    close(results(anyattn.sdpa, inputs, attn_mask=mask), want)
    assert len(want) == 4 + differentiable


@pytest.mark.parametrize("mask", [normal(2, 1, 1, 5, 9), normal(2, 3, 4, 5, 9), normal(1, 1, 4, 5, 9), normal(5, 9)])
def test_masks_with_two_batch_dimensions_equal_the_math_path(mask: Tensor) -> None:
    inputs = leaves(SHAPES["two batches"])
    mask = mask.requires_grad_()
    close(results(anyattn.sdpa, inputs, attn_mask=mask), results(math_path, inputs, attn_mask=mask))


@pytest.mark.parametrize("mask", [None, normal(4, 5, 9, dtype=torch.float32) > 0, normal(2, 4, 5, 9)], ids=type)
def test_grouped_queries_equal_the_math_path(mask: Tensor | None) -> None:
    inputs = leaves(((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6)))
    arguments = {"attn_mask": mask, "enable_gqa": True}
    close(results(anyattn.sdpa, inputs, **arguments), results(math_path, inputs, **arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "bool", "float", "dropout"])
def test_results_have_the_bits_of_attention(kind: str, dtype: torch.dtype) -> None:
    """Compare bits, so that the accuracy tests of `attention` also hold here."""
    inputs = leaves(SHAPES["cross"], dtype)
    mask = normal(2, 1, 5, 9, seed=7)
    mine: dict[str, Any] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask > 0},
        "float": {"attn_mask": mask.to(dtype).requires_grad_()},
        "dropout": {"dropout_p": 0.4},
    }[kind]
    core: dict[str, Any] = {
        "causal": {"causal": True, "alignment": "top-left"},
        "bool": {"mask": mine.get("attn_mask")},
        "float": {"bias": mine.get("attn_mask")},
        "dropout": {"dropout_p": 0.4},
    }[kind]

    def attention(*inputs: Tensor, **arguments: Any) -> Tensor:
        out: Tensor = anyattn.attention(*[x.transpose(1, 2) for x in inputs], **arguments)
        return out.transpose(1, 2)

    torch.manual_seed(3)
    got = results(anyattn.sdpa, inputs, **mine)
    torch.manual_seed(3)
    equal(got, results(attention, inputs, **core))


def test_queries_without_keys_are_zero() -> None:
    inputs = leaves(SHAPES["cross"])
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[2] = False
    out, *grads = results(anyattn.sdpa, inputs, attn_mask=mask)
    assert not out[:, :, 2].any()
    assert not grads[0][:, :, 2].any()
    assert all(x.isfinite().all() for x in grads)


def test_empty_sequences_give_zeros() -> None:
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 4, 0, 8)
    assert torch.equal(anyattn.sdpa(q, k, k), torch.zeros_like(q))
    assert anyattn.sdpa(k, q, q).shape == (2, 4, 0, 8)
    assert anyattn.sdpa(q[:0], q[:0], q[:0]).shape == (0, 4, 3, 8)


def test_wrong_arguments_are_refused_by_name() -> None:
    q, k, v = (x.detach() for x in leaves(SHAPES["cross"]))
    with pytest.raises(ValueError, match=r"attn_mask cannot be combined with is_causal"):
        anyattn.sdpa(q, k, v, torch.ones(5, 9, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"enable_gqa"):
        anyattn.sdpa(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"leading dimensions.*\(3, 4, 5, 8\)"):
        anyattn.sdpa(q[:1].expand(3, -1, -1, -1), k, v)
    with pytest.raises(TypeError, match=r"attn_mask.*int64"):
        anyattn.sdpa(q, k, v, torch.ones(5, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias.*broadcast"):
        anyattn.sdpa(q, k, v, normal(4, 9))
    with pytest.raises(ValueError, match=r"value must be a tensor.*\(6,\)"):
        anyattn.sdpa(q, k, v[0, 0, 0])
    with pytest.raises(TypeError, match=r"query must be a torch.Tensor, got ndarray"):
        anyattn.sdpa(q.numpy(), k, v)
    with pytest.raises(ValueError, match=r"dropout_p"):
        anyattn.sdpa(q, k, v, dropout_p=1.0)


def test_mask_that_is_no_tensor_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TypeError, match="attn_mask must be a tensor or None, got list"):
        anyattn.sdpa(x, x, x, [[True]])


def test_sdpa_compiles() -> None:
    inputs = leaves(SHAPES["broadcast batches"], torch.float32)
    mask = leaf(4, 5, 9, dtype=torch.float32)
    compiled = torch.compile(anyattn.sdpa, fullgraph=True, backend="aot_eager")
    equal(results(compiled, inputs, attn_mask=mask), results(anyattn.sdpa, inputs, attn_mask=mask))


# Behind torch's own function.


try:
    from torch.nn.attention import varlen
except ImportError:
    TAKEN = set()
else:
    TAKEN = set(inspect.signature(varlen.varlen_attn).parameters)
WINDOWS, PAGES = {"window_size", "enable_gqa"} <= TAKEN, "block_table" in TAKEN
REGISTRY = hasattr(torch.nn.attention, "activate_flash_attention_impl")
_handles: list[Override] = []


def activate() -> None:
    """Activate anyattn through torch's registry, or as use_anyattn does if torch has no registry."""
    if REGISTRY:
        torch.nn.attention.activate_flash_attention_impl("anyattn")
    else:
        _handles.append(Override())


def restore() -> None:
    if REGISTRY:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        _handles.pop().remove()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Activates anyattn; the names of the passes that were ours."""
    names: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(execute, name)

        def count(*arguments: Any, **keywords: Any) -> Any:
            names.append(name)
            return original(*arguments, **keywords)

        return count

    for name in ("forward", "backward"):
        monkeypatch.setattr(execute, name, counted(name))
    activate()
    yield names
    restore()


def layouts(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """One tensor in memory by heads, by rows, and inside a packed projection."""
    batch, nheads, seqlen, head_dim = shape
    x = normal(*shape, seed=seed, dtype=dtype)
    packed = torch.zeros(batch, seqlen, 3, nheads, head_dim, dtype=dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    by_rows = x.transpose(1, 2).contiguous().transpose(1, 2)
    return [x, by_rows, packed[:, :, 1].transpose(1, 2)]


HOOKED: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": MASKS["bool"]},
    "bool rows": {"attn_mask": MASKS["bool rows"]},
    "float": {"attn_mask": MASKS["float"].float()},
    "scale": {"scale": -0.2},
}


def accepted(want: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> list[float]:
    """Return the largest accepted errors: twice (gradients: three times) the math path's, plus some units."""
    eps = torch.finfo(dtype).eps
    return [
        (3 if i else 2) * float((p.double() - e).abs().max()) + (8 if i else 4) * eps * float(e.abs().max())
        for i, (p, e) in enumerate(zip(plain, exact, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HOOKED)
def test_hook_replaces_the_function_of_torch(kind: str, dtype: torch.dtype, calls: list[str]) -> None:
    nheads_kv = 2 if flash_takes_groups() else 4
    shapes = ((2, 4, 5, 8), (2, nheads_kv, 9, 8), (2, nheads_kv, 9, 8))
    arguments: dict[str, Any] = {**HOOKED[kind], "enable_gqa": True}
    exact = results(
        math_path, [x.detach().double().requires_grad_() for x in leaves(shapes, dtype)], **widened(arguments)
    )
    plain = results(math_path, leaves(shapes, dtype), **narrowed(arguments, dtype))
    assert calls == []
    for inputs in zip(*(layouts(shape, dtype, seed) for seed, shape in enumerate(shapes)), strict=True):
        got = results(
            F.scaled_dot_product_attention, [x.requires_grad_() for x in inputs], **narrowed(arguments, dtype)
        )
        for one, other, budget in zip(got, exact, accepted(got, plain, exact, dtype), strict=True):
            assert float((one.double() - other).abs().max()) <= budget
    assert calls == ["forward", "backward"] * 3


def flash_takes_groups() -> bool:
    """Return whether torch passes grouped queries on a CPU to its flash kernel. torch 2.6 never does."""
    q, k = normal(1, 2, 4, 8), normal(1, 1, 4, 8)
    return torch._fused_sdp_choice(q, k, k, enable_gqa=True) == SDPBackend.FLASH_ATTENTION.value


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return narrowed(arguments, torch.float64)


def narrowed(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert float masks to a dtype that torch accepts together with `dtype`."""
    return {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}


@pytest.mark.parametrize("layout", [0, 1, 2], ids=["by heads", "by rows", "packed"])
def test_hook_returns_the_strides_of_fake_tensors(layout: int, calls: list[str]) -> None:
    """Compare strides, because code compiled by Inductor relies on them."""
    q, k, v = (layouts((2, 4, n, 8), torch.float32, n)[layout] for n in (5, 9, 9))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(out, q, k, v, out, lse, 0.0, False)
    q, k, v, meta, meta_lse = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (q, k, v, out, lse)
    )
    fakes = [
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v),
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(meta, q, k, v, meta, meta_lse, 0.0, False),
    ]
    for real, fake in zip((out, lse, *grads), fakes, strict=True):
        assert real.stride() == fake.stride()
        assert real.dtype == fake.dtype
    assert calls == ["forward", "backward"]


def test_hook_works_in_compiled_code(calls: list[str]) -> None:
    """Compile by Inductor a graph whose projections make views in several layouts."""

    def program(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).unbind(-3)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        again = F.scaled_dot_product_attention(out.contiguous(), out, out)
        return again.transpose(1, 2).flatten(-2) * 2

    inputs = leaves(((2, 7, 16), (16, 96)), torch.float32)
    want = results(program, inputs)
    compiled = torch.compile(program, fullgraph=True)
    close(results(compiled, inputs), want, rtol=1e-5, atol=1e-5)
    assert calls == ["forward", "forward", "backward", "backward"] * 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hook_works_in_multihead_attention(training: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).train(training)
    x = leaf(2, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)

    def program(x: Tensor) -> Tensor:
        keywords: dict[str, Any] = {
            "attn_mask": causal,
            "key_padding_mask": padding.double().masked_fill(padding, -math.inf),
        }
        out: Tensor = module(x, x, x, need_weights=False, **keywords)[0]
        return out

    got = results(program, [x])
    assert calls == ["forward", "backward"]
    restore()
    close(got, results(program, [x]))
    assert len(calls) == 2
    activate()


@torch.no_grad()
def test_hook_works_in_inference(calls: list[str]) -> None:
    """Check that torch's fast path for inference is off with the hook, and on again afterwards."""
    layer, x = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True, dtype=torch.float64).eval(), normal(2, 6, 16)
    got = layer(x)
    assert calls == ["forward"]
    restore()
    assert torch.backends.mha.get_fastpath_enabled()
    close([got], [layer(x)])
    activate()


@pytest.mark.skipif(not WINDOWS, reason="this torch has no varlen_attn, or one without windows")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)], ids=str)
def test_hook_works_in_varlen_attention(window: tuple[int, int], compiled: bool, calls: list[str]) -> None:
    """torch.nn.attention.varlen, which has no CPU kernel of its own."""
    inputs = leaves(((9, 4, 8), (11, 2, 8), (11, 2, 8)), torch.float32)
    begins = torch.tensor([0, 3, 9], dtype=torch.int32), torch.tensor([0, 5, 11], dtype=torch.int32)
    bounds = tuple(None if side < 0 else side for side in window)
    want = results(lambda *x: anyattn.attention_varlen(*x, *begins, window=bounds, scale=0.3), inputs)
    calls.clear()

    def program(*x: Tensor) -> Tensor:
        out: Tensor = varlen.varlen_attn(*x, *begins, 6, 6, window_size=window, scale=0.3, enable_gqa=True)
        return out

    equal(results(torch.compile(program, fullgraph=True, backend="aot_eager") if compiled else program, inputs), want)
    assert calls == ["forward", "backward"]


@pytest.mark.skipif(not PAGES, reason="this torch has no varlen_attn, or one without pages")
@pytest.mark.usefixtures("calls")
def test_hook_works_in_paged_varlen_attention() -> None:
    q, pages = normal(3, 4, 8), normal(5, 4, 4, 8, seed=1)
    begins, used = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([6, 3], dtype=torch.int32)
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)
    paged = {"seqused_k": used, "block_table": table}
    out, lse = varlen.varlen_attn(q, pages, pages, begins, None, 2, 8, return_aux=varlen.AuxRequest(lse=True), **paged)
    want = anyattn.attention_varlen(q, pages, pages, begins, None, **paged, return_lse=True)
    equal([out, lse], list(want))


def test_context_manager_activates_and_restores() -> None:
    x = normal(1, 2, 5, 8)
    before = F.scaled_dot_product_attention(x, x, x)
    with anyattn.compat.torch.use_anyattn():
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), anyattn.sdpa(x, x, x))
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), before)


def test_context_manager_covers_gpus() -> None:
    def registered() -> bool:
        found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_scaled_dot_product_flash_attention", "CUDA"
        )
        return found

    before = registered()
    with anyattn.compat.torch.use_anyattn():
        assert registered()
    assert registered() == before == torch.backends.cuda.is_built()
