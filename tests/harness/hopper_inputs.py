"""Problems for the Hopper kernels: arrays whose alignment the copy engine accepts, inside larger buffers of NaN."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from anyattn.testing import Case, CaseInputs, make_inputs

MARGIN = 8  # elements: 16 bytes


def aligned(case: Case) -> CaseInputs:
    """Return the case's inputs with strides and addresses that are multiples of 16 bytes, relative to the buffer."""
    inputs = make_inputs(case)
    for name in "qkv":
        inputs.arguments[name] = embed(np.array(inputs.arguments[name]), case.layout)
    return inputs


def embed(values: np.ndarray, layout: str) -> np.ndarray:
    order = [0, 2, 1, 3] if layout == "bhsd" else [0, 1, 2, 3]
    moved = values.transpose(order)
    margins = (1, 1, 1, MARGIN)
    buffer = np.full([n + 2 * margin for n, margin in zip(moved.shape, margins, strict=True)], np.nan, values.dtype)
    view = buffer[tuple(slice(margin, margin + n) for n, margin in zip(moved.shape, margins, strict=True))]
    view[...] = moved
    return view.transpose(np.argsort(order))


def drawn(seed: int, longest: int) -> Case:
    """Return a random problem that the Hopper kernels support."""
    rng = random.Random(seed)
    choices: dict[str, Any] = {
        "batch": rng.choice((1, 2, 3)),
        "nheads_kv": rng.choice((1, 2, 3)),
        "group": rng.choice((1, 2, 4)),
        "seqlen_q": rng.randint(65, longest),
        "seqlen_k": rng.randint(1, longest),
        "dtype": rng.choice(("float16", "bfloat16")),
        "causal": rng.random() < 0.7,
        "alignment": rng.choice(("bottom-right", "top-left")),
        "layout": rng.choice(("bshd", "bhsd")),
        "scale": rng.choice((None, 0.3)),
    }
    size = rng.choice((64, 128))
    return Case(f"drawn_{seed}", head_dim=size, head_dim_v=size, seed=seed, **choices)
