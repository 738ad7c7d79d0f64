"""Jobs of ranks: short forms of other packages' code over several processes, with their calls of flash_attn.

Each job returns the largest differences of out, dq, dk and dv from flash_attn_func in one process.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from anyattn.compat.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    flash_attn_func,
    flash_attn_varlen_func,
)

Differences = tuple[float, ...]


def inputs(rows: int, *, packed: bool = False) -> list[Tensor]:
    """Return q, k, v and dout of the whole sequence: 4 query heads and 4 key heads, or 2 of packed documents."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(rows, 4, 16), (rows, 2 if packed else 4, 16), (rows, 2 if packed else 4, 16), (rows, 4, 16)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return found if packed else [x[None] for x in found]


def differences(
    got: list[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Any, **options: Any
) -> Differences:
    """Compare a rank's (out, dq, dk, dv) with the rows of one process's results."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    tables = [options.pop(name) for name in ("cu_seqlens", "max_seqlen") if name in options]
    if tables:
        out = flash_attn_varlen_func(*leaves, tables[0], tables[0], tables[1], tables[1], **options)
    else:
        out = flash_attn_func(*leaves, **options)
    want = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return tuple(float((x - y[rows]).abs().max()) for x, y in zip(got, want, strict=True))


def defaults(function: Any) -> dict[str, Any]:
    """Return the arguments of a function with None where it has no default, as ring-flash-attention makes them."""
    spec = inspect.getfullargspec(function)
    given = spec.defaults or ()
    found = dict(zip(spec.args, (None,) * (len(spec.args) - len(given)) + given, strict=True))
    return {**found, "softcap": 0.0}


def call(function: Any, **arguments: Any) -> Any:
    window = {"window_size_left": -1, "window_size_right": -1}
    return function(**{**defaults(function), "dropout_p": 0.0, "softmax_scale": 0.25, **window, **arguments})


class Ring:
    """Exchange with both neighbours, started before a step and completed after it."""

    sent = 0  # bytes

    def send(self, *tensors: Tensor) -> list[Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        self.sent += sum(x.nbytes for x in tensors)
        received = [torch.empty_like(x) for x in tensors]
        operations = [dist.P2POp(dist.isend, x.contiguous(), (rank + 1) % size) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, (rank - 1) % size) for x in received]
        self.works = dist.batch_isend_irecv(operations)
        return received

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def merged(out: Tensor | None, lse: Tensor | None, out_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """Return ring-flash-attention's merge of two results, with lse as (batch, rows, nheads, 1)."""
    lse_part = lse_part.transpose(-2, -1).unsqueeze(-1)
    if out is None or lse is None:
        return out_part, lse_part
    out = out - torch.sigmoid(lse_part - lse) * (out - out_part)
    return out, lse - torch.nn.functional.logsigmoid(lse - lse_part)


def ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of ring-flash-attention's causal ring: keyword calls and its merge."""
    keys, coming, out, lse, size = [k, v], [], None, None, dist.get_world_size()
    for step in range(size):
        if step + 1 < size:
            coming = ring.send(*keys)
        if step <= dist.get_rank():
            arguments = {"q": q, "k": keys[0], "v": keys[1], "causal": step == 0, "return_softmax": False}
            out_part, lse_part, _, _ = call(_flash_attn_forward, **arguments)
            out, lse = merged(out, lse, out_part, lse_part)
        if step + 1 < size:
            ring.wait()
            keys = coming
    assert out is not None and lse is not None
    return out.to(q.dtype), lse.squeeze(-1).transpose(1, 2)


def ring_backward(ring: Ring, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    """Return dq, dk and dv of the ring. The gradients of keys travel around the ring in float32 or float64."""
    keys, coming, size = [k, v], [], dist.get_world_size()
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, *sums = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for step in range(size):
        if step + 1 < size:
            coming = ring.send(*keys)
            ring.wait()
        buffers = [torch.empty_like(x) for x in (q, k, v)]
        if step <= dist.get_rank():
            arguments = {"dout": dout, "q": q, "k": keys[0], "v": keys[1], "out": out, "softmax_lse": lse}
            arguments |= dict(zip(("dq", "dk", "dv"), buffers, strict=True))
            call(_flash_attn_backward, **arguments, causal=step == 0, deterministic=False)
            dq, sums = dq + buffers[0], [x + y for x, y in zip(sums, buffers[1:], strict=True)]
        keys, sums = coming, ring.send(*sums)
        ring.wait()
    return [x.to(q.dtype) for x in (dq, *sums)]


def ring_flash_attention() -> Differences:
    """Run the ring of ring-flash-attention, forward and backward."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = inputs(6 * size)
    rows = (slice(None), slice(6 * rank, 6 * rank + 6))
    q, k, v, dout = (x[rows].contiguous() for x in whole)
    out, lse = ring_forward(Ring(), q, k, v)
    gradients = ring_backward(Ring(), dout, q, k, v, out, lse)
    return differences([out, *gradients], *whole, rows, softmax_scale=0.25, causal=True)


def ring_flash_attention_bytes(rows: int) -> tuple[int, int]:
    """Return the bytes that a rank of ring-flash-attention sends for bfloat16 tensors, forward and backward."""
    q, k, v, dout = (x[:, :rows].bfloat16() for x in inputs(rows))
    forward, backward = Ring(), Ring()
    out, lse = ring_forward(forward, q, k, v)
    ring_backward(backward, dout, q, k, v, out, lse)
    return forward.sent, backward.sent


def torch_bytes(rows: int) -> tuple[int, int]:
    """Return the bytes that a rank of PyTorch's ring sends for bfloat16 tensors, forward and backward.

    PyTorch's own functions run with the operator of CPU tensors, which its table of operators lacks.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as own

    sent, phase = [0, 0], 0
    gather, permute = own.ft_c.all_gather_single, own.ft_c.permute_tensor

    def all_gather(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent[phase] += x.nbytes * (dist.get_world_size() - 1)
        return gather(x, *arguments, **keywords)

    def permute_tensor(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent[phase] += x.nbytes
        return permute(x, *arguments, **keywords)

    q, k, v, dout = (x.transpose(1, 2).bfloat16() for x in inputs(rows))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own.ft_c, "all_gather_single", all_gather)
        patch.setattr(own.ft_c, "permute_tensor", permute_tensor)
        group: Any = dist.group.WORLD
        out, lse = own._templated_ring_attention(group, 2, flash, q, k, v, is_causal=True)
        phase = 1
        own._templated_ring_attention_backward(
            group, 2, lambda **given: flash_backward(**given, dropout_p=0.0), dout, "grad_out", q, k, v, out, lse,
            is_causal=True,
        )  # fmt: skip
    return sent[0], sent[1]


def llama3_varlen() -> Differences:
    """Run ring-flash-attention's llama3 form: packed documents, keys gathered one KV head at a time."""
    rank, size = dist.get_rank(), dist.get_world_size()
    table = torch.tensor([0, 5, 5 * size + 1, 6 * size], dtype=torch.int32)
    whole = inputs(6 * size, packed=True)
    rows = slice(6 * rank, 6 * rank + 6)
    q, k, v, dout = (x[rows].contiguous() for x in whole)
    left = int(torch.searchsorted(table, rows.start, right=True)) - 1
    right = int(torch.searchsorted(table, rows.stop))
    queries = (table[left : right + 1] - rows.start).clamp(0, 6)
    keys = table[left : right + 1].clamp(max=rows.stop) - table[left]
    part = slice(int(table[left]), rows.stop)
    lengths = {f"max_seqlen_{x}": int(t.diff().max()) for x, t in (("q", queries), ("k", keys))}
    tables = {"cu_seqlens_q": queries, "cu_seqlens_k": keys, **lengths, "causal": True}
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for head in range(2):
        heads = slice(2 * head, 2 * head + 2)
        gathered = torch.empty(2, 6 * size, 1, 16, dtype=q.dtype)
        for buffer, x in zip(gathered, (k, v), strict=True):
            dist.all_gather_into_tensor(buffer, x[:, head : head + 1].contiguous())
        given = {"q": q[:, heads], "k": gathered[0][part], "v": gathered[1][part], **tables}
        out[:, heads], lse, _, _ = call(_flash_attn_varlen_forward, **given, return_softmax=False)
        sums = torch.zeros_like(gathered)
        given |= {"dout": dout[:, heads], "out": out[:, heads], "softmax_lse": lse, "dq": dq[:, heads]}
        call(_flash_attn_varlen_backward, **given, dk=sums[0][part], dv=sums[1][part], deterministic=False)
        dist.all_reduce(sums)
        dk[:, head], dv[:, head] = sums[0][rows, 0], sums[1][rows, 0]
    return differences(
        [out, dq, dk, dv], *whole, rows, softmax_scale=0.25, causal=True, cu_seqlens=table, max_seqlen=6 * size
    )  # fmt: skip


def all_to_all(x: Tensor, scatter: int, gather: int) -> Tensor:
    """Divide one axis over the ranks and join another, as DeepSpeed's single_all_to_all does."""
    size = dist.get_world_size()
    sent = torch.stack(x.chunk(size, scatter)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat(list(received), gather)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, gather: int) -> Tensor:
        ctx.axes = scatter, gather
        return all_to_all(x, scatter, gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_to_all(gradient.contiguous(), *reversed(ctx.axes)), None, None


def deepspeed_ulysses() -> Differences:
    """Run DeepSpeed's DistributedAttention with flash_attn_func as the local attention, through autograd."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = inputs(6 * size)
    rows = (slice(None), slice(6 * rank, 6 * rank + 6))
    leaves = [x[rows].clone().requires_grad_() for x in whole[:3]]
    context = flash_attn_func(*(Exchange.apply(x, 2, 1) for x in leaves), 0.0, 0.25, True, (7, 0))
    out = Exchange.apply(context, 1, 2)
    grads = torch.autograd.grad(out, leaves, whole[3][rows])
    return differences([out.detach(), *grads], *whole, rows, softmax_scale=0.25, causal=True, window_size=(7, 0))


def yunchang_ulysses() -> Differences:
    """Run yunchang's Ulysses with its calls: forward with keywords, backward by position with buffers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = inputs(6 * size)
    rows = (slice(None), slice(6 * rank, 6 * rank + 6))
    q, k, v, dout = (all_to_all(x[rows], 2, 1) for x in whole)
    scores = {"dropout_p": 0.0, "softmax_scale": 0.25, "causal": True, "softcap": 1.5, "alibi_slopes": None}
    window = {"window_size_left": -1, "window_size_right": -1}
    out, lse, _, _ = _flash_attn_forward(q, k, v, **scores, **window, return_softmax=False)
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(dout, q, k, v, out, lse, *buffers, 0.0, 0.25, True, -1, -1, 1.5, None, False, None)
    got = [all_to_all(x, 1, 2) for x in (out, *buffers)]
    return differences(got, *whole, rows, softmax_scale=0.25, causal=True, softcap=1.5)


def torch_context_parallel(rows: int, causal: bool) -> Differences:
    """Run PyTorch's context_parallel on CPU tensors; rows: of the whole sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.functional import scaled_dot_product_attention

    from anyattn import distributed

    size = dist.get_world_size()
    whole = [x.transpose(1, 2).contiguous() for x in inputs(rows)]
    leaves = [x.clone().requires_grad_() for x in whole[:3]]
    want = scaled_dot_product_attention(*leaves, is_causal=causal)
    wanted = [want.detach(), *torch.autograd.grad(want, leaves, whole[3])]
    kind = distributed.Sharding.zigzag if rows % (2 * size) == 0 else distributed.Sharding.contiguous
    sharding = kind(rows, size)
    mesh, buffers = init_device_mesh("cpu", (size,)), [x.clone() for x in whole]
    blocks = context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4)
    with distributed.torch_context_parallel(), blocks:
        q, k, v = (x.clone().requires_grad_() for x in buffers[:3])
        from torch.nn import functional

        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        got = [out.detach(), *torch.autograd.grad(out, (q, k, v), buffers[3])]
    return tuple(float((x - distributed.shard(y, sharding, 2)).abs().max()) for x, y in zip(got, wanted, strict=True))
