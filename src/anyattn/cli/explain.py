"""`anyattn explain`: the backend of a described problem, and why each other backend is refused. Computes nothing."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..definition.describe import Description, describe
from ..definition.dtypes import ATTENTION_DTYPES, QUANTISED
from ..definition.inputs import FIELDS
from ..definition.options import ALIGNMENTS, Options
from ..definition.passes import BACKWARD, FORWARD
from ..definition.quantised import SCALES_OF
from ..runtime import dispatch

# Flags of optional arrays that differ from the array's name
FLAGS = {"alibi_slopes": "alibi", "seqused_q": "seqused", "seqused_k": "seqused", "leftpad_k": "leftpad"}
# Optional arrays without a flag, because --varlen, --paged, --dropout, --stored and score functions add them
ADDED = (
    *("cu_seqlens_q", "cu_seqlens_k", "block_table", "rng_state", "captured", "captured_indices"),
    *SCALES_OF.values(),
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="show the backend of a problem, and why not the others",
        description="Shows which backend would compute a call with these sizes and arguments, and why the others would "
        "not. Nothing is computed. The exit status is 1 if no backend computes the call, and 2 if the call is invalid.",
    )
    add_sizes(parser)
    add_features(parser)
    parser.add_argument("--backend", help="name this backend in the call (default: automatic choice)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(ATTENTION_DTYPES)} (default: %(default)s)")
    parser.add_argument("--batch", type=_size, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--heads", type=_size, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=_size, help="heads of k and v (default: as many as query heads)")
    parser.add_argument("--head-dim", type=_size, default=64, help="size of a head of q and k (default: %(default)s)")
    parser.add_argument("--head-dim-v", type=_size, help="size of a head of v (default: --head-dim)")
    parser.add_argument("--seqlen-q", type=_size, default=1024, help="queries of a sequence (default: %(default)s)")
    parser.add_argument("--seqlen-k", type=_size, help="keys of a sequence (default: --seqlen-q)")
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")


def add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--causal", action="store_true", help="attend only to keys up to the query's position")
    parser.add_argument(
        "--window",
        nargs=2,
        type=_bound,
        default=(None, None),
        metavar=("LEFT", "RIGHT"),
        help="keys before and after the query's position; none: no limit",
    )
    parser.add_argument("--chunk", type=_size, default=0, help="positions of a chunk (default: no chunks)")
    parser.add_argument(
        "--alignment", choices=ALIGNMENTS, default=ALIGNMENTS[0], help="of causal and window (default: %(default)s)"
    )
    parser.add_argument("--scale", type=float, help="factor of the scores (default: head_dim ** -0.5)")
    parser.add_argument("--softcap", type=float, default=0.0, help="bound of the scores (default: off)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout_p (default: %(default)s)")
    for flag, names in extras_by_flag().items():
        shape = f"({', '.join(FIELDS[names[0]].shapes[0])})"
        parser.add_argument(f"--{flag}", action="store_true", help=f"pass {' and '.join(names)} of shape {shape}")
    parser.add_argument("--varlen", action="store_true", help="packed sequences, as in attention_varlen")
    parser.add_argument("--paged", type=_size, default=0, metavar="PAGE_SIZE", help="k and v in pages of this size")
    parser.add_argument("--stored", default="", choices=QUANTISED, help="dtype of quantised k and v")
    parser.add_argument("--backward", action="store_true", help="explain the backward pass instead of the forward pass")
    parser.add_argument("--dlse", action="store_true", help="with a gradient of lse (needs --backward)")
    parser.add_argument("--deterministic", action="store_true", help="require the same bits in every run")
    parser.add_argument("--batch-invariant", action="store_true", help="require independence of the rest of the batch")


def extras_by_flag() -> dict[str, list[str]]:
    """Return the names of the optional arrays of each flag."""
    found: dict[str, list[str]] = {}
    for name in FIELDS:
        if name not in ADDED:
            found.setdefault(FLAGS.get(name, name).replace("_", "-"), []).append(name)
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; return 0 if a backend supports the problem, 1 if none does, 2 if it is not valid."""
    try:
        problem = describe(parse(arguments))
        explanation = dispatch.explain(problem, dispatch.named(arguments.backend))
    except (TypeError, ValueError) as error:
        sys.stderr.write(f"anyattn explain: {error}\n")
        return 2
    print(json.dumps(explanation._asdict(), indent=2) if arguments.json else explanation)
    return 0 if explanation.chosen else 1


def parse(a: argparse.Namespace) -> Description:
    """Return the description that the flags give."""
    if a.varlen and (a.bias or a.mask):
        raise ValueError("--bias and --mask cannot be combined with --varlen.")
    given = [name for flag, names in extras_by_flag().items() if getattr(a, flag.replace("-", "_")) for name in names]
    return Description(
        dtype=a.dtype,
        device=a.device,
        batch=a.batch,
        nheads=a.heads,
        nheads_kv=a.kv_heads,
        seqlen_q=a.seqlen_q,
        seqlen_k=a.seqlen_k,
        head_dim=a.head_dim,
        head_dim_v=a.head_dim_v,
        stored=a.stored,
        packed=a.varlen,
        page_size=a.paged,
        extras=frozenset(given),
        options=_options(a),
        pass_=BACKWARD if a.backward else FORWARD,
        dlse=a.dlse,
    )


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
        deterministic=a.deterministic,
        batch_invariant=a.batch_invariant,
    )


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)


def _bound(text: str) -> int | None:
    """Return an integer >= 0, or None for "none"."""
    return None if text.lower() == "none" else _size(text)
