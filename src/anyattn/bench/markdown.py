"""Tables of the README and the documentation, from committed results and from the evidence of each backend."""

from __future__ import annotations

from typing import Any

from ..capabilities import evidence
from ..runtime import dispatch

QUOTED = ("(1, 8, 2048, 64)", "(1, 16, 2048, 128)")
WORKLOADS = (
    *("GQA 32:8 prefill", "decode B=1", "decode B=8", "decode pages of 16", "32 rows", "window 256", "window 1024"),
    *("varlen", "dense bias", "mask documents", "dropout", "backward few heads", "backward GQA"),
)
EVIDENCE = ("tested", "compiled", "expected")
# (name, end of the label) of a case -> what the README calls it
HIGHLIGHTS = {
    ("(1, 16, 2048, 128)", "float32 causal forward"): "prefill, 2,048 tokens, 16 heads of 128, float32",
    ("(1, 16, 2048, 128)", "bfloat16 causal backward"): "its gradients in bfloat16",
    ("window 256", "bfloat16 causal window 255 forward"): "sliding window of 256, 8,192 tokens, bfloat16",
    ("decode B=1", "bfloat16 cache forward"): "one token over a cache of 65,536 keys, 32:8 heads, bfloat16",
}


def hardware() -> str:
    """Return the hardware of each backend, by level of evidence."""
    lines = [f"| Backend | {' | '.join(name.capitalize() for name in EVIDENCE)} |", "|---" * (len(EVIDENCE) + 1) + "|"]
    for name in dispatch.names():
        found = evidence(name)
        lines.append(f"| `{name}` | {' | '.join('; '.join(found.get(how, ())) or '-' for how in EVIDENCE)} |")
    return "\n".join(lines)


def highlights(processors: dict[str, dict[str, Any]]) -> str:
    """Return the time of a few cases on each processor, and how many times as long PyTorch takes."""
    heads = [_head(name, results["machine"]) for name, results in processors.items()]
    lines = [f"| anyattn (PyTorch's SDPA) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for key, text in HIGHLIGHTS.items():
        lines.append(f"| {text} | {' | '.join(_against(key, results) for results in processors.values())} |")
    sentences = [f"* {name}: {_faster(results)}" for name, results in processors.items()]
    lines += ["", "Of the benchmark cases that anyattn and PyTorch both compute, anyattn is faster in:", *sentences]
    return "\n".join(lines)


def _head(name: str, machine: dict[str, Any]) -> str:
    return f"{name}, {machine['threads']} threads, {machine['date']}"


def _against(key: tuple[str, str], results: dict[str, Any]) -> str:
    """Return anyattn's time of a case, with PyTorch's as a multiple of it."""
    (row,) = (row for row in results["cases"] if (row["name"], row["label"].split(") ", 1)[-1]) == key)
    ours, sdpa = (row["seconds"][name]["median"] for name in ("anyattn", "torch SDPA"))
    return f"{ours * 1e3:.1f} ms ({sdpa / ours:.1f}x)"


def _faster(results: dict[str, Any]) -> str:
    """Return in how many cases anyattn is faster than PyTorch, and by how much."""
    timed = [row["seconds"] for row in results["cases"]]
    ratios = sorted(
        row["torch SDPA"]["median"] / row["anyattn"]["median"] for row in timed if {"anyattn", "torch SDPA"} <= set(row)
    )
    faster, half = sum(ratio > 1 for ratio in ratios), ratios[len(ratios) // 2]
    return (
        f"{faster} of {len(ratios)}. PyTorch takes {half:.1f} times as long in the median, "
        f"and from {ratios[0]:.2f} to {ratios[-1]:.0f} times."
    )


def accuracy(results: dict[str, Any]) -> str:
    names = list(results["accuracy"][0]["errors"])
    lines = [f"| dtype | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in results["accuracy"]:
        errors = " | ".join(f"{row['errors'][name]:.1e}" for name in names)
        lines.append(f"| {row['dtype']} | {errors} |")
    return "\n".join(lines)


def speed(results: dict[str, Any]) -> str:
    """Return dense and causal attention next to PyTorch's, with the share of the peak."""
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
    """Return milliseconds of anyattn, and the times of the other libraries relative to them."""
    rows = [row for row in results["cases"] if row["name"] in WORKLOADS and "anyattn" in row["seconds"]]
    others = sorted({name for row in rows for name in row["seconds"]} - {"anyattn"}, reverse=True)
    lines = [f"| workload | ms | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for row in rows:
        seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
        ours = seconds["anyattn"]
        ratios = [f"{seconds[name] / ours:.1f}x" if name in seconds else "" for name in others]
        lines.append(f"| {row['name']}: {row['label']} | {ours * 1e3:.1f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def slower(results: dict[str, Any]) -> str:
    """Return the cases in which another library takes less time than anyattn, and how much of its time."""
    lines = ["| case | faster library, and its time as a part of anyattn's |", "|---|---|"]
    for row in results["cases"]:
        seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
        ours = seconds.pop("anyattn", 0.0)  # 0: anyattn refuses the case
        faster = [f"{name} {theirs / ours:.2f}" for name, theirs in seconds.items() if theirs < ours]
        if faster:
            lines.append(f"| {row['name']}: {row['label']} | {', '.join(faster)} |")
    return "\n".join(lines)
