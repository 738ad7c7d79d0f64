"""Exceptions and public objects survive pickle, copies and process pools."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn import errors
from anyattn.backends.cpu.library import LibraryError
from anyattn.backends.vulkan.api import DeviceLost, VulkanError
from anyattn.runtime import dispatch

EXCEPTIONS: list[Exception] = [
    anyattn.UnsupportedProblem("attention of 3 queries", {"cpu": ["no"], "numpy": ["neither", "nor"]}),
    errors.CacheOverflow("full"),
    errors.CompilationError("no"),
    errors.DeviceError("gone"),
    errors.DeviceMemoryError("full"),
    VulkanError("vkQueueSubmit", -3),
    DeviceLost("vkQueueSubmit", -4),
    LibraryError("not there"),
]


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_exceptions_survive_copies(error: Exception, copied: Any) -> None:
    got = copied(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert vars(got) == vars(error)


def refused(_: int) -> Any:
    x = np.ones((1, 8, 1, 16), np.float64)
    return anyattn.attention(x, x, x, backend="vulkan,triton")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("nothing_required")  # a process forked from one that used Vulkan lacks it
def test_refusals_pass_through_a_pool(method: str) -> None:
    with (
        multiprocessing.get_context(method).Pool(1) as pool,
        pytest.raises(anyattn.UnsupportedProblem, match="float64"),
    ):
        pool.map_async(refused, [0]).get(timeout=60)


def objects() -> dict[str, Any]:
    """Return an object of each public class that programs keep, pass on and store."""
    from anyattn.compat import flash_attention_amd, flash_attn_triton, xformers
    from anyattn.compat.flash_attn.layers.rotary import RotaryEmbedding
    from anyattn.compat.flash_attn.modules.mha import MHA
    from anyattn.compat.flash_attn.utils.generation import InferenceParams

    x = np.ones((1, 8, 1, 16), np.float32)
    layer = anyattn.nn.Attention(32, nheads=4, nheads_kv=2, causal=True, rotary_dim=8, sink=True, alibi=True)
    return {
        "Mask": anyattn.Mask(left=3, right=0),
        "Gradients": anyattn.attention_backward(x, x, x, x, *anyattn.attention_forward(x, x, x)),
        "Explanation": anyattn.explain(x, x, x),
        "Attention": layer,
        "KVCache": layer.cache(batch=2, slots=8),
        "MHA": MHA(32, 4, causal=True, rotary_emb_dim=8),
        "RotaryEmbedding": RotaryEmbedding(16),
        "InferenceParams": InferenceParams(16, 2),
        "FlashAttention of flash_attention_amd": flash_attention_amd.FlashAttention(softmax_scale=0.5),
        "FlashAttention of flash_attn_triton": flash_attn_triton.FlashAttention(0.25),
        "LowerTriangularMask": xformers.LowerTriangularMask(),
        "BlockDiagonalCausalMask": xformers.BlockDiagonalMask.from_seqlens([3, 5]).make_causal(),
        "Installation": anyattn.compat.install(),
    }


def content(x: Any) -> Any:
    """Return what an object holds, in values that can be compared."""
    if isinstance(x, torch.Tensor | np.ndarray):
        return (str(x.dtype), x.tolist())
    if isinstance(x, torch.nn.Module):
        return (type(x), repr(x), {name: content(value) for name, value in x.state_dict().items()}, simple(vars(x)))
    if isinstance(x, tuple):
        return (type(x), [content(value) for value in x])
    return (type(x), {name: content(value) for name, value in vars(x).items()}) if hasattr(x, "__dict__") else x


def simple(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, int | float | str | tuple | None)}


def saved(x: Any) -> Any:
    """Return an object that passed through torch.save."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy, saved])
def test_objects_survive_copies(copied: Any) -> None:
    for name, before in objects().items():
        assert content(copied(before)) == content(before), name


def test_a_layer_that_was_used_survives_copies() -> None:
    layer = anyattn.nn.Attention(32, nheads=4, rotary_dim=8)
    x = torch.randn(1, 5, 32)
    out = layer(x)
    for other in (copy.deepcopy(layer), saved(layer)):
        assert torch.equal(other(x), out)


def test_functions_and_modules_of_the_package_survive_pickle() -> None:
    for name in anyattn.__all__:
        public = getattr(anyattn, name)
        assert pickle.loads(pickle.dumps(public)) is public, name


def echo(x: Any) -> Any:
    return x


def test_objects_pass_through_a_spawned_process() -> None:
    before = objects()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        after = pool.map_async(echo, [before]).get(timeout=120)[0]
    assert {name: content(x) for name, x in after.items()} == {name: content(x) for name, x in before.items()}


def test_a_device_array_is_copied_by_value() -> None:
    """Check that a copy has separate memory, because handles have no meaning in another process."""
    if "vulkan" not in dispatch.available():
        pytest.skip("there is no Vulkan device")
    values = np.arange(48, dtype=np.float16).reshape(1, 3, 2, 8)
    before = anyattn.vulkan.DeviceArray(values)
    for after in (copy.copy(before), copy.deepcopy(before), pickle.loads(pickle.dumps(before))):
        assert after.buffer is not before.buffer
        assert np.array_equal(after.numpy(), values)
