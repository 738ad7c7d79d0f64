"""Score functions of a call: their graph, and their captured arrays as the framework reads and converts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..definition.dtypes import DTYPES, widen
from ..definition.score.builder import without_unread_arrays
from ..definition.score.graph import FLOAT, Graph
from ..definition.score.trace import Traced, numpy_dtypes, trace


class Packed(NamedTuple):
    """Fields of Options and Extras that carry score_mod and mask_mod."""

    score: str = ""
    captured: Any = None  # floating-point arrays, concatenated, in the compute dtype; None: none
    captured_indices: Any = None  # other arrays, concatenated, int32; None: none


class Functions(NamedTuple):
    """Traced functions of a call, and what the framework does with captured arrays.

    Attributes:
        graph: the functions.
        arrays: captured arrays, in the order of `graph.arrays`.
        join: returns arrays as one flat array; True: in the compute dtype, False: int32.
        convert: returns an array in its own shape; True: in the compute dtype, False: unchanged.
        host: returns the values of an array, or None if they are not known now.
    """

    graph: Graph
    arrays: tuple[Any, ...]
    join: Callable[[Sequence[Any], bool], Any]
    convert: Callable[[Any, bool], Any]
    host: Callable[[Any], npt.NDArray[Any] | None]

    def zeros(self, size: int) -> Any:
        """Return zeros in the compute dtype."""
        return self.join([np.zeros(size)], True)

    def packed(self, graph: Graph, *, every_array: bool) -> Packed:
        """Return the fields of a graph of these arrays. every_array: also those that the graph does not read."""
        if graph.score is graph.mask is None:
            return Packed()
        numbers: Sequence[int] = range(len(self.arrays))
        if not every_array:
            graph, numbers = without_unread_arrays(graph)
        known = [(one, self.arrays[number]) for one, number in zip(graph.arrays, numbers, strict=True)]
        groups = {floats: [x for one, x in known if (one.kind == FLOAT) == floats] for floats in (True, False)}
        values, indices = (self.join(group, floats) if group else None for floats, group in groups.items())
        return Packed(graph.text, values, indices)


def trace_numpy(score_mod: Any, mask_mod: Any, q: Any, gradients: bool) -> Functions:
    """Return functions that read NumPy arrays. gradients: the gradients of captured arrays are wanted."""
    known = DTYPES.get(str(q.dtype.name))
    compute = known.compute if known and known.compute else "float32"

    def convert(x: Any, floats: bool) -> Any:
        if not isinstance(x, np.ndarray):
            raise TypeError(f"a captured array must be a NumPy array like q, got {type(x).__name__}.")
        return widen(x, str(x.dtype.name), compute) if floats else x

    def join(arrays: Sequence[Any], floats: bool) -> Any:
        ready = [convert(x, floats) for x in arrays]
        return np.concatenate([(x if floats else _integers(x)).reshape(-1) for x in ready])

    traced = with_gradients(trace(score_mod, mask_mod, dtypes=numpy_dtypes(compute)), lambda x: gradients)
    return Functions(*traced, join, convert, lambda x: convert(x, False))


def with_gradients(traced: Traced, wanted: Callable[[Any], bool]) -> Traced:
    """Return the functions with the gradients of those floating-point arrays that are wanted."""
    known = zip(traced.graph.arrays, traced.arrays, strict=True)
    arrays = tuple([one._replace(gradient=one.kind == FLOAT and wanted(x)) for one, x in known])
    return traced._replace(graph=traced.graph._replace(arrays=arrays))


def _integers(x: Any) -> Any:
    if x.dtype.kind != "b" and x.size and (x.min() < -(2**31) or x.max() >= 2**31):
        raise ValueError(f"a captured array of integers must fit in int32, got {x.min()} to {x.max()}.")
    return x.astype(np.int32)
