"""The section of `anyattn bench` that compares score functions with built-in arguments."""

from __future__ import annotations

import pytest
import torch

from anyattn.bench import report, score_functions

TINY = (1, 2, 32, 8)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_functions, "flex", lambda *_: None)


@pytest.mark.parametrize("name", score_functions.cases(*TINY[1:3]))
@pytest.mark.parametrize("dtype", score_functions.DTYPES)
def test_functions_and_arguments_agree_and_are_timed(name: str, dtype: str) -> None:
    case = score_functions.cases(*TINY[1:3])[name]
    rows = score_functions.row(name, case, dtype, TINY, 0.0)
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["wrong"] is None
        assert set(row["seconds"]) == {"function", "argument"}


def test_a_function_of_another_result_is_not_timed() -> None:
    case = score_functions.cases(*TINY[1:3])["ALiBi"]
    other = case._replace(arguments={"alibi_slopes": 2 * case.arguments["alibi_slopes"]})
    rows = score_functions.row("ALiBi", other, "float32", TINY, 0.0)
    assert all(row["wrong"] and not row["seconds"] for row in rows)
    (shown, _) = report._score_functions({"functions": rows, "masks": []})
    assert "differ" in shown.rows[0][-1]


def test_masks_that_torch_cannot_hold_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_functions, "LARGEST_EAGER_MASK", 256)
    rows = [score_functions.mask_row(length) for length in (256, 512)]
    assert [set(row["seconds"]) for row in rows] == [{"anyattn", "torch"}, {"anyattn"}]
    functions = score_functions.row("ALiBi", score_functions.cases(*TINY[1:3])["ALiBi"], "float32", TINY, 0.0)
    (_, masks) = report._score_functions({"functions": functions, "masks": rows})
    assert masks.rows[1][-1] == "-"


def test_results_of_torch_are_compared() -> None:
    case = score_functions.cases(*TINY[1:3])["ALiBi"]
    outs = {"function": torch.zeros(3), "argument": torch.full((3,), torch.nan)}
    assert score_functions.wrong(case, outs, "float32")
