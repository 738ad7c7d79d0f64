"""Attention on four devices of the host: XLA divides calls along batch and heads, and every result stays the same."""

from __future__ import annotations

from pathlib import Path

from harness.processes import run_python


def test_calls_are_divided_over_devices() -> None:
    result = run_python(Path(__file__).with_name("jax_devices.py"), ANYATTN_NUM_THREADS="1")
    assert (result.returncode, result.stdout) == (0, "0 faults\n"), result.stdout + result.stderr
