"""torch.nn.functional.scaled_dot_product_attention, by its best path for each case."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..cases import ITEMSIZE, Case
from ..inputs import Inputs
from .base import LIMIT_BYTES, Prepared, Refused, differentiate, per_sequence, refuse, swapped

if TYPE_CHECKING:
    from torch import Tensor


class Sdpa:
    """is_causal and enable_gqa where they say it all, else a mask; packed sequences one by one; pages gathered."""

    name = "torch SDPA"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        case = inputs.case
        refuse(case, softcap=case.softcap, sink=case.sink)
        if case.dropout_p and case.backward:
            raise Refused("its gradients under its own dropout are not compared")
        if case.packed:
            return per_sequence(inputs, self._dense)
        return self._dense(inputs)

    def _dense(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        attend = _attend(inputs)
        if case.page_size:
            return Prepared(_gathered(inputs, attend), lambda out: swapped([out]))
        arrays = [inputs.heads_first(name) for name in ("q", "k", "v")]
        own = case.dropout_p > 0
        if case.backward:
            return Prepared(differentiate(arrays, attend, inputs.heads_first("dout")), swapped)
        return Prepared(lambda: attend(*arrays), lambda out: swapped([out]), own_dropout=own)


class SdpaPacked:
    """Decoding with the query heads of a KV head as rows, which the caller arranges; enable_gqa reads K and V for each
    query head."""

    name = "torch SDPA (packed)"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        case = inputs.case
        if case.group == 1 or case.seqlen_q != 1 or case.packed or case.page_size or case.backward:
            return None
        if inputs.visible is not None or inputs.additive is not None or case.dropout_p or case.softcap or case.sink:
            return None
        from torch.nn.functional import scaled_dot_product_attention

        q = inputs.q.reshape(case.batch, case.nheads_kv, case.group, case.head_dim)
        k, v = inputs.heads_first("k"), inputs.heads_first("v")
        shape = (case.batch, 1, case.nheads, case.head_dim_v)
        return Prepared(lambda: scaled_dot_product_attention(q, k, v), lambda out: [out.reshape(shape)])


class SdpaPadded:
    """Packed sequences padded to the longest, with a mask of keys: what a batch of a tokenizer is."""

    name = "torch SDPA (padded)"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        case = inputs.case
        if not case.packed or case.backward:
            return None
        refuse(case, softcap=case.softcap, sink=case.sink, dropout_here=case.dropout_p, ALiBi_here=case.alibi)
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (_padded(x, inputs).transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
        longest = case.seqlen_k
        keys = torch.arange(longest)
        mask = (keys < torch.tensor(case.lengths)[:, None])[:, None, None, :]  # (batch, 1, 1, longest)
        if case.causal or case.window:
            lo, hi = (torch.from_numpy(x)[:, None] for x in case.bounds(longest, longest))
            mask = mask & (lo <= keys) & (keys < hi)

        def run() -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=case.group > 1)

        def results(out: Tensor) -> list[Tensor]:
            return [torch.cat([out[b, :, :n].transpose(0, 1) for b, n in enumerate(case.lengths)])]

        return Prepared(run, results)


def _padded(x: Tensor, inputs: Inputs) -> Tensor:
    import torch

    parts = torch.split(x, list(inputs.case.lengths))
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _attend(inputs: Inputs) -> Callable[..., Any]:
    """On (batch, nheads, seqlen, head_dim) tensors."""
    from torch.nn.functional import scaled_dot_product_attention

    case = inputs.case
    gqa = case.group > 1
    simple = case.causal and case.window is None and case.seqlen_q == case.seqlen_k and not case.bias and not case.mask
    if simple and not case.alibi:
        return lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=case.dropout_p, enable_gqa=gqa
        )
    mask = _mask(inputs)
    return lambda q, k, v: scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=case.dropout_p, enable_gqa=gqa
    )


def _mask(inputs: Inputs) -> Tensor | None:
    """Everything that changes scores in the one array that SDPA takes."""
    case = inputs.case
    _check(case)
    if inputs.additive is None or inputs.visible is None:
        return inputs.visible if inputs.additive is None else inputs.additive
    return inputs.additive.masked_fill(~inputs.visible, float("-inf"))


def _check(case: Case) -> None:
    per_head = case.seqlen_q * case.seqlen_k
    size = per_head * (case.nheads * ITEMSIZE[case.dtype] if case.bias == "full" or case.alibi else 1)
    if (case.causal or case.window or case.bias or case.alibi) and size > LIMIT_BYTES:
        raise Refused(f"its mask would take {size / 2**30:.1f} GiB")


def _gathered(inputs: Inputs, attend: Callable[..., Any]) -> Callable[[], Any]:
    """Pages are gathered at every call: SDPA has no block table."""
    case, (k_pages, v_pages) = inputs.case, inputs.pages
    q, table = inputs.heads_first("q"), inputs.block_table.long()

    def gather(pages: Tensor) -> Tensor:
        return pages[table].flatten(1, 2)[:, : case.seqlen_k].transpose(1, 2)

    return lambda: attend(q, gather(k_pages), gather(v_pages))
