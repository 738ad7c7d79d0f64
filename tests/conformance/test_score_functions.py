"""Tests of score_mod and mask_mod: every function of the gallery, on every backend, dense and packed."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn import testing
from anyattn.definition import accuracy
from anyattn.runtime import dispatch
from harness.backends import ADDS_CAPTURED, COMPUTES_FUNCTIONS, Engine
from harness.score_gallery import BATCH, HEADS, N_K, N_Q, Entry, arrays, dense, gallery
from harness.selection import every_backend

NAMES = tuple(gallery())


@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_are_those_of_the_whole_matrix(name: str) -> None:
    """NumPy backend in float64 through autograd, with the gradients of captured tensors."""
    entry = gallery()[name]
    q, k, v, dout = arrays()
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(entry.leaves)
    functions = {"score_mod": entry.score_mod, "mask_mod": entry.mask_mod}
    out, lse = anyattn.attention(q, k, v, return_lse=True, backend="numpy", **functions)  # type: ignore[arg-type]
    found = torch.autograd.grad((out * dout).sum(), leaves, materialize_grads=True)
    torch.set_default_dtype(torch.float64)  # products of integers and numbers are float64 then, as in the definition
    try:
        want, want_lse = dense(q, k, v, entry)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.autograd.grad((want * dout).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-14, atol=1e-13)
    for got, one, leaf in zip(found, expected, leaves, strict=True):
        # captured arrays are float32, and so are their gradients
        eps = torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(got, one, rtol=0, atol=float(64 * eps * (1 + one.abs().max())))


def is_slow(engine: Engine, name: str, dtype: str) -> bool:
    """Return whether Triton's interpreter takes seconds for what another dtype and another function show."""
    return engine.interpreted and dtype == "bfloat16" and name not in ("causal", "table", "relative", "mixed")


@every_backend(interpreter=True, only=COMPUTES_FUNCTIONS, full_if=is_slow)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gallery_is_computed_within_its_error_budgets(name: str, dtype: str, engine: Engine) -> None:
    check(*of_gallery(name, dtype, engine.backend in ADDS_CAPTURED), engine)


@lru_cache(maxsize=2)
def of_gallery(
    name: str, dtype: str, captured: bool
) -> tuple[dict[str, Any], torch.Tensor, list[dict[str, accuracy.Expected]]]:
    """Return the arguments of a call, dout, and what the definition computes, once for all engines.

    captured: with the gradients of captured arrays.
    """
    entry = of_name(name, captured)
    q, k, v, dout = arrays(getattr(torch, dtype))
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "score_mod": entry.score_mod, "mask_mod": entry.mask_mod}
    return arguments, dout, expected(arguments, dout)


def of_name(name: str, captured: bool) -> Entry:
    """Return an entry of the gallery. captured: its arrays have gradients."""
    entry = gallery()[name]
    for leaf in entry.leaves:
        leaf.requires_grad_(captured)
    return entry


@every_backend(interpreter=True, only=COMPUTES_FUNCTIONS)
@pytest.mark.parametrize("name", ["causal", "documents", "relative_clamped", "mixed", "per_head", "temperature"])
def test_packed_sequences_count_from_their_own_start(name: str, engine: Engine) -> None:
    entry = of_name(name, engine.backend in ADDS_CAPTURED)
    q, k, v, dout = (x[0] for x in arrays(torch.float32))
    boundaries = torch.tensor([[0, 30, N_Q], [0, 41, N_K]], dtype=torch.int32)
    arguments = {
        **{"q": q, "k": k, "v": v, "score_mod": entry.score_mod, "mask_mod": entry.mask_mod},
        **{"cu_seqlens_q": boundaries[0], "cu_seqlens_k": boundaries[1]},
    }
    check(arguments, dout, expected(arguments, dout), engine)


@every_backend(interpreter=True, only=COMPUTES_FUNCTIONS)
def test_functions_combine_with_every_other_argument(engine: Engine) -> None:
    entry = of_name("mixed", engine.backend in ADDS_CAPTURED)
    q, k, v, dout = arrays(torch.float32)
    arguments = {
        **{"q": q, "k": k, "v": v, "score_mod": entry.score_mod, "mask_mod": gallery()["dilated"].mask_mod},
        **{"window": (40, 3), "softcap": 5.0, "alibi_slopes": torch.rand(HEADS), "sink": torch.randn(HEADS)},
        **{"bias": torch.randn(1, HEADS, 1, N_K), "mask": torch.rand(N_Q, N_K) < 0.9, "dropout_p": 0.2, "seed": 3},
        **{"seqused_k": torch.tensor([70, 83]), "leftpad_k": torch.tensor([3, 0])},
    }
    check(arguments, dout, expected(arguments, dout), engine)


