"""Launching without a GPU: kernels are compiled for a card that is not here, and a driver takes them that only records.

A script, as it needs a process in which Triton's interpreter is off. Prints JSON for test_triton.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import aot
import torch
import triton
from triton.backends.compiler import GPUTarget

from anyattn.backends.base import Call
from anyattn.backends.triton.plan import TritonPlan
from anyattn.frameworks.torch.adapter import adapter

ARCH, STREAM = "sm_90", 77
launches: list[dict[str, Any]] = []
loads: list[str] = []


class Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        loads.append(name)
        return 1, 2, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, *arguments: Any) -> None:
        pass


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = list(source.signature.values())

    def __call__(self, *call: Any) -> None:
        grid, stream, arguments = call[:3], call[3], call[-len(self.signature) :]
        pairs = list(zip(_flat(self.signature), _flat(arguments), strict=True))
        launches.append(
            {"grid": grid, "stream": stream, "arguments": [pair for pair in pairs if pair[0] != "constexpr"]}
        )


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in (_flat(value) if isinstance(value, tuple) else [value])]


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    problem = aot.describe(ARCH, "float16", 64, backward=False, right=0)
    plan = TritonPlan(problem)
    arrays = {name: torch.zeros(getattr(problem, name).shape, dtype=torch.float16) for name in "qkv"}
    call = Call(adapter, **arrays)
    call.out, call.lse = torch.zeros(problem.out_shape, dtype=torch.float16), torch.zeros(problem.lse_shape)
    plan.forward(call)
    plan.forward(call)
    TritonPlan(problem).forward(call)
    before = len(loads)
    call.q = torch.zeros(call.q.numel() + 1, dtype=torch.float16)[1:].view(call.q.shape)
    plan.forward(call)
    pointers = [x.data_ptr() for x in (call.q, call.k, call.v, call.out, call.lse)]
    found = {"loads": [before, len(loads)], "launches": launches, "pointers": pointers, "stream": STREAM}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
