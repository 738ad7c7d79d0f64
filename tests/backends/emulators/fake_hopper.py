"""Launching the Hopper kernels without a GPU, by fake_gpu's driver.

A script, as it needs a process in which Triton's interpreter is off. Prints JSON for test_hopper: call -> launches.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton

from anyattn.backends.triton import launch
from anyattn.backends.triton.launch import Kernel
from anyattn.backends.triton.plan import TritonPlan
from anyattn.backends.triton.sm90.plan import HopperKernel
from anyattn.config import settings
from anyattn.definition.problem import Array
from backends.emulators import fake_gpu

Found = dict[str, Any]


def compiled(kernel: Kernel, device: int, aligned: bool) -> Any:
    """Hopper's kernels alone: the portable ones are test_launch's."""
    if isinstance(kernel, HopperKernel):
        return launch.compiled(kernel, device, aligned)
    name = kernel.function.__name__

    def run(*call: Any) -> None:
        fake_gpu.launches.append({"kernel": name, "grid": call[:3], "maps": []})

    return SimpleNamespace(run=run, function=None, packed_metadata=None)


def launched(hopper: str, shift: int = 0, **changes: Any) -> Found:
    """Return the launches of one forward pass and the addresses of its arrays. `shift` moves q by elements."""
    os.environ["ANYATTN_HOPPER"] = hopper
    settings.reload()
    problem = fake_gpu.aot.describe("cuda:0", "float16", 64, right=0, seqlen_q=1000)
    arrays = {name: change for name, change in changes.items() if isinstance(change, Array)}
    scalars = {name: change for name, change in changes.items() if name not in arrays}
    problem = problem.with_arrays(**arrays)._replace(**scalars)
    plan = TritonPlan(problem)
    call = fake_gpu._call(problem, plan)
    call.q = torch.zeros(call.q.numel() + shift, dtype=torch.float16)[shift:].view(call.q.shape)
    fake_gpu.launches.clear()
    plan.run(call)
    pointers = {name: getattr(call, name).data_ptr() for name in ("q", "k", "v", "out")}
    return {"launches": list(fake_gpu.launches), "pointers": pointers}


def main() -> None:
    launch.Kernel._compile = compiled  # type: ignore[method-assign]
    fake_gpu.start("nvidia")
    odd = Array((2, 1000, 8, 64), (1000 * 513, 513, 64, 1), "float16", "cuda:0")
    found = {
        "off": launched("0"),
        "on": launched("1"),
        "address": launched("1", shift=1),
        "strides": launched("1", q=odd),
        "softcap": launched("1", softcap=10.0),
        "few keys": launched("1", alignment="top-left"),
    }
    sys.stdout.write(json.dumps({"triton": triton.__version__, **found}))


if __name__ == "__main__":
    main()
