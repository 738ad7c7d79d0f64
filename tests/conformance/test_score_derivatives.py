"""Tangents and second derivatives of calls with score_mod and mask_mod: every function of the gallery."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn import testing
from anyattn.definition import accuracy, derivative_accuracy, derivatives
from anyattn.definition.inputs import Tangents
from anyattn.frameworks.torch.score_functions import traced
from harness.backends import DERIVES_FUNCTIONS, Engine
from harness.score_gallery import BATCH, HEADS, N_K, N_Q, Entry, arrays, dense, gallery
from harness.selection import every_backend

NAMES = tuple(gallery())


def directions(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a tangent of every array that may have one."""
    generator = torch.Generator().manual_seed(1)
    likes = {name: given[name] for name in ("q", "k", "v", "bias", "sink") if name in given}
    return {f"t{name}": torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in likes.items()}


def functions(entry: Entry) -> dict[str, Any]:
    return {"score_mod": entry.score_mod, "mask_mod": entry.mask_mod}


@pytest.mark.parametrize("name", NAMES)
def test_definition_equals_double_autograd_of_the_whole_matrix(name: str) -> None:
    entry = gallery()[name]
    *qkv, dout = arrays()
    q, k, v = qkv
    along = directions({"q": q, "k": k, "v": v})
    captured = [x for x in traced(entry.score_mod, entry.mask_mod).arrays if x.requires_grad]  # in their order
    assert len(captured) == len(entry.leaves)
    leaves = [x.requires_grad_() for x in (*qkv, dout)] + captured
    torch.set_default_dtype(torch.float64)
    try:
        out, _ = dense(q, k, v, entry)
        first = torch.autograd.grad((out * dout).sum(), qkv, create_graph=True, materialize_grads=True)
        product = sum((grad * t).sum() for grad, t in zip(first, along.values(), strict=True))
        want = torch.autograd.grad(product, leaves, materialize_grads=True)
    finally:
        torch.set_default_dtype(torch.float32)
    problem, given = testing.describe({"q": q.detach(), "k": k.detach(), "v": v.detach(), **functions(entry)})
    tangents = {name: x.numpy() for name, x in along.items()}
    got = derivatives.second(problem, given, dout.detach().numpy(), None, tangents)
    tout, tlse = derivatives.tangent(problem, given, tangents)
    assert np.array_equal(tout, got["ddout"]) and np.array_equal(tlse, got["ddlse"])
    for result, one in zip(("dq", "dk", "dv", "ddout"), want[:4], strict=True):
        np.testing.assert_allclose(got[result], one.detach().numpy(), rtol=0, atol=1e-12)
    if captured:
        flat = torch.cat([x.double().reshape(-1) for x in want[4:]]).detach().numpy()
        eps = max(torch.finfo(x.dtype).eps for x in captured)  # of torch's gradients
        np.testing.assert_allclose(got["dcaptured"], flat, rtol=0, atol=64 * eps * (1 + np.abs(flat).max()))


@every_backend(only=DERIVES_FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gallery_is_computed_within_its_error_budgets(name: str, dtype: str, engine: Engine) -> None:
    check(*of_gallery(name, dtype), engine)


@lru_cache(maxsize=2)
def of_gallery(name: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, accuracy.Expected]]:
    """Return the arguments of a call, the other arrays, and what the definition computes, once for all engines."""
    q, k, v, dout = arrays(getattr(torch, dtype))
    arguments = {"q": q, "k": k, "v": v, **functions(gallery()[name])}
    return prepared(arguments, dout)


def prepared(
    arguments: dict[str, Any], dout: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any], dict[str, accuracy.Expected]]:
    """Return the arguments, dout and the tangents, and what the definition computes."""
    problem, given = testing.describe(arguments)
    along = directions(arguments)
    wide = {name: x.double().numpy() for name, x in along.items()}
    expected = derivative_accuracy.expected_second(problem, given, dout.double().numpy(), None, wide)
    expected |= derivative_accuracy.expected_tangent(problem, given, wide) | accuracy.expected_forward(problem, given)
    return arguments, {"dout": dout, **along}, expected


