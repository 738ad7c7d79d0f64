"""Arguments of a distributed call: checked on every rank, compared between ranks, and turned into a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..definition.inputs import FIELDS, SCORES, TABLE, Extras, Inputs
from ..definition.options import Options
from ..definition.problem import Array, contiguous, described
from ..definition.validate import check_attention
from ..frameworks.torch.adapter import adapter
from .agreement import agree
from .pairs import UNBOUNDED, Band, Document
from .partial import Sequences
from .plan import Layout
from .sharding import KINDS, Sharding

SCHEDULES = ("auto", "ring", "ulysses", "ulysses+ring", "gather")


@dataclass(frozen=True)
class Ranks:
    """Groups of a call: the ring's, and the one that exchanges heads (None: one rank)."""

    ring: Any
    heads: Any
    ring_rank: int
    ring_size: int
    heads_rank: int
    heads_size: int

    @property
    def size(self) -> int:
        return self.ring_size * self.heads_size

    @property
    def rank(self) -> int:
        return self.ring_rank * self.heads_size + self.heads_rank

    def groups(self) -> list[Any]:
        """Return the groups with more than one rank, outermost first."""
        return [group for group, size in ((self.ring, self.ring_size), (self.heads, self.heads_size)) if size > 1]


def find_ranks(group: Any, schedule: str) -> Ranks:
    """Return the groups for a ProcessGroup, None (all ranks), or a DeviceMesh with one or two dimensions."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialised. Call torch.distributed.init_process_group first.")
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim == 2:
            if schedule not in ("auto", "ulysses+ring"):
                raise ValueError(f"group must have one dimension for schedule {schedule!r}, got a mesh with 2.")
            ring, heads = group.get_group(0), group.get_group(1)
            sizes = dist.get_world_size(ring), dist.get_world_size(heads)
            return Ranks(ring, heads, dist.get_rank(ring), sizes[0], dist.get_rank(heads), sizes[1])
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh with 1 or 2 dimensions, got {group.ndim}.")
        group = group.get_group()
    if schedule == "ulysses+ring":
        raise ValueError("group must be a DeviceMesh (ring, ulysses) for schedule 'ulysses+ring', got one dimension.")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this process.")
    return Ranks(group, None, dist.get_rank(group), dist.get_world_size(group), 0, 1)


def check_local(inputs: Inputs, options: Options, ranks: Ranks, keys: int | None) -> None:
    """Check what a rank can check by itself. keys: number of keys of the whole sequence, if known."""
    q, k, _, extras = inputs
    absent = {"block_table": extras.block_table, "cache_batch_idx": extras.cache_batch_idx}
    for name, x in absent.items():
        if x is not None:
            raise NotImplementedError(f"{name} must be None, got an array. A KV cache is not divided over processes.")
    if extras.k_scale is not None or extras.v_scale is not None:
        raise NotImplementedError("k_scale and v_scale must be None, got an array. Pass keys and values of q's dtype.")
    if extras.kv_indices is not None and extras.cu_seqlens_q is not None:
        raise NotImplementedError("kv_indices must be None for packed documents, got an array. Use attention.")
    if options.score and options.dropout_p:
        raise NotImplementedError(
            f"dropout_p must be 0 with score_mod or mask_mod, got {options.dropout_p}. Use one process."
        )
    if options.batch_invariant:
        raise NotImplementedError("batch_invariant must be False, got True. Use deterministic=True.")
    arrays: dict[str, Array] = described(("q", "k", "v", *Extras._fields), (*inputs[:3], *extras), adapter.describe)
    if extras.cu_seqlens_q is None:
        length = next((x.shape[3] for x in (extras.bias, extras.mask) if x is not None and x.shape[3] > 1), k.shape[1])
        for name in ("k", "v"):
            old = arrays[name]
            if len(old.shape) == 4:
                shape = (old.shape[0], length if keys is None else keys, *old.shape[2:])
                arrays[name] = contiguous(shape, old.dtype, old.device)
    check_attention(arrays, options)
    for name, field in FIELDS.items():
        x = getattr(extras, name)
        if field.kind == TABLE and x is not None and name != "kv_indices" and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}.")


def arguments_of(inputs: Inputs, options: Options, others: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal on all ranks, by the names of the public arguments."""
    found: dict[str, Any] = {**options._asdict(), **others}
    for name, x in zip(("q", "k", "v"), inputs[:3], strict=True):
        rows = 0 if inputs.extras.cu_seqlens_q is not None else 1
        shape = [size for axis, size in enumerate(x.shape) if axis != rows]
        found[name] = (shape, str(x.dtype), x.device.type, _needs_gradient(x))
    for name, x in inputs.extras._asdict().items():
        if x is None or name in ("rng_state", "kv_indices"):
            found[name] = None if x is None else (x.ndim, x.shape[-1], str(x.dtype))
        elif FIELDS[name].kind == TABLE:
            found[name] = x.tolist()
        else:
            shape = list(x.shape)
            if FIELDS[name].kind == SCORES:
                del shape[2]  # rows; `rows_are_shared` compares them
            found[name] = (shape, str(x.dtype), _needs_gradient(x))
    return found


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def shardings(
    sharding: str | Sharding, sharding_k: str | Sharding | None, rows: Sequence[tuple[int, ...]], cu: Any, cu_k: Any
) -> tuple[Sharding, Sharding]:
    """Return the shardings of queries and keys. rows: of queries and of keys on every rank."""
    kinds = ("sharding", sharding, cu), ("sharding_k", sharding if sharding_k is None else sharding_k, cu_k)
    found = [_sharding(name, kind, [row[i] for row in rows], cu) for i, (name, kind, cu) in enumerate(kinds)]
    steps = {interval.step for one in found for rank in one.intervals for interval in rank if interval.length > 1}
    if len(steps) > 1:
        raise ValueError("sharding_k must be striped like sharding, got different steps between positions.")
    return found[0], found[1]


