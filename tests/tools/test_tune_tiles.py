"""`anyattn tune` on the Triton kernels: uphill on any ground, and never to tiles that compute something else.

The kernels run in the interpreter, where every choice of tiles computes the same; the clock is a formula.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anyattn.backends.triton import device as devices
from anyattn.backends.triton import tuning
from anyattn.backends.triton.tuning import CHOICES, PHASES, Tiles
from anyattn.bench import tune_triton
from anyattn.bench.tune_triton import Workload
from anyattn.cli import main
from anyattn.config import settings
from anyattn.definition.errors import CompilationError
from harness.backends import Engine, engines

ARCH = "sm_90"
BEST = (64, 32, 8, 3, 2)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("ANYATTN_CACHE", str(tmp_path / "cache"))
    settings.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    settings.reload()


def slope(found: Tiles) -> float:
    """Slower with every step away from BEST."""
    pairs = zip(CHOICES, found, BEST, strict=True)
    return 1.1 ** sum(abs(choices.index(x) - choices.index(best)) for choices, x, best in pairs)


@pytest.mark.parametrize("start", [(16, 16, 1, 1, 1), (128, 128, 8, 2, 1), BEST], ids=str)
def test_search_ends_at_the_fastest_configuration(start: Tiles) -> None:
    asked: list[Tiles] = []

    def timed(found: Tiles) -> float:
        asked.append(found)
        return slope(found)

    assert tune_triton.climb(start, slope(start), timed) == (BEST, 1.0)
    assert len(set(asked)) == len(asked) and start not in asked, "nothing is measured twice"


def test_noise_does_not_count_as_faster() -> None:
    assert tune_triton.climb(BEST, 1.0, lambda _: 0.98) == (BEST, 1.0)


def test_configurations_that_do_not_run_are_skipped() -> None:
    """A start that does not compile: any neighbour that does is better."""
    found, seconds = tune_triton.climb(
        (128, 64, 8, 2, 1), math.inf, lambda found: slope(found) if found[0] < 128 else math.inf
    )
    assert (found, seconds) == (BEST, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", PHASES)
def test_tuned_tiles_take_precedence_over_the_table(phase: str, dtype: str) -> None:
    found: dict[str, Callable[..., Any]] = {
        "forward": lambda width: tuning.forward(ARCH, dtype, width),
        "decode": lambda width: tuning.decode(ARCH, dtype, width, 100),
        "dkv": lambda width: tuning.backward(ARCH, dtype, width)[0],
        "dq": lambda width: tuning.backward(ARCH, dtype, width)[1],
    }
    before = {(name, width): config(width) for name, config in found.items() for width in (64, 80, 128, 256)}
    assert BEST not in before.values()
    tuning.use_tiles(ARCH, phase, dtype, 128, BEST)
    tuning.save_tiles()
    for (name, width), old in before.items():
        assert found[name](width) == (BEST if name == phase and width in (80, 128) else old)
    assert tuning.forward("sm_80", dtype, 128) != BEST, "another card"


def test_tuned_forward_still_halves_its_key_tile() -> None:
    tuning.use_tiles(ARCH, "forward", "float16", 64, (64, 128, 8, 3, 2))
    assert tuning.forward(ARCH, "bfloat16", 64, heavy=True) == (64, 64, 8, 3, 2)


def test_query_tile_does_not_exceed_the_number_of_queries() -> None:
    tuning.use_tiles(ARCH, "decode", "float16", 64, (64, 128, 8, 3, 2))
    assert [tuning.decode(ARCH, "float16", 64, rows).tile_q for rows in (1, 17, 64)] == [16, 32, 64]


@pytest.mark.parametrize(
    "entry", ["null", "[]", '{"forward 16-bit 64": 3}', '{"forward 16-bit 64": [64, 48, 4, 1, 1]}']
)
def test_malformed_file_is_reported_and_ignored(entry: str, _cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = tuning.forward(ARCH, "float16", 64)
    _cache.mkdir()
    (_cache / tuning.FILE).write_text(f'{{"{ARCH}": {entry}}}')
    settings.reload()
    with caplog.at_level(logging.WARNING, logger="anyattn"):
        assert tuning.forward(ARCH, "float16", 64) == before
    assert len(caplog.messages) == 1 and str(_cache / tuning.FILE) in caplog.messages[0]


interpreter = pytest.mark.skipif(Engine("triton") not in engines(), reason="no Triton here: .ci/run requires it")


def small(phase: str) -> Workload:
    return Workload(phase, "float32", 16, 1, 1 if phase == "decode" else 40, 50, nheads_kv=2)


@interpreter
@pytest.mark.parametrize("phase", PHASES)
def test_tuning_activates_the_fastest_configuration(phase: str) -> None:
    times = iter([4.0, 3.0, 2.0])  # each step is faster, until the clock stands
    result = tune_triton.tune(small(phase), "cpu", 0.1, clock=lambda call: next(times, 2.0))
    assert result.seconds_before == 4.0 and result.seconds == 2.0 and result.tiles != result.before
    assert tune_triton.tiles_in_use(small(phase), devices.INTERPRETER) == result.tiles


@interpreter
@pytest.mark.parametrize("phase", PHASES)
def test_wrong_result_is_reported(phase: str) -> None:
    task = tune_triton.make_task(small(phase), "cpu")
    results = [x for x in task.call() if x is not None]
    assert task.is_right(tuple(results))
    for at, x in enumerate(results):
        wrong = x.clone()
        wrong.view(-1)[-1] += 0.01
        assert not task.is_right((*results[:at], wrong, *results[at + 1 :]))


@interpreter
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a wrong result is not chosen even if it is faster."""
    right = tune_triton.make_task(small("forward"), "cpu")
    count = 0

    def call() -> tuple[Any, ...]:
        nonlocal count
        count += 1
        out, lse = right.call()
        return (out, lse) if count == 1 else (out * 1.001, lse)

    monkeypatch.setattr(tune_triton, "make_task", lambda *_: right._replace(call=call))
    result = tune_triton.tune(small("forward"), "cpu", 0.1, clock=lambda call: 1.0 if count == 1 else 0.5)
    assert result.tiles == result.before and count > 1


