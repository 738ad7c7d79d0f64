"""The README's tables, from the committed results and from what backends say of themselves.

python -m anyattn.bench.markdown RESULTS README
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ..capabilities import evidence
from ..runtime import dispatch

QUOTED = ("(1, 8, 2048, 64)", "(1, 16, 2048, 128)")
WORKLOADS = (
    *("GQA 32:8 prefill", "decode B=1", "decode B=8", "decode pages of 16", "32 rows", "window 256", "window 1024"),
    *("varlen", "dense bias", "mask documents", "dropout", "backward few heads", "backward GQA"),
)


def hardware() -> str:
    """Return the hardware of each backend by how well it is known to work there."""
    rows = [
        f"| `{name}` | {how} | {'; '.join(where)} |"
        for name in dispatch.names()
        for how, where in evidence(name).items()
    ]
    return "\n".join(["| Engine | State | Hardware |", "|---|---|---|", *rows])


def accuracy(results: dict[str, Any]) -> str:
    names = list(results["accuracy"][0]["errors"])
    lines = [f"| dtype | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in results["accuracy"]:
        errors = " | ".join(f"{row['errors'][name]:.1e}" for name in names)
        lines.append(f"| {row['dtype']} | {errors} |")
    return "\n".join(lines)


def speed(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = f"`{machine['cpu_target']}`, torch {machine['versions']['torch']}"
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {versions}, {machine['date']}:",
        "",
        "| (batch, nheads, seqlen, head_dim) | useful GFLOP/s | of the peak | torch SDPA | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        if row["name"] in QUOTED and "anyattn" in row["seconds"]:
            ours, sdpa = (row["seconds"][name]["median"] for name in ("anyattn", "torch SDPA"))
            rates = [row["flops"] / seconds / 1e9 for seconds in (ours, sdpa)]
            share = row["flops"] / ours / row["peak_flops"]
            lines.append(f"| {row['label']} | {rates[0]:.0f} | {share:.0%} | {rates[1]:.0f} | {sdpa / ours:.2f}x |")
    return "\n".join(lines)


def workloads(results: dict[str, Any]) -> str:
    """Milliseconds of ours, and how many times longer each of the others takes."""
    rows = [row for row in results["cases"] if row["name"] in WORKLOADS and "anyattn" in row["seconds"]]
    others = sorted({name for row in rows for name in row["seconds"]} - {"anyattn"}, reverse=True)
    lines = [f"| workload | ms | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for row in rows:
        seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
        ours = seconds["anyattn"]
        ratios = [f"{seconds[name] / ours:.1f}x" if name in seconds else "" for name in others]
        lines.append(f"| {row['name']}: {row['label']} | {ours * 1e3:.1f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def fill(text: str, results: dict[str, Any]) -> str:
    """The text with everything between `<!-- NAME:begin -->` and `<!-- NAME:end -->` written anew."""
    sections = {
        "hardware": hardware(),
        "accuracy": accuracy(results),
        "speed": speed(results),
        "workloads": workloads(results),
    }
    for name, section in sections.items():
        pattern = re.compile(f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text = pattern.sub(rf"\g<1>{section}\n\g<2>", text)
    return text


def main(results: str, readme: str) -> None:
    path = Path(readme)
    path.write_text(fill(path.read_text(), json.loads(Path(results).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:3])
