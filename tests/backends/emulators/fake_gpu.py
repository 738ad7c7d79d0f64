"""Launching without a GPU: kernels are compiled for a card that is not here, Triton's own launchers turn arguments into
a kernel's parameters, and fake_driver.c, in place of CUDA's or HIP's driver, has these recorded.

A script, as it needs a process in which Triton's interpreter is off. Prints JSON for test_launch: scenario -> findings.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import aot
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from anyattn.backends.base import Call
from anyattn.backends.triton.backend import TritonBackend
from anyattn.backends.triton.plan import TritonPlan
from anyattn.definition.errors import CompilationError
from anyattn.definition.passes import ARRAYS
from anyattn.definition.problem import Problem
from anyattn.frameworks.torch.adapter import adapter

Found = dict[str, Any]
launches: list[Found] = []
loads: list[str] = []


class Map(ctypes.Structure):
    """fake_driver.c's tensor map."""

    _fields_ = (
        ("address", ctypes.c_uint64), ("rank", ctypes.c_uint32), ("swizzle", ctypes.c_uint32),
        ("shape", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4), ("box", ctypes.c_uint32 * 5),
    )  # fmt: skip

    def describe(self) -> Found:
        """Outermost first, in elements of 2 bytes."""
        shape, box = (list(numbers[: self.rank][::-1]) for numbers in (self.shape, self.box))
        strides = [step // 2 for step in self.strides[: self.rank - 1][::-1]]
        return {"address": self.address, "shape": shape, "strides": [*strides, 1], "box": box}


CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)
MAP_BYTES, SCRATCH_BYTES = 128, [8, 8]


