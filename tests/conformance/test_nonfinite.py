"""NaN and infinity in inputs: in whatever depends on them, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyattn.testing import Case, CaseInputs, make_inputs
from harness.backends import Engine
from harness.checks import run
from harness.selection import every_backend

pytestmark = every_backend()

# Two sequences, two KV heads with two query heads each; several tiles of rows and keys.
CASE = Case("nonfinite", seqlen_q=150, seqlen_k=170, nheads_kv=2, group=2, head_dim=40, dlse=True)
DTYPES = ("float32", "bfloat16", "float16", "float64")
B, H, KV = 1, 2, 1  # the sequence, query head and KV head that are hit; head 3 reads the same keys
ROW, KEY, COLUMN = 70, 90, 5
Results = dict[str, np.ndarray]


def hit(inputs: CaseInputs, engine: Engine, name: str, index: tuple[int, ...], value: float) -> Results:
    """The results of both directions with one number replaced; `inputs` is as before afterwards."""
    array = {"dout": inputs.dout, "dlse": inputs.dlse}.get(name, inputs.arguments.get(name))
    assert array is not None
    old, array[index] = array[index], value
    try:
        return both(inputs, engine)
    finally:
        array[index] = old


def both(inputs: CaseInputs, engine: Engine) -> Results:
    return run(inputs, "forward", engine) | run(inputs, "backward", engine)  # type: ignore[return-value]


@pytest.fixture(params=DTYPES)
def inputs(request: pytest.FixtureRequest) -> CaseInputs:
    return make_inputs(replace(CASE, dtype=request.param))


def same(got: Results, clean: Results, name: str, where: tuple[object, ...]) -> None:
    """Check that the results have the same bits at these indices."""
    assert got[name][where].tobytes() == clean[name][where].tobytes(), name


def others(axis: int, index: int, size: int) -> tuple[object, ...]:
    """All indices of an axis but one."""
    return (*[slice(None)] * axis, [i for i in range(size) if i != index])


def unrelated(got: Results, clean: Results) -> None:
    """The other sequence, and the other KV head of the same one."""
    for name in ("out", "dq", "dk", "dv"):
        same(got, clean, name, (0,))
        heads = slice(0, 2) if name in ("out", "dq") else slice(0, 1)
        same(got, clean, name, (B, slice(None), heads))
    same(got, clean, "lse", (0,))
    same(got, clean, "lse", (B, slice(0, 2)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_query_changes_only_its_own_results(inputs: CaseInputs, engine: Engine, value: float) -> None:
    """Check that NaN stays in the query's own row and head."""
    clean, got = both(inputs, engine), hit(inputs, engine, "q", (B, ROW, H, COLUMN), value)
    assert np.isnan(got["out"][B, ROW, H]).all() and not np.isfinite(got["lse"][B, H, ROW])
    assert np.isnan(got["dq"][B, ROW, H]).all()
    unrelated(got, clean)
    for name in ("out", "dq"):
        same(got, clean, name, (B, others(0, ROW, 150)[0], H))
        same(got, clean, name, (B, slice(None), 3))
    same(got, clean, "lse", (B, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_value_changes_only_its_column(inputs: CaseInputs, engine: Engine, value: float) -> None:
    """One column of the output of every row that sees it; no score."""
    clean, got = both(inputs, engine), hit(inputs, engine, "v", (B, KEY, KV, COLUMN), value)
    column = got["out"][B, :, 2:, COLUMN]
    assert np.isnan(column).all() if np.isnan(value) else (column == np.inf).all()
    same(got, clean, "out", (B, slice(None), slice(2, 4), others(0, COLUMN, 40)[0]))
    same(got, clean, "lse", ())
    unrelated(got, clean)


def test_nan_in_a_key_changes_only_its_own_head(inputs: CaseInputs, engine: Engine) -> None:
    """Every row that sees it; in the gradients every key of the head too."""
    clean, got = both(inputs, engine), hit(inputs, engine, "k", (B, KEY, KV, COLUMN), np.nan)
    assert np.isnan(got["out"][B, :, 2:]).all() and np.isnan(got["lse"][B, 2:]).all()
    for name in ("dq", "dk", "dv"):
        assert np.isnan(got[name][B, :, 2:] if name == "dq" else got[name][B, :, 1]).all(), name
    unrelated(got, clean)


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_nan_in_a_gradient_changes_only_the_gradients_that_depend_on_it(
    inputs: CaseInputs, engine: Engine, name: str
) -> None:
    """The row's dq and every key that it sees; dlse reaches no value."""
    index = (B, ROW, H, COLUMN) if name == "dout" else (B, H, ROW)
    clean, got = both(inputs, engine), hit(inputs, engine, name, index, np.nan)
    for result in ("out", "lse"):
        same(got, clean, result, ())
    assert np.isnan(got["dq"][B, ROW, H]).all() and np.isnan(got["dk"][B, :, KV]).all()
    same(got, clean, "dq", (B, others(0, ROW, 150)[0], H))
    same(got, clean, "dq", (B, slice(None), 3))
    values = others(0, COLUMN, 40)[0] if name == "dout" else slice(None)
    same(got, clean, "dv", (B, slice(None), KV, values))
    if name == "dout":
        assert np.isnan(got["dv"][B, :, KV, COLUMN]).all()
    unrelated(got, clean)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_query_whose_scores_are_all_lowest_attends_to_no_key(engine: Engine, dtype: str) -> None:
    """A row of lowest numbers gives zeros and lse -inf, however many tiles of keys it has."""
    inputs = make_inputs(replace(CASE, dtype=dtype, bias="full"))
    bias = np.zeros((2, 4, 150, 170), np.float32)
    bias[:, :, 7] = np.finfo(np.float32).min
    inputs.arguments["bias"] = bias
    got = run(inputs, "forward", engine)
    assert not got["out"][:, 7].any() and np.isneginf(got["lse"][:, :, 7]).all()
    assert np.isfinite(got["lse"][:, :, :7]).all()


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_lowest_number_masks_a_key_like_minus_infinity(engine: Engine, lowest: float) -> None:
    """Beside other keys and alone: a row of nothing else sees no key. Gradients and all."""
    case = replace(CASE, dtype="float32", bias="full")
    inputs, masked = make_inputs(case), make_inputs(replace(case, bias="", mask="full"))
    hidden = np.random.default_rng(0).random((2, 4, 150, 170)) < 0.5
    hidden[:, :, 7] = True
    inputs.arguments["bias"] = np.where(hidden, np.float32(lowest), np.float32(0))
    masked.arguments.update({name: inputs.arguments[name] for name in ("q", "k", "v")}, mask=~hidden)
    masked.dout, masked.dlse = inputs.dout, inputs.dlse
    got, want = both(inputs, engine), both(masked, engine)
    assert not got["out"][:, 7].any() and np.isneginf(got["lse"][:, :, 7]).all() and not got["dq"][:, 7].any()
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
    assert not got["dbias"][hidden].any()
