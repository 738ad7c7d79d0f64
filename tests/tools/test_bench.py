"""`anyattn bench`: what it counts, that it refuses wrong results, names who is absent, and reads what it wrote.

Nothing here asserts a duration.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn import cli
from anyattn.bench import (
    derivatives,
    gate,
    goals,
    markdown,
    memory,
    overhead,
    plots,
    precision,
    providers,
    report,
    run,
    suites,
)
from anyattn.bench.inputs import Inputs
from anyattn.bench.providers import Prepared, Refused, jax_arrays
from anyattn.bench.timing import measure
from anyattn.bench.workloads import Workload, from_json
from anyattn.config import settings
from harness.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
EVERY = [workload for name, workloads in suites.SUITES.items() for workload in workloads()]


def small(workload: Workload) -> Workload:
    """Return the workload with the same features at a tiny size."""
    left, right = workload.window or (None, None)
    cross = workload.seqlen_k != workload.seqlen_q
    return replace(
        workload,
        name="small",
        batch=min(workload.batch, 2),
        nheads=2 * workload.group,
        nheads_kv=2,
        seqlen_q=min(workload.seqlen_q, 45),
        seqlen_k=83 if cross else min(workload.seqlen_k, 45),
        window=workload.window and (left and min(left, 7), right),
        lengths=workload.lengths and (5, 33, 1, 17),
    )


def of(workload: Workload) -> str:
    return workload.label.replace(" ", "-")


def features(workload: Workload) -> tuple[object, ...]:
    """Return all that a provider may refuse or do otherwise: everything about a workload but its sizes."""
    window = workload.window and tuple(side is None for side in workload.window)
    same = (workload.seqlen_q == workload.seqlen_k, workload.head_dim == workload.head_dim_v)
    counts = (workload.group > 1, workload.seqlen_q == 1, bool(workload.lengths), bool(workload.page_size))
    scores = (bool(workload.softcap), bool(workload.dropout_p), workload.bias, workload.mask, workload.alibi)
    names = (workload.dtype, workload.causal, workload.sink, workload.cache, workload.stored, workload.backward)
    return (window, *same, *counts, *scores, *names)


SMALL = list(dict.fromkeys(small(workload) for workload in EVERY))
# One of each combination of features; those that differ in sizes alone are for `make full`.
DISTINCT = list({features(workload): workload for workload in reversed(SMALL)}.values())
each_workload = pytest.mark.parametrize(
    "workload", [one if one in DISTINCT else pytest.param(one, marks=pytest.mark.full) for one in SMALL], ids=of
)


def brute_force(workload: Workload) -> np.ndarray:
    """Return (visible pairs, keys visible to some row), rule by rule."""
    pairs, keys = 0, 0
    for n_q, n_k in workload.sequences():
        i, j = np.arange(n_q)[:, None] + n_k - n_q, np.arange(n_k)
        seen = np.ones((n_q, n_k), bool)
        left, right = workload.window or (None, None)
        if workload.causal:
            seen &= j <= i
        if left is not None:
            seen &= j >= i - left
        if right is not None:
            seen &= j <= i + right
        keys += int(seen.any(axis=0).sum())
        if workload.mask == "padding":
            seen &= j < n_k - n_k // 4
        if workload.mask == "documents":
            seen &= i // -(-n_k // 4) == j // -(-n_k // 4)
        pairs += int(seen.sum())
    return np.array([pairs, keys])


def test_counted_operations_equal_a_brute_force_count() -> None:
    for workload in SMALL:
        pairs, keys = brute_force(workload)
        d, dv, size = workload.head_dim, workload.head_dim_v, 4 if workload.dtype == "float32" else 2
        products = [d, dv, d, d, dv] if workload.backward else [d, dv]  # S, dP, dQ, dK, dV; S, PV
        assert workload.flops == pairs * workload.nheads * 2 * sum(products), of(workload)
        of_key = d + dv + 2 * 4 if workload.stored else (d + dv) * size  # a scale of k and one of v
        assert workload.kv_bytes == keys * workload.nheads_kv * of_key, of(workload)
        assert workload.bytes > workload.kv_bytes, of(workload)


def test_suites_are_distinct_and_cover_every_feature() -> None:
    for name in suites.SUITES:
        workloads = suites.select([name])
        assert workloads
        assert all(workload.suite == name for workload in workloads)
        assert len(set(workloads)) == len(workloads)
        assert len({(workload.name, workload.label) for workload in workloads}) == len(workloads), (
            "two rows that nobody can tell apart"
        )
        for workload in workloads:
            assert workload.flops > 0
            assert workload.nheads % workload.nheads_kv == 0
            assert 2 * workload.kv_bytes < 4 * 2**30
    features = (
        "causal",
        "window",
        "softcap",
        "alibi",
        "sink",
        "dropout_p",
        "bias",
        "mask",
        "lengths",
        "page_size",
        "stored",
    )
    assert all(any(getattr(workload, name) for workload in EVERY) for name in features)
    decode = [workload for workload in suites.bars() if workload.cache and not workload.page_size]
    assert {workload.dtype for workload in decode} == {"float32", "bfloat16"}
    assert all(workload.kv_bytes >= 256 * 2**20 for workload in decode)


def test_case_survives_json() -> None:
    for workload in SMALL:
        assert from_json(json.loads(json.dumps(asdict(workload) | {"label": workload.label}))) == workload


@each_workload
def test_gate_agrees_with_the_definition(workload: Workload) -> None:
    """Check that NumPy in float64 and the gate's own formulas equal the definition to 1e-9."""
    exact = Inputs(replace(workload, dtype="float64", suite="", cache=False, page_size=0))
    with anyattn.backend("numpy"):
        assert answer(providers.by_name("anyattn"), gate.Gate(exact)) == "right"


