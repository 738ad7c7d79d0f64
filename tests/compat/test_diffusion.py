"""The surfaces that diffusion models use: diffusers, xFormers, ComfyUI."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattn.compat.diffusers
from anyattn.compat import comfyui, xformers
from anyattn.runtime import execute
from harness.plain_torch import plain_output
from harness.tensors import close, leaf, normal

BATCH, ROWS, KEYS, NHEADS, HEAD_DIM = 2, 5, 9, 4, 8


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, inputs, normal(*out.shape, seed=9).to(out.dtype), retain_graph=True)]


def triangle(rows: int, keys: int, offset: int = 0) -> Tensor:
    """0 where key j <= row i + offset, else -inf."""
    return torch.full((rows, keys), -math.inf, dtype=torch.float64).triu(offset + 1)


def inputs(rows: int = ROWS, keys: int = KEYS) -> list[Tensor]:
    shapes = ((BATCH, rows, NHEADS, HEAD_DIM), (BATCH, keys, NHEADS, HEAD_DIM), (BATCH, keys, NHEADS, 6))
    return [leaf(*shape, seed=seed) for seed, shape in enumerate(shapes)]


# xFormers


@pytest.mark.parametrize("shape", [(BATCH, NHEADS, ROWS, KEYS), (1, 1, 1, KEYS)], ids=str)
def test_xformers_tensor_bias_is_added_to_the_scores(shape: tuple[int, ...]) -> None:
    given, bias = inputs(), leaf(*shape, seed=5)
    got = xformers.memory_efficient_attention(*given, bias, 0.0, 0.3, op=("any", "kernel"))
    close(gradients(got, *given, bias), gradients(plain_output(*given, bias=bias, scale=0.3), *given, bias))


@pytest.mark.parametrize("name", ["LowerTriangularMask", "LowerTriangularFromBottomRightMask"])
def test_xformers_triangular_masks_are_causal(name: str) -> None:
    given = inputs()
    got = xformers.memory_efficient_attention(*given, attn_bias=getattr(xformers, name)())
    want = plain_output(*given, bias=triangle(ROWS, KEYS, KEYS - ROWS if "Bottom" in name else 0))
    close(gradients(got, *given), gradients(want, *given))


@pytest.mark.parametrize("kind", ["full", "top-left", "bottom-right"])
@pytest.mark.parametrize("seqlens_k", [None, (4, 6, 1)], ids=["self", "cross"])
def test_xformers_block_diagonal_masks_separate_sequences(kind: str, seqlens_k: tuple[int, ...] | None) -> None:
    seqlens_q = (3, 5, 1)
    given = [x[:1] for x in inputs(9, sum(seqlens_k or seqlens_q))]
    mask = xformers.BlockDiagonalMask.from_seqlens(seqlens_q, seqlens_k)
    mask = {"full": mask, "top-left": mask.make_causal(), "bottom-right": mask.make_causal_from_bottomright()}[kind]
    blocks = []
    splits = (x.split(n, 1) for x, n in zip(given, (seqlens_q, *[seqlens_k or seqlens_q] * 2), strict=True))
    for q, k, v in zip(*splits, strict=True):
        offset = {"full": k.shape[1], "top-left": 0, "bottom-right": k.shape[1] - q.shape[1]}[kind]
        blocks.append(plain_output(q, k, v, bias=triangle(q.shape[1], k.shape[1], offset)))
    got = xformers.memory_efficient_attention(*given, mask)
    close(gradients(got, *given), gradients(torch.cat(blocks, 1), *given))


def test_xformers_masks_of_the_real_package_are_accepted_by_name() -> None:
    """An object of xFormers' own class: what counts is its name and seqstart."""
    mine = xformers.BlockDiagonalMask.from_seqlens([2, 3], [4, 5]).make_causal()
    theirs = type("BlockDiagonalCausalMask", (), {"q_seqinfo": mine.q_seqinfo, "k_seqinfo": mine.k_seqinfo})()
    given = [x[:1] for x in inputs()]
    got, want = (xformers.memory_efficient_attention(*given, mask) for mask in (theirs, mine))
    assert torch.equal(got, want)


