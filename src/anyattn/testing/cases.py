"""Cases: choices of a call, without arrays. One case per feature, or any number of random cases."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

# Choices for each field of a Case. A choice that is listed twice is sampled twice as often.
DTYPES = ("float64", "float32", "float16", "bfloat16")
STORED = ("int8", "float8_e4m3fn", "float8_e5m2")  # dtypes of quantised keys and values
SCALES = ("one", "heads", "sequences", "slots")  # shapes of their scales
LENGTHS = ("full", "full", "seqused", "leftpad", "both", "varlen", "varlen_seqused", "paged", "paged_varlen")
LAYOUTS = ("bshd", "bhsd", "packed", "last", "reversed", "expanded", "slices", "any")
# Cases may have further contents: see arrays.py.
CONTENTS = ("normal", "normal", "normal", "huge", "equal_keys", "rising", "falling", "all_negative", "empty_sequences")
# Shapes of a dense bias or mask from (batch, nheads, seqlen_q, seqlen_k). "expanded" has the full shape with strides
# of 0, and (1, nheads, 1, seqlen_k) in memory.
BROADCASTS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "full": lambda b, h, q, k: (b, h, q, k),
    "b1": lambda b, h, q, k: (1, h, q, k),
    "h1": lambda b, h, q, k: (b, 1, q, k),
    "row": lambda b, h, q, k: (b, h, 1, k),
    "column": lambda b, h, q, k: (b, h, q, 1),
    "one": lambda b, h, q, k: (1, 1, 1, 1),
    "rank1": lambda b, h, q, k: (k,),
    "rank2": lambda b, h, q, k: (q, k),
    "rank3": lambda b, h, q, k: (h, q, k),
    "expanded": lambda b, h, q, k: (1, h, 1, k),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Choices of one call of attention. Everything else is sampled from `seed`.

    Sizes belong to the longest sequence. `lengths` determines how the others are shorter.
    """

    name: str
    batch: int = 2
    seqlen_q: int = 63
    seqlen_k: int = 111
    nheads_kv: int = 2
    group: int = 1  # query heads per KV head
    head_dim: int = 40
    head_dim_v: int = 40
    dtype: str = "float32"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    chunk: int = 0
    alignment: str = "bottom-right"
    offset: str = ""  # "int": one for all sequences; "each": one per sequence
    lengths: str = "full"  # one of LENGTHS, the tables of the call
    kv_indices: str = ""  # "shared": one list per query; "heads": one per query and KV head
    mask: str = ""  # one of BROADCASTS, the shape of the dense mask and of the bias
    bias: str = ""
    bias_dtype: str = ""  # "": q's dtype
    alibi: str = ""  # "h": (nheads,); "bh": (batch, nheads)
    softcap: float = 0.0
    sink: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    layout: str = "bshd"  # one of LAYOUTS; "any": a random layout for every array, also tables and statistics
    dlse: bool = False  # the backward pass has a gradient of lse
    content: str = "normal"  # one of CONTENTS, the kind of values
    page_size: int = 0  # 0: sampled
    stored: str = ""  # one of STORED, the dtype of quantised keys and values; "": q's dtype
    scales: str = "slots"  # one of SCALES, the shape of their scales
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def nheads(self) -> int:
        return self.nheads_kv * self.group

    @property
    def packed(self) -> bool:
        """Return whether all sequences share one axis."""
        return "varlen" in self.lengths

    @property
    def paged(self) -> bool:
        return self.lengths.startswith("paged")