PRESENT = [
    p for p in providers.PROVIDERS if not p.absent() and p.name != "flex_attention"
]  # which compiles for seconds


@each_workload
def test_providers_pass_the_gate_or_refuse(workload: Workload) -> None:
    """Ours refuses nothing; the others are right about whatever they do not refuse."""
    inputs = Inputs(workload)
    torch.manual_seed(0)  # torch draws its own dropout
    expected = gate.Gate(inputs)
    answers = {provider.name: answer(provider, expected) for provider in PRESENT}
    assert answers["anyattn"] == "right"
    assert not [text for text in answers.values() if text.startswith("wrong")], answers


@pytest.mark.full
@pytest.mark.parametrize("workload", [workload for workload in SMALL if workload.window or workload.softcap], ids=of)
def test_compiled_flex_attention_passes_the_gate(workload: Workload) -> None:
    assert not answer(providers.by_name("flex_attention"), gate.Gate(Inputs(workload))).startswith("wrong")


@each_workload
def test_jax_providers_pass_the_gate_or_refuse(workload: Workload) -> None:
    """They compute on all processors, so they refuse any other number of threads."""
    expected = gate.Gate(Inputs(workload))
    for name in ("jax.nn", "anyattn JAX"):
        found = answer(providers.by_name(name), expected, jax_arrays.processors())
        assert not found.startswith("wrong"), found
        plain = not (workload.packed or workload.cache or workload.page_size or workload.dropout_p)
        assert found == "right" or name == "jax.nn" or not plain, found
        refused = answer(providers.by_name(name), expected, jax_arrays.processors() + 1)
        assert refused.startswith("refused"), refused


def answer(provider: Any, expected: gate.Gate, threads: int = 1) -> str:
    try:
        prepared = run.prepare(provider, expected.inputs, threads)
    except Refused as reason:
        return f"refused: {reason}"
    if prepared is None:
        return "does not arise"
    problem = run.check(expected, prepared)
    return f"wrong: {problem}" if problem else "right"


class Fake:
    """A provider whose result is ours, changed."""

    package = "nothing"

    def __init__(self, change: Callable[[list[torch.Tensor]], list[torch.Tensor]], name: str = "fake") -> None:
        self.name, self.change = name, change

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared:
        ours = OURS.prepare(inputs, threads)
        assert ours is not None
        return Prepared(ours.run, lambda returned: self.change([x.clone() for x in ours.results(returned)]))


