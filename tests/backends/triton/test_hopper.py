"""The Hopper kernels without a GPU: their Python on an emulated processor, what they take, and what was compiled."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyattn import testing
from anyattn.backends.triton.device import Device, interpreted
from anyattn.testing import Case, CaseInputs
from harness.backends import skip_module_without
from harness.hopper_inputs import aligned, drawn
from harness.paths import SCRIPTS, TESTS
from harness.processes import run_python

pytest.importorskip("triton.backends.nvidia", reason="Triton is not for this platform")
skip_module_without("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="on a GPU scripts/gpu.py runs the kernels themselves")

from anyattn.backends.triton.sm90 import plan  # noqa: E402
from backends.emulators.gluon_emulator import Pointer, WrongProgramError, launch  # noqa: E402

CASE = Case(
    "hopper", batch=1, seqlen_q=200, seqlen_k=500, nheads_kv=1, head_dim=64, head_dim_v=64, dtype="float16", causal=True
)
# (seqlen_q, seqlen_k): one tile and several, ends in and between tiles, more rows than keys and the other way round.
LENGTHS = ((128, 128), (129, 127), (65, 513), (300, 40), (257, 256), (200, 640))
DROPPED = (("arrive", "k_empty"), ("arrive", "v_empty"))  # at the others the copy engine arrives
CLEAN: frozenset[tuple[str, str]] = frozenset()
GUARD = 64


def run(inputs: CaseInputs, seed: int = 0, broken: frozenset[tuple[str, str]] = CLEAN) -> list[str]:
    """Return the errors in the results of the emulated kernel."""
    problem, arrays = inputs.describe()
    assert not plan.unsupported_reasons(problem)
    out, lse = (np.full(int(np.prod(shape)) + 2 * GUARD, np.nan) for shape in (problem.out_shape, problem.lse_shape))
    memory = {"out": Pointer(out, GUARD), "lse": Pointer(lse, GUARD)}
    launch(plan.forward_kernel(problem, None), memory | {name: whole(arrays[name]) for name in "qkv"}, seed, broken)
    assert all(np.isnan(array[edge]).all() for array in (out, lse) for edge in (slice(GUARD), slice(-GUARD, None)))
    got = {"out": out[GUARD:-GUARD].reshape(problem.out_shape), "lse": lse[GUARD:-GUARD].reshape(problem.lse_shape)}
    return testing.compare(testing.expected(inputs), got)


def whole(view: np.ndarray) -> Pointer:
    """Return a pointer to the view within the whole memory of its owner."""
    owner = view
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    return Pointer(owner.reshape(-1).astype(np.float32), start // view.itemsize)


@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
@pytest.mark.parametrize("dtype", plan.HALVES)
@pytest.mark.parametrize("mask", ["full", "bottom-right", "top-left"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_emulated_kernels_equal_the_reference(lengths: tuple[int, int], mask: str, dtype: str, head_dim: int) -> None:
    alignment = "bottom-right" if mask == "full" else mask
    sizes = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "head_dim": head_dim, "head_dim_v": head_dim}
    case = replace(CASE, dtype=dtype, causal=mask != "full", alignment=alignment, **sizes)
    assert not run(aligned(case), seed=sum(lengths))


@pytest.mark.parametrize("seed", range(12))
def test_emulated_kernels_equal_the_reference_on_random_problems(seed: int) -> None:
    """Check several sequences, heads, groups and strides, with NaN in all unused memory."""
    assert not run(aligned(drawn(seed, 300)), seed)


@pytest.mark.parametrize("seed", range(20))
def test_results_do_not_depend_on_the_order_of_events(seed: int) -> None:
    assert not run(aligned(CASE), 1000 * seed)


@pytest.mark.parametrize(
    ("operation", "name"),
    [*(("wait", name) for name in ("q_full", "k_full", "v_full", "k_empty", "v_empty")), *DROPPED],
)
def test_emulator_detects_each_missing_barrier(operation: str, name: str) -> None:
    """Without any one of them some order of events ends in a wrong result, or never."""

    def wrong(seed: int) -> bool:
        try:
            return bool(run(aligned(CASE), seed, frozenset({(operation, name)})))
        except WrongProgramError:
            return True

    assert any(wrong(100 * seed) for seed in range(10))


def without_interpreter(script: Path, *arguments: str) -> str:
    """Return what a script prints that compiles for a GPU, in a process of its own: here Triton interprets."""
    done = run_python(script, *arguments, without=("TRITON_INTERPRET",))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_compiled_variants_pass_the_checks() -> None:
    """Check that no register spills, registers are divided, and the softmax overlaps a running product."""
    assert "4 variants, 0 complaints" in without_interpreter(SCRIPTS / "hopper.py", "--only", "bfloat16")


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import anyattn.backends.triton.append
    import anyattn.backends.triton.plan_backward
    import anyattn.backends.triton.plan_forward  # noqa: F401  (before the script turns the interpreter off)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import hopper

    return hopper


def parsed(gates: Any, order: str) -> list[Any]:
    return [gates.Run(name, int(count or 1)) for name, _, count in (run.partition("*") for run in order.split())]


GOOD = "QK*8 mbwait PV*8 BAR arrive WAIT1 max*64 EX2*66 mbwait WAIT0"


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (GOOD, ""),
        (GOOD.replace("EX2*66 mbwait WAIT0", "mbwait WAIT0"), "0 of 66 exponentials between the two waits"),
        (GOOD.replace("EX2*66", "EX2*65"), "65 of 66"),
        (GOOD.replace(" mbwait WAIT0", " WAIT0"), "no barrier is awaited between the exponentials and the second wait"),
        (GOOD.replace("PV*8 BAR", "BAR"), "issues QK*8 before it waits for scores; QK*8 PV*8 expected"),
        (GOOD.replace(" WAIT0", ""), "never waits for the second product"),
    ],
)
def test_wrong_order_of_instructions_is_detected(gates: Any, order: str, complaint: str) -> None:
    loop = parsed(gates, order)
    assert gates.loops([gates.Run("WAIT0", 1), *loop]) == [loop]
    found = list(gates.misplaced(loop, 128))
    assert any(complaint in fault for fault in found) if complaint else not found


def test_wrong_use_of_resources_is_detected(gates: Any) -> None:
    group = parsed(gates, f"{GOOD} fence BAR store")
    order = [*group, *group]
    code = ["USETMAXREG.DEALLOC.CTAPOOL 0x18", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0"]
    numbers = {"spills": 0, "shared": 1000}
    assert not list(gates.faults("float16/128/full", numbers, code, order))
    assert list(gates.faults("float16/128/full", numbers | {"spills": 8}, code, order)) == ["spills 8 bytes"]
    assert "232449 bytes" in next(gates.faults("float16/128/full", numbers | {"shared": 232449}, code, order))
    assert "no partition gets 24" in next(gates.faults("float16/128/full", numbers, code[1:], order))
    assert "1 loops" in next(gates.faults("float16/128/full", numbers, code, group))
    unfenced = [run for run in order if run.name != "fence"]
    assert list(gates.faults("float16/128/full", numbers, code, unfenced)) == ["results are stored without a fence"]


@pytest.fixture(scope="module")
def recorded() -> Any:
    """Return the launches of calls on an emulated GPU."""
    return json.loads(without_interpreter(TESTS / "backends" / "emulators" / "fake_hopper.py").splitlines()[-1])


def test_hopper_kernels_are_off_by_default(recorded: Any) -> None:
    assert [launch["kernel"] for launch in recorded["off"]["launches"]] == ["attention_forward"]
    assert [launch["kernel"] for launch in recorded["on"]["launches"]] == ["attention_forward_hopper"]


def test_tensor_maps_describe_the_arrays(recorded: Any) -> None:
    """(batch, head, row, dim) of arrays (batch, row, head, dim); boxes of a warpgroup's rows and of a tile's keys."""
    (launch,), pointers = recorded["on"]["launches"], recorded["on"]["pointers"]
    assert launch["grid"] == [2 * 8 * 8, 1, 1]
    shapes = {"q": [2, 8, 1000, 64], "k": [2, 2, 1024, 64], "v": [2, 2, 1024, 64], "out": [2, 8, 1000, 64]}
    for name, tensor_map in zip(shapes, launch["maps"], strict=True):
        _, heads, rows, dim = shapes[name]
        assert tensor_map["address"] == pointers[name]
        assert tensor_map["shape"] == shapes[name]
        assert tensor_map["strides"] == [rows * heads * dim, dim, heads * dim, 1]
        assert tensor_map["box"] == [1, 1, 128 if name in "kv" else 64, 64]


def test_keys_that_no_query_attends_to_are_not_copied(recorded: Any) -> None:
    (launch,) = recorded["few keys"]["launches"]
    assert [tensor_map["shape"][2] for tensor_map in launch["maps"]] == [1000, 1000, 1000, 1000]


@pytest.mark.parametrize("why", ["address", "strides", "softcap"])
def test_portable_kernels_compute_all_other_problems(why: str, recorded: Any) -> None:
    assert [launch["kernel"] for launch in recorded[why]["launches"]] == ["attention_forward"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "supports float16 and bfloat16, got float32"),
        ({"head_dim": 96, "head_dim_v": 96}, "supports head_dim = head_dim_v of 64 or 128"),
        ({"head_dim_v": 128}, "supports head_dim = head_dim_v of 64 or 128"),
        ({"softcap": 5.0, "alibi": "h", "lengths": "seqused"}, "does not support alibi, lengths, softcap"),
        ({"causal": False, "window": (9, None)}, "does not support left"),
        ({"scale": -1.0}, "supports a scale above 0"),
        ({"seqlen_q": 64}, "leaves up to 64 queries to the decoding kernel"),
        ({"alignment": "top-left", "window": (None, 0), "seqlen_k": 0}, "has nothing to compute"),
        ({"layout": "slices"}, ""),
    ],
)
def test_unsupported_problems_are_left_to_the_portable_kernels(change: dict[str, Any], reason: str) -> None:
    problem, _ = aligned(replace(CASE, **change)).describe()
    assert reason in "; ".join(plan.unsupported_reasons(problem))
    assert bool(plan.unsupported_reasons(problem)) == bool(reason)


def test_unaligned_strides_and_batch_invariance_are_refused() -> None:
    problem, _ = aligned(CASE).describe()
    shifted = problem.k._replace(strides=(1, 64 * 500 + 4, 64, 1))
    assert not plan.unsupported_reasons(problem.with_arrays(k=shifted._replace(strides=(1, 64, 3, 1)))), (
        "one sequence, one head"
    )
    assert "16 bytes" in plan.unsupported_reasons(problem.with_arrays(k=shifted))[0]
    for step in (0, -64):
        odd = problem.v._replace(strides=(1, step, 64, 1))
        assert "16 bytes" in plan.unsupported_reasons(problem.with_arrays(v=odd))[0]
    assert "batch_invariant" in plan.unsupported_reasons(problem._replace(batch_invariant=True))[0]


def test_triton_without_gluon_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.backends.triton import sm90
    from anyattn.config import settings

    monkeypatch.setenv("ANYATTN_HOPPER", "1")
    settings.reload()
    monkeypatch.delitem(sys.modules, "anyattn.backends.triton.sm90.dialect")
    monkeypatch.delattr(sm90, "dialect")
    monkeypatch.setitem(sys.modules, "triton.experimental", None)
    missing = sm90.reason_off()
    monkeypatch.undo()
    settings.reload()
    assert missing is not None and missing.startswith("off, because this version of Triton has no supported Gluon")
    assert sm90.reason_off() == "off, because no GPU has run them yet (ANYATTN_HOPPER=1 enables them)"


@pytest.mark.parametrize("causal", [False, True])
def test_device_checks_pass_and_detect_an_error(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of `make gpu`, here with the portable kernels on host memory: they pass, and see an error."""
    from device import hopper as hopper_device

    case = replace(CASE, seqlen_q=70, seqlen_k=90, group=2, causal=causal, layout="bhsd")
    assert not hopper_device.small(case, "cpu") and not hopper_device.large(case, "cpu")
    monkeypatch.setattr(hopper_device, "visible", lambda *_: torch.ones((), dtype=torch.bool))
    assert bool(hopper_device.large(case, "cpu")) == causal


def test_device_checks_launch_only_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a problem that the portable plan would split among more programs."""
    from anyattn.backends.triton import plan_forward as portable
    from anyattn.backends.triton.sm90.plan import HopperKernel
    from anyattn.config import settings
    from device import hopper as hopper_device

    monkeypatch.setattr(portable, "forward_shape", portable.forward_shape)  # restored at the end, as are these
    monkeypatch.setattr(HopperKernel, "launch", lambda *_: None)
    monkeypatch.setenv("ANYATTN_HOPPER", "0")
    launches = hopper_device.prepare()
    try:
        assert settings.current().hopper
        problem, _ = aligned(drawn(1, 200)).describe()
        assert portable.forward_shape(problem, Device("sm_90", 132, 2**25))[1:] == (False, 1)
        kernel = plan.forward_kernel(problem, None)
        kernel.launch(None, 0, 0)
        assert launches == [kernel.grid]
    finally:
        monkeypatch.undo()
        settings.reload()
