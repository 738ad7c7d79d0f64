"""The promise at (batch 1, 8 heads, 512, head_dim 64), unit normal inputs, seeds 0 to 9."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.definition import reference
from anyattn.testing import Case, make_inputs, numpy_dtype
from harness.backends import Engine
from harness.selection import every_backend

pytestmark = every_backend()

SEEDS = range(10)


@cache
def drawn(seed: int, dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((1, 8, 512, 64)).astype(numpy_dtype(dtype)).swapaxes(1, 2) for _ in range(3))


@cache
def exact(seed: int, dtype: str, causal: bool) -> np.ndarray:
    inputs = make_inputs(Case("promise", batch=1, seqlen_q=1, seqlen_k=1))
    inputs.arguments = {**dict(zip("qkv", drawn(seed, dtype), strict=True)), "causal": causal}
    return reference.forward(*inputs.describe())[0]


def error(seed: int, dtype: str, causal: bool, out: np.ndarray) -> float:
    return float(np.abs(out.astype(np.float64) - exact(seed, dtype, causal)).max())


@pytest.mark.parametrize("causal", [False, True])
def test_float32_error_is_at_most_that_of_torch(causal: bool, engine: Engine) -> None:
    """The median of the largest errors is below 1e-6, and none is more than 1.5 times that of torch's SDPA."""
    torch = pytest.importorskip("torch")
    errors = []
    for seed in SEEDS:
        q, k, v = drawn(seed, "float32")
        mine = error(seed, "float32", causal, anyattn.attention(q, k, v, causal=causal, backend=engine.backend))
        tensors = [torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
        theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
        assert mine <= 1.5 * error(seed, "float32", causal, theirs.numpy().swapaxes(1, 2)), f"seed {seed}"
        errors.append(mine)
    assert np.median(errors) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_float16_result_is_the_rounded_exact_result(causal: bool, engine: Engine) -> None:
    """Within half a unit in the last place of the exact result, and 2e-4."""
    for seed in SEEDS:
        q, k, v = drawn(seed, "float16")
        out = anyattn.attention(q, k, v, causal=causal, backend=engine.backend).astype(np.float64)
        want = exact(seed, "float16", causal)
        half = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64) / 2
        assert (np.abs(out - want) <= half + 2e-4).all(), f"seed {seed}"


def test_wrong_result_exceeds_its_budget() -> None:
    """The budgets themselves: an error of a few units passes, a dropped key, a NaN or a wrong infinity does not."""
    inputs = make_inputs(Case("budget", seqlen_q=60, seqlen_k=50, causal=True))
    want = testing.expected(inputs)
    good = {name: x.value.astype(np.float32) for name, x in want.items()}
    assert testing.compare(want, good) == []
    for name, index, value in (("out", (0, 30, 0, 0), np.nan), ("out", (0, 0, 0, 0), 1e-30), ("lse", (0, 0, 0), -1e30)):
        bad = {key: x.copy() for key, x in good.items()}
        bad[name][index] = value
        assert [line.split(":")[0] for line in testing.compare(want, bad)] == [name]
    given = inputs.arguments
    without_last = {**given, "k": given["k"][:, :-1], "v": given["v"][:, :-1], "offset": -10}
    inputs.arguments = without_last
    out, lse = reference.forward(*inputs.describe())
    assert len(testing.compare(want, {"out": out.astype(np.float32), "lse": lse.astype(np.float32)})) == 2
    wrong_shape = testing.compare(want, {"out": good["out"][:1], "lse": good["lse"]})
    assert wrong_shape == [f"out: error inf > {want['out'].budget:.3g}"]
