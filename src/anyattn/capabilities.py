"""Capabilities of the backends: the features that each backend supports in each pass, taken from its `supports`.

`anyattn info --features` prints the table, the documentation shows it, and tests compare the backends with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .backends.base import Backend
from .definition.describe import Description, describe
from .definition.options import Options
from .definition.passes import BACKWARD, FORWARD
from .definition.score.trace import captured, trace
from .runtime import dispatch

SMALL = Description(nheads=2, seqlen_q=5, seqlen_k=7, head_dim=16)


def _small(*extras: str, **options: Any) -> Description:
    """Return the small problem with these optional arrays and fields of Options."""
    return SMALL._replace(extras=frozenset(extras), options=Options(**options))


_SLOPES, _DOCUMENTS = captured(np.ones(2, np.float32)), captured(np.zeros(8, np.int32))
# Score functions of the table, as keywords of `attention`.
FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: score + np.tanh(score)},
    "mask_mod": {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < 2)},
    "captured arrays": {
        "score_mod": lambda score, b, h, q_idx, kv_idx: score - _SLOPES[h] * (q_idx - kv_idx),
        "mask_mod": lambda b, h, q_idx, kv_idx: _DOCUMENTS[q_idx] <= _DOCUMENTS[kv_idx],
    },
}


def _functions(name: str) -> Description:
    functions = FUNCTIONS[name]
    return _small(score=trace(functions.get("score_mod"), functions.get("mask_mod")).graph.text)


FEATURES: dict[str, Description] = {
    "float32": SMALL,
    "float16": SMALL._replace(dtype="float16"),
    "bfloat16": SMALL._replace(dtype="bfloat16"),
    "float64": SMALL._replace(dtype="float64"),
    "head_dim 59": SMALL._replace(head_dim=59),
    "head_dim 256": SMALL._replace(head_dim=256),
    "head_dim 512": SMALL._replace(head_dim=512),
    "head_dim 1024": SMALL._replace(head_dim=1024),
    "head_dim_v unlike head_dim": SMALL._replace(head_dim_v=24),
    "scale": _small(scale=-0.5),
    "grouped-query heads": SMALL._replace(nheads_kv=1),
    "causal": _small(right=0),
    "causal, top left": _small(right=0, alignment="top-left"),
    "offset": _small("offset", right=0),
    "window": _small(left=3, right=1),
    "chunk": _small(chunk=4),
    "mask": _small("mask"),
    "bias": _small("bias"),
    "alibi_slopes": _small("alibi_slopes"),
    "score_mod": _functions("score_mod"),
    "mask_mod": _functions("mask_mod"),
    "captured arrays": _functions("captured arrays"),
    "softcap": _small(softcap=5.0),
    "sink": _small("sink"),
    "dropout": _small(dropout_p=0.1),
    "lengths (seqused, leftpad)": _small("seqused_q", "seqused_k", "leftpad_k"),
    "packed sequences": SMALL._replace(packed=True),
    "pages": SMALL._replace(page_size=4),
    "packed sequences, pages": SMALL._replace(packed=True, page_size=4),
    "cache_batch_idx": _small("cache_batch_idx"),
    "kv_indices": _small("kv_indices"),
    "int8 k and v": SMALL._replace(stored="int8"),
    "float8 k and v": SMALL._replace(stored="float8_e4m3fn"),
    "gradient of lse": SMALL._replace(dlse=True),
    "deterministic": _small(deterministic=True),
    "batch_invariant": _small(batch_invariant=True),
}
PASSES = (FORWARD, BACKWARD)
DEVICES = ("cpu", "cuda:0")  # a backend supports a feature if it does so on one of these


class Feature(NamedTuple):
    """Feature and its refusals by backend and pass: a list of reasons, empty if the feature is supported."""

    name: str
    description: Description
    refusals: dict[str, dict[str, list[str]]]


def collect() -> list[Feature]:
    """Return every feature with the answers of every backend."""
    return [Feature(name, description, _refusals(description)) for name, description in FEATURES.items()]


def evidence(name: str) -> dict[str, tuple[str, ...]]:
    """Return the hardware that a backend runs on, by level of evidence: the EVIDENCE of the backend's module."""
    module = sys.modules[type(dispatch.get(name)).__module__]
    found: dict[str, tuple[str, ...]] = getattr(module, "EVIDENCE", {})
    return found


def cells(found: list[Feature]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table; "no [2]" refers to the second of `footnotes`."""
    numbers = footnotes(found)

    def cell(reasons: list[str]) -> str:
        return f"no {''.join(f'[{numbers[reason]}]' for reason in reasons)}" if reasons else "yes"

    header = ["feature", *(f"{name} {pass_}" for name in dispatch.names() for pass_ in PASSES)]
    rows = [[f.name, *(cell(reasons) for reasons in _columns(f))] for f in found]
    return header, rows


def footnotes(found: list[Feature]) -> dict[str, int]:
    """Return the number of each reason, in the order in which they first appear."""
    reasons = dict.fromkeys(reason for feature in found for cell in _columns(feature) for reason in cell)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def _columns(feature: Feature) -> Iterator[list[str]]:
    for passes in feature.refusals.values():
        yield from passes.values()


def _refusals(description: Description) -> dict[str, dict[str, list[str]]]:
    return {
        name: {pass_.name: _reasons(dispatch.get(name), description._replace(pass_=pass_)) for pass_ in PASSES}
        for name in dispatch.names()
    }


def _reasons(backend: Backend, description: Description) -> list[str]:
    """Return the shortest list of reasons that the backend gives on any of DEVICES."""
    answers = [dispatch.unsupported(backend, describe(description._replace(device=device))) for device in DEVICES]
    return min(answers, key=len)