def declared(kernel: Any) -> list[int]:
    """Bytes of each parameter, as the machine code has them."""
    if "ptx" in kernel.asm:
        entry = kernel.asm["ptx"].split(".entry ")[1].split("\n)")[0]
        found = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?", entry)
        return [int(bits) // 8 * int(count or 1) for bits, count in found]
    arguments = kernel.asm["amdgcn"].split(".amdgpu_metadata")[1].split(".args:")[1].split(".group_segment")[0]
    return [int(size) for size in re.findall(r"\.size: +(\d+)", arguments)]


@CALLBACK
def recorded(grid: Any, stream: int, function: int, parameters: Any) -> None:
    """Record a launch, and check its parameters against the declaration of the kernel."""
    kernel = next(kernel for kernel in compiled if kernel.function == function)
    kinds = [kind for kind in _flat(kernel.src.signature.values()) if kind != "constexpr"]
    plain = [CTYPES.get(kind, ctypes.c_uint64) for kind in kinds if not kind.startswith("tensordesc")]
    wanted, sizes = declared(kernel), [ctypes.sizeof(kind) for kind in plain]
    assert wanted[: len(sizes)] == sizes and wanted[-2:] == SCRATCH_BYTES, (sizes, wanted)
    assert len(plain) < len(kinds) or len(wanted) == len(sizes) + 2
    values = [kind.from_address(address).value for kind, address in zip(plain, parameters, strict=False)]
    maps = [Map.from_address(parameters[at]).describe() for at, size in enumerate(wanted) if size == MAP_BYTES]
    launches.append({
        "kernel": kernel.src.fn.__name__, "grid": grid[:3], "device": driver.device, "stream": stream,
        "arguments": list(zip(kinds, values, strict=False)), "maps": maps,
    })  # fmt: skip


class Vendor(NamedTuple):
    """The library that Triton looks for, the variable that says where, and a card."""

    library: str
    variable: str
    target: GPUTarget
    properties: SimpleNamespace


COMMON = {"multi_processor_count": 132, "L2_cache_size": 2**25}
VENDORS = {
    "nvidia": Vendor(
        "libcuda.so.1", "TRITON_LIBCUDA_PATH", GPUTarget("cuda", 90, 32), SimpleNamespace(major=9, minor=0, **COMMON)
    ),
    "amd": Vendor(
        "libamdhip64.so",
        "TRITON_LIBHIP_PATH",
        GPUTarget("hip", "gfx942", 64),
        SimpleNamespace(major=9, minor=4, gcnArchName="gfx942:sramecc+", **COMMON),
    ),
}


def load_fake_driver(vendor: Vendor, folder: Path) -> None:
    """fake_driver.c, compiled and loaded under the name by which Triton asks for the vendor's."""
    library, source = folder / vendor.library, Path(__file__).resolve().parent / "fake_driver.c"
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{vendor.library}", source, "-o", library], check=True)
    os.environ[vendor.variable] = str(folder if vendor.library.endswith(".1") else library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).fake_on_launch(recorded)


compiled: list[Any] = []
_compile = triton.compile


def _keep(*arguments: Any, **options: Any) -> Any:
    compiled.append(_compile(*arguments, **options))
    return compiled[-1]


class Driver:
    """Triton's utilities and launchers, on devices and streams that the scenarios choose."""

    def __init__(self, name: str) -> None:
        self.vendor, self.folder = VENDORS[name], tempfile.TemporaryDirectory()
        load_fake_driver(self.vendor, Path(self.folder.name))
        backend = importlib.import_module(f"triton.backends.{name}.driver")
        prefix = {"nvidia": "Cuda", "amd": "HIP"}[name]
        self.utils, self.launcher_cls = getattr(backend, f"{prefix}Utils")(), getattr(backend, f"{prefix}Launcher")
        self.device, self.stream = 0, 77
        self._load, self.utils.load_binary = self.utils.load_binary, self._load_binary
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def _load_binary(self, name: str, *arguments: Any) -> Any:
        loads.append(name)
        return self._load(name, *arguments)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 1000 * device

    def get_current_target(self) -> GPUTarget:
        return self.vendor.target

    def allocate_default_profile_scratch(self, *arguments: Any) -> None:
        raise AssertionError("a kernel wants scratch memory")


class Guard:
    """torch.cuda.device"""

    def __init__(self, device: int) -> None:
        self.device, self.before = device, driver.device

    def __enter__(self) -> None:
        driver.device = self.device

    def __exit__(self, *error: object) -> None:
        driver.device = self.before


class Watch(TorchDispatchMode):
    """A recorder of the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


driver: Driver


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in (_flat(value) if isinstance(value, tuple) else [value])]


def _tensor(array: Any) -> torch.Tensor:
    return torch.zeros(array.shape, dtype=getattr(torch, array.dtype))


def _call(problem: Problem, plan: TritonPlan) -> Call:
    """Return a call with every result and a workspace."""
    arrays = {**problem.arrays, **problem.outputs()}
    call = Call(adapter, **{name: _tensor(array) for name, array in arrays.items()})
    call.workspace = torch.zeros(max(plan.workspace_bytes, 1), dtype=torch.uint8)
    return call


def _run(problem: Problem) -> Found:
    """Launches of one call, the operators of torch that ran meanwhile, and where its arrays are."""
    plan = TritonPlan(problem)
    call = _call(problem, plan)
    before = len(launches)
    with Watch() as watch:
        plan.run(call)
    given = {name: getattr(call, name, None) for name in (*ARRAYS, "workspace")}
    where = {name: array.data_ptr() for name, array in given.items() if isinstance(array, torch.Tensor)}
    return {"launches": launches[before:], "operators": watch.seen, "pointers": where}


def alignment() -> Found:
    """Three aligned calls of two equal plans, then one with q off by an element."""
    problem = aot.describe("cuda:0", "float16", 64, right=0)
    plan, before = TritonPlan(problem), len(launches)
    call = _call(problem, plan)
    loads.clear()
    plan.run(call)
    plan.run(call)
    TritonPlan(problem).run(call)
    aligned = len(loads)
    call.q = torch.zeros(call.q.numel() + 1, dtype=torch.float16)[1:].view(call.q.shape)
    plan.run(call)
    pointers = [x.data_ptr() for x in (call.q, call.k, call.v, call.out, call.lse)]
    return {"loads": [aligned, len(loads)], "launches": launches[before:], "pointers": pointers}


def streams() -> Found:
    """A call on either device, with device 0 current, before and after a change of the current stream."""
    found = []
    for stream in (77, 88):
        driver.stream = stream
        found += [_run(aot.describe(f"cuda:{number}", "float16", 64, right=0)) for number in (0, 1)]
    driver.stream = 77
    return {"launches": [launch for part in found for launch in part["launches"]], "current": driver.device}


def training() -> Found:
    return _run(aot.describe("cuda:0", "float16", 64, aot.pass_named("backward"), right=0, sink=True))


def functions() -> Found:
    """A forward call with a mask function, and a backward call with a score function that reads an array."""
    forward = _run(aot.describe("cuda:0", "float16", 64, functions="documents"))
    backward = _run(aot.describe("cuda:0", "float16", 64, aot.pass_named("backward"), functions="relative"))
    return {name: [*forward[name], *backward[name]] for name in ("launches", "operators")} | {
        "pointers": [forward["pointers"], backward["pointers"]]
    }


def decoding() -> Found:
    return _run(aot.describe("cuda:0", "float16", 64, right=0, seqlen_q=1, paged=True))


def append() -> Found:
    problem, before = aot.describe_append("cuda:1", "float16", 64), len(launches)
    plan = TritonBackend().plan(problem)
    call = _call(problem, plan)
    with Watch() as watch:
        plan.run(call)
    return {"launches": launches[before:], "operators": watch.seen}


def precision() -> Found:
    """The kernels that float32 gets by torch's setting."""
    plan = TritonPlan(aot.describe("cuda:0", "float32", 32, right=0))
    call, found = _call(plan._problem, plan), []
    for setting in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(setting)
        before = len(loads)
        plan.run(call)
        found.append(len(loads) - before)
    return {"loaded": found}


def refusal() -> Found:
    """A compiler that fails."""

    def compile(*_: Any, **__: Any) -> None:
        raise ValueError("out of registers")

    kept, triton.compile = triton.compile, compile
    try:
        TritonPlan(aot.describe("cuda:0", "float16", 128, right=0))
    except CompilationError as error:
        return {"error": str(error)}
    finally:
        triton.compile = kept
    return {"error": ""}


def start(name: str) -> None:
    """Make torch and Triton find two GPUs of this vendor."""
    global driver
    driver = Driver(name)
    triton.compile = _keep
    triton.runtime.driver.set_active(driver)
    torch.cuda.get_device_properties = lambda index: driver.vendor.properties  # type: ignore[assignment]
    torch.cuda.device = Guard  # type: ignore[assignment,misc]
    torch.version.hip = "7.0" if name == "amd" else None


def main() -> None:
    start(sys.argv[1])
    scenarios = (alignment, streams, training, functions, decoding, append, precision, refusal)
    sys.stdout.write(json.dumps({scenario.__name__: scenario() for scenario in scenarios}))


if __name__ == "__main__":
    main()
