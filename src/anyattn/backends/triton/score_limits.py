"""Limits of the score functions that the Triton backend computes. Nothing here imports Triton."""

from __future__ import annotations

from ...definition.problem import Problem
from ...definition.score.graph import CONSTANT, INT

LARGEST = 2**31 - 1


def limits(problem: Problem) -> list[str]:
    """Return why the functions of a problem are not supported, or []."""
    if not problem.score:
        return []
    graph, reasons = problem.functions, []
    elements = max(graph.sizes(floats=floats) for floats in (True, False))
    if elements > LARGEST:
        reasons.append(f"supports captured arrays of up to 2^31 - 1 elements in all, got {elements}")
    integers = [node.value or 0 for node in graph.nodes if node.operation == CONSTANT and node.kind == INT]
    if any(not -LARGEST - 1 <= value <= LARGEST for value in integers):
        reasons.append("supports integers in score functions that fit in int32; convert larger ones to floating point")
    return reasons
