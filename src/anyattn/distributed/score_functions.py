"""Score functions of a pair: the indices of its call become the indices of the whole sequences.

A call counts b, h, q_idx and kv_idx from 0. The graph adds the starts of the pair, which it reads from one more
captured array. So all pairs have one graph, and its text does not depend on the pair.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definition.score.builder import Builder
from ..definition.score.graph import INDICES, INT, Captured, parse


class Starts(NamedTuple):
    """First indices of a pair, and the steps between its queries and its keys."""

    b: int
    h: int
    q_idx: int
    kv_idx: int
    q_step: int
    kv_step: int


@lru_cache(64)
def with_starts(text: str) -> str:
    """Return the text of a graph that reads the starts of a pair from its last captured array."""
    graph = parse(text)
    build, number = Builder(), len(graph.arrays)
    moved: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        moved[position] = build.add(node._replace(arguments=tuple([moved[one] for one in node.arguments])))
        if node.operation in INDICES:
            moved[position] = _shifted(build, moved[position], number, node.operation)
    score, mask = (None if one is None else moved[one] for one in (graph.score, graph.mask))
    return build.graph(score, mask, (*graph.arrays, Captured((len(Starts._fields),), INT))).text


def _shifted(build: Builder, index: int, array: int, name: str) -> int:
    """Return step * index + start."""

    def read(field: str) -> int:
        return build.read(array, INT, (build.constant(Starts._fields.index(field)),))

    if name in ("q_idx", "kv_idx"):
        index = build.apply("mul", index, read(name.replace("idx", "step")))
    return build.apply("add", index, read(name))


def captured_indices(given: Tensor | None, starts: Starts, device: Any) -> Tensor:
    """Return the captured integers of a pair's call."""
    own = torch.tensor(starts, dtype=torch.int32).to(device)
    return own if given is None else torch.cat([given, own])
