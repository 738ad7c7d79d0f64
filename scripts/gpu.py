"""Run all tests and timings that need a GPU, and write JSON after every part.

    python scripts/gpu.py --json build/gpu.json
        [--part cases|claims|hopper|speed|decode|latency|memory|training|peers|tune]

Needs torch 2.11 or later with a GPU, Triton 3.6 or later and NumPy. Each part takes less than ten minutes. Claims are
compared with the CPU engine (ANYATTN_LIBRARY names its library). Exit status 1: a result is wrong; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_times
import torch

import anyattn
from anyattn.runtime.dispatch import get

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

Found = dict[str, Any]
LONGEST = 540  # seconds limit of a part
SECONDS = 0.1  # per choice of tiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="output file; an existing file keeps its other parts")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all of them")
    arguments = parser.parse_args()
    reason = get("triton").available()
    if reason or not torch.cuda.is_available():
        sys.stderr.write(f"no GPU: {reason or 'torch finds none through CUDA or ROCm'}\n")
        return 2
    found: Found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    found["machine"] = machine()
    wrong = False
    for part in arguments.part or PARTS:
        found[part] = run(PARTS[part])
        wrong |= bool(found[part].get("wrong"))
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{part}: {found[part]['summary']}, {found[part]['seconds']:.0f} s", flush=True)
    return 1 if wrong else 0


def run(part: Callable[[str], Found], device: str = "cuda") -> Found:
    """Return the findings and the seconds of a part. A part that raises counts as wrong, and the next parts run."""
    start = time.perf_counter()
    try:
        found = part(device)
    except Exception:
        found = {"summary": "broken", "wrong": {"exception": traceback.format_exc()}}
    return found | {"seconds": time.perf_counter() - start}


def machine() -> Found:
    """Return the description of the machine that the numbers belong to, with its limits measured in the same run."""
    import triton

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"anyattn": anyattn.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "ceilings": gpu_times.ceilings("cuda"),
    }


def cases(device: str) -> Found:
    """Run the common matrix, including the cases that are too large for the interpreter."""
    from device.arrays import compare
    from harness.cases import ALL

    outcomes = {case.name: compare(case, device) for case in ALL}
    wrong = {name: lines for name, lines in outcomes.items() if lines and lines != ["refused"]}
    refused = [name for name, lines in outcomes.items() if lines == ["refused"]]
    summary = f"{len(ALL) - len(wrong) - len(refused)} agree, {len(wrong)} wrong, {len(refused)} refused"
    return {"summary": summary, "wrong": wrong, "refused": refused}


def claims(device: str) -> Found:
    from device.claims import EVERYWHERE, GPU

    wrong = {}
    every = {**EVERYWHERE, **GPU}
    for name, claim in every.items():
        try:
            claim(device)
        except Exception:
            wrong[name] = traceback.format_exc()
    return {"summary": f"{len(every) - len(wrong)} hold, {len(wrong)} do not", "wrong": wrong}


def hopper(device: str) -> Found:
    """Run the kernels for Hopper in a separate process, which is ended if it hangs."""
    from anyattn.backends.triton.device import device as card
    from anyattn.backends.triton.sm90 import ARCH

    if card(device).arch != ARCH:
        return {"summary": f"not for {card(device).arch}"}
    try:
        command = [sys.executable, str(TESTS / "device" / "hopper.py")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"summary": f"did not end within {LONGEST} s", "wrong": {"launches": "hang, or are slow"}}
    said = done.stdout.splitlines()[-1:] or ["broken"]
    wrong = {"output": done.stdout[-4000:], "errors": done.stderr[-4000:]}
    return {"summary": said[0], "wrong": wrong if done.returncode else {}}


def tune(device: str) -> Found:
    """Tune the tiles of 16-bit dtypes for the tables of tuning.py, within the time limit. Nothing is stored."""
    from anyattn.bench import tune_triton

    halves = [workload for workload in tune_triton.workloads(device) if workload.dtype != "float32"]
    results, start = [], time.perf_counter()
    for workload in halves:
        if time.perf_counter() - start > LONGEST / 2:
            break
        results.append(tune_triton.tune(workload, device, SECONDS))
        print(results[-1], flush=True)
    anyattn.settings.reload()
    gains = [result.seconds_before / result.seconds for result in results]
    summary = f"{len(results)} of {len(halves)} workloads, up to {max(gains):.2f}x faster than the table's tiles"
    rows = [{**result._asdict(), "workload": result.workload._asdict()} for result in results]
    return {"summary": summary, "rows": rows}


PARTS: dict[str, Callable[[str], Found]] = {
    "cases": cases, "claims": claims, "hopper": hopper, **gpu_times.PARTS, "tune": tune,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
