"""Arrays of a call: name, shape, dtypes and gradient of each, listed once.

Everything that depends on the list of arrays follows from it: the operators' schemas, the checks, the arrays of a
Problem and of a Call, the positions of gradients, the vmap rules and the flags of `anyattn explain`. A new optional
array is a field of `Extras` and a row of `FIELDS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar


class Extras(NamedTuple):
    """Optional arrays, in the order of the operators' schemas.

    No properties, because torch 2.6 does not compile them.
    """

    bias: Any = None
    mask: Any = None
    alibi_slopes: Any = None
    sink: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_q: Any = None
    seqused_k: Any = None
    leftpad_k: Any = None
    offset: Any = None
    block_table: Any = None
    cache_batch_idx: Any = None
    kv_indices: Any = None
    rng_state: Any = None
    captured: Any = None
    captured_indices: Any = None
    k_scale: Any = None
    v_scale: Any = None


NO_EXTRAS = Extras()  # `inputs.extras is NO_EXTRAS` means that a call has no optional arrays


class Inputs(NamedTuple):
    """Arrays of an attention call."""

    q: Any
    k: Any
    v: Any
    extras: Extras = NO_EXTRAS


class Saved(NamedTuple):
    """Arrays that the backward pass reads in addition to the inputs; dlse may be None."""

    out: Any
    lse: Any
    dout: Any
    dlse: Any = None


class Tangents(NamedTuple):
    """Direction in the space of the inputs with gradients, each in the shape of its input; None: zeros."""

    tq: Any = None
    tk: Any = None
    tv: Any = None
    tbias: Any = None
    tsink: Any = None
    tcaptured: Any = None


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of the inputs; dbias, dsink and dcaptured are None without these inputs.

    dcaptured is flat: the gradients of the floating-point arrays that score_mod reads, concatenated in the order of
    their first reads, in the compute dtype.
    """

    dq: Any
    dk: Any
    dv: Any
    dbias: Any = None
    dsink: Any = None
    dcaptured: Any = None


class SecondGradients(NamedTuple):
    """Gradients of <dout, tout> + <dlse, tlse>, where (tout, tlse) is the tangent of (out, lse).

    Those of the inputs are like `Gradients`. The gradient of dout is tout, and the gradient of dlse is tlse.
    """

    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    dsink: Any
    dcaptured: Any
    ddout: Any
    ddlse: Any


AnyGradients = TypeVar("AnyGradients", Gradients, SecondGradients)


class Appended(NamedTuple):
    """Arrays of an append to a KV cache: the cache (k, v), the new keys and values, and their slots.

    q is rotated like the keys. A call without new keys only reads `cache_seqlens`. A quantised cache has scales, which
    are written too.
    """

    q: Any
    k: Any
    v: Any
    new_k: Any = None
    new_v: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    cache_seqlens: Any = None
    cache_batch_idx: Any = None
    block_table: Any = None
    k_scale: Any = None
    v_scale: Any = None


# Kinds of optional arrays. Frameworks prepare each kind in one way, and vmap folds each kind in one way.
SCORES = "scores"  # broadcast to (batch, nheads, seqlen_q, seqlen_k)
HEADS = "heads"  # one number per head, in the compute dtype
TABLE = "table"  # int32 lengths and positions; values in host memory are checked
STATE = "state"  # state of the random generator
CAPTURED = "captured"  # arrays that score_mod and mask_mod read, flat
SCALES = "scales"  # factors of quantised keys or values, for all, per head, per sequence and head, or per slot and head


class Field(NamedTuple):
    """Properties of an optional array."""

    kind: str
    shapes: tuple[tuple[str, ...], ...]  # accepted shapes, by the names of sizes
    dtypes: tuple[str, ...]  # accepted dtypes; "q": of q, "compute": of scores and sums
    gradient: bool = False
    scalar: bool = False  # an int is accepted for all sequences
    note: str = ""  # for error messages