# Features of attention, each as fields of a Case.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, top left": {"causal": True, "alignment": "top-left"},
    "window": {"window": (30, 7)},
    "causal window": {"causal": True, "window": (40, None)},
    "chunk": {"chunk": 24, "causal": True},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": "b1", "causal": True},
    "mask": {"mask": "h1"},
    "alibi": {"alibi": "h", "causal": True},
    "sink": {"sink": True, "causal": True},
    "dropout": {"dropout_p": 0.2},
    "lengths": {"lengths": "both", "causal": True},
    "varlen": {"lengths": "varlen", "causal": True},
    "paged": {"lengths": "paged", "causal": True},
    "kv_indices": {"kv_indices": "shared", "causal": True},
    "quantised": {"stored": "int8", "causal": True},
    "decode": {"seqlen_q": 1, "seqlen_k": 300, "group": 4, "causal": True},
    "everything": {
        "causal": True, "window": (50, None), "chunk": 80, "softcap": 4.0, "bias": "b1", "mask": "h1",
        "alibi": "h", "sink": True, "dropout_p": 0.1, "lengths": "both", "scale": -0.2,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the sizes that `random_case` samples."""

    smallest: int = 1  # batch
    shortest: int = 64  # seqlen_q and seqlen_k: long enough for the windows and chunks of FEATURES
    longest: int = 160
    head_dim: int = 128
    scores: int = 2**17  # of all heads; the reference computes a million scores, both passes, in half a second
    single_head_in: int = 0  # one case in this many is a single head with any number of scores; 0: none


def feature_cases(seed: int = 0, dtypes: Iterable[str] = DTYPES, limits: Limits = Limits()) -> Iterator[Case]:
    """Yield one case per dtype and feature. Sizes and values depend on the seed."""
    for dtype in dtypes:
        for name, feature in FEATURES.items():
            number = zlib.crc32(f"{seed} {dtype} {name}".encode())
            batch, nheads_kv, group, seqlen_q, seqlen_k = _sizes(rng := random.Random(number), limits)
            sizes = Case(name, batch, seqlen_q, seqlen_k, nheads_kv, group, _head_dim(rng, limits))
            head_dim_v = rng.choice((sizes.head_dim, _head_dim(rng, limits)))
            yield replace(sizes, head_dim_v=head_dim_v, dtype=dtype, dlse=True, seed=number, **feature)


def random_case(rng: random.Random, limits: Limits = Limits(), name: str = "random") -> Case:
    """Sample any valid call. Packed sequences have no dense bias or mask."""
    lengths, dtype = rng.choice(LENGTHS), rng.choice(DTYPES)
    broadcasts = ("",) if "varlen" in lengths else ("", "", *BROADCASTS)
    batch, nheads_kv, group, seqlen_q, seqlen_k = _sizes(rng, limits)
    return Case(
        name=name,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads_kv=nheads_kv,
        group=group,
        head_dim=_head_dim(rng, limits),
        head_dim_v=_head_dim(rng, limits),
        dtype=dtype,
        causal=rng.random() < 0.5,
        window=rng.choice((None, None, (random_side(rng, limits.longest), random_side(rng, limits.longest)))),
        chunk=rng.choice((0, 0, 0, rng.randint(1, 80), rng.randint(80, 2000))),
        alignment=rng.choice(("bottom-right", "top-left")),
        offset=rng.choice(("", "", "int", "each")),
        lengths=lengths,
        mask=rng.choice(broadcasts),
        bias=rng.choice(broadcasts),
        bias_dtype=rng.choice(("", "float64" if dtype == "float64" else "float32")),
        alibi=rng.choice(("", "h", "bh")),
        softcap=rng.choice((0.0, 0.0, 0.7, 20.0)),
        sink=rng.random() < 0.5,
        dropout_p=rng.choice((0.0, 0.0, 0.1, 0.8)),
        scale=rng.choice((None, None, 0.0, rng.uniform(-1, 1))),
        layout=rng.choice(("any", rng.choice(LAYOUTS))),
        dlse=rng.random() < 0.5,
        content=rng.choice(CONTENTS),
        page_size=rng.choice((0, 1, 16, rng.randint(1, 300))),
        seed=rng.getrandbits(32),
        kv_indices=rng.choice(("", "", "", "", "shared", "heads")),
        stored=rng.choice(("", "", "", "", *STORED)),
        scales=rng.choice(SCALES),
    )


def random_side(rng: random.Random, longest: int) -> int | None:
    """Sample one side of a window."""
    return rng.choice((None, 0, rng.randint(0, 100), rng.randint(0, longest)))


def _sizes(rng: random.Random, limits: Limits) -> tuple[int, int, int, int, int]:
    """Sample batch, nheads_kv, group, seqlen_q, seqlen_k.

    Long sequences have few heads, two long ones have one head.
    """
    batch, kv, group = rng.choice((0, 1, 1, 2, 3, 5)), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 4, 8))
    batch = max(batch, limits.smallest)
    rows, keys = _seqlen(rng, limits), _seqlen(rng, limits)
    if limits.single_head_in and rng.randrange(limits.single_head_in) == 0:
        return min(batch, 1), 1, 1, rows, keys
    while max(batch, 1) * kv * group * rows * keys > limits.scores:  # empty arrays have buffers too
        if max(batch, 1) * kv * group > 1:
            batch, kv, group = min(batch, max(1, batch // 2)), max(1, kv // 2), max(1, group // 2)
        elif rows > keys:
            keys //= 2
        else:
            rows //= 2
    return batch, kv, group, rows, keys


def _seqlen(rng: random.Random, limits: Limits) -> int:
    """Sample a short length, one near a multiple of a tile's sides, or any."""
    kind = rng.randrange(4)
    if kind == 3:
        length = rng.randint(1, 16)
    elif kind == 0:
        length = rng.randint(0, 130)
    elif kind == 1:
        step = rng.choice((8, 16, 64, 128, 256))
        length = step * rng.randint(1, max(1, limits.longest // step)) + rng.choice((-1, 0, 0, 1))
    else:
        length = int(2 ** rng.uniform(0, math.log2(limits.longest)))
    return min(limits.longest, max(limits.shortest, length))


def _head_dim(rng: random.Random, limits: Limits) -> int:
    choices = (rng.randint(1, 40), rng.randint(1, 260), 32, 64, 64, 80, 96, 128, 192, 256)
    return min(limits.head_dim, rng.choice(choices))