def _sharding(name: str, kind: str | Sharding, lengths: list[int], cu_seqlens: Sequence[int] | None) -> Sharding:
    total, size = sum(lengths), len(lengths)
    if isinstance(kind, Sharding):
        found = kind
    elif kind == "contiguous":
        found = Sharding.of_lengths(lengths)
    elif kind == "zigzag":
        found = Sharding.zigzag(total, size, None if cu_seqlens is None else [*cu_seqlens[:-1], total])
    elif kind == "striped":
        found = Sharding.striped(total, size)
    else:
        raise ValueError(f"{name} must be a Sharding or one of {', '.join(KINDS)}, got {kind!r}.")
    if found.world_size != size:
        raise ValueError(f"{name} must be for the group's {size} ranks, got one for {found.world_size}.")
    if list(found.lengths()) != lengths:
        raise ValueError(
            f"{name} must match the ranks' rows {lengths}, got a sharding of {list(found.lengths())}. "
            f"Divide the arrays with anyattn.distributed.shard."
        )
    return found


def sequences(inputs: Inputs, options: Options, queries: int, keys: int) -> Sequences:
    """Return the lengths and offsets of every sequence. queries, keys: rows of the whole dense sequence."""
    extras = inputs.extras
    given = {name: getattr(extras, name) for name in _LENGTHS}
    tables: dict[str, Any] = {name: None if x is None else x.tolist() for name, x in given.items()}
    if extras.cu_seqlens_q is None:
        whole_q, whole_k = [queries] * inputs.q.shape[0], [keys] * inputs.q.shape[0]
    else:
        for name, total in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
            _check_boundaries(name, tables[name], total)
        whole_q, whole_k = ([b - a for a, b in pairwise(cu)] for cu in (tables["cu_seqlens_q"], tables["cu_seqlens_k"]))
    n_q, n_k = tables["seqused_q"] or whole_q, tables["seqused_k"] or whole_k
    pads = tables["leftpad_k"] or [0] * len(n_q)
    for name, used, most in (("seqused_q", n_q, whole_q), ("seqused_k", n_k, whole_k), ("leftpad_k", pads, n_k)):
        if any(not 0 <= x <= limit for x, limit in zip(used, most, strict=True)):
            raise ValueError(f"{name} must be from 0 to {most}, got {used}.")
    aligned = [c - p - r if options.alignment == "bottom-right" else 0 for r, c, p in zip(n_q, n_k, pads, strict=True)]
    return Sequences(*map(tuple, (n_q, n_k, pads, tables["offset"] or aligned)))


def _check_boundaries(name: str, cu_seqlens: list[int], total: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > total or any(a > b for a, b in pairwise(cu_seqlens)):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at or before the {total} rows, got {cu_seqlens}."
        )


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "offset")


def make_layout(queries: Sharding, keys: Sharding, inputs: Inputs, options: Options, found: Sequences) -> Layout:
    """Return the layout of a call, which is the same on every rank."""
    extras = inputs.extras
    limits = Band(
        UNBOUNDED if options.left is None else options.left,
        UNBOUNDED if options.right is None else options.right,
        options.chunk,
    )
    rows = [Document(n, pad, used, offset + pad, offset + pad) for n, used, pad, offset in zip(*found, strict=True)]
    if extras.cu_seqlens_q is None:
        cu_q, cu_k = (0, queries.length), (0, keys.length)
        documents: tuple[Document, ...] = (_hull(rows),) if rows else (Document(0, 0, 0, 0, 0),)
    else:
        cu_q, cu_k = tuple(extras.cu_seqlens_q.tolist()), tuple(extras.cu_seqlens_k.tolist())
        documents = tuple(rows)
    layout = Layout(queries, keys, cu_q, cu_k, documents, limits)
    _check_positions(layout, inputs, options)
    return layout


