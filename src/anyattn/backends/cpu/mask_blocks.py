"""Block masks of mask functions for the CPU engine: which tiles of keys it skips, and where it needs no mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...definition.problem import Problem
from ...definition.score.blocks import Sizes, kinds
from ...definition.score.graph import READ, split
from ...definition.score.intervals import Extremes
from ..base import Call

BLOCK_Q, BLOCK_K = 64, 32
MOST_BLOCKS = 2**22  # of a call: with more, blocks of more keys

Kinds = npt.NDArray[np.int8]


class MaskBlocks:
    """Block mask of a problem. It depends on the values of the captured arrays that the mask reads."""

    def __init__(self, problem: Problem) -> None:
        self._graph = graph = problem.functions
        assert graph.mask is not None
        nodes = [graph.nodes[number] for number in graph.reachable((graph.mask,))]
        names = {node.operation for node in nodes}
        self._reads = {int(node.value or 0) for node in nodes if node.operation == READ}
        self._sizes = Sizes(
            problem.batch if "b" in names else 1,
            problem.nheads if "h" in names else 1,
            problem.seqlen_q,
            problem.seqlen_k,
        )
        self._block_k = BLOCK_K
        while 2 * np.prod(self._shape) > MOST_BLOCKS and self._block_k < problem.seqlen_k:
            self._block_k *= 2
        self._kinds: Kinds | None = None

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, nheads, seqlen_q, seqlen_k = self._sizes
        return (batch, nheads, -(-seqlen_q // BLOCK_Q), -(-seqlen_k // self._block_k))

    def fields(self) -> dict[str, float]:
        """Return the strides and sizes for the C struct."""
        batch, nheads, rows, keys = self._shape
        strides = (0 if batch == 1 else nheads * rows * keys, 0 if nheads == 1 else rows * keys, keys, 1)
        found: dict[str, float] = {f"mask_blocks.stride{axis}": stride for axis, stride in enumerate(strides)}
        return found | {"mask_blocks.dtype": 5, "mask_block_q": BLOCK_Q, "mask_block_k": self._block_k}

    def of(self, call: Call) -> Kinds:
        """Return the kind of every block, (batch or 1, nheads or 1, q_blocks, k_blocks)."""
        found = self._kinds
        if found is None:
            arrays = [None if x is None else call.adapter.numpy(x) for x in (call.captured, call.captured_indices)]
            views = split(self._graph, *arrays) if self._reads else []
            extremes: list[Any] = [Extremes(x) if i in self._reads else None for i, x in enumerate(views)]
            found = kinds(self._graph, extremes, self._sizes, (BLOCK_Q, self._block_k))
            if not self._reads:
                self._kinds = found
        return found