OURS = providers.by_name("anyattn")


def nudged(index: int, amount: float) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    def change(results: list[torch.Tensor]) -> list[torch.Tensor]:
        results[index] = results[index] + amount * results[index].abs().max()
        return results

    return change


LARGE = Workload("large", 1, 4, 1024, 32, nheads_kv=2, causal=True)


@pytest.mark.parametrize("size", ["small", "sampled"])
@pytest.mark.parametrize(("backward", "index"), [(False, 0), (True, 0), (True, 1), (True, 2)])
def test_gate_refuses_a_wrong_result(size: str, backward: bool, index: int) -> None:
    workload = replace(LARGE, backward=backward) if size == "sampled" else small(replace(LARGE, backward=backward))
    row = run.run_workload(workload, [Fake(nudged(index, 1e-4)), Fake(nudged(index, 0.0), "right")], 1, 0.0)
    assert set(row["seconds"]) == {"right"}
    assert ": error " in row["wrong"]["fake"]


@pytest.mark.parametrize(
    "change", [lambda x: [x[0][:, 1:]], lambda x: [x[0] * torch.nan], lambda x: [x[0], x[0]]], ids=["shape", "nan", "2"]
)
def test_gate_refuses_malformed_results(change: Any) -> None:
    row = run.run_workload(small(LARGE), [Fake(change)], 1, 0.0)
    assert not row["seconds"]
    assert row["wrong"]["fake"]


@pytest.mark.parametrize("change", [lambda x: [x[0] * 0], lambda x: [x[0] * 1.4]], ids=["zero", "scale"])
def test_gate_refuses_wrong_dropout(change: Any) -> None:
    """Check average and spread of results whose random bits differ from anyattn's."""
    inputs = Inputs(Workload("dropout", 1, 4, 256, 64, dropout_p=0.1))
    expected = gate.Gate(inputs)
    ours = providers.by_name("anyattn").prepare(inputs, 1)
    assert ours is not None
    out = ours.results(ours.run())
    assert expected.wrong(out, own_dropout=True) is None
    assert "spread" in str(expected.wrong(change(out), own_dropout=True))
    plain = Inputs(replace(inputs.workload, dropout_p=0.0))
    without = providers.by_name("torch SDPA").prepare(plain, 1)
    assert without is not None
    assert "spread" in str(expected.wrong(without.results(without.run()), own_dropout=True))


def plan(**changes: Any) -> run.Plan:
    given = {
        "workloads": [small(LARGE)],
        "sections": (),
        "providers": providers.PROVIDERS[:2],
        "threads": 1,
        "seconds": 0.0,
    }
    return run.Plan(**given | changes)


def test_missing_providers_are_named() -> None:
    class Absent(Fake):
        def absent(self) -> str | None:
            return "gone fishing"

    results = run.run(plan(providers=(*providers.PROVIDERS[:1], Absent(nudged(0, 0.0)))))
    assert results["absent"] == {"fake": "gone fishing"}
    assert results["machine"]["versions"]["nothing"] is None
    assert any("gone fishing" in line for line in report.notes(results))
    assert set(results["cases"][0]["seconds"]) == {"anyattn"}


def test_results_are_saved_after_every_step() -> None:
    kept: list[tuple[int, bool]] = []
    wanted = plan(workloads=[small(LARGE)] * 2, sections=("citizen",), providers=providers.PROVIDERS[:1])
    run.run(replace(wanted, keep=lambda results: kept.append((len(results["cases"]), "citizen" in results))))
    assert kept == [(1, False), (2, False), (2, True)]


def test_failure_is_reported_and_the_run_continues() -> None:
    class Broken(Fake):
        def prepare(self, inputs: Inputs, threads: int) -> Prepared:
            raise RuntimeError("out of order")

    row = run.run_workload(small(LARGE), [Broken(nudged(0, 0.0)), OURS], 1, 0.0)
    assert row["refused"] == {"fake": "RuntimeError: out of order"}
    assert set(row["seconds"]) == {"anyattn"}


