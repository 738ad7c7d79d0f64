"""Drawings of what rows see: each is asked of the reference itself, with the arguments that its caption shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyattn import testing
from anyattn.definition import reference

CELL = 18
MARGIN = 34  # for the names of the axes

# Group -> caption -> arguments; rows and keys are sizes, cu_seqlens are those of rows and keys alike.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "causal": {
        "causal=True": {"rows": 6, "keys": 6, "causal": True},
        "causal=True, 4 rows and 7 keys": {"rows": 4, "keys": 7, "causal": True},
        'causal=True, alignment="top-left"': {"rows": 4, "keys": 7, "causal": True, "alignment": "top-left"},
        "causal=True, 6 rows and 4 keys": {"rows": 6, "keys": 4, "causal": True},
        "causal=True, offset=1": {"rows": 4, "keys": 7, "causal": True, "offset": 1},
    },
    "window": {
        "window=(2, 1)": {"rows": 7, "keys": 7, "window": (2, 1)},
        "window=(2, None), causal=True": {"rows": 7, "keys": 7, "window": (2, None), "causal": True},
        "window=(None, 1)": {"rows": 7, "keys": 7, "window": (None, 1)},
        "window=(2, 0), 3 rows and 7 keys": {"rows": 3, "keys": 7, "window": (2, 0)},
    },
    "chunk": {
        "chunk=3": {"rows": 7, "keys": 7, "chunk": 3},
        "chunk=3, causal=True": {"rows": 7, "keys": 7, "chunk": 3, "causal": True},
        "chunk=4, window=(1, None), causal=True": {
            "rows": 8, "keys": 8, "chunk": 4, "window": (1, None), "causal": True,
        },
    },
    "lengths": {
        "seqused_k=[5]": {"rows": 7, "keys": 7, "seqused_k": [5]},
        "leftpad_k=[2], causal=True": {"rows": 7, "keys": 7, "leftpad_k": [2], "causal": True},
        "seqused_q=[5], seqused_k=[6], causal=True": {
            "rows": 7, "keys": 7, "seqused_q": [5], "seqused_k": [6], "causal": True,
        },
    },
    "varlen": {
        "cu_seqlens=[0, 3, 4, 8]": {"cu_seqlens": [0, 3, 4, 8]},
        "cu_seqlens=[0, 3, 4, 8], causal=True": {"cu_seqlens": [0, 3, 4, 8], "causal": True},
    },
    "sink": {
        "sink, causal=True": {"rows": 6, "keys": 6, "causal": True, "sink": True},
        "sink, window=(2, 0)": {"rows": 6, "keys": 6, "window": (2, 0), "sink": True},
    },
}  # fmt: skip


def drawn(group: str) -> str:
    """The group's drawings as HTML."""
    figures = [figure(caption, dict(arguments)) for caption, arguments in GROUPS[group].items()]
    return f'<div class="masks">{"".join(figures)}</div>'


def figure(caption: str, arguments: dict[str, Any]) -> str:
    sink = bool(arguments.pop("sink", False))
    picture = svg(seen(**arguments), sink)
    return f"<figure>{picture}<figcaption><code>{caption.replace('<', '&lt;')}</code></figcaption></figure>"


def seen(rows: int = 0, keys: int = 0, cu_seqlens: list[int] | None = None, **arguments: Any) -> np.ndarray:
    """(rows, keys): which keys the reference lets each row see."""
    if cu_seqlens:
        arguments |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        rows = keys = cu_seqlens[-1]
    q, k = (np.zeros((size, 1, 1) if cu_seqlens else (1, size, 1, 1)) for size in (rows, keys))
    problem, arrays = testing.describe({"q": q, "k": k, "v": k, **arguments})
    found = np.zeros((rows, keys), bool)
    for head in reference.heads(problem, arrays):
        s = head.sequence
        found[s.row_q : s.row_q + s.n_q, s.row_k : s.row_k + s.n_k] = head.s > -np.inf
    return found


def svg(cells: np.ndarray, sink: bool) -> str:
    """One square per row and key; a sink is a column of its own, which every row sees."""
    rows, keys = cells.shape
    left = MARGIN + (CELL + 6 if sink else 0)
    width, height = left + keys * CELL + 1, MARGIN + rows * CELL + 1

    def square(x: float, i: int, kind: str) -> str:
        return f'<rect class="{kind}" x="{x}" y="{MARGIN + i * CELL}" width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'

    parts = [square(left + j * CELL, i, "seen" if cells[i, j] else "hidden") for i in range(rows) for j in range(keys)]
    if sink:
        parts += [square(MARGIN, i, "sink") for i in range(rows)]
        parts.append(f'<text class="text" x="{MARGIN}" y="{MARGIN - 20}">sink</text>')
    labels = [
        *(f'<text class="text" x="{left + j * CELL + 4}" y="{MARGIN - 5}">{j}</text>' for j in range(keys)),
        *(f'<text class="text" x="{MARGIN - 14}" y="{MARGIN + i * CELL + 12}">{i}</text>' for i in range(rows)),
        f'<text class="text" x="{left}" y="{MARGIN - 20}">keys</text>',
        f'<text class="text" transform="translate(10 {MARGIN + rows * CELL / 2 + 12}) rotate(-90)">rows</text>',
    ]
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(parts + labels)}</svg>'
