"""Cases as calls on JAX arrays: eager, and inside a compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import anyattn
from anyattn import testing
from anyattn.definition.inputs import FIELDS

ARRAYS = {"q", "k", "v", "out", "lse", "dout", "dlse", "tq", "tk", "tv", "tbias", "tsink", *FIELDS}


@contextmanager
def wide(dtype: str = "float64") -> Iterator[None]:
    """Let JAX have 64-bit arrays if the dtype needs them, in every thread: XLA calls backends on its own threads."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def compute(inputs: testing.CaseInputs, direction: str, backend: str | None, *, jit: bool) -> testing.Results:
    """Return the results of a pass as NumPy arrays, by name."""
    given = {**inputs.arguments, **inputs.tangents, "dout": inputs.dout, "dlse": inputs.dlse, "backend": backend}
    arrays = {name: x for name, x in given.items() if name in ARRAYS and name != "rng_state" and x is not None}
    others = {name: x for name, x in given.items() if name not in ARRAYS or name == "rng_state"}

    def run(arrays: dict[str, Any]) -> dict[str, Any]:
        return _results(direction, others, arrays)

    with wide(inputs.case.dtype):
        found = (jax.jit(run) if jit else run)({name: jnp.asarray(x) for name, x in arrays.items()})
        return {name: None if x is None else np.asarray(x) for name, x in found.items()}


def _results(direction: str, scalars: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    forward = {name: x for name, x in arrays.items() if name in ("q", "k", "v", *FIELDS)} | scalars
    saved = {name: arrays[name] for name in ("dlse",) if name in arrays}
    along = {name: x for name, x in arrays.items() if name in ("tq", "tk", "tv", "tbias", "tsink")}
    if direction == "forward_tangent":
        results = anyattn.attention_forward_tangent(**along, **forward)
        return dict(zip(("out", "lse", "tout", "tlse"), results, strict=True))
    out, lse = anyattn.attention_forward(**forward)
    if direction == "forward":
        return {"out": out, "lse": lse}
    if direction == "tangent":
        return dict(zip(("tout", "tlse"), anyattn.attention_tangent(out=out, lse=lse, **along, **forward), strict=True))
    function = anyattn.attention_second if direction == "second" else anyattn.attention_backward
    given = {**forward, **saved, **(along if direction == "second" else {})}
    return dict(function(arrays["dout"], out=out, lse=lse, **given)._asdict())
