"""Rules of a call: `make_problem` checks metadata and raises before any computation.

ValueError (sizes, scalars) and TypeError (dtypes) name the argument, the accepted values and the received value.
Optional arrays are checked against `FIELDS`. `sequences.py` and `kvcache.py` check the values in tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import kvcache, philox, quantised
from .dtypes import ATTENTION_DTYPES, DTYPES, QUANTISED, key_dtypes
from .inputs import CAPTURED, FIELDS, SCORES, Field, Saved, Tangents, accepted_shapes
from .mask import Mask
from .options import ALIGNMENTS, PRECISIONS, Options, Rotation
from .passes import APPEND, BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from .problem import Array, Problem
from .score.graph import Graph, parse

POSITION_LIMIT = 2**31 - 1
Given = Mapping[str, Array]
Sizes = tuple[int, int, int]  # batch, seqlen_q, seqlen_k

_SAVED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(Saved._fields, ("compute",)),
    **dict.fromkeys(("out", "dout"), ("q", "compute")),
}
_TANGENTS = {name: (name.removeprefix("t"),) for name in Tangents._fields}  # each has the dtype of its input


def make_problem(arrays: Mapping[str, Array | None], options: Options | Rotation, pass_: Pass = FORWARD) -> Problem:
    """Return the validated problem of a pass from the metadata of its arrays and its scalars.

    Raises:
        ValueError, TypeError: an array or a scalar is wrong; the message names it.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    unknown = given.keys() - set(pass_.inputs)
    if unknown:
        raise TypeError(f"the {pass_} pass does not accept {', '.join(sorted(unknown))}.")
    if pass_ is APPEND:
        assert isinstance(options, Rotation)
        return _append_problem(given, options)
    assert isinstance(options, Options)
    return _attention_problem(given, options, pass_)


def _append_problem(given: Given, rotation: Rotation) -> Problem:
    kvcache.check_arrays(given)
    q = given["q"]
    return Problem(APPEND, given, q.shape[0], q.shape[1], kvcache.slots(given), rotation=rotation)


def _attention_problem(given: Given, options: Options, pass_: Pass) -> Problem:
    _check_tangents(given)
    batch, seqlen_q, seqlen_k = check_attention(given, options)
    q = given["q"]
    problem = Problem(
        pass_=pass_,
        arrays=given,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        interval=make_interval(options, "offset" in given, seqlen_q, seqlen_k),
        alignment="offset" if "offset" in given else options.alignment,
        scale=1.0 / math.sqrt(q.shape[-1]) if options.scale is None else float(options.scale),
        softcap=float(options.softcap),
        dropout_p=float(options.dropout_p),
        deterministic=options.deterministic,
        batch_invariant=options.batch_invariant,
        query_start=options.query_start,
        key_start=options.key_start,
        partial=options.partial,
        score=options.score,
        precision=options.precision,
    )
    if options.partial and pass_ not in (FORWARD, BACKWARD):
        raise ValueError(f"partial must be False in the {pass_} pass, got True.")
    if pass_ in (TANGENT, SECOND, FORWARD_TANGENT) and problem.quantised:
        raise ValueError(f"k and v must have q's dtype {q.dtype} in the {pass_} pass, got {problem.k.dtype}.")
    if options.score and (options.query_start or options.key_start):
        raise ValueError("score_mod and mask_mod cannot be combined with query_start and key_start.")
    _check_saved(problem)
    return problem


def check_attention(given: Given, options: Options) -> Sizes:
    """Check the arrays and scalars that every pass of attention has; return (batch, seqlen_q, seqlen_k).

    torch.compile traces this function, with torch 2.6 too.
    """
    for name in ("q", "k", "v"):
        if name not in given:
            raise TypeError(f"{name} must be an array, got None.")
    sizes = _sizes(given, options)
    _check_dtypes(given)
    _check_heads(given)
    _check_devices(given)
    _check_combinations(given)
    _check_shapes(given, sizes, parse(options.score) if options.score else Graph())
    _check_scalars(options, given, DTYPES[given["q"].dtype].compute)
    return sizes


def _check_saved(problem: Problem) -> None:
    required = set(problem.pass_.inputs)
    for name, want in (("dout", problem.out_shape), ("out", problem.out_shape), ("lse", problem.lse_shape)):
        array = problem.arrays.get(name)
        if name not in required:
            continue
        if array is None or array.shape != want:
            raise ValueError(f"{name} must have shape {want}, got {None if array is None else array.shape}.")
    dlse = problem.dlse
    if dlse is not None and dlse.shape != problem.lse_shape:
        raise ValueError(f"dlse must have lse's shape {problem.lse_shape}, got {dlse.shape}.")


