"""Ctrl+C and other signals during long calls: scenarios_signals.py is what the children do."""

from __future__ import annotations

import pytest

from backends.cpu.test_threads import digest, pytestmark, serial

__all__ = ["pytestmark", "serial"]


@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "backward",
        "torch_autograd",
        "numpy_backend",
        "handler_that_returns",
        "handler_that_raises_another",
        "another_thread_goes_on",
    ],
)
def test_signals_during_a_call_do_not_change_results(name: str, serial: str) -> None:
    assert digest(name, "scenarios_signals.py") == serial
