"""Public functions: attention of sequences that are divided over the processes of a group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import explicit
from ..definition.inputs import Extras, Gradients, Inputs, Saved, replace_extras
from ..definition.options import Options
from ..frameworks.score_arguments import DESCRIPTION
from ..frameworks.torch import functional
from ..runtime import dispatch
from . import request
from .pairs import Band
from .partial import Arrays, Heads, Sequences, Static
from .plan import Layout, make_plan
from .request import Ranks
from .ring import Ring, attend
from .ring import backward as ring_backward
from .score_functions import with_starts
from .sharding import Sharding
from .ulysses import Exchange, exchange_for_heads, exchange_for_rows


class Call(NamedTuple):
    """Call of one rank whose arguments agree with the other ranks' arguments."""

    inputs: Inputs
    options: Options
    layout: Layout
    sequences: Sequences
    ranks: Ranks
    gather: bool
    return_lse: bool
    backend: str
    shared_rows: dict[str, bool]  # one row of a bias or mask stands for all queries


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    sharding: str | Sharding = "contiguous",
    sharding_k: str | Sharding | None = None,
    schedule: str = "auto",
    return_lse: bool = False,
    **arguments: Any,
) -> Any:
    """Compute the attention of a sequence that is divided over the ranks of a group. Every rank calls it.

    The result is the rank's part of what `anyattn.attention` computes for the whole sequence, up to rounding: out, lse
    and gradients, with the same dropped entries. Memory per rank is O(N / P).

    Args:
        q: (batch, rows, nheads, head_dim), the rank's queries.
        k: (batch, rows, nheads_kv, head_dim), the rank's keys.
        v: (batch, rows, nheads_kv, head_dim_v).
        group: a ProcessGroup, a DeviceMesh with one dimension, or a DeviceMesh (ring, ulysses). Default: all ranks.
        sharding: which positions each rank has: a `Sharding`, "contiguous" (with any number of rows on each rank),
            "zigzag" or "striped".
        sharding_k: which keys each rank has. Default: like `sharding`.
        schedule: "ring" exchanges keys between pairs of ranks while it computes. "gather" receives all keys first.
            "ulysses" exchanges sequence parts for groups of heads. "ulysses+ring" does both on a mesh. "auto" takes
            ulysses+ring on a mesh with two dimensions, else ulysses if the heads can be divided and it sends fewer
            bytes, else ring.
        return_lse: also return lse, (batch, nheads, rows). Gradients then flow through lse too.
        **arguments: keywords of `anyattn.attention` that concern masks, scores, dropout and the backend. bias, mask and
            kv_indices have the rank's queries and all keys of the whole sequence. Lengths and offsets concern the
            whole sequence. dropout_p without seed samples the state on rank 0.

    Returns:
        out (batch, rows, nheads, head_dim_v), the rank's rows; with return_lse also lse.

        The gradients of q, k and v are complete. The gradients of sink, and of a bias with one row for all queries, are
        this rank's contributions, as for every parameter that all ranks share: their sum over the group is the
        gradient of one process. DistributedDataParallel and FSDP add them.

    Raises:
        ValueError, TypeError, NotImplementedError: on every rank, before data is sent, if a rank passes a wrong
            argument or if arguments differ between ranks.

    >>> import torch, anyattn.distributed as ad
    >>> _ = torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    >>> q = k = v = torch.ones(1, 8, 2, 16)
    >>> ad.attention(q, k, v, causal=True).shape
    torch.Size([1, 8, 2, 16])
    >>> torch.distributed.destroy_process_group()
    """
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in arguments:
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}. Use attention_varlen.")
    call = _agreed(q, k, v, group, sharding, sharding_k, schedule, return_lse, arguments, "attention")
    out, lse = _compute(call)
    return (out, lse) if return_lse else out


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    group: Any = None,
    sharding: str | Sharding = "contiguous",
    sharding_k: str | Sharding | None = None,
    schedule: str = "auto",
    return_lse: bool = False,
    **arguments: Any,
) -> Any:
    """Compute the attention of packed documents that are divided over the ranks of a group. Every rank calls it.

    Args:
        q: (rows, nheads, head_dim), the rank's rows of the packed queries of all documents.
        k: (rows, nheads_kv, head_dim), the rank's rows of the packed keys.
        v: (rows, nheads_kv, head_dim_v).
        cu_seqlens_q: (documents + 1,), cumulative lengths of the whole packed queries, the same on every rank.
        cu_seqlens_k: (documents + 1,), cumulative lengths of the whole packed keys.
        group: as for `attention`.
        sharding: as for `attention`, over all rows of all documents. "zigzag" divides each document by itself.
        sharding_k: as for `attention`.
        schedule: as for `attention`.
        return_lse: also return lse, (nheads, rows).
        **arguments: keywords of `anyattn.attention_varlen`, as for `attention`.

    Returns:
        out (rows, nheads, head_dim_v), the rank's rows; with return_lse also lse.

    Raises:
        ValueError, TypeError, NotImplementedError: as for `attention`.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise TypeError("cu_seqlens_q and cu_seqlens_k must be tensors, got None.")
    tables = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    given = {**arguments, **tables}
    call = _agreed(q, k, v, group, sharding, sharding_k, schedule, return_lse, given, "attention_varlen")
    q, k, v, extras = call.inputs
    inputs = Inputs(q[None], k[None], v[None], extras)
    out, lse = _compute(call._replace(inputs=inputs))
    return (out[0], lse[0]) if return_lse else out[0]


def _agreed(
    q: Tensor, k: Tensor, v: Tensor, group: Any, sharding: Any, sharding_k: Any, schedule: str, return_lse: bool,
    arguments: dict[str, Any], caller: str,
) -> Call:  # fmt: skip
    """Return the call after all ranks have compared their arguments."""
    ranks = request.find_ranks(group, schedule)
    inputs, options, backend = Inputs(q, k, v, Extras()), Options(), None
    error: Exception | None = None
    for name in ("query_start", "key_start", "partial"):
        if name in arguments:
            error = TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    try:
        inputs, options, seed, backend, _ = explicit(q, k, v, arguments, caller, DESCRIPTION)
        inputs = functional.prepare(inputs, seed, draw=options.dropout_p != 0)
    except (ValueError, TypeError, NotImplementedError) as found:
        error = found
    others: dict[str, Any] = {"sharding": repr(sharding), "sharding_k": repr(sharding_k), "schedule": schedule}
    others |= {"return_lse": bool(return_lse), "backend": backend}
    known = sharding if sharding_k is None else sharding_k
    keys = known.length if isinstance(known, Sharding) else None
    rows = request.compare(ranks, inputs, options, others, keys, error)
    extras = inputs.extras
    packed = extras.cu_seqlens_q is not None
    cu_q, cu_k = (extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()) if packed else (None, None)
    queries, keys_ = request.shardings(sharding, sharding_k, rows, cu_q, cu_k)
    for name in ("bias", "mask"):
        x = getattr(extras, name)
        if x is not None and x.shape[3] not in (1, keys_.length):
            raise ValueError(f"{name} must have all {keys_.length} keys in its last dimension, got {tuple(x.shape)}.")
    request.check_lists(rows, keys_.length)
    found_sequences = request.sequences(inputs, options, queries.length, keys_.length)
    if extras.rng_state is not None and ranks.size > 1:
        extras = replace_extras(extras, rng_state=_from_first(extras.rng_state, ranks))
    layout = _layout(schedule, ranks, queries, keys_, Inputs(*inputs[:3], extras), options, found_sequences)
    chosen = _choose(schedule, ranks, layout, Inputs(*inputs[:3], extras), options)
    if chosen == "ulysses":
        ranks = Ranks(None, ranks.ring, 0, 1, ranks.ring_rank, ranks.ring_size)
    named = backend or ",".join(dispatch.named(None))
    return Call(Inputs(*inputs[:3], extras), options, layout, found_sequences, ranks, chosen == "gather",
                bool(return_lse), named, request.shared_rows(rows))  # fmt: skip


def _layout(
    schedule: str, ranks: Ranks, queries: Sharding, keys: Sharding, inputs: Inputs, options: Options,
    sequences: Sequences,
) -> Layout:  # fmt: skip
    """Return the layout over the ring's ranks, each with the rows of its group of heads."""
    size = ranks.size if schedule == "ulysses" else ranks.heads_size
    rows = Layout(queries.group(size), keys.group(size), (), (), (), Band()) if size > 1 else None
    if rows is None:
        return request.make_layout(queries, keys, inputs, options, sequences)
    layout = request.make_layout(rows.queries, rows.keys, inputs, options, sequences)
    return layout._replace(queries=queries, keys=keys)


