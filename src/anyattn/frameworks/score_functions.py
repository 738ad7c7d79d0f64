"""Score functions of a call: the text of their graph, and their captured arrays as two flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..definition.dtypes import DTYPES, widen
from ..definition.score.graph import FLOAT
from ..definition.score.trace import Traced, trace


class Packed(NamedTuple):
    """Fields of Options and Extras that carry score_mod and mask_mod."""

    score: str
    captured: Any  # floating-point arrays, concatenated, in the compute dtype; None: none
    captured_indices: Any  # other arrays, concatenated, int32; None: none


def pack(traced: Traced, join: Callable[[Sequence[Any], bool], Any]) -> Packed:
    """Return the fields of a traced call. join: concatenates arrays; True: floating-point, False: others."""
    arrays = list(zip(traced.graph.arrays, traced.arrays, strict=True))
    groups = {floats: [x for known, x in arrays if (known.kind == FLOAT) == floats] for floats in (True, False)}
    values, indices = (join(group, floats) if group else None for floats, group in groups.items())
    return Packed(traced.graph.text, values, indices)


def trace_numpy(score_mod: Any, mask_mod: Any, q: Any) -> Packed:
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

    return pack(trace(score_mod, mask_mod), join)


def _integers(x: Any) -> Any:
    if x.dtype.kind != "b" and x.size and (x.min() < -(2**31) or x.max() >= 2**31):
        raise ValueError(f"a captured array of integers must fit in int32, got {x.min()} to {x.max()}.")
    return x.astype(np.int32)
