"""The public functions on torch tensors: what they accept and refuse, random state, gradients on demand, KV cache."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anyattn
from harness import tensors

normal = partial(tensors.normal, dtype=torch.float32)
leaf = partial(tensors.leaf, dtype=torch.float32)
qkv = partial(tensors.qkv, dtype=torch.float32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def numpy(x: Tensor) -> np.ndarray:
    x = x.detach()
    if x.dtype is torch.bfloat16:
        import ml_dtypes

        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True, "return_lse": True},
    "scores": {"bias": normal(4, 5, 7), "mask": normal(2, 1, 1, 7) > -1, "sink": normal(4), "softcap": 2.0},
    "tables": {"seqused_k": torch.tensor([7, 3]), "leftpad_k": torch.tensor([1, 0]), "window": (3, 1), "offset": 2},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "kv_indices": {"kv_indices": torch.tensor([6, -1, 2, 2, 0]).expand(2, 5, 5), "causal": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_results_have_the_bits_of_numpy_arrays(kind: str, dtype: torch.dtype) -> None:
    options = {**OPTIONS[kind], "return_lse": True}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    options = {
        name: x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    got = anyattn.attention(*qkv(dtype=dtype), **options)
    alone = anyattn.attention(*qkv(dtype=dtype), **options | {"return_lse": False})
    assert numpy(alone).tobytes() == numpy(got[0]).tobytes()
    options = {name: numpy(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    want = anyattn.attention(*[numpy(x) for x in qkv(dtype=dtype)], **options)
    for one, other in zip(got, want, strict=True):
        assert one.is_contiguous()
        assert numpy(one).dtype == other.dtype
        assert numpy(one).tobytes() == other.tobytes()


def test_explicit_functions_agree_with_autograd() -> None:
    q, k, v = qkv(grad=True)
    bias, sink = leaf(5, 7), leaf(4)
    options: dict[str, Any] = {"bias": bias, "sink": sink, "causal": True, "dropout_p": 0.1, "seed": 3}
    out, lse = anyattn.attention(q, k, v, **options, return_lse=True)
    dout, dlse = normal(*out.shape, seed=7), normal(*lse.shape, seed=8)
    want = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), (q, k, v, bias, sink))
    again = anyattn.attention_forward(q, k, v, **options)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    assert not again[0].requires_grad
    grads = anyattn.attention_backward(dout, q, k, v, *again, dlse=dlse, **options)
    for one, other in zip(grads[:5], want, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


def test_absent_gradients_are_none() -> None:
    out, lse = anyattn.attention_forward(*qkv())
    grads = anyattn.attention_backward(out, *qkv(), out, lse)
    assert grads.dbias is None
    assert grads.dsink is None


def test_flash_attention_accepts_heads_first() -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv())
    want = anyattn.attention(*qkv(), causal=True).transpose(1, 2)
    assert torch.equal(anyattn.flash_attention(q, k, v), want)


def test_explain_accepts_tensors() -> None:
    explanation = anyattn.explain(*qkv(), causal=True)
    assert explanation.chosen in anyattn.get_available_backends()


def test_manual_seed_reproduces_the_dropout() -> None:
    torch.manual_seed(5)
    one = anyattn.attention(*qkv(), dropout_p=0.5)
    other = anyattn.attention(*qkv(), dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(one, anyattn.attention(*qkv(), dropout_p=0.5))
    assert not torch.equal(one, other)


def test_int_seed_is_a_random_state() -> None:
    one = anyattn.attention(*qkv(), dropout_p=0.5, seed=-3)
    assert torch.equal(one, anyattn.attention(*qkv(), dropout_p=0.5, rng_state=torch.tensor([-3, 0])))
    assert not torch.equal(one, anyattn.attention(*qkv(), dropout_p=0.5, rng_state=torch.tensor([-3, 1])))
    assert torch.equal(one, torch.compile(anyattn.attention, backend="eager")(*qkv(), dropout_p=0.5, seed=-3))


def test_numbers_of_numpy_are_numbers() -> None:
    q, k, v = qkv()
    want = anyattn.attention(q, k, v, offset=2, window=(3, 0))
    assert torch.equal(anyattn.attention(q, k, v, offset=np.int64(2), window=(np.int32(3), np.int64(0))), want)
    want = anyattn.attention_with_kvcache(q, k, v, cache_seqlens=6)
    assert torch.equal(anyattn.attention_with_kvcache(q, k, v, cache_seqlens=np.int32(6)), want)


def test_forward_with_dropout_requires_a_random_state() -> None:
    with pytest.raises(ValueError, match="rng_state"):
        anyattn.attention_forward(*qkv(), dropout_p=0.5)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sink", "q sink", "k v bias", ""])
def test_gradients_are_computed_only_for_inputs_that_require_them(wanted: str) -> None:
    given = {**dict(zip("qkv", qkv(), strict=True)), "bias": normal(1, 4, 1, 7), "sink": normal(4)}
    full = {name: x.clone().requires_grad_() for name, x in given.items()}
    anyattn.attention(**full).square().sum().backward()
    given = {name: x.clone().requires_grad_(name in wanted.split()) for name, x in given.items()}
    out = anyattn.attention(**given)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.square().sum().backward()
    for name, x in given.items():
        assert (x.grad is None) == (name not in wanted.split())
        if x.grad is not None:
            assert torch.equal(x.grad, full[name].grad)  # type: ignore[arg-type]


def test_no_gradients_are_recorded_under_no_grad() -> None:
    with torch.no_grad():
        assert anyattn.attention(*qkv(grad=True)).grad_fn is None
    with torch.inference_mode():
        assert anyattn.attention(*qkv()).is_inference()
    out, lse = anyattn.attention(*qkv(grad=True), return_lse=True)
    assert out.requires_grad
    assert lse.requires_grad


def test_changed_input_is_detected_in_the_backward() -> None:
    q, k, v = qkv(grad=True)
    shifted = k + 1
    out = anyattn.attention(q, shifted, v)
    shifted.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_uses_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.runtime import execute

    seen = []
    original = execute.backward
    monkeypatch.setattr(execute, "backward", lambda *args, **kwargs: seen.append(args[4]) or original(*args, **kwargs))
    with anyattn.backend("numpy"):
        out = anyattn.attention(*qkv(grad=True))
    out.sum().backward()
    assert seen == ["numpy"]


def test_copies_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = qkv()
    strange = q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert strange.stride(-1) != 1
    with caplog.at_level(logging.DEBUG, logger="anyattn"):
        assert torch.equal(anyattn.attention(strange, k, v), anyattn.attention(q, k, v))
    assert "q is copied" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="anyattn"):
        anyattn.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, bias=normal(4, 5, 1).expand(2, 4, 5, 7))
    assert "copied" not in caplog.text


@pytest.mark.parametrize("batch, rows, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty_sizes_have_finite_gradients(batch: int, rows: int, keys: int) -> None:
    q = torch.ones(batch, rows, 4, 8, requires_grad=True)
    k, v = torch.ones(batch, keys, 2, 8, requires_grad=True), torch.ones(batch, keys, 2, 6, requires_grad=True)
    sink = torch.ones(4, requires_grad=True)
    out, lse = anyattn.attention(q, k, v, sink=sink, return_lse=True)
    assert out.shape == (batch, rows, 4, 6)
    if keys == 0:
        assert not out.any()
        assert (lse == 1).all()
    (out.sum() + lse.sum()).backward()
    for x in (q, k, v, sink):
        assert x.grad is not None
        assert x.grad.isfinite().all()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "numpy k": ({"k": np.zeros((2, 7, 2, 8), np.float32)}, TypeError, "k must be a torch.Tensor"),
    "no k": ({"k": None}, TypeError, "k must be a torch.Tensor"),
    "no v": ({"v": None}, TypeError, "v must be a torch.Tensor"),
    "numpy bias": ({"bias": np.zeros((5, 7), np.float32)}, TypeError, "bias must be a torch.Tensor"),
    "numpy table": ({"seqused_k": np.array([7, 7])}, TypeError, "seqused_k must be a torch.Tensor"),
    "list table": ({"offset": [1, 2]}, TypeError, "offset must be a torch.Tensor"),
    "float table": ({"seqused_k": torch.tensor([7.0, 7.0])}, TypeError, "seqused_k must hold integers"),
    "huge table": ({"offset": torch.tensor([1, 2**40])}, ValueError, "offset must fit in int32"),
    "huge offset": ({"offset": 2**31}, ValueError, "offset must fit in int32"),
    "table values": ({"seqused_k": torch.tensor([7, 8])}, ValueError, "seqused_k"),
    "dtypes": ({"k": torch.zeros(2, 7, 2, 8, dtype=torch.float64)}, TypeError, "one dtype"),
    "integers": ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int32)}, TypeError, "int32"),
    "rank": ({"q": torch.zeros(5, 4, 8)}, ValueError, "q must have 4 dimensions"),
    "no dimension": ({"q": torch.zeros(())}, ValueError, "q must have 4 dimensions"),
    "device": ({"k": torch.zeros(2, 7, 2, 8, device="meta")}, ValueError, "k must be on q.s device cpu, got meta"),
    "mask dtype": ({"mask": torch.zeros(5, 7)}, TypeError, "mask"),
    "mask shape": ({"mask": torch.zeros(3, 7, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "integer sink": ({"sink": torch.zeros(4, dtype=torch.int64)}, TypeError, "sink must be floating point"),
    "slopes with gradients": ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "alibi_slopes"),
    "seed and state": ({"seed": 1, "rng_state": torch.tensor([1, 0])}, ValueError, "cannot be combined"),
    "seed range": ({"seed": 2**64, "dropout_p": 0.1}, ValueError, "64-bit"),
    "seed of text": ({"seed": "1", "dropout_p": 0.1}, TypeError, "seed must be an integer, got '1'"),
    "dropout of text": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a real number, got '0.1'"),
    "window of tensors": ({"window": (torch.tensor([1, 2]), 0)}, ValueError, "window must hold integers"),
    "state dtype": ({"rng_state": torch.zeros(2), "dropout_p": 0.1}, TypeError, "rng_state"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_wrong_arguments_are_refused_by_name(what: str, grad: bool) -> None:
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        anyattn.attention(**{**dict(zip("qkv", qkv(grad=grad), strict=True)), **change})


def test_mixing_numpy_and_torch_arrays_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match="k must be a NumPy array"):
        anyattn.attention(q.numpy(), k, v.numpy())
    out, lse = anyattn.attention_forward(q, k, v)
    with pytest.raises(TypeError, match=r"lse must be a torch\.Tensor"):
        anyattn.attention_backward(out, q, k, v, out, lse.numpy())


NEW = (normal(2, 2, 4, 8, seed=1), normal(2, 2, 2, 8, seed=2), normal(2, 2, 2, 8, seed=3))


def step(cache: list[Tensor], lengths: Any, **options: Any) -> Tensor:
    """Return two rows of two sequences, after `lengths` keys in the cache."""
    q, k, v = NEW
    out: Tensor = anyattn.attention_with_kvcache(q, *cache, k=k, v=v, cache_seqlens=lengths, causal=True, **options)
    return out


ROTARY = {"rotary_cos": normal(16, 3, seed=4).cos(), "rotary_sin": normal(16, 3, seed=4).sin()}
CACHES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dense": ((2, 16, 2, 8), {}),
    "rotary": ((2, 16, 2, 8), ROTARY),
    "halves": ((2, 16, 2, 8), {**ROTARY, "rotary_interleaved": False}),
    "entries": ((4, 16, 2, 8), {"cache_batch_idx": torch.tensor([3, 1])}),
    "paged": ((9, 4, 2, 8), {**ROTARY, "block_table": torch.tensor([[8, 1, 0, 3], [2, 4, 6, -1]])}),
}


@pytest.mark.parametrize("kind, dynamic", [*[(kind, True) for kind in CACHES], ("paged", False)])
def test_compiled_kvcache_equals_eager_kvcache(kind: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    shape, options = CACHES[kind]
    eager, compiled = ([normal(*shape, seed=seed) for seed in (5, 6)] for _ in range(2))
    call = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in range(2):
        lengths = torch.tensor([9 + 2 * n, 2 * n], dtype=torch.int32)
        torch.testing.assert_close(call(compiled, lengths, **options), step(eager, lengths, **options))
    torch.testing.assert_close(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_kvcache_in_inductor_writes_to_the_right_slots(dynamic: bool) -> None:
    """Views of a stacked cache, made inside the graph: a mutating operator is misplaced there."""
    torch._dynamo.reset()
    eager, compiled = normal(3, 2, 2, 16, 2, 8), normal(3, 2, 2, 16, 2, 8)

    def layers(stack: Tensor, lengths: Tensor) -> Tensor:
        return sum(step([stack[n, 0], stack[n, 1]], lengths) for n in range(3))  # type: ignore[return-value]

    call = torch.compile(layers, fullgraph=True, dynamic=dynamic)
    for n in range(3):
        lengths = torch.tensor([2 * n, 5 + n], dtype=torch.int32)
        torch.testing.assert_close(call(compiled, lengths), layers(eager, lengths))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", CACHES)
def test_kvcache_writes_what_numpy_writes(kind: str) -> None:
    shape, options = CACHES[kind]
    cache = [normal(*shape, seed=seed) for seed in (5, 6)]
    arrays = [x.numpy().copy() for x in cache]
    out = step(cache, torch.tensor([9, 3]), **options)
    q, k, v = (x.numpy() for x in NEW)
    options = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in options.items()}
    want = anyattn.attention_with_kvcache(q, *arrays, k=k, v=v, cache_seqlens=np.array([9, 3]), causal=True, **options)
    for one, other in zip((out, *cache), (want, *arrays), strict=True):
        assert one.numpy().tobytes() == other.tobytes()


def test_kvcache_counts_as_an_in_place_change() -> None:
    cache = [normal(2, 16, 2, 8, seed=seed) for seed in (5, 6)]
    versions = [x._version for x in cache]
    step(cache, 4)
    assert all(x._version > before for x, before in zip(cache, versions, strict=True))
    with torch.inference_mode():
        step([torch.zeros(2, 16, 2, 8), torch.zeros(2, 16, 2, 8)], 4)


def test_kvcache_refuses_gradients() -> None:
    cache = [leaf(2, 16, 2, 8, seed=seed) for seed in (5, 6)]
    with pytest.raises(ValueError, match="must not require a gradient, because none flows"):
        step(cache, 4)
    with torch.no_grad():
        step(cache, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_full_kvcache_changes_nothing(compiled: bool) -> None:
    torch._dynamo.reset()
    cache = [normal(2, 16, 2, 8, seed=seed) for seed in (5, 6)]
    before = [x.clone() for x in cache]
    call = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    for lengths in (torch.tensor([3, 15]), torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match="cache_seqlens"):
            call(cache, lengths)
    with pytest.raises(ValueError, match="cache_batch_idx"):
        call(cache, torch.tensor([3, 3]), cache_batch_idx=torch.tensor([0, 2]))
    assert all(torch.equal(x, y) for x, y in zip(cache, before, strict=True))


def test_kvcache_that_attention_would_copy_is_refused() -> None:
    strange = torch.zeros(2, 16, 8, 2).transpose(2, 3)
    with pytest.raises(ValueError, match="k_cache must be contiguous"):
        step([strange, torch.zeros(2, 16, 2, 8)], 4)


def test_kvcache_under_autocast_keeps_its_dtype() -> None:
    cache = [torch.zeros(2, 16, 2, 8, dtype=torch.bfloat16) for _ in range(2)]
    q, k, v = normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = anyattn.attention_with_kvcache(q, *cache, k=k, v=v, cache_seqlens=3)
    assert out.dtype is torch.bfloat16
    assert torch.equal(cache[1][:, 3:4], v.to(torch.bfloat16))


def test_kvcache_accepts_new_keys_of_any_strides() -> None:
    """Copied for the engine; and a refused attention leaves the cache as it was here too."""
    q, k, v = (x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2) for x in NEW)
    one, other = ([normal(2, 16, 2, 8, seed=seed) for seed in (5, 6)] for _ in range(2))
    out = anyattn.attention_with_kvcache(q, *one, k=k, v=v, cache_seqlens=3, causal=True, **ROTARY)
    assert torch.equal(out, step(other, 3, **ROTARY))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="sink"):
        anyattn.attention_with_kvcache(q, *one, k=k, v=v, cache_seqlens=5, sink=normal(3))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
