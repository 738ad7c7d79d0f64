"""Symbolic derivatives of a score function: by the score, and by the captured arrays at each read.

Reverse mode: every node that depends on the score or on an array with a gradient gets an adjoint, the derivative of the
result by that node. Where a function has no derivative, the rules are those of torch: 0 for floor, round, sign and
comparisons; the mean of both sides for equal arguments of minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .builder import Builder
from .graph import FLOAT, READ, SCORE, Graph

Rule = Callable[[Builder, int, int, tuple[int, ...]], tuple["int | None", ...]]


class Derivative(NamedTuple):
    """Derivative of score_mod as a graph that extends the function's graph."""

    graph: Graph
    slope: int  # node: the derivative by the score
    reads: tuple[tuple[int, int], ...]  # reads of arrays with a gradient, and the derivative by each
    indices: tuple[int, ...]  # nodes: the index expressions of these reads


def differentiate(graph: Graph) -> Derivative:
    """Return the derivative of the graph's score function."""
    assert graph.score is not None
    build, active = Builder(graph), _active(graph)
    adjoints = {graph.score: build.constant(1.0)}
    for number in range(graph.score, -1, -1):
        node, adjoint = graph.nodes[number], adjoints.get(number)
        if adjoint is None or number not in active or not node.arguments or node.operation == READ:
            continue
        terms = RULES[node.operation](build, adjoint, number, node.arguments)
        for argument, term in zip(node.arguments, terms, strict=True):
            if term is not None and argument in active:
                before = adjoints.get(argument)
                adjoints[argument] = term if before is None else build.apply("add", before, term)
    zero = build.constant(0.0)
    score = next((n for n, node in enumerate(graph.nodes) if node.operation == SCORE), None)
    reads = tuple((n, adjoints[n]) for n in graph.reads if n in active and n in adjoints)
    indices = dict.fromkeys(one for n, _ in reads for one in graph.nodes[n].arguments)
    slope = zero if score is None else adjoints.get(score, zero)
    return Derivative(graph._replace(nodes=tuple(build.nodes)), slope, reads, tuple(indices))


def _active(graph: Graph) -> set[int]:
    """Return the nodes that depend, as floating-point values, on the score or on an array with a gradient."""
    found: set[int] = set()
    for number, node in enumerate(graph.nodes):
        wanted = node.operation == READ and graph.arrays[int(node.value or 0)].gradient
        depends = node.operation == SCORE or wanted
        if node.operation != READ:
            depends = depends or any(argument in found for argument in node.arguments)
        if depends and node.kind == FLOAT:
            found.add(number)
    return found


def _div(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int, int]:
    by_a = build.apply("div", g, x[1])
    return by_a, build.apply("neg", build.apply("mul", by_a, r))


def _pow(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int, int]:
    a, b = x
    less = build.apply("pow", a, build.apply("sub", b, build.constant(1.0)))
    by_a = build.apply("mul", g, build.apply("mul", b, less))
    zero = build.constant(0.0)
    log = build.apply("where", build.apply("eq", r, zero), zero, build.apply("log", a))  # 0 ** b: no 0 * -inf
    return by_a, build.apply("mul", g, build.apply("mul", r, log))


def _mod(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int, int]:
    return g, build.apply("neg", build.apply("mul", g, build.apply("floordiv", *x)))


def _extremum(first: str) -> Rule:
    """Return the rule of minimum (first: "lt") or maximum; a constant bound is that of a clamp, which it includes."""

    def rule(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int, int]:
        zero, found = build.constant(0.0), []
        for a, b in (x, x[::-1]):
            wins = build.apply(first, a, b) if first == "lt" else build.apply("lt", b, a)
            ties = g if build.constant_value(b) is not None else build.apply("mul", g, build.constant(0.5))
            tied = build.apply("where", build.apply("eq", a, b), ties, zero)
            found.append(build.apply("where", wins, g, tied))
        return found[0], found[1]

    return rule


def _where(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[None, int, int]:
    zero = build.constant(0.0)
    return None, build.apply("where", x[0], g, zero), build.apply("where", x[0], zero, g)


def _sigmoid(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int]:
    rest = build.apply("sub", build.constant(1.0), r)
    return (build.apply("mul", g, build.apply("mul", r, rest)),)


def _tanh(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[int]:
    square = build.apply("mul", r, r)
    return (build.apply("mul", g, build.apply("sub", build.constant(1.0), square)),)


def _none(build: Builder, g: int, r: int, x: tuple[int, ...]) -> tuple[None, ...]:
    return (None,) * len(x)


RULES: dict[str, Rule] = {
    "neg": lambda build, g, r, x: (build.apply("neg", g),),
    "abs": lambda build, g, r, x: (build.apply("mul", g, build.apply("sign", x[0])),),
    "exp": lambda build, g, r, x: (build.apply("mul", g, r),),
    "log": lambda build, g, r, x: (build.apply("div", g, x[0]),),
    "sqrt": lambda build, g, r, x: (build.apply("div", g, build.apply("add", r, r)),),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sin": lambda build, g, r, x: (build.apply("mul", g, build.apply("cos", x[0])),),
    "cos": lambda build, g, r, x: (build.apply("neg", build.apply("mul", g, build.apply("sin", x[0]))),),
    "add": lambda build, g, r, x: (g, g),
    "sub": lambda build, g, r, x: (g, build.apply("neg", g)),
    "mul": lambda build, g, r, x: (build.apply("mul", g, x[1]), build.apply("mul", g, x[0])),
    "div": _div,
    "pow": _pow,
    "mod": _mod,
    "min": _extremum("lt"),
    "max": _extremum("gt"),
    "where": _where,
    **dict.fromkeys(("sign", "floor", "round", "floordiv", "to_float"), _none),
}