def test_refusal_is_reported_with_its_reason() -> None:
    results = run.run(plan(workloads=[replace(small(LARGE), softcap=2.0)]))
    assert results["cases"][0]["refused"] == {"torch SDPA": "no softcap"}
    assert any("no softcap" in line for line in report.notes(results))


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Some of everything, as it comes back from JSON."""
    patch = pytest.MonkeyPatch()
    patch.setattr(precision, "SEEDS", 2)
    patch.setattr(derivatives, "QUICK_SHAPE", (1, 2, 32, 8))
    patch.setattr(derivatives, "peak", lambda *_: 1.0)
    patch.setattr("anyattn.bench.score_functions.flex", lambda *_: None)  # torch compiles for seconds
    lengths = [
        replace(small(LARGE), name=f"length {n}", seqlen_q=n, seqlen_k=n, backward=b) for n in (8, 16) for b in (0, 1)
    ]
    decode = Workload("decode", 1, 4, 1, 16, seqlen_k=1024, nheads_kv=2, cache=True)
    sections = tuple(name for name in run.SECTIONS if name not in ("features", "memory"))
    results = run.run(plan(workloads=[*lengths, decode], sections=sections, quick=True))
    patch.undo()
    memory = {"suite": "", "mib": {"anyattn": 1.0, "torch SDPA": 2.0}, "refused": {}, "label": "x"}
    results["memory"] = [asdict(replace(LARGE, backward=True)) | memory]
    results["features"] = {"float32": {"plain": {"median": 1.0}, "sink": {"median": 1.02}}}
    found: dict[str, Any] = json.loads(json.dumps(results))
    return found


def test_results_include_ceilings(measured: dict[str, Any]) -> None:
    for row in measured["cases"]:
        assert row["peak_flops"] > 0
        assert (row["stream_bytes"] is not None) == (row["name"] == "decode")
        assert {"median", "low", "high", "rounds"} == set(row["seconds"]["anyattn"])


def test_results_become_tables(measured: dict[str, Any]) -> None:
    tables = list(report.tables(measured))
    assert len(tables) >= 1 + len(run.SECTIONS)
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
    text = "\n".join(" ".join(row) for table in tables for row in table.rows)
    assert "+2.0%" in text
    assert "decode" in text


def test_results_become_plots(measured: dict[str, Any], tmp_path: Path) -> None:
    found = plots.plot(measured, tmp_path / "all")
    assert [path.name for path in found] == [
        "forward.png",
        "backward.png",
        "roofline.png",
        "memory.png",
        "accuracy.png",
    ]
    (one,) = plots.plot(measured, tmp_path / "one.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (one, *found))


def test_results_become_markdown(measured: dict[str, Any]) -> None:
    assert "| bfloat16 |" in markdown.accuracy(measured)


@pytest.mark.parametrize("name", ["cpu-zen4", "cpu-zen5"])
def test_committed_results_are_read(name: str, tmp_path: Path) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert all(table.rows for table in report.tables(results))
    assert list(report.notes(results)) and plots.plot(results, tmp_path / "committed.png")


def imagined(target: str) -> dict[str, Any]:
    """Return invented results of a full run: one second for each provider, half a second for anyattn."""

    def timings(names: Any) -> dict[str, Any]:
        return {name: {"median": 1.0} for name in names} | {"anyattn": {"median": 0.5}}

    peers = [provider.name for provider in providers.PROVIDERS]
    workloads = [
        asdict(workload)
        | {"flops": workload.flops, "kv_bytes": workload.kv_bytes, "seconds": timings(peers)}
        | {"peak_flops": 4 * workload.flops, "stream_bytes": 4 * workload.kv_bytes}
        for workload in suites.select(["bars"])
    ]
    features = ("plain", "all off", "softcap", "alibi", "sink", "dropout 0.1")
    calls = ("torch SDPA", "anyattn, gradients recorded")
    return {
        "machine": {"cpu_target": target, "threads": 2},
        "cases": workloads,
        "features": {dtype: timings(features) for dtype in ("float32", "bfloat16")},
        "small_calls": {str(shape): timings(calls) for shape in overhead.SMALL},
        "citizen": timings(("attention", "attention after", "mm", "mm after")),
        "derivatives": [{"name": name, "seconds": timings(())} for name in derivatives.PASSES],
        "memory": [
            asdict(workload) | {"label": workload.label, "mib": {"anyattn": 100.0}} for workload in memory.workloads()
        ],
    }


@pytest.mark.parametrize("target", ["avx512bf16", "avx2"])
def test_every_goal_has_a_row(target: str) -> None:
    found = goals.goals(imagined(target))
    assert not [goal for goal in found if goal.value is None]
    values = {(goal.workload, goal.quantity): goal for goal in found}
    shares = [goal for goal in found if goal.quantity in ("share", "of stream read")]
    assert shares
    assert all(goal.value == 0.5 for goal in shares)
    assert all(goal.value == 2.0 for goal in found if goal.quantity in ("torch SDPA", "OpenVINO", "flex_attention"))
    if target != "avx2":
        assert values["sink bfloat16", "over plain"].verdict == "aim"
        assert values["forward float32 dense", "share"].verdict == "MISSED"
        assert values["decode 32:8 float32, B=8", "torch SDPA (packed)"].verdict == "must"
        assert "MISSED" in {goal.verdict for goal in found if goal.workload.startswith("extra memory")}
    assert report.goals_table(imagined(target))


def test_unmeasured_goal_is_not_reached() -> None:
    empty = {"machine": {"cpu_target": "avx512"}, "cases": []}
    assert {goal.verdict for goal in goals.goals(empty)} == {"not measured"}
    assert report.goals_table(empty) is None


def test_memory_is_measured_in_a_separate_process() -> None:
    workload = replace(LARGE, seqlen_q=256, seqlen_k=256)
    assert isinstance(memory.peak("anyattn", workload, 1), float)
    assert memory.peak("torch SDPA (packed)", workload, 1) is None
    assert memory.peak("torch SDPA", replace(workload, softcap=1.0), 1) == "no softcap"


def test_timing_alternates_between_providers() -> None:
    calls: list[str] = []
    timings = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.01, rounds=5)
    assert all(timing.rounds >= 5 and timing.low <= timing.median <= timing.high for timing in timings.values())
    switches = sum(x != y for x, y in pairwise(calls))
    assert switches >= 9


def bench(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments.split()])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_list_prints_without_measuring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "run", None)
    status, out, _ = bench("--list", capsys)
    assert status == 0
    assert all(workload.label in out for name in suites.DEFAULT for workload in suites.SUITES[name]())
    assert all(name in out for name in (*run.SECTIONS, *(provider.name for provider in providers.PROVIDERS)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--filter abacus", "--filter must match a case of models, bars, seeds, lengths, got 'abacus'"),
        ("--suite abacus", "got 'abacus'"),
        ("--peers abacus", "got 'abacus'"),
        ("--threads -1", "--threads must be"),
        ("--seconds -1", "--seconds must be"),
        ("--target abacus", "'abacus'"),
    ],
)
def test_bench_reports_wrong_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, threads = settings.current(), torch.get_num_threads()
    status, _, err = bench(arguments, capsys)
    assert status == 2
    assert message in err
    assert (settings.current(), torch.get_num_threads()) == (before, threads)


def test_bench_writes_results_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        f"--suite quick --filter minilm --peers sdpa --threads 1 --seconds 0.001 --json {tmp_path / 'a' / 'b.json'}"
    )
    status, out, _ = bench(arguments, capsys)
    assert status == 0
    assert "MiniLM" in out
    results = json.loads((tmp_path / "a" / "b.json").read_text())
    assert results["machine"]["threads"] == 1
    assert set(results["cases"][0]["seconds"]) == {"anyattn", "torch SDPA"}


def test_bench_fails_if_anyattn_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", (Fake(nudged(0, 1.0), "anyattn"),))
    monkeypatch.setitem(suites.SUITES, "quick", lambda: [small(LARGE)])
    status, out, _ = bench("--suite quick", capsys)
    assert status == 1
    assert "WRONG" in out