def reciprocal_is_positive(zero: float, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return 1.0 / torch.where(kv_idx == 0, zero, 1.0) > 0


@every_backend(interpreter=True, only=COMPUTES_FUNCTIONS)
def test_the_sign_of_a_zero_is_part_of_a_function(engine: Engine) -> None:
    q, k, v, _ = arrays(torch.float32)
    for zero, first in ((0.0, 0), (-0.0, 1)):  # the reciprocal of -0.0 is -inf, so the first key is masked
        mask_mod = partial(reciprocal_is_positive, zero)
        found = anyattn.attention(q, k, v, mask_mod=mask_mod, backend=engine.backend)
        want = anyattn.attention(q, k[:, first:], v[:, first:], backend="numpy")
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


@every_backend(only=("cpu",))
def test_gradients_of_captured_arrays_do_not_depend_on_threads(engine: Engine) -> None:
    entry = gallery()["mixed"]
    q, k, v, dout = (x.repeat(1, 4, 1, 1) for x in arrays(torch.float32))  # enough work for several threads
    results = []
    try:
        for threads in (1, 2, 3):
            engine.use(threads)
            functions = {"score_mod": entry.score_mod, "mask_mod": entry.mask_mod, "backend": "cpu"}
            out, lse = anyattn.attention_forward(q, k, v, **functions)  # type: ignore[arg-type]
            grads = anyattn.attention_backward(dout, q, k, v, out, lse, **functions)  # type: ignore[arg-type]
            results.append((grads.dcaptured, grads.dq, grads.dk))
    finally:
        engine.use()
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def expected(arguments: dict[str, Any], dout: torch.Tensor) -> list[dict[str, accuracy.Expected]]:
    """Return what the definition computes in both passes, with the budgets of `accuracy`."""
    problem, given = testing.describe(arguments)
    backward = accuracy.expected_backward(problem, given, dout.double().numpy(), None)
    return [accuracy.expected_forward(problem, given), backward]


def check(
    arguments: dict[str, Any], dout: torch.Tensor, passes: list[dict[str, accuracy.Expected]], engine: Engine
) -> None:
    """Compare both passes with what is expected."""
    out, lse = anyattn.attention_forward(**arguments, backend=engine.backend)
    grads = anyattn.attention_backward(dout, out=out, lse=lse, **arguments, backend=engine.backend)
    every = {"out": out, "lse": lse, **grads._asdict()}
    results = {name: testing.to_numpy(x) for name, x in every.items() if x is not None}
    assert not [line for one in passes for line in accuracy.check(one, results)]


def test_numpy_arrays_are_captured_by_a_wrapper() -> None:
    q, k, v, dout = (x.numpy() for x in arrays())
    table = np.random.default_rng(0).standard_normal((HEADS, N_Q + N_K))
    relative = anyattn.captured(table)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.tanh(score) + relative[h, q_idx - kv_idx + N_K]

    out, lse = anyattn.attention_forward(q, k, v, score_mod=score_mod)
    found = anyattn.attention_backward(dout, q, k, v, out, lse, score_mod=score_mod).dcaptured
    leaf = torch.from_numpy(table).requires_grad_()
    entry = Entry(lambda s, b, h, i, j: torch.tanh(s) + leaf[h, i - j + N_K])
    want = dense(*(torch.from_numpy(x) for x in (q, k, v)), entry)[0]
    (expected,) = torch.autograd.grad((want * torch.from_numpy(dout)).sum(), leaf)
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.reshape(table.shape), expected.numpy(), rtol=0, atol=1e-12)


def test_a_read_out_of_bounds_raises_before_any_work() -> None:
    q, k, v, _ = arrays()
    bias = torch.zeros(N_K)
    with pytest.raises(ValueError, match=r"shape \(83,\) must be from 0 to 82 on axis 0, got -82 to 74"):
        anyattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[i - j])


def test_integers_beyond_int32_raise() -> None:
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="must fit in int32, got mul"):
        anyattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i * 100000) * (j * 1000))
    large = torch.tensor([0, 2**32])
    with pytest.raises(ValueError, match="must fit in int32, got 0 to 4294967296"):
        anyattn.attention(q, k, v, mask_mod=lambda b, h, i, j: large[b] >= j)


def test_recognized_functions_have_second_derivatives() -> None:
    q, k, v, _ = arrays()
    results = []
    capped = {"score_mod": lambda s, b, h, i, j: 2 * torch.tanh(s / 2)}
    for arguments in (capped, {"softcap": 2.0}):
        leaf = q.clone().requires_grad_()
        out = anyattn.attention(leaf, k, v, **arguments)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert torch.equal(*results)


def test_samples_of_vmap_count_their_own_batch() -> None:
    q, k, v, _ = arrays()
    samples, shift = torch.stack([q, 2 * q]), torch.tensor([0.5, -0.5])

    def call(x: torch.Tensor) -> torch.Tensor:
        return anyattn.attention(x, k, v, score_mod=lambda s, b, h, i, j: s * (b + 1) + shift[b] * (i - j))

    assert torch.equal(torch.vmap(call)(samples), torch.stack([call(x) for x in samples]))


def test_a_backend_without_a_pass_of_score_functions_names_those_that_compute_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch.get("vulkan"), "score_functions", frozenset())
    q, k, v, _ = arrays(torch.float32)
    with pytest.raises(
        NotImplementedError, match="vulkan: has no forward pass with score_mod and mask_mod; computed by cpu"
    ):
        anyattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s, backend="vulkan")


def test_a_backend_without_gradients_of_captured_arrays_refuses_them_by_name() -> None:
    q, k, v, dout = arrays(torch.float32)
    table = torch.ones(N_K, requires_grad=True)
    out, lse = torch.zeros_like(dout), torch.zeros(BATCH, HEADS, N_Q)
    with pytest.raises(NotImplementedError, match="vulkan: has no gradients of captured arrays; computed by cpu"):
        anyattn.attention_backward(
            dout, q, k, v, out, lse, score_mod=lambda s, b, h, i, j: s * table[j], backend="vulkan"
        )
