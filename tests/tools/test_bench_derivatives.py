"""The section of `anyattn bench` that compares derivatives with PyTorch's math path."""

from __future__ import annotations

import pytest
import torch

from anyattn.bench import derivatives, report

TINY = (1, 2, 32, 8)


@pytest.mark.parametrize("name", derivatives.PASSES)
def test_both_providers_agree(name: str) -> None:
    results = {provider: derivatives.prepare(provider, name, TINY)() for provider in derivatives.PROVIDERS}
    assert derivatives.wrong(results) is None
    assert derivatives.wrong({**results, "anyattn": [2 * x for x in results["anyattn"]]})


def test_nan_is_a_difference() -> None:
    assert derivatives.wrong({"anyattn": [torch.tensor([torch.nan])], "torch SDPA (math)": [torch.ones(1)]})


def test_derivatives_are_measured_in_a_process_of_its_own() -> None:
    assert derivatives.peak("torch SDPA (math)", "second", (1, 1, 512, 8), 1) > 1


def test_wrong_derivatives_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "PROVIDERS", {"anyattn": lambda q, k, v: q, "other": lambda q, k, v: 2 * q})
    monkeypatch.setattr(derivatives, "PASSES", {"tangents": "tangents"})
    monkeypatch.setattr(derivatives, "QUICK_SHAPE", TINY)
    monkeypatch.setattr(derivatives, "peak", lambda *_: 1.0)
    (row,) = derivatives.measure(1, 0.0, quick=True)
    assert "results differ by" in row["wrong"] and not row["seconds"]
    (table,) = report.tables({"cases": [], "machine": {"cpu_target": ""}, "derivatives": [row]})
    assert {line[2] for line in table.rows} == {"wrong"}
