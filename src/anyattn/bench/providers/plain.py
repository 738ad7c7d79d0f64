"""softmax(QK^T)V as in the formula, with the full matrix of scores in memory, in torch and in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..inputs import Inputs
from ..workloads import Workload
from .base import LIMIT_BYTES, Prepared, Refused, differentiate, installed, per_sequence, refuse, swapped

if TYPE_CHECKING:
    from torch import Tensor


class TorchPlain:
    """Plain formula in torch, with autograd."""

    name = "softmax(QK^T)V"
    package = "torch"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared:
        _check(inputs.workload)
        return per_sequence(inputs, self._dense) if inputs.workload.packed else self._dense(inputs)

    def _dense(self, inputs: Inputs) -> Prepared:
        arrays = [inputs.heads_first(name) for name in ("q", "k", "v")]
        masked = None if inputs.visible is None else ~inputs.visible

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _torch(inputs, q, k, v, masked)

        if inputs.workload.backward:
            return Prepared(differentiate(arrays, attend, inputs.heads_first("dout")), swapped)
        return Prepared(lambda: attend(*arrays), lambda out: swapped([out]))


def _torch(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None) -> Tensor:
    import torch

    workload = inputs.workload
    if workload.group > 1:
        k, v = (x.repeat_interleave(workload.group, dim=1) for x in (k, v))
    s = (q * workload.head_dim**-0.5) @ k.transpose(-1, -2)
    if workload.softcap:
        s = workload.softcap * torch.tanh(s / workload.softcap)
    if inputs.additive is not None:
        s = s + inputs.additive
    if masked is not None:
        s = s.masked_fill(masked, -torch.inf)
    if inputs.sink is not None:
        logit = inputs.sink.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, logit], dim=-1)
    p = s.softmax(-1)
    out: Tensor = (p if inputs.sink is None else p[..., :-1]) @ v
    return out


class NumpyPlain:
    """Plain formula in NumPy, float32, forward."""

    name = "NumPy"
    package = "numpy"

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared:
        workload = inputs.workload
        _check(workload)
        refuse(workload, backward=workload.backward, **{workload.dtype: workload.dtype != "float32"})
        _limit_threads(threads)
        return per_sequence(inputs, self._dense) if workload.packed else self._dense(inputs)

    def _dense(self, inputs: Inputs) -> Prepared:
        import torch

        workload = inputs.workload
        q, k, v = (inputs.heads_first(name).numpy() for name in ("q", "k", "v"))
        # The query heads of a KV head are the rows of one product.
        rows = (workload.batch, workload.nheads_kv, workload.group * workload.seqlen_q)
        q = q.reshape(*rows, workload.head_dim)
        additive = None if inputs.additive is None else inputs.additive.numpy()
        masked = None if inputs.visible is None else ~inputs.visible.numpy()
        sink = None if inputs.sink is None else inputs.sink.numpy()[:, None, None]
        whole = (workload.batch, workload.nheads, workload.seqlen_q, workload.seqlen_k)

        def run() -> Any:
            s = np.matmul(q * np.float32(workload.head_dim**-0.5), k.swapaxes(-1, -2)).reshape(whole)
            if workload.softcap:
                s = np.float32(workload.softcap) * np.tanh(s / np.float32(workload.softcap))
            if additive is not None:
                s += additive
            if masked is not None:
                np.copyto(s, -np.inf, where=masked)
            top = s.max(axis=-1, keepdims=True)
            top = top if sink is None else np.maximum(top, sink)
            s -= top
            np.exp(s, out=s)
            total = s.sum(axis=-1, keepdims=True)
            s /= total if sink is None else total + np.exp(sink - top)
            return np.matmul(s.reshape(*rows, workload.seqlen_k), v)

        def results(out: Any) -> list[Tensor]:
            return swapped([torch.from_numpy(out.reshape(*whole[:3], workload.head_dim_v))])

        return Prepared(run, results)


def _limit_threads(threads: int) -> None:
    """Limit the threads of NumPy's matrix products, which use all cores otherwise."""
    import os

    if not installed("threadpoolctl"):
        from threadpoolctl import ThreadpoolController

        ThreadpoolController().select(internal_api="openblas").limit(limits=threads)
    elif threads != os.cpu_count():
        raise Refused(f"cannot limit it to {threads} threads: pip install threadpoolctl")


def _check(workload: Workload) -> None:
    refuse(workload, dropout_here=workload.dropout_p, pages=workload.page_size)
    if workload.matrix_bytes > LIMIT_BYTES:
        raise Refused(f"its matrix of scores would take {workload.matrix_bytes / 2**30:.1f} GiB")