def test_xformers_triangle_of_the_real_package_is_a_tensor_without_values() -> None:
    class LowerTriangularMask(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            return NotImplemented

    theirs = Tensor._make_wrapper_subclass(LowerTriangularMask, [])
    got, want = (
        xformers.memory_efficient_attention(*inputs(), mask) for mask in (theirs, xformers.LowerTriangularMask())
    )
    assert torch.equal(got, want)


def test_xformers_layouts_of_three_and_five_dimensions_are_accepted() -> None:
    q, k, v = inputs()
    one = [x[:, :, 0] for x in (q, k, v)]
    bias = normal(BATCH, ROWS, KEYS)
    want = plain_output(*[x.unsqueeze(2) for x in one], bias=bias.unsqueeze(1)).squeeze(2)
    close([xformers.memory_efficient_attention(*one, bias)], [want])
    groups = q.unflatten(2, (2, 2))
    k5, v5 = (x[:, :, :2].unsqueeze(3).expand(-1, -1, -1, 2, -1) for x in (k, v))
    bias = normal(BATCH, 2, 2, ROWS, KEYS)
    want = plain_output(q, k5.flatten(2, 3), v5.flatten(2, 3), bias=bias.flatten(1, 2)).unflatten(2, (2, 2))
    for keys, values in ((k5, v5), (k5[:, :, :, :1], v5[:, :, :, :1]), (k5.contiguous(), v5)):
        got = xformers.memory_efficient_attention(groups, keys, values, bias)
        close(gradients(got, q, k, v), gradients(want, q, k, v))


def test_xformers_applies_dropout_and_output_dtype() -> None:
    given = [x.detach().float() for x in inputs()]
    torch.manual_seed(1)
    got = xformers.memory_efficient_attention(*given, p=0.5, output_dtype=torch.float64)
    torch.manual_seed(1)
    want = anyattn.attention(*given, dropout_p=0.5)
    assert torch.equal(got, want.double())


def test_xformers_unsupported_arguments_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"attn_bias must be .*LowerTriangularMask.*, got PagedBlockDiagonal"):
        xformers.memory_efficient_attention(q, k, v, type("PagedBlockDiagonal", (), {})())
    with pytest.raises(ValueError, match="needs a batch of 1"):
        xformers.memory_efficient_attention(q, k, v, xformers.BlockDiagonalMask.from_seqlens([ROWS], [KEYS]))
    with pytest.raises(ValueError, match=r"key must have 8 rows, .*, got 9"):
        mask = xformers.BlockDiagonalMask.from_seqlens([ROWS], [KEYS - 1])
        xformers.memory_efficient_attention(q[:1], k[:1], v[:1], mask)
    with pytest.raises(ValueError, match="as many sequences"):
        xformers.BlockDiagonalMask.from_seqlens([2, 3], [5])
    with pytest.raises(ValueError, match="3, 4 or 5 dimensions"):
        xformers.memory_efficient_attention(q, k, v[0])


# ComfyUI


def comfy_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, heads, seqlen, head_dim)."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask)


MASKS = {
    "none": None,
    "rows": normal(ROWS, KEYS, seed=5),
    "batch": normal(BATCH, ROWS, KEYS, seed=5) > -1,
    "heads": normal(BATCH, NHEADS, ROWS, KEYS, seed=5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_comfyui_function_equals_plain_attention(mask: Tensor | None) -> None:
    q, k, v = (x.detach().transpose(1, 2) for x in inputs())
    v = normal(BATCH, NHEADS, KEYS, HEAD_DIM, seed=3)
    want = comfy_plain(q, k, v, mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask)
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    close([comfyui.attention(*flat, NHEADS, mask)], [want.transpose(1, 2).flatten(2)])
    close([comfyui.attention(*flat, NHEADS, mask, skip_output_reshape=True)], [want])
    split = comfyui.attention(q, k, v, NHEADS, mask, None, True, transformer_options={})
    close([split], [want.transpose(1, 2).flatten(2)])
    assert torch.equal(comfyui.override(comfy_plain, q, k, v, NHEADS, mask=mask, skip_reshape=True), split)


def test_comfyui_function_applies_scale_and_grouped_heads() -> None:
    q, k, v = (x.detach().transpose(1, 2) for x in inputs())
    got = comfyui.attention(q, k[:, :2], v[:, :2], NHEADS, skip_reshape=True, scale=0.2, enable_gqa=True)
    k, v = (x[:, :2].repeat_interleave(2, 1).transpose(1, 2) for x in (k, v))
    close([got], [plain_output(q.transpose(1, 2), k, v, scale=0.2).flatten(2)])
    with pytest.raises(TypeError, match="causal_offset"):
        comfyui.attention(q, k, v, NHEADS, causal_offset=1)


def test_comfyui_register_adds_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}
    module = ModuleType("comfy.ldm.modules.attention")
    monkeypatch.setattr(module, "register_attention_function", registered.__setitem__, raising=False)
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)
    comfyui.register()
    assert registered == {"anyattn": comfyui.attention}


# diffusers


def flux() -> tuple[Any, dict[str, Tensor]]:
    """A model that asks diffusers' dispatcher."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2)}
    widths = {"joint_attention_dim": 16, "pooled_projection_dim": 8, "in_channels": 4}
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, patch_size=1, **sizes, **widths)
    given = {"hidden_states": normal(2, 6, 4), "encoder_hidden_states": normal(2, 3, 16), "img_ids": torch.rand(6, 3)}
    given |= {"pooled_projections": normal(2, 8), "timestep": torch.ones(2), "txt_ids": torch.zeros(3, 3)}
    return model, {key: x.float() for key, x in given.items()}


def unet() -> tuple[Any, dict[str, Tensor]]:
    """An older model, with attention processors and a mask."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    widths: dict[str, Any] = {"block_out_channels": (8,), "cross_attention_dim": 8, "norm_num_groups": 4}
    model = UNet2DConditionModel(sample_size=4, layers_per_block=1, attention_head_dim=2, **blocks, **widths)
    given = {"sample": normal(2, 4, 4, 4), "encoder_hidden_states": normal(2, 5, 8), "timestep": torch.ones(2)}
    given |= {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    return model, {key: x.float() for key, x in given.items()}


@pytest.mark.parametrize("build", [flux, unet])
def test_diffusers_models_give_the_same_results_and_gradients(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build()
    parameters = [x for x in model.parameters() if x.requires_grad]

    def step() -> list[Tensor]:
        out = model(**given, return_dict=False)[0]
        grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return [out.detach(), *(x for x in grads if x is not None)]

    want = step()
    calls: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(execute, name)
        monkeypatch.setattr(execute, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    with anyattn.compat.diffusers.use_anyattn():
        got = step()
    assert calls.count("forward") == calls.count("backward") > 1
    for one, other in zip(got, want, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max()) + 1e-6
    count = len(calls)
    step()
    assert len(calls) == count
