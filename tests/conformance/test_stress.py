"""A sample of the stress test's programs, and that it sees what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stress
from harness.backends import engines

pytestmark = [
    pytest.mark.skipif(not any(engine.backend == "cpu" for engine in engines()), reason="the native engine's threads"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits address space"),
]
SEEDS = (0, 1, 2, 3, 4, 5, 6, 9)  # every end; 4 takes a Vulkan device where there is one


@pytest.fixture(scope="module")
def expected() -> Iterator[str]:
    with stress.expected_digests() as path:
        yield path


@pytest.mark.parametrize("seed", SEEDS)
def test_random_program_gives_the_expected_bits(seed: int, expected: str) -> None:
    calls, wrong = stress.problems_of(seed, expected)
    assert not wrong, "\n".join(wrong)
    assert calls > 10


def test_different_bits_are_detected(expected: str, tmp_path: Path) -> None:
    digests = json.loads(Path(expected).read_text())
    digests["half"] = "0" * 64
    other = tmp_path / "expected.json"
    other.write_text(json.dumps(digests))
    (first, *rest) = stress.problems_of(0, str(other))[1]
    assert "status 1 before its end" in first and "half gave other bits" in rest[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import time; time.sleep(60)", "hangs"),
        ("import os; os.abort()", "status -6 before its end"),
        ('print(\'{"calls": 1, "end": "exit", "status": 3}\')', "ended with status 0, expected 3"),
        (
            "import subprocess; subprocess.Popen(['sleep', '60'])\n"
            'print(\'{"calls": 1, "end": "return", "status": 0}\')',
            "left a process behind",
        ),
    ],
)
def test_crashes_and_timeouts_are_detected(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(body)
    monkeypatch.setattr(stress, "PROGRAM", program)
    monkeypatch.setattr(stress, "BOUND", 2)
    monkeypatch.setattr(stress, "GRACE", 0.2)
    assert message in "\n".join(stress.problems_of(0, "")[1])