def _hull(rows: Sequence[Document]) -> Document:
    q, first, keys, shift, _ = zip(*rows, strict=True)
    return Document(max(q), min(first), max(keys), min(shift), max(shift))


def _check_positions(layout: Layout, inputs: Inputs, options: Options) -> None:
    """Raise for combinations of a mask and a sharding that pairs of intervals cannot express."""
    documents, extras = layout.documents, inputs.extras
    varied = any(d.least_shift != d.largest_shift for d in documents)
    if options.chunk and (varied or extras.leftpad_k is not None):
        raise NotImplementedError(
            "chunk must be 0 with leftpad_k or with offsets that differ between sequences, got "
            f"{options.chunk}. Use attention_varlen, or schedule='ulysses'."
        )
    striped = any(i.step > 1 for one in (layout.queries, layout.keys) for rank in one.intervals for i in rank)
    if not striped:
        return
    refused = {"chunk": options.chunk, "alibi_slopes": extras.alibi_slopes is not None, "dropout_p": options.dropout_p}
    refused["seqused_q, seqused_k, leftpad_k and offset"] = varied
    for name, given in refused.items():
        if given:
            raise NotImplementedError(
                f"sharding must not be striped together with {name}. Use 'zigzag', or schedule='ulysses'."
            )


def compare(
    ranks: Ranks, inputs: Inputs, options: Options, others: dict[str, Any], keys: int | None, error: Exception | None
) -> list[tuple[int, ...]]:
    """Return the sizes of every rank, after the check that all ranks pass the same arguments."""
    arguments: dict[str, Any] = {}
    if error is None:
        try:
            check_local(inputs, options, ranks, keys)
            arguments = arguments_of(inputs, options, others)
        except (ValueError, TypeError, NotImplementedError) as found:
            error = found
    rows = [0, 0, 0, 0, 0, 0]
    if error is None:
        axis = 0 if inputs.extras.cu_seqlens_q is not None else 1
        scores = [-1 if x is None else x.shape[2] for x in (inputs.extras.bias, inputs.extras.mask)]
        rows = [inputs.q.shape[axis], inputs.k.shape[axis], *scores, *_listed(inputs.extras.kv_indices)]
    return agree(ranks.groups(), arguments, rows, error, getattr(inputs.q, "device", torch.device("cpu")))


def _listed(lists: Tensor | None) -> tuple[int, int]:
    """Return the smallest and the largest key slot that a rank lists."""
    if lists is None or not lists.numel():
        return -1, -1
    low, high = lists.aminmax()
    return int(low), int(high)


def check_lists(rows: Sequence[tuple[int, ...]], keys: int) -> None:
    """Raise unless every rank lists key slots of the whole sequence."""
    low, high = min(row[4] for row in rows), max(row[5] for row in rows)
    if low < -1 or high >= keys:
        raise ValueError(f"kv_indices must be from -1 (no key) to {keys - 1}, got {low if low < -1 else high}.")


def shared_rows(rows: Sequence[tuple[int, ...]]) -> dict[str, bool]:
    """Return whether one row of bias, and of mask, stands for the queries of all ranks.

    Raises:
        ValueError: some ranks have one row for all queries, and others have a row for each query.
    """
    found = {}
    for name, column in (("bias", 2), ("mask", 3)):
        own = all(row[column] == row[0] for row in rows)
        found[name] = not own and all(row[column] == 1 for row in rows)
        if rows[0][column] >= 0 and not own and not found[name]:
            found_rows = [(row[column], row[0]) for row in rows]
            raise ValueError(
                f"{name} must have one row on every rank, or a row for each query on every rank, got (rows, queries) "
                f"{found_rows}."
            )
    return found


def used_queries(layout: Layout, rank: int, found: Sequences, q: Tensor) -> Tensor | None:
    """Return which of a rank's queries are in use, (batch or 1, rows), or None if all are."""
    positions = layout.queries.positions(rank, q.device)
    if len(layout.cu_seqlens_q) == 2 and len(found.queries) == q.shape[0]:  # dense
        used = positions < torch.tensor(found.queries, device=q.device)[:, None]
    else:
        starts = torch.tensor(layout.cu_seqlens_q, device=q.device)
        number = torch.searchsorted(starts, positions, right=True) - 1
        lengths = torch.tensor((*found.queries, 0), device=q.device)
        used = (positions - starts[number] < lengths[number])[None]
    return None if min(found.queries, default=0) == layout.queries.length else used
