"""Append to a KV cache. JAX arrays do not change, so an append returns new caches.

XLA writes into the old caches if a compiled function donates them (`jax.jit(step, donate_argnums=...)`), and into
copies otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ...definition.inputs import Appended
from ...definition.kvcache import LABELS
from ...definition.options import Rotation
from ...definition.passes import APPEND
from ...definition.problem import described
from .arrays import check, is_concrete, per_sequence, table
from .calls import IN_PLACE, Static, check_values, named, problem
from .primitives import bind

TABLES = ("cache_seqlens", "cache_batch_idx", "block_table")


class Updated(NamedTuple):
    """Query, rotated if rotary tables are given, the keys in use per sequence, and the caches with the new keys.

    caches: k and v, and the scales of quantised ones.
    """

    q: jax.Array
    cache_seqlens: jax.Array
    caches: tuple[jax.Array, ...]


def append(arrays: Appended, rotation: Rotation, backend: str | None) -> Updated:
    """Return the caches after an append. The values of tables that are known now are checked now."""
    given: dict[str, Any] = {}
    for name, x in arrays._asdict().items():
        if x is None or name == "cache_seqlens":
            continue
        given[name] = table(name, x) if name in TABLES else check(LABELS.get(name, name), x)
    if arrays.cache_seqlens is not None:
        given["cache_seqlens"] = per_sequence("cache_seqlens", arrays.cache_seqlens, given["q"].shape[0])
    operands = [given.get(name) for name in APPEND.inputs]
    by_name = described(APPEND.inputs, operands, lambda x: x)
    call = problem(Static(APPEND.name, tuple(by_name), rotation, named(backend)), list(by_name.values()))
    tables = {name: given[name] for name in TABLES if name in given}
    if all(is_concrete(x) for x in tables.values()):
        check_values(call, {name: np.asarray(x) for name, x in tables.items()})
    found = bind(APPEND, operands, rotation, backend)
    used = given["cache_seqlens"] + np.int32(given["new_k"].shape[1])
    return Updated(found.get("out", given["q"]), used, tuple(found[name] for name in IN_PLACE if name in found))
