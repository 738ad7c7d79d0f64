"""Arrays that stay on a Vulkan device: attention on them, and a KV cache that never leaves it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyattn
from anyattn.vulkan import DeviceArray
from harness.backends import Engine, engines

VULKAN = Engine("vulkan")
pytestmark = pytest.mark.skipif(VULKAN not in engines(), reason="no Vulkan device: .ci/run requires one")

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# of one rounding, relative to values of about 1
ROUNDING = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def draw(rng: np.random.Generator, dtype: np.dtype[Any], *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def near(got: np.ndarray, want: np.ndarray) -> bool:
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return bool((difference <= ROUNDING[want.dtype.name] * (1 + np.abs(want.astype(np.float64)))).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 2, 33), (0, 4, 1, 8)], ids=str)
def test_arrays_survive_the_round_trip_to_the_device(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    values = draw(np.random.default_rng(0), dtype, *shape)
    array = DeviceArray(values)
    assert array.shape == shape and array.dtype == dtype
    assert array.numpy().tobytes() == values.tobytes()
    assert not DeviceArray.zeros(shape, dtype).numpy().any()


def test_unsupported_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="got float64"):
        DeviceArray(np.ones((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="3 or 4 dimensions"):
        DeviceArray(np.ones(3, np.float32))
    x = np.ones((1, 2, 3, 4), np.float32)
    with pytest.raises(TypeError, match="k must be a DeviceArray like q, got ndarray"):
        anyattn.attention(DeviceArray(x), x, x)
    with pytest.raises(anyattn.UnsupportedProblem, match="got q on vulkan:0"):
        anyattn.attention(*[DeviceArray(x)] * 3, backend="cpu")
    with pytest.raises(TypeError, match="for gradients, got DeviceArray"):
        anyattn.attention_backward(x, *[DeviceArray(x)] * 4, np.zeros((1, 3, 2), np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equals_that_of_host_arrays(dtype: np.dtype[Any]) -> None:
    """Compare with host arrays, with every optional argument passed from the host."""
    rng = np.random.default_rng(1)
    q, k, v = draw(rng, dtype, 2, 33, 4, 40), draw(rng, dtype, 2, 50, 2, 40), draw(rng, dtype, 2, 50, 2, 12)
    given = {
        "causal": True,
        "window": (20, 0),
        "softcap": 3.0,
        "bias": draw(rng, dtype, 1, 4, 33, 50),
        "mask": rng.random((2, 1, 33, 50)) < 0.8,
        "alibi_slopes": rng.random(4).astype(np.float32),
        "sink": rng.standard_normal(4).astype(np.float32),
        "seqused_k": [50, 41],
        "dropout_p": 0.2,
        "seed": 7,
    }
    out, lse = anyattn.attention(DeviceArray(q), DeviceArray(k), DeviceArray(v), return_lse=True, **given)
    want, want_lse = anyattn.attention(q, k, v, return_lse=True, backend="numpy", **given)
    assert near(out.numpy(), want) and near(lse, want_lse)
    # a result is an array like any other
    again = anyattn.attention(out, out, out).numpy()
    assert near(again, anyattn.attention(*[out.numpy()] * 3, backend="numpy"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_functions_equal_those_on_host_arrays(dtype: np.dtype[Any]) -> None:
    """Functions that stay functions, a mask that becomes `causal`, and documents, which are not reshaped here."""
    rng = np.random.default_rng(4)
    q, k, v = draw(rng, dtype, 2, 33, 4, 40), draw(rng, dtype, 2, 33, 2, 40), draw(rng, dtype, 2, 33, 2, 12)
    table, document = (anyattn.captured(x) for x in (rng.random((4, 33), np.float32), np.arange(33) // 9))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.tanh(score) * table[h, kv_idx] + (q_idx - kv_idx) / 20 * b

    masks = (lambda b, h, i, j: i >= j, lambda b, h, i, j: (document[i] == document[j]) & (i >= j))
    for mask_mod in (None, *masks):
        functions: dict[str, Any] = {"score_mod": score_mod, "mask_mod": mask_mod, "return_lse": True}
        out, lse = anyattn.attention(DeviceArray(q), DeviceArray(k), DeviceArray(v), **functions)
        want, want_lse = anyattn.attention(q, k, v, backend="numpy", **functions)
        assert near(out.numpy(), want) and near(lse, want_lse)


def test_packed_attention_equals_that_of_host_arrays() -> None:
    rng = np.random.default_rng(2)
    x = draw(rng, DTYPES[0], 40, 2, 16)
    lengths = [0, 13, 13, 37]
    out, lse = anyattn.attention_varlen(*[DeviceArray(x)] * 3, lengths, lengths, causal=True, return_lse=True)
    want, want_lse = anyattn.attention_varlen(x, x, x, lengths, lengths, causal=True, return_lse=True, backend="numpy")
    assert near(out.numpy(), want)
    assert np.array_equal(np.isfinite(lse), np.isfinite(want_lse)) and near(lse[:, :37], want_lse[:, :37])
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        anyattn.attention_varlen(*[DeviceArray(x)] * 3, [0, 9, 3], lengths[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "interleaved", "halves", "paged", "indexed"])
def test_cache_on_the_device_equals_a_cache_on_the_host(dtype: np.dtype[Any], kind: str) -> None:
    """Prefill, then steps, as on a cache on the host: what is only moved has the same bits."""
    rng = np.random.default_rng(3)
    shape, tables = (2, 32, 2, 24), {}
    if kind == "paged":
        shape, tables = (9, 7, 2, 24), {"block_table": np.array([[3, 0, 8, 5], [1, 7, 2, 4]], np.int32)}
    elif kind == "indexed":
        shape, tables = (5, 32, 2, 24), {"cache_batch_idx": np.array([4, 1], np.int32)}
    angles = np.arange(40)[:, None] * np.logspace(0, -3, 9)
    if kind in ("interleaved", "halves", "paged"):
        tables |= {"rotary_cos": np.cos(angles).astype(np.float32), "rotary_sin": np.sin(angles).astype(np.float32)}
        tables["rotary_interleaved"] = kind == "interleaved"
    host = [np.zeros(shape, dtype) for _ in range(2)]
    device = [DeviceArray.zeros(shape, dtype) for _ in range(2)]
    used = np.array([0, 3], np.int32)
    for step in (9, 1, 1, 6):
        q, k, v = (draw(rng, dtype, 2, step, heads, 24) for heads in (6, 2, 2))
        given = {"k": k, "v": v, "cache_seqlens": used, "causal": True, **tables}
        out = anyattn.attention_with_kvcache(DeviceArray(q), *device, **given)
        want = anyattn.attention_with_kvcache(q, *host, **given, backend="numpy")
        assert near(out.numpy(), want)
        assert near(device[0].numpy(), host[0])
        moved = slice(1, None) if "rotary_cos" in tables else slice(None)
        assert [x.numpy().tobytes() for x in device[moved]] == [x.tobytes() for x in host[moved]]
        used = used + step


def test_a_full_cache_is_refused_before_anything_is_written() -> None:
    cache = [DeviceArray.zeros((1, 8, 1, 8), np.float32) for _ in range(2)]
    x = np.ones((1, 3, 1, 8), np.float32)
    with pytest.raises(ValueError, match="cache_seqlens"):
        anyattn.attention_with_kvcache(DeviceArray(x), *cache, k=x, v=x, cache_seqlens=6)
    assert not any(array.numpy().any() for array in cache)


def test_memory_of_deleted_arrays_is_released() -> None:
    array = DeviceArray.zeros((1, 1000, 1, 32), np.float32)
    memory, size = array.engine.memory, array.buffer.size
    before = memory.kept
    del array
    assert memory.kept == before + size
