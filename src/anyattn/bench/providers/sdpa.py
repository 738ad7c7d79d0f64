"""torch.nn.functional.scaled_dot_product_attention, with the best implementation for each workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..inputs import Inputs
from ..workloads import ITEMSIZE, Workload
from .base import LIMIT_BYTES, Prepared, Refused, differentiate, per_sequence, refuse, swapped

if TYPE_CHECKING:
    from torch import Tensor


class Sdpa:
    """SDPA with is_causal and enable_gqa if they suffice, else with a mask. Sequences one by one; pages gathered."""

    name = "torch SDPA"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        refuse(workload, softcap=workload.softcap, sink=workload.sink)
        if workload.dropout_p and workload.backward:
            raise Refused("its gradients with its own dropout cannot be compared")
        if workload.packed:
            return per_sequence(inputs, self._dense)
        return self._dense(inputs)

    def _dense(self, inputs: Inputs) -> Prepared:
        workload = inputs.workload
        attend = _attend(inputs)
        if workload.page_size:
            return Prepared(_gathered(inputs, attend), lambda out: swapped([out]))
        arrays = [inputs.heads_first(name) for name in ("q", "k", "v")]
        own = workload.dropout_p > 0
        if workload.backward:
            return Prepared(differentiate(arrays, attend, inputs.heads_first("dout")), swapped)
        return Prepared(lambda: attend(*arrays), lambda out: swapped([out]), own_dropout=own)


class SdpaPacked:
    """Decoding with the query heads of a KV head as rows, arranged by the caller.

    enable_gqa would read K and V for
    each query head."""

    name = "torch SDPA (packed)"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        if workload.group == 1 or workload.seqlen_q != 1 or workload.packed or workload.page_size or workload.backward:
            return None
        if (
            inputs.visible is not None
            or inputs.additive is not None
            or workload.dropout_p
            or workload.softcap
            or workload.sink
        ):
            return None
        from torch.nn.functional import scaled_dot_product_attention

        q = inputs.q.reshape(workload.batch, workload.nheads_kv, workload.group, workload.head_dim)
        k, v = inputs.heads_first("k"), inputs.heads_first("v")
        shape = (workload.batch, 1, workload.nheads, workload.head_dim_v)
        return Prepared(lambda: scaled_dot_product_attention(q, k, v), lambda out: [out.reshape(shape)])


class SdpaPadded:
    """Packed sequences, padded to the longest, with a mask of keys, like a tokenizer's batch."""

    name = "torch SDPA (padded)"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        if not workload.packed or workload.backward:
            return None
        refuse(
            workload,
            softcap=workload.softcap,
            sink=workload.sink,
            dropout_here=workload.dropout_p,
            ALiBi_here=workload.alibi,
        )
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (_padded(x, inputs).transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
        longest = workload.seqlen_k
        keys = torch.arange(longest)
        mask = (keys < torch.tensor(workload.lengths)[:, None])[:, None, None, :]  # (batch, 1, 1, longest)
        if workload.causal or workload.window:
            lo, hi = (torch.from_numpy(x)[:, None] for x in workload.bounds(longest, longest))
            mask = mask & (lo <= keys) & (keys < hi)

        def run() -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=workload.group > 1)

        def results(out: Tensor) -> list[Tensor]:
            return [torch.cat([out[b, :, :n].transpose(0, 1) for b, n in enumerate(workload.lengths)])]

        return Prepared(run, results)


def _padded(x: Tensor, inputs: Inputs) -> Tensor:
    import torch

    parts = torch.split(x, list(inputs.workload.lengths))
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _attend(inputs: Inputs) -> Callable[..., Any]:
    """Return a function on (batch, nheads, seqlen, head_dim) tensors."""
    from torch.nn.functional import scaled_dot_product_attention

    workload = inputs.workload
    gqa = workload.group > 1
    simple = (
        workload.causal
        and workload.window is None
        and workload.seqlen_q == workload.seqlen_k
        and not workload.bias
        and not workload.mask
    )
    if simple and not workload.alibi:
        return lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=workload.dropout_p, enable_gqa=gqa
        )
    mask = _mask(inputs)
    return lambda q, k, v: scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=workload.dropout_p, enable_gqa=gqa
    )


def _mask(inputs: Inputs) -> Tensor | None:
    """Return everything that changes scores as the one array that SDPA accepts."""
    workload = inputs.workload
    _check(workload)
    if inputs.additive is None or inputs.visible is None:
        return inputs.visible if inputs.additive is None else inputs.additive
    return inputs.additive.masked_fill(~inputs.visible, float("-inf"))


def _check(workload: Workload) -> None:
    per_head = workload.seqlen_q * workload.seqlen_k
    size = per_head * (workload.nheads * ITEMSIZE[workload.dtype] if workload.bias == "full" or workload.alibi else 1)
    if (workload.causal or workload.window or workload.bias or workload.alibi) and size > LIMIT_BYTES:
        raise Refused(f"its mask would take {size / 2**30:.1f} GiB")


def _gathered(inputs: Inputs, attend: Callable[..., Any]) -> Callable[[], Any]:
    """Return a call that gathers the pages each time, because SDPA has no block table."""
    workload, k_pages, v_pages = inputs.workload, inputs.pages["k"], inputs.pages["v"]
    q, table = inputs.heads_first("q"), inputs.block_table.long()

    def gather(pages: Tensor) -> Tensor:
        return pages[table].flatten(1, 2)[:, : workload.seqlen_k].transpose(1, 2)

    return lambda: attend(q, gather(k_pages), gather(v_pages))
