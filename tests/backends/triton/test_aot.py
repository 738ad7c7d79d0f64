"""Kernels compiled for GPUs that are not here, against the committed table of what their machine code needs."""

from __future__ import annotations

from typing import Any

import pytest

from harness.backends import skip_module_without
from harness.paths import SCRIPTS
from harness.processes import run_python

pytest.importorskip("triton.backends.nvidia", reason="Triton is not for this platform")
skip_module_without("triton")
TOGETHER = ("sm_70,sm_75,sm_80,sm_86,sm_89", "sm_90", "sm_100,sm_120,gfx908,gfx90a", "gfx942", "gfx950,gfx1100,gfx1201")
GOOD = {"registers": 200, "spills": 8, "spills_in_loops": 0, "shared": 1000, "matrix": 5}


@pytest.mark.parametrize("archs", TOGETHER)
def test_compiled_kernels_meet_the_limits_of_the_table(archs: str) -> None:
    """Compile in a separate process, because this process interprets Triton."""
    done = run_python(SCRIPTS / "aot.py", "--jobs", "1", "--arch", archs, without=("TRITON_INTERPRET",))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import anyattn.backends.triton.append
    import anyattn.backends.triton.plan_backward
    import anyattn.backends.triton.plan_forward  # noqa: F401  (before the script turns the interpreter off)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import aot

    return aot


def test_every_architecture_is_compiled(aot: Any) -> None:
    compiled = {name.split("/")[0] for name in aot.variants(every=False)}
    named = set(",".join(TOGETHER).split(","))
    assert compiled == named == {arch for arch in (*aot.NVIDIA, *aot.AMD) if not aot.refusal(arch)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 9}, "spills 9, 8 before"),
        ({"spills_in_loops": 1}, "spills_in_loops 1, 0 before"),
        ({"matrix": 0}, "lost its matrix instructions"),
    ],
)
def test_kernels_that_exceed_the_table_are_named(aot: Any, change: dict[str, int], complaint: str) -> None:
    name, kernel = "sm_80/bfloat16/128/causal/forward", "attention_forward"
    table = {name: {kernel: GOOD}}
    assert not list(aot.worse(table, table))
    assert list(aot.worse({name: {kernel: GOOD | change}}, table)) == [f"{name} {kernel}: {complaint}"]
    assert "not in the table" in next(aot.worse({name: {"another": GOOD}}, table))


def test_kernels_must_fit_and_use_matrix_instructions(aot: Any) -> None:
    name, kernel = "sm_86/bfloat16/128/causal/forward", "attention_forward"
    assert not list(aot.faults({name: {kernel: GOOD}}))
    assert "101376 are available" in next(aot.faults({name: {kernel: GOOD | {"shared": 101377}}}))
    assert "no matrix instructions" in next(aot.faults({name: {kernel: GOOD | {"matrix": 0}}}))
    assert not list(aot.faults({name: {"combine_splits": GOOD | {"matrix": 0}}}))


def test_only_named_variants_spill_inside_loops(aot: Any) -> None:
    numbers = {"attention_forward": GOOD | {"spills_in_loops": 3}}
    assert "3 instructions for spills" in next(aot.faults({"sm_90/bfloat16/128/causal/forward": numbers}))
    assert not list(aot.faults({"sm_90/bfloat16/128/mask/forward": numbers}))


def test_spills_are_counted_in_innermost_loops_only(aot: Any) -> None:
    from machine_code import SPILL_AMD, innermost

    spill = "scratch_store_b32 off, v1, off ; 4-byte Folded Spill"
    lines = [
        ".L_a:",
        spill,
        ".L_b:",
        "v_add",
        spill,
        "s_cbranch_scc1 .L_b",
        spill,
        "s_branch .L_a",
        spill,
        "s_branch .L_c",
    ]
    loops = innermost(lines)
    assert loops == [lines[2:6]]
    assert sum(bool(SPILL_AMD.match(line)) for line in loops[0]) == 1