def check(
    arguments: dict[str, Any], others: dict[str, Any], expected: dict[str, accuracy.Expected], engine: Engine
) -> None:
    """Compare the three passes with what is expected."""
    arguments = {**arguments, "backend": engine.backend}
    along = {name: x for name, x in others.items() if name in Tangents._fields}
    together = anyattn.attention_forward_tangent(**along, **arguments)
    compare(expected, dict(zip(("out", "lse", "tout", "tlse"), together, strict=True)))
    out, lse, _, _ = together
    tangent = anyattn.attention_tangent(out=out, lse=lse, **along, **arguments)
    compare(expected, dict(zip(("tout", "tlse"), tangent, strict=True)))
    second = anyattn.attention_second(out=out, lse=lse, **others, **arguments)
    compare(expected, {name: x for name, x in second._asdict().items() if x is not None})


def compare(expected: dict[str, accuracy.Expected], got: dict[str, Any]) -> None:
    found = {name: testing.to_numpy(x) for name, x in got.items()}
    assert not accuracy.check({name: expected[name] for name in found}, found)


@every_backend(only=DERIVES_FUNCTIONS)
@pytest.mark.parametrize("name", ["documents", "relative_clamped", "mixed", "per_head", "temperature"])
def test_packed_sequences_count_from_their_own_start(name: str, engine: Engine) -> None:
    q, k, v, dout = (x[0] for x in arrays(torch.float32))
    boundaries = torch.tensor([[0, 30, N_Q], [0, 41, N_K]], dtype=torch.int32)
    packed = {"cu_seqlens_q": boundaries[0], "cu_seqlens_k": boundaries[1]}
    check(*prepared({"q": q, "k": k, "v": v, **functions(gallery()[name]), **packed}, dout), engine)


def with_everything() -> tuple[dict[str, Any], torch.Tensor]:
    """Return the arguments of a call with every other argument, and dout."""
    entry = gallery()["mixed"]
    q, k, v, dout = arrays(torch.float32)
    arguments = {
        **{"q": q, "k": k, "v": v, "score_mod": entry.score_mod, "mask_mod": gallery()["dilated"].mask_mod},
        **{"window": (40, 3), "softcap": 5.0, "alibi_slopes": torch.rand(HEADS), "sink": torch.randn(HEADS)},
        **{"bias": torch.randn(1, HEADS, 1, N_K), "mask": torch.rand(N_Q, N_K) < 0.9, "dropout_p": 0.2, "seed": 3},
        **{"seqused_k": torch.tensor([70, 83]), "leftpad_k": torch.tensor([3, 0])},
    }
    return arguments, dout


@every_backend(only=DERIVES_FUNCTIONS)
def test_functions_combine_with_every_other_argument(engine: Engine) -> None:
    check(*prepared(*with_everything()), engine)


