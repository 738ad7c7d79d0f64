"""Random programs around attention calls: threads, forks, spawned children, signals, exceptions, limits, exits.

Each program follows from its seed (which moments are hit does not) and runs in a process of its own. It must end
in time, as it said that it would, with the bits of one thread in every result, and leave no process behind.

    python tests/stress.py --seconds 3600         (make stress SECONDS=3600)
    python tests/stress.py --only 12              one program
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.paths import python_path

PROGRAM = Path(__file__).parent / "stress_program.py"
BOUND = 150  # seconds that a program may take; a hang ends itself before, with the stack of every thread
GRACE = 10  # and what it started, after it: multiprocessing's own helper ends a moment later
SETTINGS = ("OMP_", "GOMP_", "KMP_", "ANYATTN_NUM_THREADS", "ANYATTN_CPU_TARGET", "ANYATTN_BACKEND")


@contextmanager
def expected_digests() -> Iterator[str]:
    """Give the file with the results of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROGRAM), "--serial"]
        environment = _environment(ANYATTN_NUM_THREADS="1")
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
        path = Path(folder, "expected.json")
        path.write_bytes(done.stdout)
        yield str(path)


def problems_of(seed: int, expected: str) -> tuple[int, list[str]]:
    """Run one program; return its number of calls and a line for everything that is wrong."""
    rng = random.Random(seed)
    variables = {
        "ANYATTN_NUM_THREADS": rng.choice(("", "", "1", "2", "5")),
        "OMP_NUM_THREADS": rng.choice(("", "", "1", "3")),
    }
    variables["OMP_WAIT_POLICY"] = rng.choice(("", "active", "passive"))
    command = [sys.executable, "-X", "faulthandler", str(PROGRAM), str(seed), expected]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = _environment(**{name: value for name, value in variables.items() if value})
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            status = process.wait(BOUND)
        except subprocess.TimeoutExpired:
            status = None
        left = _end_group(process.pid)
        process.wait()
        out.seek(0)
        err.seek(0)
        said, errors = out.read().splitlines(), err.read()
    return _judge(said, status, left, errors)


def _judge(said: list[str], status: int | None, left: bool, errors: str) -> tuple[int, list[str]]:
    if status is None:
        return 0, [f"hangs: it took more than {BOUND} s", errors]
    if not said:
        return 0, [f"ended with status {status} before its end", errors]
    told = json.loads(said[-1])
    wrong = []
    if status != told["status"]:
        wrong += [f"{told['end']}: ended with status {status}, expected {told['status']}", errors]
    if left:
        wrong.append(f"{told['end']}: left a process behind")
    return int(told["calls"]), wrong


def _end_group(group: int) -> bool:
    """Kill what is left of a program; return whether there was something."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return True


def _environment(**variables: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return environment | {
        "PYTHONPATH": python_path(),
        "ANYATTN_REQUIRE": "cpu",
        "ANYATTN_VULKAN_SOFTWARE": "1",
        **variables,
    }


def say(*lines: str) -> None:
    sys.stdout.write("\n  ".join(lines) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="random programs around attention calls")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--only", type=int, metavar="SEED", help="this program alone")
    arguments = parser.parse_args()
    start, seed, calls, failed = time.monotonic(), arguments.seed, 0, 0
    if arguments.only is not None:
        seed, arguments.seconds = arguments.only, 0
    first = seed
    with expected_digests() as expected:
        while True:
            made, wrong = problems_of(seed, expected)
            calls += made
            if wrong:
                failed += 1
                say(f"FAILED: python tests/stress.py --only {seed}", *wrong)
            seed += 1
            if time.monotonic() - start >= arguments.seconds:
                break
    say(f"{seed - first} programs, {calls} calls in {time.monotonic() - start:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