def _check_tangents(given: Given) -> None:
    for name in Tangents._fields:
        tangent, primal = given.get(name), given.get(name.removeprefix("t"))
        if tangent is None:
            continue
        if primal is None:
            raise ValueError(f"{name} must be None without {name.removeprefix('t')}, got shape {tangent.shape}.")
        if tangent.shape != primal.shape:
            raise ValueError(f"{name} must have the shape {primal.shape} of {name[1:]}, got {tangent.shape}.")


def _sizes(given: Given, options: Options) -> Sizes:
    """Return (batch, seqlen_q, seqlen_k); check the ranks, and that k and v have matching shapes."""
    q, k, v = (given[name] for name in ("q", "k", "v"))
    cu_q, cu_k, pages = (given.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table"))
    if cu_k is not None and pages is not None:
        raise ValueError("cu_seqlens_k cannot be combined with block_table. Pass the lengths as seqused_k.")
    _check_ranks(given)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree in all but the last dimension, got k {k.shape}, v {v.shape}.")
    batch = q.shape[0]
    for name, table in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if table is not None:
            if len(table.shape) != 1 or table.shape[0] < 1:
                raise ValueError(f"{name} must have shape (batch + 1,), got {table.shape}.")
            batch = table.shape[0] - 1
    if pages is not None:
        if len(pages.shape) != 2:
            raise ValueError(f"block_table must have shape (batch, max_pages), got {pages.shape}.")
        seqlen_k = pages.shape[1] * k.shape[1]
    else:
        seqlen_k = k.shape[0] if cu_k is not None else k.shape[1]
        if cu_k is None and "cache_batch_idx" not in given and k.shape[0] != batch:
            raise ValueError(f"k must have q's batch {batch} as its first dimension, got k {k.shape}, q {q.shape}.")
    seqlen_q = q.shape[0] if cu_q is not None else q.shape[1]
    seqlen_q = min(seqlen_q, options.max_seqlen_q) if cu_q is not None and options.max_seqlen_q else seqlen_q
    seqlen_k = min(seqlen_k, options.max_seqlen_k) if cu_k is not None and options.max_seqlen_k else seqlen_k
    return batch, seqlen_q, seqlen_k


def _check_ranks(given: Given) -> None:
    rank_q = (
        ("(total_q, nheads, head_dim)", 3) if "cu_seqlens_q" in given else ("(batch, seqlen_q, nheads, head_dim)", 4)
    )
    rank_k = ("(batch, seqlen_k, nheads_kv, head_dim)", 4)
    if "block_table" in given:
        rank_k = ("(num_pages, page_size, nheads_kv, head_dim)", 4)
    elif "cu_seqlens_k" in given:
        rank_k = ("(total_k, nheads_kv, head_dim)", 3)
    for name, (text, rank) in (("q", rank_q), ("k", rank_k), ("v", rank_k)):
        shape = given[name].shape
        if len(shape) != rank:
            raise ValueError(f"{name} must have {rank} dimensions {text}, got {shape}.")


def _check_dtypes(given: Given) -> None:
    q, k, v = (given[name] for name in ("q", "k", "v"))
    if q.dtype not in ATTENTION_DTYPES:
        raise TypeError(f"q must be one of {', '.join(ATTENTION_DTYPES)}, got {q.dtype}.")
    if k.dtype != v.dtype or k.dtype not in key_dtypes(q.dtype):
        raise TypeError(
            f"q, k and v must have one dtype, or k and v one of {', '.join(QUANTISED)}, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}. Convert them first."
        )
    quantised.check_given(given)
    names = {**{name: given[name].dtype for name in given}, "compute": DTYPES[q.dtype].compute}
    accepted = {**{name: field.dtypes for name, field in FIELDS.items()}, **_SAVED, **_TANGENTS}
    for name, array in given.items():
        dtypes = tuple(names.get(dtype, dtype) for dtype in accepted.get(name, (array.dtype,)))
        if array.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(dict.fromkeys(dtypes))}, got {array.dtype}.")