def _from_first(state: Tensor, ranks: Ranks) -> Tensor:
    """Return the dropout state of rank 0."""
    state = state.clone()
    for group in reversed(ranks.groups()):
        dist.broadcast(state, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return state


def _choose(schedule: str, ranks: Ranks, layout: Layout, inputs: Inputs, options: Options) -> str:
    """Return the schedule that runs, the same on every rank; raise if the named one cannot run."""
    parts = ranks.ring_size if schedule in ("auto", "ulysses") and ranks.heads_size == 1 else ranks.heads_size
    reason = _ulysses_refusal(inputs, options, parts)
    if ranks.heads_size > 1 or schedule == "ulysses":
        if reason is not None:
            raise ValueError(reason)
        return "ulysses+ring" if ranks.heads_size > 1 else "ulysses"
    if schedule != "auto":
        return schedule
    if reason is not None or ranks.ring_size == 1:
        return "ring"
    return "ulysses" if _ulysses_elements(layout, inputs, parts) < _ring_elements(layout, inputs, parts) else "ring"


def _ulysses_refusal(inputs: Inputs, options: Options, parts: int) -> str | None:
    q, k, _, extras = inputs
    for name, heads in (("nheads", q.shape[-2]), ("nheads_kv", k.shape[-2])):
        if heads % parts:
            return f"{name} must be a multiple of the {parts} ranks for ulysses, got {heads}. Use schedule='ring'."
    if options.dropout_p and (extras.bias is not None or extras.mask is not None):
        return "dropout_p must be 0 for ulysses with bias or mask. Use schedule='ring'."
    return None


def _ring_elements(layout: Layout, inputs: Inputs, size: int) -> int:
    """Return the largest number of elements that the first, middle or last rank receives in a forward pass."""
    _, k, v, _ = inputs
    rows = max(make_plan(layout, rank).received_rows() for rank in {0, size // 2, size - 1})
    return int(rows * k.shape[-2] * (k.shape[-1] + v.shape[-1]))


def _ulysses_elements(layout: Layout, inputs: Inputs, size: int) -> int:
    """Return the number of elements that a rank receives in a forward pass."""
    q, k, v, _ = inputs
    per_query = q.shape[-2] * (q.shape[-1] + v.shape[-1])
    per_key = k.shape[-2] * (k.shape[-1] + v.shape[-1])
    return int((layout.queries.length * per_query + layout.keys.length * per_key) * (size - 1) // size**2)


def _compute(call: Call) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the rank's rows."""
    ring, arrays, inputs, exchange = _prepare(call)
    q, k, v, extras = inputs
    out, lse = attend(ring, arrays, q, k, v, extras.bias, extras.sink, extras.captured)
    if exchange is not None:
        out = exchange_for_rows(exchange, out)
        if call.return_lse:
            lse = exchange_for_rows(exchange, lse, 2)
    return out, lse


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, group: Any, sharding: Any,
    **arguments: Any,
) -> Gradients:  # fmt: skip
    """Return dq, dk and dv of an `attention` call without optional arrays, from its results, outside autograd."""
    call = _agreed(q, k, v, group, sharding, None, "ring", False, arguments, "attention")
    ring, arrays, inputs, _ = _prepare(call)
    grads = ring_backward(ring, arrays, *inputs[:3], Saved(out, lse, dout))
    return Gradients(grads.dq.to(q.dtype), grads.dk.to(k.dtype), grads.dv.to(v.dtype))


class Prepared(NamedTuple):
    """Arguments of the ring of a call, and the exchange of heads around it."""

    ring: Ring
    arrays: Arrays
    inputs: Inputs
    exchange: Exchange | None


def _prepare(call: Call) -> Prepared:
    """Return the arguments of the ring, after the exchange of rows for heads."""
    ranks, options = call.ranks, call.options
    q, k, v, extras = call.inputs
    layout, parts = call.layout, ranks.heads_size
    exchange = None
    if parts > 1:
        first = ranks.ring_rank * parts
        exchange, keys = (_exchange(ranks, sharding, first) for sharding in (layout.queries, layout.keys))
        q, k, v = exchange_for_heads(exchange, q), exchange_for_heads(keys, k), exchange_for_heads(keys, v)
        extras = _exchanged(extras, exchange, ranks, call.shared_rows)
        layout = layout._replace(queries=layout.queries.group(parts), keys=layout.keys.group(parts))
    plan = make_plan(layout, ranks.ring_rank, gather=call.gather)
    score = with_starts(options.score) if options.score else ""
    static = Static(
        options._replace(
            left=None, right=None, chunk=0, alignment="bottom-right", max_seqlen_q=0, max_seqlen_k=0, score=score
        ),
        layout.band, call.sequences, extras.cu_seqlens_q is not None, Heads(ranks.heads_rank, parts), call.backend,
    )  # fmt: skip
    used = None if extras.sink is None else request.used_queries(layout, ranks.ring_rank, call.sequences, q)
    arrays = Arrays(
        None, extras.mask, extras.alibi_slopes, extras.kv_indices, extras.rng_state, used, None, extras.captured_indices
    )
    ring = Ring(ranks.ring if ranks.ring_size > 1 else None, plan, static, call.return_lse)
    return Prepared(ring, arrays, Inputs(q, k, v, extras), exchange)


def _exchange(ranks: Ranks, sharding: Sharding, first: int) -> Exchange:
    parts = ranks.heads_size
    union = sharding.group(parts).intervals[first // parts]
    return Exchange(ranks.heads, ranks.heads_rank, sharding.intervals[first : first + parts], union)


def _exchanged(extras: Extras, exchange: Exchange, ranks: Ranks, shared_rows: dict[str, bool]) -> Extras:
    """Return the optional arrays of the rank's heads, with the rows of its group of heads."""
    parts, changes = ranks.heads_size, {}
    for name in ("bias", "mask"):
        x = getattr(extras, name)
        if x is not None:
            changes[name] = _exchange_scores(x, exchange, ranks, shared=shared_rows[name])
    lists = extras.kv_indices
    if lists is not None:
        x = lists[:, None].expand(-1, parts, -1, -1) if lists.ndim == 3 else lists
        x = exchange_for_heads(exchange, x, 2)
        changes["kv_indices"] = x[:, 0] if lists.ndim == 3 else x
    for name in ("alibi_slopes", "sink"):
        x = getattr(extras, name)
        if x is not None:
            heads = x.shape[-1] // parts
            changes[name] = x[..., ranks.heads_rank * heads : (ranks.heads_rank + 1) * heads]
    return replace_extras(extras, **changes)


def _exchange_scores(x: Tensor, exchange: Exchange, ranks: Ranks, *, shared: bool) -> Tensor:
    """Return the rank's heads of a bias or mask with the rows of its group; one head stands for all."""
    parts = ranks.heads_size
    if shared:
        heads = x.shape[1] // parts
        return x if x.shape[1] == 1 else x[:, ranks.heads_rank * heads : (ranks.heads_rank + 1) * heads]
    x = x.expand(-1, parts, -1, -1) if x.shape[1] == 1 else x
    return exchange_for_heads(exchange, x, 2)