@interpreter
def test_tiles_that_do_not_compile_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tune_triton.make_task(small("forward"), "cpu")

    def call() -> tuple[Any, ...]:
        if tuning.forward(devices.INTERPRETER, "float32", 16).num_warps != 4:
            raise CompilationError("out of registers")
        return right.call()

    monkeypatch.setattr(tune_triton, "make_task", lambda *_: right._replace(call=call))
    assert tune_triton.tune(small("forward"), "cpu", 0.1, clock=lambda call: 1.0).seconds == 1.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a described card, on which nothing runs; without a Vulkan device."""
    from anyattn.cli import tune

    reasons = {"cpu": None, "triton": None, "vulkan": "no driver"}
    monkeypatch.setattr(tune, "_missing", reasons.get)
    monkeypatch.setattr(devices, "cards", lambda: [("cuda:0", "Abacus 9000", ARCH)])
    monkeypatch.setattr(tune_triton, "card", lambda _: devices.Device(ARCH, 100, 2**20))
    monkeypatch.setattr(tune_triton, "make_task", lambda *_: tune_triton.Task(lambda: (), {}))
    monkeypatch.setattr(tune_triton, "time_call", lambda call, **_: 1.0)


@pytest.mark.usefixtures("card")
def test_command_writes_its_findings(_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["triton"] and found["triton"]["arch"] == ARCH
    rows = found["triton"]["tiles"]
    assert {row["workload"].split()[0] for row in rows} == set(PHASES) and all(row["seconds"] == 1.0 for row in rows)
    written = json.loads((_cache / tuning.FILE).read_text())
    assert len(written[ARCH]) == len(rows) == 20
    assert main(["tune", "--backend", "triton"]) == 0
    assert "Abacus 9000, sm_90: tiles of queries" in capsys.readouterr().out
    assert main(["tune", "--backend", "vulkan"]) == 1
    assert "vulkan is not available: no driver" in capsys.readouterr().err


@pytest.mark.usefixtures("card")
def test_failing_gpu_writes_no_file(
    _cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune_triton, "time_call", fail)
    assert main(["tune"]) == 1
    assert "triton: CUDA error" in capsys.readouterr().err
    assert not _cache.exists()
