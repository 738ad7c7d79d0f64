"""Problems from a description: sizes and names of features instead of arrays. Nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from .dtypes import DTYPES
from .inputs import FIELDS, Tangents, accepted_shapes
from .options import Options
from .passes import FORWARD, Pass
from .problem import Array, Problem, contiguous
from .quantised import SCALES_OF
from .score.graph import Graph, parse
from .validate import make_problem


class Description(NamedTuple):
    """Sizes and features of a problem.

    extras: names of optional arrays, as in FIELDS. `packed`, `page_size` and dropout add the arrays that they need.
    """

    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    nheads: int = 8
    nheads_kv: int | None = None  # None: nheads
    seqlen_q: int = 1024
    seqlen_k: int | None = None  # None: seqlen_q
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    stored: str = ""  # dtype of quantised k and v; "": dtype
    packed: bool = False
    page_size: int = 0  # 0: k and v are not paged
    extras: frozenset[str] = frozenset()
    options: Options = Options()
    pass_: Pass = FORWARD
    dlse: bool = False  # a gradient of lse; used in the backward pass only


def describe(description: Description) -> Problem:
    """Return the problem of a description, with contiguous arrays.

    Raises:
        ValueError, TypeError: the description is not a valid problem; see `make_problem`.
    """
    d = _with_defaults(description)
    assert d.seqlen_k is not None
    options = d.options
    if d.packed:
        options = options._replace(max_seqlen_q=d.seqlen_q, max_seqlen_k=0 if d.page_size else d.seqlen_k)
    return make_problem(_arrays(d), options, d.pass_)


def _with_defaults(d: Description) -> Description:
    return d._replace(
        nheads_kv=d.nheads if d.nheads_kv is None else d.nheads_kv,
        seqlen_k=d.seqlen_q if d.seqlen_k is None else d.seqlen_k,
        head_dim_v=d.head_dim if d.head_dim_v is None else d.head_dim_v,
    )


def _arrays(d: Description) -> dict[str, Array]:
    """Return the metadata of every array of the problem."""
    assert d.nheads_kv is not None and d.seqlen_k is not None and d.head_dim_v is not None
    pages = math.ceil(d.seqlen_k / d.page_size) if d.page_size else 0
    rows_q = (d.batch * d.seqlen_q,) if d.packed else (d.batch, d.seqlen_q)
    rows_k = (d.batch * d.seqlen_k,) if d.packed else (d.batch, d.seqlen_k)
    rows_k = (d.batch * pages, d.page_size) if d.page_size else rows_k
    compute = DTYPES[d.dtype].compute if d.dtype in DTYPES else ""
    dtypes = {"q": d.dtype, "compute": compute or "float32"}
    sizes = {"batch": d.batch, "batch + 1": d.batch + 1, "nheads": d.nheads, "max_pages": pages, "2": 2}
    seqlen_k = pages * d.page_size or d.seqlen_k
    sizes |= {"seqlen_q": d.seqlen_q, "seqlen_k": seqlen_k, "total_q": rows_q[0], "n": seqlen_k}
    functions = _functions(d)
    sizes |= {"n_values": functions.sizes(floats=True), "n_integers": functions.sizes(floats=False)}
    found = {
        "q": ((*rows_q, d.nheads, d.head_dim), "q"),
        "k": ((*rows_k, d.nheads_kv, d.head_dim), d.stored or "q"),
        "v": ((*rows_k, d.nheads_kv, d.head_dim_v), d.stored or "q"),
    }
    names = {*d.extras, *_implied(d)}
    for name, field in FIELDS.items():
        if name in names:
            shape, *_ = accepted_shapes(field, packed_q=d.packed)
            found[name] = (tuple(sizes[size] for size in shape), field.dtypes[0])
    if d.pass_ is not FORWARD:
        out = ((*rows_q, d.nheads, d.head_dim_v), "q")
        lse = ((d.nheads, *rows_q) if d.packed else (d.batch, d.nheads, d.seqlen_q), "compute")
        saved = {"out": out, "dout": out, "lse": lse} | ({"dlse": lse} if d.dlse else {})
        saved |= {name: found[name[1:]] for name in Tangents._fields if name[1:] in found}
        found |= {name: array for name, array in saved.items() if name in d.pass_.inputs}
    return {name: contiguous(shape, dtypes.get(dtype, dtype), d.device) for name, (shape, dtype) in found.items()}


def _implied(d: Description) -> Iterable[str]:
    """Yield the optional arrays that packed sequences, pages, quantised keys and dropout need."""
    if d.packed:
        yield from ("cu_seqlens_q",) if d.page_size else ("cu_seqlens_q", "cu_seqlens_k")
    if d.page_size:
        yield from ("block_table", "seqused_k")
    if d.stored:
        yield from SCALES_OF.values()
    if d.options.dropout_p:
        yield "rng_state"
    functions = _functions(d)
    if functions.sizes(floats=True):
        yield "captured"
    if functions.sizes(floats=False):
        yield "captured_indices"


def _functions(d: Description) -> Graph:
    return parse(d.options.score) if d.options.score else Graph()