@every_backend(only=DERIVES_FUNCTIONS)
def test_derivatives_that_are_nan_at_masked_pairs_change_nothing(engine: Engine) -> None:
    weight = torch.tensor(0.3, requires_grad=True)

    def score_mod(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        root = torch.sqrt((q_idx - kv_idx) * 1.0)  # NaN above the diagonal
        return root * weight * (s + s**2) + torch.exp(s) / torch.where(q_idx >= kv_idx, 4.0, 0.0)

    q, k, v, dout = arrays(torch.float32)
    causal = gallery()["causal"].mask_mod
    call, others, expected = prepared({"q": q, "k": k, "v": v, "score_mod": score_mod, "mask_mod": causal}, dout)
    assert all(np.isfinite(want.value).all() for name, want in expected.items() if name != "lse")
    check(call, others, expected, engine)


SIZES = (
    (1, 1, 1),
    (3, 0, 2),
    (0, 3, 1),
    (1, 129, 3),
    (17, 65, 1),
    (70, 3, 2),
)  # queries, keys, query heads per KV head


@every_backend(only=DERIVES_FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_that_fill_no_tile(sizes: tuple[int, int, int], dtype: str, engine: Engine) -> None:
    n_q, n_k, group = sizes
    generator = torch.Generator().manual_seed(6)
    shapes = ((n_q, 2 * group, 5), (n_k, 2, 5), (n_k, 2, 9), (n_q, 2 * group, 9))
    q, k, v, dout = (torch.randn(2, *shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)
    functions = {
        "score_mod": lambda s, b, h, i, j: s * torch.sigmoid(s) + 0.1 * (h + b) * torch.cos(s),
        "mask_mod": lambda b, h, i, j: (i + 2 * j) % 3 != 0,
    }
    check(*prepared({"q": q, "k": k, "v": v, "softcap": 4.0, **functions}, dout), engine)


@every_backend(only=DERIVES_FUNCTIONS)
def test_rows_with_a_large_lse_are_summed_again(engine: Engine) -> None:
    q, k, v, dout = arrays(torch.float32)
    arguments = {"q": q, "k": k, "v": v, "score_mod": lambda s, b, h, i, j: 40 * s + 3 * s**2 + 200}
    _, _, expected = found = prepared(arguments, dout)
    assert expected["lse"].value.min() > 128
    check(*found, engine)


@every_backend(only=DERIVES_FUNCTIONS)
def test_functions_combine_with_selected_keys(engine: Engine) -> None:
    entry = gallery()["mixed"]
    q, k, v, dout = arrays(torch.float32)
    generator = torch.Generator().manual_seed(2)
    slots = torch.randint(-1, N_K, (BATCH, N_Q, 19), generator=generator, dtype=torch.int32)
    check(*prepared({"q": q, "k": k, "v": v, "kv_indices": slots, **functions(entry)}, dout), engine)


@every_backend(only=DERIVES_FUNCTIONS)
def test_absent_tangents_are_zeros(engine: Engine) -> None:
    arguments, dout = with_everything()
    arguments["backend"] = engine.backend
    zeros = {name: torch.zeros_like(x) for name, x in directions(arguments).items()}
    out, lse = anyattn.attention_forward(**arguments)
    for name, tangent in directions(arguments).items():
        one = {name: tangent}
        results = [
            (
                *anyattn.attention_tangent(out=out, lse=lse, **along, **arguments),
                *anyattn.attention_second(dout, out=out, lse=lse, **along, **arguments),
            )
            for along in (one, zeros | one)
        ]
        assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@every_backend(only=("cpu",))
def test_results_do_not_depend_on_threads(engine: Engine) -> None:
    entry = gallery()["mixed"]
    q, k, v, dout = (x.repeat(1, 4, 1, 1) for x in arrays(torch.float32))  # enough work for several threads
    arguments = {"q": q, "k": k, "v": v, **functions(entry), "backend": "cpu"}
    results = []
    try:
        for threads in (1, 2, 3):
            engine.use(threads)
            out, lse, *tangent = anyattn.attention_forward_tangent(**directions(arguments), **arguments)
            second = anyattn.attention_second(dout, out=out, lse=lse, **directions(arguments), **arguments)
            results.append((*tangent, *[x for x in second if x is not None]))
    finally:
        engine.use()
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@every_backend(interpreter=True, refusals=True, only=("triton", "vulkan"))
@pytest.mark.parametrize("pass_name", testing.DERIVATIVES)
def test_other_backends_refuse_by_name(pass_name: str, engine: Engine) -> None:
    q, k, v, dout = arrays(torch.float32)
    lse = torch.zeros(BATCH, HEADS, N_Q)
    saved = {} if pass_name == "forward_tangent" else {"out": torch.zeros_like(dout), "lse": lse}
    saved |= {"dout": dout} if pass_name == "second" else {}
    given = {
        "q": q,
        "k": k,
        "v": v,
        "tq": q,
        "backend": engine.backend,
        "score_mod": lambda s, b, h, i, j: torch.sin(s),
    }
    computed = f"with score_mod and mask_mod; computed by {', '.join(DERIVES_FUNCTIONS)}"
    message = "has no .* pass" if engine.backend == "vulkan" else computed
    with pytest.raises(anyattn.UnsupportedProblem, match=message):
        getattr(anyattn, f"attention_{pass_name}")(**saved, **given)
