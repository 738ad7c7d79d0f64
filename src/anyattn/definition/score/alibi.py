"""ALiBi in a score function: a term that is -slope |q_idx - kv_idx| on every visible pair.

A function may write the distance with a sign, slope * (kv_idx - q_idx). This is ALiBi if no key comes after its query.
"""

from __future__ import annotations

import numpy as np

from .evaluate import evaluate
from .graph import CONSTANT, FLOAT, READ, Graph, Node
from .linear import Linear, is_distance, linear

Slopes = int | tuple[float, ...]
AHEAD, BEHIND = Linear(-1, 1, 0), Linear(1, -1, 0)  # kv_idx - q_idx and q_idx - kv_idx


def alibi(graph: Graph, node: Node, nheads: int, *, is_causal: bool) -> tuple[int, Slopes] | None:
    """Return x and the slopes if a node is x - slope |q_idx - kv_idx|, or None.

    slopes: number of a captured array (nheads,) without a gradient, or one number for each head. is_causal: no pair is
    visible whose key comes after the query.
    """
    if node.operation == "sub":
        orders = [(node.arguments, -1)]
    elif node.operation == "add":
        orders = [(node.arguments, 1), (node.arguments[::-1], 1)]
    else:
        return None
    for (rest, term), sign in orders:
        slopes = _slopes(graph, term, sign, nheads, is_causal=is_causal)
        if slopes is not None:
            return rest, slopes
    return None


def _slopes(graph: Graph, term: int, sign: int, nheads: int, *, is_causal: bool) -> Slopes | None:
    """Return the slopes if sign * term is -slope |q_idx - kv_idx|, or None."""
    term, sign = _without_sign(graph, term, sign)
    product = graph.nodes[term]
    if product.operation != "mul":
        return None
    for one, distance in (product.arguments, product.arguments[::-1]):
        slope, total = _without_sign(graph, one, sign * _direction(graph, distance, is_causal=is_causal))
        if total == -1:
            found = _of_heads(graph, slope, nheads)
            if found is not None:
                return found
    return None


def _without_sign(graph: Graph, number: int, sign: int) -> tuple[int, int]:
    """Return x and its sign for x or -x."""
    while graph.nodes[number].operation == "neg":
        number, sign = graph.nodes[number].arguments[0], -sign
    return number, sign


def _direction(graph: Graph, number: int, *, is_causal: bool) -> int:
    """Return 1 for |q_idx - kv_idx| as a floating-point number, -1 for its negative, and 0 for anything else."""
    sign, absolute = 1, False
    while graph.nodes[number].operation in ("abs", "neg", "to_float"):
        node = graph.nodes[number]
        absolute = absolute or node.operation == "abs"
        if node.operation == "neg" and not absolute:
            sign = -sign
        number = node.arguments[0]
    found = linear(graph, number)
    if absolute:
        return sign if is_distance(found) else 0
    if not is_causal or not is_distance(found):
        return 0
    return sign if found == BEHIND else -sign


def _of_heads(graph: Graph, number: int, nheads: int) -> Slopes | None:
    """Return the slopes if a node is a number of each head, or None."""
    node = graph.nodes[number]
    if node.operation == READ:
        array = graph.arrays[int(node.value or 0)]
        indices = [graph.nodes[one].operation for one in node.arguments]
        is_table = indices == ["h"] and array.shape == (nheads,) and array.kind == FLOAT and not array.gradient
        return int(node.value or 0) if is_table else None
    needed = [graph.nodes[one] for one in graph.reachable([number])]
    inputs = {one.operation for one in needed if one.operation == READ or not one.arguments}
    if node.kind != FLOAT or not inputs <= {"h", CONSTANT}:
        return None
    (values,) = evaluate(graph, (number,), {"h": np.arange(nheads)}, (), np.float64)
    slopes = np.broadcast_to(values, nheads)
    return tuple(slopes.tolist()) if np.isfinite(slopes).all() else None