def _check_heads(given: Given) -> None:
    q, k, v = (given[name] for name in ("q", "k", "v"))
    nheads, nheads_kv = q.shape[-2], k.shape[-2]
    if nheads < 1 or nheads_kv < 1 or nheads % nheads_kv:
        raise ValueError(
            f"nheads ({nheads}) must be a multiple of nheads_kv ({nheads_kv}), got q {q.shape}, k {k.shape}. "
            "The last two dimensions are nheads and head_dim."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have one head_dim, got q {q.shape}, k {k.shape}.")
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(f"head_dim and head_dim_v must be at least 1, got q {q.shape}, v {v.shape}.")


def _check_devices(given: Given) -> None:
    q = given["q"]
    for name, array in given.items():
        if array.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {array.device}.")


def _check_combinations(given: Given) -> None:
    if "cache_batch_idx" in given and ("block_table" in given or "cu_seqlens_k" in given):
        raise ValueError("cache_batch_idx cannot be combined with block_table or cu_seqlens_k. It needs a dense cache.")
    packed = "cu_seqlens_q" in given or "cu_seqlens_k" in given
    for name, field in FIELDS.items():
        if field.kind == SCORES and name in given and packed:
            raise ValueError(
                f"{name} cannot be combined with cu_seqlens, because packed queries have no dense score matrix."
            )


def _check_shapes(given: Given, sizes: Sizes, functions: Graph) -> None:
    """Check the shape of every optional array against FIELDS."""
    batch, seqlen_q, seqlen_k = sizes
    q, packed_q = given["q"], "cu_seqlens_q" in given
    named = {"batch": batch, "batch + 1": batch + 1, "nheads": q.shape[-2], "nheads_kv": given["k"].shape[-2], "2": 2}
    # `update`, because Dynamo of torch 2.6 does not trace `|=` of dicts.
    named.update(quantised.sizes(given["k"]))
    named.update({"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "total_q": q.shape[0]})
    named.update({"n_values": functions.sizes(floats=True), "n_integers": functions.sizes(floats=False)})
    for name, field in FIELDS.items():
        array = given.get(name)
        if array is None:
            if field.kind == CAPTURED and named[field.shapes[0][0]]:
                raise ValueError(f"{name} must hold the arrays that the score function reads, got None.")
            continue
        shapes = accepted_shapes(field, packed_q=packed_q)
        accepted = [tuple(named.get(size) for size in shape) for shape in shapes]
        if not any(_fits(array.shape, shape, broadcast=field.kind == SCORES) for shape in accepted):
            raise ValueError(f"{name} must {_expected(field, shapes, named)}, got {array.shape}.")


def _fits(shape: tuple[int, ...], want: tuple[int | None, ...], *, broadcast: bool) -> bool:
    """Return whether a shape is the wanted one. A wanted size of None accepts any size."""
    if len(shape) != len(want):
        return False
    return all(b is None or a == b or (broadcast and a == 1) for a, b in zip(shape, want, strict=True))


def _expected(field: Field, shapes: Sequence[tuple[str, ...]], named: Mapping[str, int]) -> str:
    names = " or ".join(f"({', '.join(shape)}{',' * (len(shape) == 1)})" for shape in shapes)
    accepted = [tuple(named.get(size) for size in shape) for shape in shapes]
    if any(None in shape for shape in accepted):  # (batch, max_pages)
        known = dict.fromkeys(size for shape in shapes for size in shape if size in named)
        return f"have shape {names} with {', '.join(f'{size} = {named[size]}' for size in known)}"
    values = " or ".join(str(shape) for shape in accepted)
    verb = "broadcast to" if field.kind == SCORES else "have shape"
    text = f"{verb} {names}" + ("" if names == values else f" = {values}")
    return f"{text}: {field.note}" if field.note else text


def _check_scalars(options: Options, given: Given, compute: str) -> None:
    limit = 2.0**128 if compute == "float32" else math.inf
    if options.scale is not None and not abs(options.scale) < limit:
        raise ValueError(f"scale must be finite in {compute}, got {options.scale}.")
    if not 0 <= options.softcap < limit:
        raise ValueError(f"softcap must be >= 0 (0: off) and finite in {compute}, got {options.softcap}.")
    if options.chunk < 0:
        raise ValueError(f"chunk must be >= 0 (0: off), got {options.chunk}.")
    if options.alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {options.alignment!r}.")
    if options.precision not in ("", *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, or None, got {options.precision!r}.")
    if not 0.0 <= options.dropout_p < 1.0 or philox.threshold(options.dropout_p) > 65535:
        raise ValueError(f"dropout_p must be in [0, 1 - 2^-17), got {options.dropout_p}.")
    if philox.threshold(options.dropout_p) and "rng_state" not in given:
        raise ValueError(
            "rng_state must be an int64 array (seed, offset) if dropout_p > 0, got None. Or pass an int seed."
        )
    for name, size in (("max_seqlen_q", options.max_seqlen_q), ("max_seqlen_k", options.max_seqlen_k)):
        if size < 0:
            raise ValueError(f"{name} must be >= 0 (0 or None: unknown), got {size}.")
    for name, start in (("query_start", options.query_start), ("key_start", options.key_start)):
        if not 0 <= start <= POSITION_LIMIT:
            raise ValueError(f"{name} must be from 0 to {POSITION_LIMIT}, got {start}.")


def make_interval(options: Options, given_offset: bool, seqlen_q: int, seqlen_k: int) -> Mask:
    """Return the bounds, clamped so that positions never overflow; None for a bound that cannot exclude a key."""
    reach = POSITION_LIMIT if given_offset else max(seqlen_q, seqlen_k)
    left, right = options.left, options.right
    left = None if left is None or left >= reach else max(left, -reach)
    right = None if right is None or right >= reach else max(right, -reach)
    return Mask(left, right, min(options.chunk, POSITION_LIMIT))
