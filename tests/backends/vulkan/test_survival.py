"""A Vulkan call survives interrupts, forks and threads: scenarios.py is what the child processes do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.vulkan.common import needs_vulkan, started
from harness.processes import run_python

pytestmark = [
    needs_vulkan,
    pytest.mark.skipif(sys.platform == "win32", reason="forks, and sets an interval timer"),
]

SCRIPT = Path(__file__).parent / "scenarios.py"
EVERYWHERE = ("interrupted_at_random", "interrupted_again", "called_in_a_signal_handler", "forked", "threads_at_once")
HANG_SECONDS = 300


@pytest.mark.parametrize("name", [*EVERYWHERE, "interrupted_at_every_line"])
def test_process_survives_device_failures(name: str) -> None:
    result = run_python("-X", "faulthandler", SCRIPT, name, timeout=HANG_SECONDS, ANYATTN_REQUIRE="")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("driver", ["mesa", "swiftshader"])
def test_process_survives_device_failures_on_other_drivers(driver: str, name: str) -> None:
    started(driver, str(SCRIPT), name, ANYATTN_REQUIRE="")
