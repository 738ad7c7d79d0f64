"""Quantised keys and values: scales, quantisation of new keys, gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn.definition.dtypes import DTYPES, QUANTISED, widen
from anyattn.definition.quantised import quantise
from anyattn.testing import numpy_dtype
from harness.backends import Engine
from harness.selection import every_backend

BATCH, ROWS, KEYS, HEADS, HEADS_KV, DIM = 2, 5, 7, 4, 2, 8


def quantised(stored: str = "int8", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {"q": rng.standard_normal((BATCH, ROWS, HEADS, DIM)).astype(np.float32)}
    for name in ("k", "v"):
        codes, scale = quantise(rng.standard_normal((BATCH, KEYS, HEADS_KV, DIM)), stored)
        found |= {name: codes.view(numpy_dtype(stored)), f"{name}_scale": scale}
    return found


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    """Return torch tensors; float8 through its bits."""
    found = {}
    for name, x in given.items():
        kind = getattr(torch, x.dtype.name)
        found[name] = (
            torch.from_numpy(x.view(np.uint8).copy()).view(kind) if kind.itemsize == 1 else torch.from_numpy(x)
        )
    return found


@pytest.mark.parametrize("stored", QUANTISED)
def test_quantisation_error_is_half_a_step(stored: str) -> None:
    x = np.random.default_rng(0).standard_normal((50, 4, 16)).astype(np.float32)
    codes, scale = quantise(x, stored)
    largest = np.abs(x).max(axis=-1)
    np.testing.assert_array_equal(scale, largest / np.float32(DTYPES[stored].largest))
    values = widen(codes, stored) * scale[..., None]
    relative = 2.0 ** -(DTYPES[stored].mantissa + 1)
    step = (
        np.maximum(relative * np.abs(x), scale[..., None] * 2.0**-11)
        if DTYPES[stored].mantissa
        else scale[..., None] / 2
    )
    assert (np.abs(values - x) <= 1.0001 * step).all()


@pytest.mark.parametrize("stored", QUANTISED)
def test_special_rows(stored: str) -> None:
    """Zeros, numbers that are too small for a scale, NaN and infinity give no wrong numbers."""
    x = np.zeros((4, 3), np.float32)
    x[1], x[2, 1], x[3, 2] = 1e-44, np.nan, -np.inf
    codes, scale = quantise(x, stored)
    assert not codes.view(np.uint8).any()
    np.testing.assert_array_equal(scale, np.array([0, 0, np.nan, np.nan], np.float32))


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
@pytest.mark.parametrize("stored", QUANTISED)
def test_special_rows_on_every_backend(stored: str, engine: Engine) -> None:
    cache = np.zeros((1, 4, 1, 3), numpy_dtype(stored))
    new = np.zeros((1, 4, 1, 3), np.float32)
    new[0, 1], new[0, 2, 0, 1], new[0, 3, 0, 2] = 1e-44, np.nan, -np.inf
    scales = np.ones((2, 1, 4, 1), np.float32)
    given = {"k": new, "v": -new, "k_scale": scales[0], "v_scale": scales[1], "cache_seqlens": 0}
    v_cache = cache.copy()
    anyattn.attention_with_kvcache(new[:, :1], cache, v_cache, **given, backend=engine.backend)
    for name, array in (("k", cache), ("v", v_cache)):
        codes, scale = quantise(given[name], stored)
        assert array.tobytes() == codes.tobytes()
        assert given[f"{name}_scale"].tobytes() == scale.tobytes()


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", QUANTISED)
def test_every_code_is_read_exactly(stored: str, dtype: str, engine: Engine) -> None:
    """The output of one key is its value; lse is its score. Infinity and NaN are codes of values too."""
    codes, one = np.arange(256, dtype=np.uint8).view(numpy_dtype(stored)), np.ones((), np.float32)
    values = widen(codes, stored, "float32")
    given: dict[str, Any] = {"k_scale": one, "v_scale": one, "backend": engine.backend}
    finite = np.isfinite(values)
    k, q = codes[finite].reshape(1, -1, 1, 1), np.ones((1, finite.sum(), 1, 1), numpy_dtype(dtype))
    mask = np.eye(finite.sum(), dtype=np.bool_)[None, None]
    _, lse = anyattn.attention(q, k, k, mask=mask, return_lse=True, **given)
    np.testing.assert_allclose(lse.ravel(), values[finite], rtol=1e-6)  # a score times log2(e) is rounded
    out = anyattn.attention(q[:, :1], k[:, :1], codes.reshape(1, 1, 1, 256), **given)
    np.testing.assert_array_equal(out.ravel().astype(np.float32), values)


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
@pytest.mark.parametrize("stored", QUANTISED)
def test_float16_results_of_small_and_of_uneven_scales(stored: str, engine: Engine) -> None:
    """Scales of values may be below the numbers of float16, and far apart."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 70, 2, 16)).astype(np.float16)
    k = rng.standard_normal((1, 90, 1, 16)).astype(np.float32)
    v = rng.standard_normal((1, 90, 1, 16)).astype(np.float32) * 2.0 ** rng.integers(-20, 3, (1, 90, 1, 1))
    (k_stored, k_scale), (v_stored, v_scale) = quantise(k, stored), quantise(v, stored)
    given = {"k": k_stored.view(numpy_dtype(stored)), "v": v_stored.view(numpy_dtype(stored))}
    out = anyattn.attention(q, **given, k_scale=k_scale, v_scale=v_scale, backend=engine.backend)
    plain = (widen(x, stored) * scale[..., None] for x, scale in ((k_stored, k_scale), (v_stored, v_scale)))
    want = anyattn.attention(q.astype(np.float64), *plain, backend="numpy")
    assert np.abs(out - want).max() <= 4 * 2.0**-10 * np.abs(want).max()


