"""torch's compiled flex_attention, forward.

Compilation takes seconds per shape. It is timed where it is the natural
comparison (windows, softcap), and otherwise only within the rest of a compile time budget."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..inputs import Inputs
from ..workloads import Workload
from .base import Prepared, Refused, refuse, swapped

if TYPE_CHECKING:
    from torch import Tensor

COMPILE_SECONDS = 240.0


class Flex:
    name = "flex_attention"
    package = "torch"

    def __init__(self) -> None:
        self._spent = 0.0

    def absent(self) -> str | None:
        import shutil

        compilers = ("c++", "g++", "clang++")
        if not any(shutil.which(name) for name in compilers):
            return "torch.compile needs a C++ compiler"
        try:
            from torch.nn.attention import flex_attention  # noqa: F401
        except ImportError as error:
            return str(error)
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        if not (workload.window or workload.softcap) or workload.packed or workload.backward:
            return None
        refuse(
            workload,
            sink=workload.sink,
            dropout=workload.dropout_p,
            bias_here=workload.bias,
            pages_here=workload.page_size,
        )
        if self._spent > COMPILE_SECONDS:
            raise Refused(f"its compile budget of {COMPILE_SECONDS:.0f} s is spent")
        start = time.perf_counter()
        prepared = _compiled(inputs)
        prepared.run()  # compiles
        self._spent += time.perf_counter() - start
        return prepared


def _compiled(inputs: Inputs) -> Prepared:
    import torch
    import torch._inductor.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    workload = inputs.workload
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()  # after eight recompilations it would silently use an unfused path
    attend: Any = torch.compile(flex_attention, dynamic=False)
    q, k, v = (inputs.heads_first(name) for name in ("q", "k", "v"))
    visible = _visible(workload)
    mask = (
        None if visible is None else create_block_mask(visible, None, None, workload.seqlen_q, workload.seqlen_k, "cpu")
    )
    change = _change(inputs)

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = attend(q, k, v, score_mod=change, block_mask=mask, enable_gqa=workload.group > 1)
            return out

    return Prepared(run, lambda out: swapped([out]))


def _visible(workload: Workload) -> Any:
    interval, shift = workload.interval, workload.seqlen_k - workload.seqlen_q
    left, right = interval.left, interval.right
    if workload.mask:
        raise Refused("no boolean mask")
    if left is None and right is None:
        return None
    if right is None:
        return lambda b, h, i, j: i + shift - j <= left
    if left is None:
        return lambda b, h, i, j: j - (i + shift) <= right
    return lambda b, h, i, j: (i + shift - j <= left) & (j - (i + shift) <= right)


def _change(inputs: Inputs) -> Any:
    import torch

    workload, slopes = inputs.workload, inputs.alibi_slopes
    shift, cap = workload.seqlen_k - workload.seqlen_q, workload.softcap
    if not cap and slopes is None:
        return None

    def change(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        s = cap * torch.tanh(s / cap) if cap else s
        return s if slopes is None else s - slopes[h] * (i + shift - j).abs()

    return change
