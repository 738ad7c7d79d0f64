"""Score functions of a call: the text of their graph, and their captured arrays as two flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..definition.dtypes import DTYPES, widen
from ..definition.score.graph import FLOAT
from ..definition.score.patterns import recognize
from ..definition.score.trace import Traced, trace


class Simplified(NamedTuple):
    """Functions of a call whose causal masks, windows, chunks and ALiBi are built-in arguments.

    Query i is at position i, and key j at position j: the alignment is "top-left".
    """

    score: str  # the rest; "" if nothing is left
    left: int | None
    right: int | None
    chunk: int
    slopes: Any  # (nheads,), in the compute dtype; None: no ALiBi


class Packed(NamedTuple):
    """Fields of Options and Extras that carry score_mod and mask_mod."""

    score: str
    captured: Any  # floating-point arrays, concatenated, in the compute dtype; None: none
    captured_indices: Any  # other arrays, concatenated, int32; None: none


def pack(traced: Traced, nheads: int, join: Callable[[Sequence[Any], bool], Any]) -> tuple[Packed, Simplified | None]:
    """Return the fields of a traced call, and the simplified functions, or None if nothing is recognized.

    join: concatenates arrays; True: floating-point, False: others.
    """
    arrays = list(zip(traced.graph.arrays, traced.arrays, strict=True))
    groups = {floats: [x for known, x in arrays if (known.kind == FLOAT) == floats] for floats in (True, False)}
    values, indices = (join(group, floats) if group else None for floats, group in groups.items())
    found = recognize(traced.graph, nheads)
    packed = Packed(traced.graph.text, values, indices)
    if found.left is found.right is found.slopes is None and found.chunk == 0:
        return packed, None
    graph = found.graph
    text = "" if graph.score is graph.mask is None else graph.text
    slopes = None
    if found.slopes is not None and values is not None:
        start = sum(array.size for array in graph.arrays[: found.slopes] if array.kind == FLOAT)
        slopes = values[start : start + nheads]
    return packed, Simplified(text, found.left, found.right, found.chunk, slopes)


def trace_numpy(score_mod: Any, mask_mod: Any, q: Any) -> tuple[Packed, Simplified | None]:
    """Return the fields of functions that read NumPy arrays."""
    known = DTYPES.get(str(q.dtype.name))
    compute = known.compute if known and known.compute else "float32"

    def join(arrays: Sequence[Any], floats: bool) -> Any:
        for x in arrays:
            if not isinstance(x, np.ndarray):
                raise TypeError(f"a captured array must be a NumPy array like q, got {type(x).__name__}.")
        if floats:
            return np.concatenate([widen(x, str(x.dtype.name), compute).reshape(-1) for x in arrays])
        return np.concatenate([_integers(x).reshape(-1) for x in arrays])

    return pack(trace(score_mod, mask_mod), q.shape[-2], join)


def _integers(x: Any) -> Any:
    if x.dtype.kind != "b" and x.size and (x.min() < -(2**31) or x.max() >= 2**31):
        raise ValueError(f"a captured array of integers must fit in int32, got {x.min()} to {x.max()}.")
    return x.astype(np.int32)
