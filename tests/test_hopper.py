"""The Hopper kernels without a GPU: their Python on an emulated processor, what they take, and what was compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Case
from hopper_inputs import aligned, drawn
from inputs import Inputs

from anyattn import accuracy
from anyattn.backends.triton.device import interpreted

pytest.importorskip("triton.experimental.gluon", reason="Triton is not for this platform")
pytestmark = pytest.mark.skipif(not interpreted(), reason="on a GPU scripts/gpu.py runs the kernels themselves")

from gluon_emulator import Pointer, WrongProgramError, launch  # noqa: E402

from anyattn.backends.triton.hopper import plan  # noqa: E402

CASE = Case(
    "hopper", batch=1, seqlen_q=200, seqlen_k=500, nheads_kv=1, head_dim=64, head_dim_v=64, dtype="float16", causal=True
)
# (seqlen_q, seqlen_k): one tile and several, ends in and between tiles, more rows than keys and the other way round.
LENGTHS = ((128, 128), (129, 127), (64, 513), (300, 40), (257, 256), (200, 640))
CLEAN: frozenset[tuple[str, str]] = frozenset()
GUARD = 64


def run(inputs: Inputs, seed: int = 0, broken: frozenset[tuple[str, str]] = CLEAN) -> list[str]:
    """What is wrong with the emulated kernel's results."""
    problem, arrays = inputs.canonical()
    assert not plan.refusals(problem)
    out, lse = (np.full(int(np.prod(shape)) + 2 * GUARD, np.nan) for shape in (problem.out_shape, problem.lse_shape))
    memory = {"out": Pointer(out, GUARD), "lse": Pointer(lse, GUARD)}
    launch(plan.forward_kernel(problem, []), memory | {name: whole(arrays[name]) for name in "qkv"}, seed, broken)
    assert all(np.isnan(array[edge]).all() for array in (out, lse) for edge in (slice(GUARD), slice(-GUARD, None)))
    got = {"out": out[GUARD:-GUARD].reshape(problem.out_shape), "lse": lse[GUARD:-GUARD].reshape(problem.lse_shape)}
    return accuracy.check(accuracy.expected_forward(problem, arrays), got)


def whole(view: np.ndarray) -> Pointer:
    """Where a view begins in all the memory that it lies in."""
    owner = view
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    return Pointer(owner.reshape(-1).astype(np.float32), start // view.itemsize)


@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
@pytest.mark.parametrize("dtype", plan.DTYPES)
@pytest.mark.parametrize("mask", ["full", "bottom-right", "top-left"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_emulated(lengths: tuple[int, int], mask: str, dtype: str, head_dim: int) -> None:
    alignment = "bottom-right" if mask == "full" else mask
    sizes = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "head_dim": head_dim, "head_dim_v": head_dim}
    case = replace(CASE, dtype=dtype, causal=mask != "full", alignment=alignment, **sizes)
    assert not run(aligned(case), seed=sum(lengths))


@pytest.mark.parametrize("seed", range(12))
def test_emulated_random_problems(seed: int) -> None:
    """Several sequences and heads, groups, strides; NaN around and behind what rows see."""
    assert not run(aligned(drawn(seed, 300)), seed)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events(seed: int) -> None:
    assert not run(aligned(CASE), 1000 * seed)


@pytest.mark.parametrize("name", ["q_full", "k_full", "v_full", "k_empty", "v_empty"])
@pytest.mark.parametrize("operation", ["wait", "arrive"])
def test_emulator_sees_what_barriers_are_for(operation: str, name: str) -> None:
    """Without any one of them some order of events ends in a wrong result, or never."""
    if operation == "arrive" and name.endswith("full"):
        pytest.skip("the copy engine arrives there")

    def wrong(seed: int) -> bool:
        try:
            return bool(run(aligned(CASE), seed, frozenset({(operation, name)})))
        except WrongProgramError:
            return True

    assert any(wrong(100 * seed) for seed in range(10))