_SCORES = (("batch", "nheads", "seqlen_q", "seqlen_k"),)
_SEQUENCES = (("batch",),)
_BOUNDARIES = (("batch + 1",),)
_SELECTIONS = (
    *(("batch", "seqlen_q", "n"), ("batch", "nheads_kv", "seqlen_q", "n")),
    *(("total_q", "n"), ("nheads_kv", "total_q", "n")),
)
_SCALES = ((), ("nheads_kv",), ("batch", "nheads_kv"), ("entries", "slots", "nheads_kv"))
FIELDS: dict[str, Field] = {
    "bias": Field(SCORES, _SCORES, ("q", "compute"), gradient=True),
    "mask": Field(SCORES, _SCORES, ("bool",)),
    "alibi_slopes": Field(HEADS, (("nheads",), ("batch", "nheads")), ("compute",)),
    "sink": Field(HEADS, (("nheads",),), ("compute",), gradient=True),
    "cu_seqlens_q": Field(TABLE, _BOUNDARIES, ("int32",)),
    "cu_seqlens_k": Field(TABLE, _BOUNDARIES, ("int32",)),
    "seqused_q": Field(TABLE, _SEQUENCES, ("int32",)),
    "seqused_k": Field(TABLE, _SEQUENCES, ("int32",)),
    "leftpad_k": Field(TABLE, _SEQUENCES, ("int32",)),
    "offset": Field(TABLE, _SEQUENCES, ("int32",), scalar=True),
    "block_table": Field(TABLE, (("batch", "max_pages"),), ("int32",)),
    "cache_batch_idx": Field(TABLE, _SEQUENCES, ("int32",)),
    "kv_indices": Field(TABLE, _SELECTIONS, ("int32",)),
    "rng_state": Field(STATE, (("2",),), ("int64",), note="seed and offset"),
    "captured": Field(CAPTURED, (("n_values",),), ("compute",), gradient=True),
    "captured_indices": Field(CAPTURED, (("n_integers",),), ("int32",)),
    "k_scale": Field(SCALES, _SCALES, ("float32",)),
    "v_scale": Field(SCALES, _SCALES, ("float32",)),
}
TABLES = tuple(name for name, field in FIELDS.items() if field.kind == TABLE)
GRADIENTS = tuple(name for name, field in FIELDS.items() if field.gradient)  # in addition to dq, dk and dv


def accepted_shapes(field: Field, *, packed_q: bool) -> tuple[tuple[str, ...], ...]:
    """Return the accepted shapes of an optional array for packed (total_q) or unpacked (seqlen_q) queries."""
    other = "seqlen_q" if packed_q else "total_q"
    return tuple(shape for shape in field.shapes if other not in shape)


def make_inputs(q: Any, k: Any, v: Any, *extras: Any) -> Inputs:
    """Return the inputs from a flat list: only q, k and v, or q, k, v and every optional array."""
    for x in extras:
        if x is not None:
            return Inputs(q, k, v, Extras(*extras))
    return Inputs(q, k, v, NO_EXTRAS)  # torch 2.6 cannot trace a default that is a NamedTuple


def replace_extras(extras: Extras, **changes: Any) -> Extras:
    """Return the extras with some arrays replaced. torch 2.6 cannot trace `_replace`."""
    given = dict(zip(Extras._fields, extras, strict=True))
    return Extras(**{**given, **changes})


def flatten(arrays: Inputs | Appended, saved: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Return the arrays as one flat tuple, in the order of a pass's inputs; without extras if the call has none.

    saved: the arrays that the pass reads between q, k, v and the optional arrays.
    """
    if isinstance(arrays, Appended):
        return arrays
    q, k, v, extras = arrays
    return (q, k, v, *saved) if extras is NO_EXTRAS else (q, k, v, *saved, *extras)


def reshape_gradients(grads: AnyGradients, extras: Extras) -> AnyGradients:
    """Return the gradients of optional arrays in the shapes of the caller's arrays, and None for absent arrays."""
    found = {}
    for name in GRADIENTS:
        array, gradient = getattr(extras, name), getattr(grads, f"d{name}")
        found[f"d{name}"] = None if array is None else gradient.reshape(array.shape)
    given = dict(zip(grads._fields, grads, strict=True))  # torch 2.6 traces no `_replace`
    return type(grads)(**{**given, **found})