@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("backend", [None, "cpu", "numpy"])
def test_torch_equals_numpy(stored: str, backend: str | None) -> None:
    given = quantised(stored)
    out, lse = anyattn.attention(**given, causal=True, return_lse=True, backend=backend)
    got, got_lse = anyattn.attention(**tensors(given), causal=True, return_lse=True, backend=backend)
    np.testing.assert_array_equal(got.numpy(), out)
    np.testing.assert_array_equal(got_lse.numpy(), lse)


@pytest.mark.parametrize("stored", QUANTISED)
def test_only_q_has_a_gradient(stored: str) -> None:
    given = tensors(quantised(stored))
    given["q"].requires_grad_()
    anyattn.attention(**given, causal=True).square().sum().backward()
    plain = {name: (given[name].float() * given[f"{name}_scale"][..., None]).requires_grad_() for name in ("k", "v")}
    q = given["q"].detach().clone().requires_grad_()
    anyattn.attention(q, **plain, causal=True).square().sum().backward()
    torch.testing.assert_close(given["q"].grad, q.grad)


def test_gradients_of_the_cache_are_refused() -> None:
    given = tensors(quantised("float8_e4m3fn"))
    for name in ("k", "k_scale"):
        needs = {**given, name: given[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            anyattn.attention(**needs)
    arrays = quantised()
    saved = dict(zip(("out", "lse"), anyattn.attention(**arrays, return_lse=True), strict=True))
    grads = anyattn.attention_backward(saved["out"], **arrays, **saved)
    assert grads.dq is not None and grads.dk is None and grads.dv is None
    with pytest.raises(anyattn.UnsupportedProblem, match="quantised"):
        anyattn.attention_backward(saved["out"], **arrays, **saved, backend="cpu")


def test_vulkan_refuses_by_name() -> None:
    with pytest.raises(anyattn.UnsupportedProblem, match="k_scale"):
        anyattn.attention(**quantised(), backend="vulkan")


def test_compiled_call_equals_eager() -> None:
    given = tensors(quantised())
    compiled = torch.compile(anyattn.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, causal=True), anyattn.attention(**given, causal=True))


def test_vmap_over_queries_equals_a_loop() -> None:
    given = tensors(quantised())
    queries = torch.stack([given["q"], 2 * given["q"]])
    rest = {name: x for name, x in given.items() if name != "q"}
    got = torch.func.vmap(lambda q: anyattn.attention(q, **rest, causal=True))(queries)
    torch.testing.assert_close(got, torch.stack([anyattn.attention(q, **rest, causal=True) for q in queries]))


BAD = {
    "no k_scale": ({"k_scale": None}, ValueError, "k_scale", "int8"),
    "no v_scale": ({"v_scale": None}, ValueError, "v_scale", "int8"),
    "scale of another shape": ({"k_scale": np.ones((3,), np.float32)}, ValueError, "k_scale", "(3,)", "nheads_kv"),
    "scale of slots transposed": ({"v_scale": np.ones((2, 2, 7), np.float32)}, ValueError, "v_scale", "(2, 2, 7)"),
    "NaN": ({"k_scale": np.array([1, np.nan], np.float32)}, ValueError, "k_scale", "finite", "nan"),
    "infinite": ({"v_scale": float("inf")}, ValueError, "v_scale", "inf"),
    "negative": ({"k_scale": np.full((2, 2), -1, np.float32)}, ValueError, "k_scale", ">= 0", "-1"),
    "integer scale": ({"k_scale": np.ones(2, np.int32)}, TypeError, "k_scale", "int32"),
    "k of another dtype": ({"k": np.zeros((2, 7, 2, 8), np.uint8)}, TypeError, "int8", "uint8"),
    "two dtypes": ({"v": np.zeros((2, 7, 2, 8), np.float32)}, TypeError, "int8", "float32"),
    "scales of float32": (
        {"k": np.zeros((2, 7, 2, 8), np.float32), "v": np.zeros((2, 7, 2, 8), np.float32)}, ValueError, "k_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_scales(name: str) -> None:
    changes, error, *words = BAD[name]
    with pytest.raises(error) as caught:
        anyattn.attention(**{**quantised(), **changes})
    assert all(word in str(caught.value) for word in words), caught.value


def test_values_of_slots_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only slots in use are looked at."""
    from anyattn.config import settings

    given = quantised()
    given["k_scale"][:, 5:] = np.nan
    monkeypatch.setenv("ANYATTN_CHECK", "1")
    settings.reload()
    try:
        anyattn.attention(**given, seqused_k=[5, 5])
        given["k_scale"][1, 4, 0] = -1
        with pytest.raises(ValueError, match="k_scale must be finite and >= 0, got -1"):
            anyattn.attention(**given, seqused_k=[5, 5])
    finally:
        monkeypatch.undo()
        settings.reload()


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
def test_score_functions_take_the_scores_of_scaled_keys(engine: Engine) -> None:
    given = quantised("float8_e4m3fn")
    plain = {name: widen(given[name], "float8_e4m3fn") * given[f"{name}_scale"][..., None] for name in "kv"}
    options: dict[str, Any] = {
        "score_mod": lambda score, b, h, q_idx, kv_idx: score * score - 0.25 * kv_idx,
        "mask_mod": lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 != 1,
    }
    out = anyattn.attention(**given, **options, backend=engine.backend)
    want = anyattn.attention(given["q"].astype(np.float64), **plain, **options, backend="numpy")
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


@every_backend(interpreter=True, only=("cpu", "numpy", "triton"))
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_of_nan_reaches_the_output(name: str, rows: int, engine: Engine) -> None:
    """Slots are not checked, so that a scale that is not a number must show. Another head is not affected."""
    given = quantised()
    given["q"] = given["q"][:, :rows]
    given[name][1, KEYS - 1, 0] = np.nan
    out = anyattn.attention(**given, causal=True, backend=engine.backend)
    group = HEADS // HEADS_KV
    assert np.isnan(out[1, -1, :group]).all()
    assert np.isfinite(out[1, :, group:]).all() and np.isfinite(out[0]).all()


@pytest.mark.parametrize("change", ["heads", "float64", "missing", "read-only"])
def test_an_append_that_is_refused_writes_nothing(change: str) -> None:
    given = quantised()
    x = np.ones((BATCH, 1, HEADS_KV, DIM), np.float32)
    call: dict[str, Any] = {"k": x, "v": x, "k_scale": given["k_scale"], "v_scale": given["v_scale"]}
    if change == "heads":
        call["k_scale"] = np.ones(HEADS_KV, np.float32)
    elif change == "float64":
        call["k_scale"] = given["k_scale"].astype(np.float64)
    elif change == "missing":
        call["k_scale"] = None
    else:
        call["k_scale"] = given["k_scale"].copy()
        call["k_scale"].flags.writeable = False
    before = {name: given[name].tobytes() for name in given}
    with pytest.raises((ValueError, TypeError), match="k_scale"):
        anyattn.attention_with_kvcache(given["q"][:, :1], given["k"], given["v"], cache_seqlens=3, **call)
    assert all(given[name].tobytes() == old for name, old in before.items())


def test_packed_scales_are_of_slots_with_three_dimensions() -> None:
    """A packed array of scales is (1, total_k, nheads_kv), so that it is never taken for (batch, nheads_kv)."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, HEADS, DIM)).astype(np.float32)
    (k, k_scale), (v, v_scale) = (quantise(rng.standard_normal((2, HEADS_KV, DIM)), "int8") for _ in range(2))
    lengths = {"cu_seqlens_q": [0, 2, 4], "cu_seqlens_k": [0, 0, 2]}
    got = anyattn.attention_varlen(q, k, v, **lengths, k_scale=k_scale[None], v_scale=v_scale[None])
    plain = ((x * scale[..., None]).astype(np.float32) for x, scale in ((k, k_scale), (v, v_scale)))
    np.testing.assert_allclose(got, anyattn.attention_varlen(q, *plain, **lengths), rtol=1e-5, atol=1e-6)
    sequences = anyattn.attention_varlen(q, k, v, **lengths, k_scale=k_scale, v_scale=v_scale)
    assert not np.allclose(sequences, got)
