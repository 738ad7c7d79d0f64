"""The C ABI checks for itself: wrong fields around valid arrays give a status and a message, no crash, no write."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.backends import Engine, engines
from harness.processes import run_python


@pytest.mark.parametrize("target", [engine.target for engine in engines() if engine.backend == "cpu"])
@pytest.mark.parametrize("kind", ["wrong", "garbage"])
def test_wrong_fields_return_a_status_and_write_nothing(kind: str, target: str) -> None:
    """Run in a separate process, because a wrong field may crash it."""
    Engine("cpu", target).use()
    result = run_python(Path(__file__).parent / "boundary.py", kind)
    assert result.returncode == 0, result.stderr[-3000:]
    calls, refused = (int(word) for word in result.stdout.split())
    assert calls > 400
    assert refused == calls if kind == "wrong" else 0 < refused < calls
