"""Suites of workloads: real models, all performance goals, the tables of earlier projects, lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

from .workloads import Workload

VARLEN = (64, 128, 200, 333, 512, 700, 1024, 1500, 2048, 96, 777, 1280)
DTYPES = ("float32", "bfloat16")
SHAPES = ((1, 8, 512, 64), (1, 8, 2048, 64), (1, 16, 2048, 128), (4, 12, 512, 32))


def shapes() -> list[Workload]:
    """Return the shapes that the README quotes."""
    return [
        Workload(f"{shape}", *shape, dtype=dtype, causal=causal, backward=backward)
        for dtype in DTYPES
        for backward in (False, True)
        for causal in (False, True)
        for shape in SHAPES
    ]


def models() -> list[Workload]:
    """Return one layer of well-known models, in sizes that two cores compute in about a second."""
    found = [
        Workload("Llama-3 8B prefill", 1, 32, 2048, 128, nheads_kv=8, causal=True),
        Workload("Llama-3 8B decode", 1, 32, 1, 128, seqlen_k=8192, nheads_kv=8, cache=True, causal=True),
        Workload("Llama-3 8B decode, batch 8", 8, 32, 1, 128, seqlen_k=4096, nheads_kv=8, cache=True, causal=True),
        Workload("Gemma-2 9B softcap", 1, 16, 2048, 256, nheads_kv=8, causal=True, softcap=50.0),
        # 6144, so that a third of the queries have a full window of 4096.
        Workload("Gemma-2 9B local", 1, 4, 6144, 256, nheads_kv=2, causal=True, window=(4095, 0), softcap=50.0),
        Workload("BERT base", 8, 12, 512, 64, mask="padding"),
        Workload("MiniLM", 16, 12, 256, 32),
        Workload("ViT-B/16", 16, 12, 197, 64),
        Workload("GPT-2", 4, 12, 1024, 64, causal=True),
        Workload("GPT-2 training", 4, 12, 1024, 64, causal=True, backward=True),
        Workload("Whisper cross-attention", 4, 8, 448, 64, seqlen_k=1500),
        Workload("Whisper cross-attention decode", 4, 8, 1, 64, seqlen_k=1500),
        Workload("DeepSeek-V3 prefill", 1, 16, 2048, 192, head_dim_v=128, causal=True),
        Workload("gpt-oss window and sink", 1, 64, 2048, 64, nheads_kv=8, causal=True, window=(127, 0), sink=True),
        Workload("MPT ALiBi", 1, 32, 2048, 128, causal=True, alibi=True),
        Workload("long context window", 1, 4, 32768, 128, causal=True, window=(1023, 0)),
        Workload("packed varlen", 0, 8, 0, 64, lengths=VARLEN, causal=True),
    ]
    return [replace(workload, dtype=dtype) for workload in found for dtype in DTYPES]


def bars() -> list[Workload]:
    """Return every CPU goal that is an attention call."""
    both = [
        *_dims(),
        Workload("GQA 32:8 prefill", 1, 32, 2048, 128, nheads_kv=8, causal=True),
        Workload("MHA 32 prefill", 1, 32, 2048, 128, causal=True),
        *_decode("float32"),
        *_decode("bfloat16"),
        *_blocks(),
        *(Workload(f"window {w}", 1, 8, 8192, 64, causal=True, window=(w - 1, 0)) for w in (256, 1024)),
        Workload("varlen", 0, 8, 0, 64, lengths=VARLEN),
        Workload("dense bias", 1, 8, 2048, 64, bias="full"),
        Workload("key bias", 1, 8, 2048, 64, bias="key"),
        Workload("mask documents", 1, 8, 2048, 64, mask="documents"),
        Workload("mask padding", 1, 8, 2048, 64, mask="padding"),
        Workload("dropout", 1, 8, 2048, 64, dropout_p=0.1),
        Workload("dropout", 1, 8, 2048, 64, dropout_p=0.1, backward=True),
        Workload("softcap", 1, 8, 2048, 64, softcap=30.0),
        Workload("alibi", 1, 8, 2048, 64, alibi=True),
        Workload("sink", 1, 8, 2048, 64, sink=True),
        Workload("backward few heads", 1, 2, 2048, 64, causal=True, backward=True),
        Workload("backward GQA", 1, 32, 1024, 128, nheads_kv=8, causal=True, backward=True),
        Workload("backward varlen", 0, 8, 0, 64, lengths=VARLEN, backward=True),
        Workload("backward window", 1, 8, 8192, 64, causal=True, window=(1023, 0), backward=True),
        *(Workload(f"small {shape}", *shape) for shape in ((1, 8, 64, 64), (1, 1, 16, 64))),
    ]
    rows = [workload if workload.cache else replace(workload, dtype=dtype) for workload in both for dtype in DTYPES]
    half = [replace(workload, dtype="float16") for workload in shapes() if workload.dtype == "float32"]
    return list(dict.fromkeys([*shapes(), *half, *rows]))


def _dims() -> list[Workload]:
    """Return head dims between and beyond the usual ones, with the usual ones for comparison."""
    dims = ((32, 32), (40, 40), (59, 59), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256))
    unequal = ((192, 128), (64, 128), (128, 64))
    return [
        Workload(f"head_dim {d}" + (f"/{dv}" if d != dv else ""), 1, 8, 1024, d, head_dim_v=dv, backward=backward)
        for backward in (False, True)
        for d, dv in (*dims, *unequal)
    ]


def _decode(dtype: str) -> list[Workload]:
    """Return decoding with at least 256 MiB of K and V, for one and for eight sequences, contiguous and paged."""
    keys = 2 ** (15 if dtype == "float32" else 16)
    plain = [
        Workload(f"decode B={b}", b, 32, 1, 128, seqlen_k=keys // b * n, nheads_kv=8, cache=True, dtype=dtype)
        for b, n in ((1, 1), (8, 1), (8, 2))
    ]
    paged = [replace(plain[1], name=f"decode pages of {size}", page_size=size) for size in (1, 16, 256)]
    if dtype == "float32":
        return plain + paged
    stored = [replace(plain[2], name=f"decode {stored}", stored=stored) for stored in ("int8", "float8_e4m3fn")]
    return [*plain, *paged, *stored, replace(stored[0], name="decode int8, pages of 16", page_size=16)]


def _blocks() -> list[Workload]:
    """Return workloads with few queries: speculative decoding and chunks of a prefill."""
    return [
        Workload(f"{rows} rows", 1, 32, rows, 128, seqlen_k=8192, nheads_kv=8, causal=True)
        for rows in (1, 2, 4, 8, 16, 32, 48)
    ]


def seeds() -> list[Workload]:
    """Return the tables of the projects that anyattn grew from.

    Where two cores would need minutes, batch times heads
    is reduced, as the name says. The speed of attention does not depend on it once every core has work."""
    found = []
    for dtype, backward, causal in product(("float32", "float16"), (False, True), (True, False)):
        for seqlen in (1024, 2048, 4096, 8192, 16384):
            heads = max(1, 128 * 1024**2 // seqlen**2)  # about as much work as 4 x 32 heads of 1024
            batch = 4 if heads == 128 else 1
            name = f"fused-attention B4 H32 D64 N{seqlen}" + (f" ({heads} of 128 heads)" if heads < 128 else "")
            shape = (batch, heads // batch, seqlen, 64)
            found.append(Workload(name, *shape, dtype=dtype, causal=causal, backward=backward))
    for seqlen in (128, 256, 512, 1024, 2048, 4096):
        batch = min(16, max(1, 16 * 1024**2 // seqlen**2))
        name = f"B16 H8 D64 N{seqlen}" + (f" (batch {batch})" if batch < 16 else "")
        found.append(Workload(name, batch, 8, seqlen, 64))
    for name, seqlen, dim in (("small", 64, 64), ("medium", 128, 128), ("large", 256, 64)):
        found.extend(
            Workload(f"CUDA {name}", 8, 16, seqlen, dim, dtype=dtype, backward=backward)
            for dtype in ("float32", "float16")
            for backward in (False, True)
        )
    return [*found, *edges()]


def edges() -> list[Workload]:
    """Return lengths on both sides of tile edges. Tile sizes are not an argument, so they cannot be swept."""
    lengths = (31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 512, 513)
    return [Workload(f"tile edge {seqlen}", 4, 8, seqlen, 64) for seqlen in lengths]


def lengths() -> list[Workload]:
    """Return workloads for speed against length."""
    return [
        Workload(f"length {seqlen}", 1, 8, seqlen, 64, causal=True, backward=backward)
        for backward in (False, True)
        for seqlen in (128, 256, 512, 1024, 2048, 4096)
    ]


def quick() -> list[Workload]:
    """Return one workload of every kind, each far below a second."""
    return [
        *(Workload(f"{s}", *s, dtype=d, causal=c) for s in SHAPES[1:2] for d in DTYPES for c in (False, True)),
        *(Workload(f"{s}", *s, dtype=d, causal=True, backward=True) for s in SHAPES[1:2] for d in DTYPES),
        Workload("Llama-3 8B prefill", 1, 32, 512, 128, nheads_kv=8, causal=True),
        *(replace(workload, name="decode") for d in DTYPES for workload in _decode(d)[:1]),
        _decode("float32")[4],
        Workload("MiniLM", 4, 12, 256, 32),
        Workload("window 256", 1, 8, 4096, 64, causal=True, window=(255, 0)),
        Workload("packed varlen", 0, 8, 0, 64, lengths=VARLEN[:6]),
        Workload("dropout", 1, 8, 1024, 64, dropout_p=0.1),
        Workload("Gemma-2 softcap", 1, 8, 1024, 256, nheads_kv=4, causal=True, softcap=50.0),
        *(workload for workload in lengths() if not workload.backward and 512 <= workload.seqlen_q <= 2048),
    ]


def vulkan() -> list[Workload]:
    """Return workloads for the Vulkan providers, small enough for a software driver."""
    sizes = ((1, 8, 256, 64), (1, 8, 512, 64))
    found = [Workload(f"{s}", *s, causal=c, backward=b) for b in (False, True) for s in sizes for c in (False, True)]
    found += [Workload("head_dim 128", 1, 8, 512, 128, backward=b) for b in (False, True)]
    found += [Workload("GQA 8:2", 1, 8, 512, 64, nheads_kv=2, causal=True, backward=b) for b in (False, True)]
    return [*found, *(replace(workload, dtype="float16") for workload in found[2:4])]


SUITES: dict[str, Callable[[], list[Workload]]] = {
    "models": models,
    "bars": bars,
    "seeds": seeds,
    "lengths": lengths,
    "quick": quick,
    "vulkan": vulkan,
}
DEFAULT = ("models", "bars", "seeds", "lengths")


def select(names: Iterable[str], pattern: str = "") -> list[Workload]:
    """Return the workloads of these suites that contain every word of the pattern in suite, name or label."""
    words = pattern.lower().split()
    workloads = [replace(workload, suite=name) for name in names for workload in SUITES[name]()]
    return [
        workload
        for workload in workloads
        if all(word in f"{workload.suite} {workload.name} {workload.label}".lower() for word in words)
    ]
