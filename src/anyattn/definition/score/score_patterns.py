"""Parts of a score function that built-in arguments express: scale, softcap, bias and ALiBi.

The arguments act in this order: score * scale, softcap, the rest of the function, + bias, - ALiBi.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from .alibi import Slopes, alibi
from .graph import FLOAT, INDICES, READ, SCORE, Graph, Node

SLOPES, BIAS, SOFTCAP, SCALE = "slopes", "bias", "softcap", "scale"
SCORE_ARGUMENTS = frozenset((SLOPES, BIAS, SOFTCAP, SCALE))


class Operand(NamedTuple):
    """Captured array, by its number, and the axes of (b, h, q_idx, kv_idx) that its own axes are."""

    array: int
    axes: tuple[int, ...]


class Scored(NamedTuple):
    """Built-in arguments of a score function.

    scale multiplies the scores before the softcap. slopes: number of a captured array (nheads,) without a gradient, or
    one number for each head.
    """

    scale: float = 1.0
    softcap: float = 0.0
    bias: Operand | None = None
    slopes: Slopes | None = None


def peel(
    graph: Graph, number: int, nheads: int, allowed: Collection[str], *, is_causal: bool
) -> tuple[Scored, int | None]:
    """Return the allowed arguments, and the node of the rest of the function (None: nothing is left).

    is_causal: no pair is visible whose key comes after the query.
    """
    bias: Operand | None
    slopes: Slopes | None
    bias = slopes = None
    while True:
        node = graph.nodes[number]
        added = _bias(graph, node) if bias is None and BIAS in allowed else None
        subtracted = alibi(graph, node, nheads, is_causal=is_causal) if slopes is None and SLOPES in allowed else None
        if added is not None:
            number, bias = added
        elif subtracted is not None:
            number, slopes = subtracted
        else:
            break
    inner = _capped(graph, number)
    scale, cap = (1.0, 0.0) if inner is None else inner
    fits = (cap == 0 or SOFTCAP in allowed) and (scale == 1 or SCALE in allowed)
    if inner is None or not fits:
        return Scored(bias=bias, slopes=slopes), number
    return Scored(scale, cap, bias, slopes), None


def operand(graph: Graph, number: int) -> Operand | None:
    """Return the captured array that a node reads at indices alone, in their order, and the axes of these; or None."""
    node = graph.nodes[number]
    names = [graph.nodes[one].operation for one in node.arguments]
    if node.operation != READ or not names or not set(names) <= set(INDICES):
        return None
    axes = tuple([INDICES.index(name) for name in names])
    return Operand(int(node.value or 0), axes) if list(axes) == sorted(set(axes)) else None


def _bias(graph: Graph, node: Node) -> tuple[int, Operand] | None:
    """Return x and the array of x + array[...], which is read at indices alone, or None."""
    if node.operation != "add":
        return None
    for rest, read in (node.arguments, node.arguments[::-1]):
        found = operand(graph, read)
        if found is not None and graph.nodes[read].kind == FLOAT:
            return rest, found
    return None


def _capped(graph: Graph, number: int) -> tuple[float, float] | None:
    """Return (scale, cap) of cap * tanh(scale * score / cap), or of scale * score (cap 0); None for other functions."""
    base, times, divisor = _multiple(graph, number)
    node = graph.nodes[base]
    if node.operation == SCORE:
        return times / divisor, 0.0
    if node.operation != "tanh":
        return None
    base, inner, inner_divisor = _multiple(graph, node.arguments[0])
    cap = times / divisor
    return (cap * inner / inner_divisor, cap) if graph.nodes[base].operation == SCORE else None


def _multiple(graph: Graph, number: int) -> tuple[int, float, float]:
    """Return (x, times, divisor) of x * times / divisor, where times and divisor are products of positive constants."""
    times = divisor = 1.0
    while True:
        node = graph.nodes[number]
        if node.operation not in ("mul", "div"):
            return number, times, divisor
        rest, factor = node.arguments
        if node.operation == "mul" and graph.nodes[rest].operation == "constant":
            rest, factor = factor, rest
        value = graph.nodes[factor].value if graph.nodes[factor].operation == "constant" else None
        if value is None or not 0 < value < math.inf:
            return number, times, divisor
        times, divisor = (times * value, divisor) if node.operation == "mul" else (times, divisor * value)
        number = rest
