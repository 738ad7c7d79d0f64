"""Values of a graph in NumPy, for any shapes of the score and the indices that broadcast against each other.

An operation on indices alone is computed in the broadcast shape of those indices. So a term that depends only on the
query is computed once per query, and a term that depends only on the key once per key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .derivative import Derivative, differentiate
from .graph import CONSTANT, FLOAT, READ, SCORE, Graph, split
from .operations import OPERATIONS

Values = npt.NDArray[Any]


class Place(NamedTuple):
    """Indices of the pairs of a tile: each an integer or an array of integers; they broadcast against each other."""

    b: Any
    h: Any
    q_idx: Any
    kv_idx: Any


class Functions:
    """Score function and mask function of a call, with the values of their captured arrays.

    Args:
        graph: the functions.
        values: all captured floating-point arrays, concatenated, in the compute dtype; None if there are none.
        indices: all other captured arrays, concatenated, int32.
        kind: compute dtype.
    """

    def __init__(self, graph: Graph, values: Values | None, indices: Values | None, kind: str) -> None:
        self.graph, self._number = graph, np.dtype(kind).type
        values = None if values is None else np.asarray(values, kind)
        self._captured = (values, indices)
        self.arrays: list[Values] = split(graph, values, indices)

    def score(self, t: Values, place: Place) -> Values:
        """Return score_mod(t, b, h, q_idx, kv_idx), or t without a score function."""
        if self.graph.score is None:
            return t
        (found,) = evaluate(self.graph, (self.graph.score,), self._inputs(t, place), self.arrays, self._number)
        return np.asarray(np.broadcast_to(found, t.shape))

    def mask(self, place: Place) -> Values:
        """Return mask_mod(b, h, q_idx, kv_idx), in the broadcast shape of the indices that it depends on."""
        assert self.graph.mask is not None
        (found,) = evaluate(self.graph, (self.graph.mask,), self._inputs(None, place), self.arrays, self._number)
        return np.asarray(found)

    def backward(self, t: Values, place: Place, ds: Values, total: Values | None, *, absolute: bool = False) -> Values:
        """Return ds d score_mod / d t. Add the gradients of the captured arrays to `total`, flat, if it is given.

        Where ds is 0, nothing is added, even if the derivative is infinite or NaN. absolute: use the absolute values of
        all derivatives.
        """
        if self.graph.score is None:
            return ds
        derivative = derivative_of(self.graph)
        wanted = (derivative.slope, *[adjoint for _, adjoint in derivative.reads], *derivative.indices)
        found = evaluate(derivative.graph, wanted, self._inputs(t, place), self.arrays, self._number)
        if absolute:
            found[: 1 + len(derivative.reads)] = [np.abs(x) for x in found[: 1 + len(derivative.reads)]]
        slope, adjoints = found[0], found[1 : 1 + len(derivative.reads)]
        if total is not None:
            index = dict(zip(derivative.indices, found[1 + len(derivative.reads) :], strict=True))
            targets = split(self.graph, total, np.zeros(self.graph.sizes(floats=False), np.int32))
            for (read, _), adjoint in zip(derivative.reads, adjoints, strict=True):
                node = derivative.graph.nodes[read]
                places = [index[one] for one in node.arguments]
                _scatter(targets[int(node.value or 0)], places, _product(ds, adjoint))
        return _product(ds, slope)

    @cached_property
    def slope(self) -> Functions:
        """Return the derivative d score_mod / d score as a score function of the same arrays."""
        return Functions(slope_of(self.graph), *self._captured, self._number.__name__)

    def slopes(self, t: Values, place: Place) -> tuple[Values, Values]:
        """Return the first and the second derivative of score_mod at t; 1 and 0 without a score function.

        Either may be infinite or NaN at a masked pair.
        """
        one = np.ones_like(t)
        if self.graph.score is None:
            return one, np.zeros_like(t)
        return self.slope.score(t, place), self.slope.backward(t, place, one, None)

    def _inputs(self, t: Values | None, place: Place) -> dict[str, Any]:
        return {SCORE: t, **place._asdict()}


@lru_cache(256)
def derivative_of(graph: Graph) -> Derivative:
    return differentiate(graph)


@lru_cache(256)
def slope_of(graph: Graph) -> Graph:
    """Return the graph whose score function is d score_mod / d score."""
    derivative = derivative_of(graph)
    return derivative.graph._replace(score=derivative.slope)


@lru_cache(256)
def _order(graph: Graph, wanted: tuple[int, ...]) -> list[int]:
    return graph.reachable(wanted)


def evaluate(
    graph: Graph, wanted: tuple[int, ...], inputs: Mapping[str, Any], arrays: Sequence[Values], number: Any
) -> list[Any]:
    """Return the values of the wanted nodes. number: NumPy type of floating-point values."""
    found: dict[int, Any] = {}
    with np.errstate(all="ignore"):
        for one in _order(graph, wanted):
            node = graph.nodes[one]
            if node.operation == CONSTANT:
                found[one] = number(node.value) if node.kind == FLOAT else node.value
            elif node.operation == READ:
                found[one] = read(arrays[int(node.value or 0)], [found[x] for x in node.arguments], node.kind)
            elif node.operation in OPERATIONS:
                value = OPERATIONS[node.operation].compute(*[found[x] for x in node.arguments])
                found[one] = np.asarray(value, number) if node.kind == FLOAT else value
            else:
                found[one] = inputs[node.operation]
    return [found[one] for one in wanted]


def read(array: Values, indices: Sequence[Any], kind: str) -> Values:
    """Return array[indices]. Booleans are stored as integers."""
    found = array[tuple(indices)]
    if kind == FLOAT:
        return np.asarray(found)
    return np.asarray(found != 0 if kind == "b" else found.astype(np.int64))


def _product(ds: Values, factor: Any) -> Values:
    product = np.asarray(ds * factor)
    if np.isfinite(factor).all():
        return product
    return np.asarray(np.where(ds == 0, ds.dtype.type(0), product))


def _scatter(target: Values, places: Sequence[Any], terms: Values) -> None:
    """Add terms at array elements, in a fixed order. Axes along which no index varies are summed first."""
    if not places:
        target += terms.sum(dtype=terms.dtype)
        return
    flat = np.asarray(np.ravel_multi_index(tuple(np.broadcast_arrays(*places)), target.shape))
    flat = flat.reshape((1,) * (terms.ndim - flat.ndim) + flat.shape)
    constant = tuple(axis for axis in range(terms.ndim) if flat.shape[axis] == 1)
    summed = terms.sum(axis=constant, keepdims=True)
    sums = np.bincount(flat.ravel(), weights=summed.ravel(), minlength=target.size)
    target += sums.reshape(target.shape)
