"""`anyattn explain`: which backend a described problem gets, and every refusal with its reasons. Computes nothing."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from ..definition.dtypes import ATTENTION_DTYPES as DTYPES
from ..definition.options import ALIGNMENTS, Options
from ..definition.passes import BACKWARD, FORWARD
from ..definition.problem import Array, Problem
from ..definition.validate import make_problem
from ..runtime import dispatch


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain", help="which backend a problem gets, and why not the others"
    )
    add_sizes(parser)
    add_features(parser)
    parser.add_argument("--backend", help="ask as a call that names this backend")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--batch", type=_size, default=1)
    parser.add_argument("--heads", type=_size, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=_size, help="default: as many as query heads")
    parser.add_argument("--head-dim", type=_size, default=64)
    parser.add_argument("--head-dim-v", type=_size, help="default: --head-dim")
    parser.add_argument("--seqlen-q", type=_size, default=1024)
    parser.add_argument("--seqlen-k", type=_size, help="default: --seqlen-q")
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")


def add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--window", nargs=2, type=_bound, default=(None, None), metavar=("LEFT", "RIGHT"), help="keys, or none"
    )
    parser.add_argument("--chunk", type=_size, default=0)
    parser.add_argument("--alignment", choices=ALIGNMENTS, default=ALIGNMENTS[0])
    parser.add_argument("--scale", type=float)
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--bias", action="store_true", help="one number per query head, row and key")
    parser.add_argument("--mask", action="store_true", help="a dense boolean mask")
    parser.add_argument("--alibi", action="store_true")
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--seqused", action="store_true", help="lengths per sequence")
    parser.add_argument("--leftpad", action="store_true")
    parser.add_argument("--offset", action="store_true", help="a position of row 0 per sequence")
    parser.add_argument("--varlen", action="store_true", help="packed sequences")
    parser.add_argument("--paged", type=_size, default=0, metavar="PAGE_SIZE", help="k and v in pages")
    parser.add_argument("--cache-batch-idx", action="store_true", help="an entry of the cache per sequence")
    parser.add_argument("--backward", action="store_true", help="the gradients, not the forward")
    parser.add_argument("--dlse", action="store_true", help="with a gradient of lse (needs --backward)")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Status 0 if a backend computes the problem, 1 if none does, 2 if there is no such problem."""
    try:
        problem = describe(arguments)
        explanation = dispatch.explain(problem, dispatch.named(arguments.backend))
    except (TypeError, ValueError) as error:
        sys.stderr.write(f"anyattn explain: {error}\n")
        return 2
    print(json.dumps(explanation._asdict(), indent=2) if arguments.json else explanation)
    return 0 if explanation.chosen else 1


def describe(a: argparse.Namespace) -> Problem:
    """The problem, from metadata alone: nothing of its size is allocated."""
    if a.varlen and (a.bias or a.mask):
        raise ValueError("--bias and --mask have no meaning for packed sequences (--varlen)")
    a.seqlen_k = a.seqlen_q if a.seqlen_k is None else a.seqlen_k
    a.kv_heads = a.heads if a.kv_heads is None else a.kv_heads
    a.head_dim_v = a.head_dim if a.head_dim_v is None else a.head_dim_v
    given = {name: _array(shape, dtype, a.device) for name, (shape, dtype) in _shapes(a).items()}
    return make_problem(given, _options(a), BACKWARD if a.backward else FORWARD)


def _shapes(a: argparse.Namespace) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array that the problem has."""
    compute = "float64" if a.dtype == "float64" else "float32"
    pages = math.ceil(a.seqlen_k / a.paged) if a.paged else 0
    rows_q = (a.batch * a.seqlen_q,) if a.varlen else (a.batch, a.seqlen_q)
    rows_k = (a.batch * a.seqlen_k,) if a.varlen else (a.batch, a.seqlen_k)
    rows_k = (a.batch * pages, a.paged) if a.paged else rows_k
    scores = (a.batch, a.heads, a.seqlen_q, pages * a.paged or a.seqlen_k)
    out = ((*rows_q, a.heads, a.head_dim_v), a.dtype)
    lse = (a.heads, *rows_q) if a.varlen else scores[:3]
    every = {
        "q": ((*rows_q, a.heads, a.head_dim), a.dtype),
        "k": ((*rows_k, a.kv_heads, a.head_dim), a.dtype),
        "v": ((*rows_k, a.kv_heads, a.head_dim_v), a.dtype),
        "bias": a.bias and (scores, a.dtype),
        "mask": a.mask and (scores, "bool"),
        "alibi_slopes": a.alibi and ((a.heads,), compute),
        "sink": a.sink and ((a.heads,), compute),
        "cu_seqlens_q": a.varlen and ((a.batch + 1,), "int32"),
        "cu_seqlens_k": a.varlen and not a.paged and ((a.batch + 1,), "int32"),
        "seqused_q": a.seqused and ((a.batch,), "int32"),
        "seqused_k": (a.seqused or a.paged) and ((a.batch,), "int32"),
        "leftpad_k": a.leftpad and ((a.batch,), "int32"),
        "offset": a.offset and ((a.batch,), "int32"),
        "block_table": a.paged and ((a.batch, pages), "int32"),
        "cache_batch_idx": a.cache_batch_idx and ((a.batch,), "int32"),
        "rng_state": a.dropout and ((2,), "int64"),
        "out": a.backward and out,
        "dout": a.backward and out,
        "lse": a.backward and (lse, compute),
        "dlse": a.backward and a.dlse and (lse, compute),
    }
    return {name: described for name, described in every.items() if described}


def _array(shape: tuple[int, ...], dtype: str, device: str) -> Array:
    """Contiguous."""
    return Array(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype, device)


def _options(a: argparse.Namespace) -> Options:
    left, right = a.window
    return Options(
        scale=a.scale,
        softcap=a.softcap,
        left=left,
        right=0 if a.causal else right,
        chunk=a.chunk,
        alignment=a.alignment,
        dropout_p=a.dropout,
        max_seqlen_q=a.seqlen_q if a.varlen else 0,
        max_seqlen_k=a.seqlen_k if a.varlen and not a.paged else 0,
        deterministic=a.deterministic,
        batch_invariant=a.batch_invariant,
    )


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 0")
    return int(text)


def _bound(text: str) -> int | None:
    """An integer >= 0, or none."""
    return None if text.lower() == "none" else _size(text)
