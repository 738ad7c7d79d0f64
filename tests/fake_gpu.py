"""Launching without a GPU: kernels are compiled for a card that is not here, Triton's own launchers turn arguments into
a kernel's parameters, and fake_cuda.c, in place of CUDA's driver, has these recorded.

A script, as it needs a process in which Triton's interpreter is off. Prints JSON for test_launch: scenario -> findings.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import aot
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from anyattn.backends.base import Call
from anyattn.backends.triton.backend import TritonBackend
from anyattn.backends.triton.plan import TritonPlan
from anyattn.errors import CompilationError
from anyattn.frameworks.torch.adapter import adapter
from anyattn.kvcache import ARRAYS
from anyattn.problem import INPUTS, SAVED, Problem

Found = dict[str, Any]
launches: list[Found] = []
loads: list[str] = []


class Map(ctypes.Structure):
    """fake_cuda.c's tensor map."""

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
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?")
MAP_BYTES, SCRATCH_BYTES = 128, [8, 8]
STREAM = 4  # its place in the configuration of a launch, in words of 64 bits


@CALLBACK
def recorded(config: Any, function: int, parameters: Any) -> None:
    """What the driver gets for a launch, held against what the kernel's machine code declares."""
    kernel = next(kernel for kernel in compiled if kernel.function == function)
    kinds = [kind for kind in _flat(kernel.src.signature.values()) if kind != "constexpr"]
    entry = kernel.asm["ptx"].split(".entry ")[1].split("\n)")[0]
    declared = [int(bits) // 8 * int(count or 1) for bits, count in PARAMETER.findall(entry)]
    plain = [CTYPES.get(kind, ctypes.c_uint64) for kind in kinds if not kind.startswith("tensordesc")]
    sizes = [ctypes.sizeof(kind) for kind in plain]
    assert declared[: len(sizes)] == sizes and declared[-2:] == SCRATCH_BYTES, (sizes, declared)
    assert len(plain) < len(kinds) or len(declared) == len(sizes) + 2
    values = [kind.from_address(address).value for kind, address in zip(plain, parameters, strict=False)]
    maps = [parameters[at] for at, size in enumerate(declared) if size == MAP_BYTES]
    launches.append({
        "kernel": kernel.src.fn.__name__, "grid": config[:3], "device": driver.device,
        "stream": ctypes.cast(config, ctypes.POINTER(ctypes.c_uint64))[STREAM],
        "arguments": list(zip(kinds, values, strict=False)), "maps": [Map.from_address(at).describe() for at in maps],
    })  # fmt: skip


def fake_cuda(folder: Path) -> None:
    """fake_cuda.c, compiled and loaded under the name by which Triton asks for CUDA's driver."""
    library, source = folder / "libcuda.so.1", Path(__file__).resolve().parent / "fake_cuda.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).fake_cuda_on_launch(recorded)


compiled: list[Any] = []
_compile = triton.compile


def _keep(*arguments: Any, **options: Any) -> Any:
    compiled.append(_compile(*arguments, **options))
    return compiled[-1]


class Driver:
    """Triton's utilities and launchers, on devices and streams that the scenarios choose."""

    def __init__(self, folder: Path) -> None:
        fake_cuda(folder)
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.device, self.stream = 0, 77
        self._load, self.utils.load_binary = self.utils.load_binary, self._load_binary

    def _load_binary(self, name: str, *arguments: Any) -> Any:
        loads.append(name)
        return self._load(name, *arguments)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 1000 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

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
    """Which operators of torch run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


FOLDER = tempfile.TemporaryDirectory()  # until the process ends
driver = Driver(Path(FOLDER.name))
triton.compile = _keep


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in (_flat(value) if isinstance(value, tuple) else [value])]


def _tensor(array: Any) -> torch.Tensor:
    return torch.zeros(array.shape, dtype=getattr(torch, array.dtype))


def _call(problem: Problem, plan: TritonPlan) -> Call:
    """With every result that there is."""
    given = {name: getattr(problem, name) for name in (*INPUTS, *SAVED)}
    call = Call(adapter, **{name: _tensor(array) for name, array in given.items() if array is not None})
    if problem.dout is None:
        call.out = torch.zeros(problem.out_shape, dtype=getattr(torch, problem.dtype))
        call.lse = torch.zeros(problem.lse_shape)
    else:
        results = {f"d{name}": getattr(call, name) for name in ("q", "k", "v", "bias", "sink")}
        for name, like in results.items():
            setattr(call, name, None if like is None else torch.zeros_like(like))
    call.workspace = torch.zeros(max(plan.forward_bytes, plan.backward_bytes, 1), dtype=torch.uint8)
    return call


def _run(problem: Problem) -> Found:
    """Launches of one call, the operators of torch that ran meanwhile, and where its arrays are."""
    plan = TritonPlan(problem)
    call = _call(problem, plan)
    before = len(launches)
    with Watch() as watch:
        (plan.forward if problem.dout is None else plan.backward)(call)
    given = {name: getattr(call, name, None) for name in Call.__annotations__ if name != "adapter"}
    where = {name: array.data_ptr() for name, array in given.items() if isinstance(array, torch.Tensor)}
    return {"launches": launches[before:], "operators": watch.seen, "pointers": where}


def alignment() -> Found:
    """Three aligned calls of two equal plans, then one with q off by an element."""
    problem = aot.describe("cuda:0", "float16", 64, backward=False, right=0)
    plan, before = TritonPlan(problem), len(launches)
    call = _call(problem, plan)
    loads.clear()
    plan.forward(call)
    plan.forward(call)
    TritonPlan(problem).forward(call)
    aligned = len(loads)
    call.q = torch.zeros(call.q.numel() + 1, dtype=torch.float16)[1:].view(call.q.shape)
    plan.forward(call)
    pointers = [x.data_ptr() for x in (call.q, call.k, call.v, call.out, call.lse)]
    return {"loads": [aligned, len(loads)], "launches": launches[before:], "pointers": pointers}


def streams() -> Found:
    """A call on either device, with device 0 current, before and after a change of the current stream."""
    found = []
    for stream in (77, 88):
        driver.stream = stream
        found += [_run(aot.describe(f"cuda:{number}", "float16", 64, backward=False, right=0)) for number in (0, 1)]
    driver.stream = 77
    return {"launches": [launch for part in found for launch in part["launches"]], "current": driver.device}


def training() -> Found:
    return _run(aot.describe("cuda:0", "float16", 64, backward=True, right=0, sink=True))


def decoding() -> Found:
    return _run(aot.describe("cuda:0", "float16", 64, backward=False, right=0, seqlen_q=1, paged=True))


def append() -> Found:
    problem, before = aot.describe_append("cuda:1", "float16", 64), len(launches)
    arrays = {name: getattr(problem, name) for name in ARRAYS}
    call = Call(adapter, **{name: _tensor(x) for name, x in arrays.items() if x is not None}, out=_tensor(problem.q))
    with Watch() as watch:
        TritonBackend().append(problem, call)
    return {"launches": launches[before:], "operators": watch.seen}


def precision() -> Found:
    """The kernels that float32 gets by torch's setting."""
    plan = TritonPlan(aot.describe("cuda:0", "float32", 32, backward=False, right=0))
    call, found = _call(plan._problem, plan), []
    for setting in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(setting)
        before = len(loads)
        plan.forward(call)
        found.append(len(loads) - before)
    return {"loaded": found}


def refusal() -> Found:
    """A compiler that fails."""

    def compile(*_: Any, **__: Any) -> None:
        raise ValueError("out of registers")

    kept, triton.compile = triton.compile, compile
    try:
        TritonPlan(aot.describe("cuda:0", "float16", 128, backward=False, right=0))
    except CompilationError as error:
        return {"error": str(error)}
    finally:
        triton.compile = kept
    return {"error": ""}


def main() -> None:
    triton.runtime.driver.set_active(driver)
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, L2_cache_size=2**25)
    torch.cuda.get_device_properties = lambda index: card  # type: ignore[assignment]
    torch.cuda.device = Guard  # type: ignore[assignment,misc]
    scenarios = (alignment, streams, training, decoding, append, precision, refusal)
    sys.stdout.write(json.dumps({scenario.__name__: scenario() for scenario in scenarios}))


if __name__ == "__main__":
    main()
