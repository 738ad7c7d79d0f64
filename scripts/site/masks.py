"""Drawings of masks, computed by the definition from the arguments that each caption shows."""

from __future__ import annotations

from math import ceil
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from anyattn import testing
from anyattn.definition import reference

CELL = 18
MARGIN = 34  # for the names of the axes
GAP = 28
WIDTH = 480  # two figures side by side: readable at the width of a phone too
CHARACTER = 7.4  # width in the font of captions
STYLE = """
.visible { fill: #4051b5; } .sink { fill: #f28c28; } .masked { fill: #e3e6ee; }
.text { fill: #667; font: 11px sans-serif; } .code { fill: #334; font: 12px monospace; }
@media (prefers-color-scheme: dark) {
  .visible { fill: #8c9eff; } .masked { fill: #343a48; } .text { fill: #99a; } .code { fill: #ccd; }
}
"""

# Group -> caption -> arguments; rows and keys are sizes, and cu_seqlens apply to both.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "causal": {
        "causal=True": {"rows": 6, "keys": 6, "causal": True},
        "causal=True, 4 queries and 7 keys": {"rows": 4, "keys": 7, "causal": True},
        'causal=True, alignment="top-left"': {"rows": 4, "keys": 7, "causal": True, "alignment": "top-left"},
        "causal=True, 6 queries and 4 keys": {"rows": 6, "keys": 4, "causal": True},
        "causal=True, offset=1": {"rows": 4, "keys": 7, "causal": True, "offset": 1},
    },
    "window": {
        "window=(2, 1)": {"rows": 7, "keys": 7, "window": (2, 1)},
        "window=(2, None), causal=True": {"rows": 7, "keys": 7, "window": (2, None), "causal": True},
        "window=(None, 1)": {"rows": 7, "keys": 7, "window": (None, 1)},
        "window=(2, 0), 3 queries and 7 keys": {"rows": 3, "keys": 7, "window": (2, 0)},
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


def drawing(group: str) -> str:
    """Return the group's figures with their captions as one SVG file."""
    x = y = line = 0
    widest = 0
    figures = []
    for caption, arguments in GROUPS[group].items():
        content, width, height = figure(caption, dict(arguments))
        if x and x + width > WIDTH:
            x, y, line = 0, y + line + GAP, 0
        figures.append(f'<g transform="translate({x} {y})">{content}</g>')
        x, line, widest = x + width + GAP, max(line, height), max(widest, x + width)
    size = f'width="{widest}" height="{y + line}" viewBox="0 0 {widest} {y + line}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *figures, "</svg>"]
    return "\n".join(lines) + "\n"


def figure(caption: str, arguments: dict[str, Any]) -> tuple[str, int, int]:
    """Return a figure and its width and height."""
    sink = bool(arguments.pop("sink", False))
    squares, width, height = svg(visible(**arguments), sink)
    text = escape(caption)
    label = f'<text class="code" x="0" y="{height + 18}">{text}</text>'
    return squares + label, max(width, ceil(CHARACTER * len(caption))), height + 26


def visible(rows: int = 0, keys: int = 0, cu_seqlens: list[int] | None = None, **arguments: Any) -> np.ndarray:
    """Return which keys each query attends to, by the reference: (queries, keys)."""
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


def svg(cells: np.ndarray, sink: bool) -> tuple[str, int, int]:
    """Return a square for each query and key, and the width and height. A sink is a separate column."""
    rows, keys = cells.shape
    left = MARGIN + (CELL + 6 if sink else 0)
    width, height = left + keys * CELL + 1, MARGIN + rows * CELL + 1

    def square(x: float, i: int, kind: str) -> str:
        return f'<rect class="{kind}" x="{x}" y="{MARGIN + i * CELL}" width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'

    parts = [
        square(left + j * CELL, i, "visible" if cells[i, j] else "masked") for i in range(rows) for j in range(keys)
    ]
    if sink:
        parts += [square(MARGIN, i, "sink") for i in range(rows)]
        parts.append(f'<text class="text" x="{MARGIN}" y="{MARGIN - 20}">sink</text>')
    labels = [
        *(f'<text class="text" x="{left + j * CELL + 4}" y="{MARGIN - 5}">{j}</text>' for j in range(keys)),
        *(f'<text class="text" x="{MARGIN - 14}" y="{MARGIN + i * CELL + 12}">{i}</text>' for i in range(rows)),
        f'<text class="text" x="{left}" y="{MARGIN - 20}">keys</text>',
        f'<text class="text" transform="translate(10 {MARGIN + rows * CELL / 2 + 22}) rotate(-90)">queries</text>',
    ]
    return "".join(parts + labels), width, height
