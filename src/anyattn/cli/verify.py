"""`anyattn verify`: a seeded matrix of problems on this machine, every backend compared with float64 in both passes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ..runtime import dispatch
from .table import table


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="compare every backend of this machine with float64",
        description="Compares every available backend with float64, feature by feature, forward and backward, in about "
        "a minute. The exit status is 1 if a result is wrong.",
    )
    parser.add_argument("--backend", choices=dispatch.names(), help="only this backend, which must be available")
    parser.add_argument("--seed", type=int, default=0, help="seed of sizes and values (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: one entry per problem and backend")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; return 0 if every result of every backend is within its budget, else 1."""
    from .matrix import engines, missing_dtypes, outcomes

    found, absent = engines(arguments.backend)
    results = []
    for number, outcome in enumerate(outcomes(found, arguments.seed), 1):
        results.append(outcome)
        _progress(f"{number}: {outcome.engine} {outcome.name}")
    _progress("")
    wrong = [result for result in results if result.mismatches]
    ok = bool(results) and not wrong and not (arguments.backend and absent)
    if arguments.json:
        summary = {"ok": ok, "absent": absent, "left_out": _left_out()}
        print(json.dumps({**summary, "results": [asdict(result) for result in results]}, indent=1))
        return 0 if ok else 1
    print(_table(results))
    for name, reason in {**absent, **missing_dtypes()}.items():
        print(f"not checked: {name}: {reason}")
    for line in _left_out():
        print(f"excluded: {line}")
    for line in dict.fromkeys(f"{x.engine}, {x.name}: {x.refused}" for x in results if x.refused):
        print(f"refused: {line}")
    for result in wrong:
        print(f"MISMATCH {result.engine}, {result.name}: {'; '.join(result.mismatches)}")
    # A refused problem is not wrong, because the call raises.
    print(f"{len(results) - len(wrong)} of {len(results)} agree with float64" if results else "nothing was checked")
    return 0 if ok else 1


def _left_out() -> list[str]:
    """Return the compute paths that failed their self-test in this process."""
    from ..backends.vulkan.selftest import failures

    return failures()


def _table(results: list[Any]) -> str:
    header = ("engine", "dtype", "problems", "agree", "refused", "forward", "backward", "seconds")
    rows = []
    for key in dict.fromkeys((result.engine, result.dtype) for result in results):
        group = [result for result in results if (result.engine, result.dtype) == key]
        counts = (len(group), sum(not x.mismatches for x in group), sum(bool(x.refused) for x in group))
        worst = (max((x.forward or 0.0) for x in group), max((x.backward or 0.0) for x in group))
        seconds = sum(x.seconds for x in group)
        rows.append((*key, *map(str, counts), *(f"{share:.0%}" for share in worst), f"{seconds:.1f}"))
    return table(header, rows) + "\nforward, backward: largest error in per cent of the accepted error"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:78]:78}\r")
        sys.stderr.flush()
