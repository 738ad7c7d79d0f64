"""A good citizen among other threads and processes: scenarios.py and scenarios_memory.py are what the children do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.cpu import scenarios
from harness.backends import engines
from harness.processes import run_python

pytestmark = [
    pytest.mark.skipif(not any(engine.backend == "cpu" for engine in engines()), reason="the native engine's threads"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc"),
]

FOLDER = Path(__file__).parent
MANY = ("beside_torch", "fork_both", "python_threads", "inside_openmp")
SETTINGS = ("OMP_", "GOMP_", "KMP_", "ANYATTN_NUM_THREADS", "ANYATTN_CPU_TARGET", "ANYATTN_BACKEND")


def fresh(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python without this process's settings of threads, where the CPU backend is required."""
    environment = {"ANYATTN_REQUIRE": "cpu", **environment}
    options = ("-X", "faulthandler")
    return run_python(*options, *command, without=SETTINGS, timeout=2 * scenarios.HANG_SECONDS, **environment)


def digest(name: str, script: str = "scenarios.py", **environment: str) -> str:
    result = fresh(FOLDER / script, name, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def serial() -> str:
    return digest("serial", ANYATTN_NUM_THREADS="1")


@pytest.mark.parametrize(
    "name",
    [
        "beside_torch",
        "own_pool_beside_torch",
        "torch_comes_later",
        "one_thread_of_torch",
        "one_thread_of_torch_in_python_threads",
        "data_loader_fork",
        "data_loader_spawn",
        "fork_own_pool",
        "fork_openmp",
        "fork_both",
        "torch_comes_after_the_fork",
        "multiprocessing_fork",
        "fork_beside_a_caller",
        "fork_beside_a_caller_with_torch",
        "python_threads",
        "first_calls_at_once",
        "short_lived_threads",
        "python_threads_and_reloads",
        "inside_openmp",
        "interrupted",
        "unloaded",
        "exit_from_a_thread",
        "one_processor",
    ],
)
def test_results_do_not_depend_on_other_threads_and_processes(name: str, serial: str) -> None:
    assert digest(name) == serial


@pytest.mark.parametrize(
    ("name", "threads"),
    [("python_threads", "1"), ("python_threads", "2"), *((name, "3") for name in MANY)],
)
def test_results_do_not_depend_on_the_number_of_threads(name: str, threads: str, serial: str) -> None:
    assert digest(name, ANYATTN_NUM_THREADS=threads) == serial


@pytest.mark.parametrize("value", ["1", "2", " 2 , 3", "300"])
def test_first_number_of_omp_num_threads_is_used(value: str, serial: str) -> None:
    """Nested levels too: the first number is ours."""
    assert digest("by_omp_num_threads", OMP_NUM_THREADS=value) == serial


@pytest.mark.parametrize(
    "name", ["no_memory_numpy", "no_memory_torch", "no_memory_for_threads", "no_memory_for_scratch"]
)
def test_failed_allocations_do_not_change_later_results(name: str, serial: str) -> None:
    assert digest(name, "scenarios_memory.py") == serial
