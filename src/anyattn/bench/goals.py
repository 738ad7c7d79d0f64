"""Goals of the CPU engine compared with the measurements of a run, from suite "bars" and from the sections.

A share is relative to the measured limit of the machine; a ratio is another provider's time divided by anyattn's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = dict[str, Any]
OURS = "anyattn"
SDPA = "torch SDPA"
PEERS = ("ONNX Runtime", "OpenVINO")
MIB = 2.0**20


class Goal(NamedTuple):
    """Goal and its measured value, None if the run did not measure it. at_most: lower is better."""

    workload: str
    quantity: str
    value: float | None
    must: float
    aim: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if self.aim is not None and sign * self.value >= sign * self.aim:
            return "aim"
        return "must" if sign * self.value >= sign * self.must else "MISSED"


@dataclass(frozen=True)
class View:
    """Rows of a run. Every value is the worst of the matching rows."""

    results: dict[str, Any]

    def rows(self, **wanted: Any) -> list[Row]:
        plain = {"backward": False, "suite": "bars"}
        return [
            row
            for row in self.results["cases"]
            if all(row.get(name) == value for name, value in (plain | wanted).items()) and OURS in row["seconds"]
        ]

    def share(self, **wanted: Any) -> float | None:
        rows = [row for row in self.rows(**wanted) if row["peak_flops"]]
        return _least(row["flops"] / row["seconds"][OURS]["median"] / row["peak_flops"] for row in rows)

    def ratio(self, peer: str = SDPA, **wanted: Any) -> float | None:
        return _least(
            row["seconds"][peer]["median"] / row["seconds"][OURS]["median"]
            for row in self.rows(**wanted)
            if peer in row["seconds"]
        )

    def read(self, **wanted: Any) -> float | None:
        """Return the rate of reading K and V once per call, relative to the measured bandwidth."""
        rows = self.rows(**wanted)
        return _least(row["kv_bytes"] / row["seconds"][OURS]["median"] / row["stream_bytes"] for row in rows)

    def seconds(self, **wanted: Any) -> float | None:
        rows = self.rows(**wanted)
        return rows[0]["seconds"][OURS]["median"] if rows else None

    def rate(self, **wanted: Any) -> float | None:
        rows = self.rows(**wanted)
        return rows[0]["flops"] / rows[0]["seconds"][OURS]["median"] if rows else None

    def over(self, section: str, *path: str) -> float | None:
        """Return a median from a section of the run."""
        found: Any = self.results.get(section)
        for name in path:
            found = None if not found else found.get(name)
        return float(found["median"]) if found else None


def goals(results: dict[str, Any]) -> list[Goal]:
    view = View(results)
    parts: list[Callable[[View], Iterator[Goal]]] = [_forward, _backward, _dims, _decode, _shapes, _scores, _calls]
    parts.append(_derivatives)
    if results["machine"]["cpu_target"] == "avx2":
        parts = [_avx2]
    return [goal for part in parts for goal in part(view)]


def _least(values: Any) -> float | None:
    return min(values, default=None)


def _by(upper: float | None, lower: float | None) -> float | None:
    return upper / lower if upper and lower else None


def _forward(view: View) -> Iterator[Goal]:
    wide = [f"{shape}" for shape in ((1, 8, 512, 64), (1, 8, 2048, 64), (1, 16, 2048, 128))]

    def least(figure: Callable[..., float | None], names: list[str], **wanted: Any) -> float | None:
        return _least(value for name in names if (value := figure(name=name, **wanted)) is not None)

    text = "forward float32 dense"
    dense: Row = {"dtype": "float32", "causal": False}
    yield Goal(text, "share", least(view.share, wide, **dense), 0.80, 0.92)
    yield Goal(text, SDPA, least(view.ratio, wide, **dense), 2.2)
    for peer in PEERS:
        yield Goal(text, peer, least(view.ratio, wide, peer=peer, **dense), 1.1)
    for names, share, aim, ratio in ((wide[:1], 0.65, 0.80, 4.0), (wide[1:], 0.75, 0.88, 2.5)):
        text = f"forward float32 causal, N {'512' if len(names) == 1 else '2048'}"
        yield Goal(text, "share", least(view.share, names, dtype="float32", causal=True), share, aim)
        yield Goal(text, SDPA, least(view.ratio, names, dtype="float32", causal=True), ratio)
    for causal, bars in ((False, ((0.65, 0.80), (0.75, 0.88))), (True, ((0.55, 0.75), (0.65, 0.82)))):
        text = f"forward bfloat16 {'causal' if causal else 'dense'}"
        for names, (must, aim) in zip((wide[:2], wide[2:]), bars, strict=True):
            value = least(view.share, names, dtype="bfloat16", causal=causal)
            yield Goal(f"{text}, D {'64' if len(names) == 2 else '128'}", "share", value, must, aim)
        if not causal:
            yield Goal(text, SDPA, least(view.ratio, wide, dtype="bfloat16", causal=False), 4.0)
            yield Goal(text, "OpenVINO", least(view.ratio, wide, peer="OpenVINO", dtype="bfloat16", causal=False), 1.2)
    yield Goal("forward float16 dense", "share", least(view.share, wide, dtype="float16", causal=False), 0.75, 0.87)
    yield Goal("forward float16 dense", SDPA, least(view.ratio, wide, dtype="float16", causal=False), 3.0)
    d32: Row = {"name": f"{(4, 12, 512, 32)}", "dtype": "float32", "causal": False}
    yield Goal("forward float32, D 32", "share", view.share(**d32), 0.65, 0.82)
    yield Goal("forward float32, D 32", SDPA, view.ratio(**d32), 2.2)


def _backward(view: View) -> Iterator[Goal]:
    bars = {
        ("float32", False): (0.82, 0.93, 2.3),
        ("float32", True): (0.75, 0.88, 2.6),
        ("bfloat16", False): (0.70, 0.87, 2.6),
        ("bfloat16", True): (0.65, 0.80, 3.0),
    }
    for (dtype, causal), (must, aim, ratio) in bars.items():
        text = f"backward {dtype} {'causal' if causal else 'dense'}"
        for shape in ((1, 8, 2048, 64), (1, 16, 2048, 128)):
            wanted: Row = {"name": f"{shape}", "dtype": dtype, "causal": causal, "backward": True}
            yield Goal(f"{text}, D {shape[3]}", "share", view.share(**wanted), must, aim)
            yield Goal(f"{text}, D {shape[3]}", SDPA, view.ratio(**wanted), ratio)


def _dims(view: View) -> Iterator[Goal]:
    """Yield goals of head dims between 32, 64 and 128, relative to interpolation, and of 256 relative to 128."""
    import numpy as np

    knots = (32, 64, 128, 256)
    for dtype in ("float32", "bfloat16"):
        for backward in (False, True):
            plain = {"dtype": dtype, "backward": backward}
            rates = [view.rate(name=f"head_dim {d}", **plain) for d in knots]
            shares = []
            for name, d in (("40", 40), ("59", 59), ("80", 80), ("96", 96), ("192", 192), ("192/128", 160)):
                rate = view.rate(name=f"head_dim {name}", **plain)
                if rate and all(rates):
                    shares.append(rate / float(np.interp(d, knots, [x or 0.0 for x in rates])))
            if all(rates):
                shares.append((rates[3] or 0.0) / (rates[2] or 1.0))
            text = f"odd head dims, {dtype} {'backward' if backward else 'forward'}"
            yield Goal(text, "of neighbours", _least(shares), 0.8, 0.9)


def _decode(view: View) -> Iterator[Goal]:
    for dtype, packed, gqa in (("float32", 1.9, 5.0), ("bfloat16", 3.5, 25.0)):
        for batch in (1, 8):
            wanted: Row = {"name": f"decode B={batch}", "dtype": dtype}
            text = f"decode 32:8 {dtype}, B={batch}"
            yield Goal(text, "of stream read", view.read(**wanted), 0.75, 0.95)
            yield Goal(text, f"{SDPA} (packed)", view.ratio(f"{SDPA} (packed)", **wanted), packed)
            yield Goal(text, SDPA, view.ratio(**wanted), gqa)
        whole = view.seconds(name="decode B=8", dtype=dtype)
        for size in (1, 16, 256):
            paged = view.seconds(name=f"decode pages of {size}", dtype=dtype)
            yield Goal(f"decode {dtype}, pages of {size}", "of contiguous", _by(whole, paged), 0.9, 0.97)
        if dtype == "bfloat16":
            yield from _stored(view)
        dense = view.rate(name=f"{(1, 16, 2048, 128)}", dtype=dtype, causal=False)
        block = _by(view.rate(name="32 rows", dtype=dtype), dense)
        yield Goal(f"32 query rows {dtype}", "of the dense rate", block, 0.7)
        one = view.seconds(name="1 rows", dtype=dtype) or 0.0
        rows = (2, 4, 8, 16, 32, 48)
        speed = _least(one * n / t for n in rows if one and (t := view.seconds(name=f"{n} rows", dtype=dtype)))
        yield Goal(f"2 to 48 query rows {dtype}", "of decode, per row", speed, 1.0)


def _stored(view: View) -> Iterator[Goal]:
    """Yield the goals of quantised caches, against the same cache in bfloat16."""
    keys = max((row["seqlen_k"] for row in view.rows(name="decode B=8", dtype="bfloat16")), default=0)
    whole = view.seconds(name="decode B=8", dtype="bfloat16", seqlen_k=keys)
    for stored, faster in (("int8", 1.7), ("float8_e4m3fn", 1.5)):
        wanted: Row = {"name": f"decode {stored}"}
        yield Goal(f"decode {stored}", "of stream read", view.read(**wanted), 0.85)
        yield Goal(f"decode {stored}", "of bfloat16", _by(whole, view.seconds(**wanted)), faster)
    paged = view.seconds(name="decode int8, pages of 16")
    yield Goal("decode int8, pages of 16", "of contiguous", _by(view.seconds(name="decode int8"), paged), 0.92)


def _shapes(view: View) -> Iterator[Goal]:
    for dtype, must, aim in (("float32", 0.75, 0.88), ("bfloat16", 0.65, 0.82)):
        share = view.share(name="GQA 32:8 prefill", dtype=dtype)
        yield Goal(f"GQA 32:8 prefill {dtype}", "share", share, must, aim)
    for window, must, aim, ratio in ((256, 0.45, 0.60, 40.0), (1024, 0.70, 0.82, 18.0)):
        wanted: Row = {"name": f"window {window}", "dtype": "float32"}
        yield Goal(f"window {window}, N 8192", "share", view.share(**wanted), must, aim)
        yield Goal(f"window {window}, N 8192", SDPA, view.ratio(**wanted), ratio)
        yield Goal(f"window {window}, N 8192", "flex_attention", view.ratio("flex_attention", **wanted), 2.0)
    varlen: Row = {"name": "varlen", "dtype": "float32"}
    yield Goal("varlen 64..2048", "share", view.share(**varlen), 0.75, 0.85)
    yield Goal("varlen 64..2048", f"{SDPA} (padded)", view.ratio(f"{SDPA} (padded)", **varlen), 9.0)
    yield Goal("varlen 64..2048", f"{SDPA}, a loop", view.ratio(**varlen), 2.2)


def _scores(view: View) -> Iterator[Goal]:
    bias: Row = {"name": "dense bias", "dtype": "float32"}
    yield Goal("dense bias", "share", view.share(**bias), 0.65, 0.75)
    yield Goal("dense bias", SDPA, view.ratio(**bias), 2.0)
    yield Goal("dropout 0.1", SDPA, view.ratio(name="dropout", dtype="float32"), 10.0)
    for dtype in ("float32", "bfloat16"):
        plain = view.over("features", dtype, "plain")
        dropout = _by(plain, view.over("features", dtype, "dropout 0.1"))
        yield Goal(f"dropout 0.1 {dtype}", "of the speed without", dropout, 0.65, 0.85)
        bars = {"softcap": (0.15, 0.08), "alibi": (0.08, 0.04), "sink": (0.02, 0.01), "all off": (0.01, 0.0)}
        for name, (must, aim) in bars.items():
            cost = _by(view.over("features", dtype, name), plain)
            yield Goal(f"{name} {dtype}", "over plain", None if cost is None else cost - 1, must, aim, at_most=True)


def _calls(view: View) -> Iterator[Goal]:
    def small(shape: tuple[int, ...], name: str) -> float | None:
        return view.over("small_calls", f"{shape}", name)

    tiny, little = (1, 1, 16, 64), (1, 8, 64, 64)
    yield Goal(f"small call {little}", SDPA, _by(small(little, SDPA), small(little, OURS)), 3.0)
    theirs = _by(small(tiny, OURS), small(tiny, SDPA))
    yield Goal(f"small call {tiny}", "time by torch SDPA's", theirs, 1.5, at_most=True)
    for name, must, aim in ((OURS, 6.0, 5.0), (f"{OURS}, gradients recorded", 9.0, 7.5)):
        value = small(tiny, name)
        yield Goal(f"small call {tiny}, {name}", "us", None if value is None else value * 1e6, must, aim, at_most=True)
    for name, text, must in (("attention", "attention after torch.mm", 1.1), ("mm", "torch.mm beside attention", 1.05)):
        slower = _by(view.over("citizen", f"{name} after"), view.over("citizen", name))
        yield Goal(text, "time by its own alone", slower, must, at_most=True)
    memory = view.results.get("memory")
    threads = view.results["machine"].get("threads", 1)
    for row in memory if isinstance(memory, list) else []:
        if OURS in row["mib"] and not row["backward"] and not row["cache"]:
            copies = 2 if row["dtype"] == "float16" else 1
            size = 2 if row["dtype"] == "bfloat16" else 4
            one = row["batch"] * row["seqlen_k"] * row["nheads_kv"] * row["head_dim_v"] * size / MIB
            limit = threads * 0.25 + copies * one
            yield Goal(f"extra memory {row['label']}", "MiB", row["mib"][OURS], limit, at_most=True)


def _derivatives(view: View) -> Iterator[Goal]:
    rows = {row["name"]: row["seconds"].get(OURS, {}).get("median") for row in view.results.get("derivatives", [])}
    tangents, second = (_by(rows.get(a), rows.get(b)) for a, b in (("tangents", "forward"), ("second", "backward")))
    yield Goal("forward and tangent along tq, tk and tv", "time by the forward's", tangents, 2.6, at_most=True)
    yield Goal("second derivatives", "time by the backward's", second, 3.5, at_most=True)


def _avx2(view: View) -> Iterator[Goal]:
    """Yield goals with the AVX2 instruction set, relative to the limit of that instruction set."""
    for causal, ratio in ((False, 1.15), (True, 1.4)):
        text = f"AVX2 forward float32 {'causal' if causal else 'dense'}"
        for shape in ((1, 8, 2048, 64), (1, 16, 2048, 128)):
            wanted: Row = {"name": f"{shape}", "dtype": "float32", "causal": causal}
            if not causal:
                yield Goal(f"{text}, D {shape[3]}", "share", view.share(**wanted), 0.78, 0.90)
            yield Goal(f"{text}, D {shape[3]}", SDPA, view.ratio(**wanted), ratio)
