"""Vulkan backends of anyattn and of aule-attention, for the suite `vulkan`.

They use the device of ANYATTN_VULKAN_DEVICE or the best one. A software driver is used too. It says little about GPUs,
but both libraries compute on the same driver.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inputs import Inputs
from .anyattn import Anyattn
from .base import Prepared, Refused, installed, refuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SUITE = "vulkan"
MAX_HEAD_DIM = 64


class AnyattnVulkan(Anyattn):
    """anyattn's Vulkan backend, with tensors in host memory."""

    name = "anyattn Vulkan"
    backend = "vulkan"

    def absent(self) -> str | None:
        from ...runtime import dispatch

        return dispatch.get("vulkan").available(named=True)

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        """Return the call. `threads` is not used, because the device has its own."""
        return super().prepare(inputs, threads) if inputs.workload.suite == SUITE else None


class Aule:
    """aule-attention, with the forward pass of its `flash_attention` and the backward pass of a separate module."""

    name = "aule-attention Vulkan"
    package = "aule-attention"

    def absent(self) -> str | None:
        return installed("aule") and "not installed: pip install aule-attention==0.5.0"

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        if workload.suite != SUITE:
            return None
        refuse(
            workload,
            packed_sequences=workload.packed,
            KV_cache=workload.cache or workload.page_size,
            causal_mask_from_the_bottom_right=workload.causal and workload.seqlen_q != workload.seqlen_k,
            window=workload.window,
            softcap=workload.softcap,
            bias=workload.bias,
            mask=workload.mask,
            ALiBi=workload.alibi,
            sink=workload.sink,
            dropout=workload.dropout_p,
            **{workload.dtype: workload.dtype != "float32"},
        )
        if max(workload.head_dim, workload.head_dim_v) > MAX_HEAD_DIM or workload.head_dim != workload.head_dim_v:
            raise Refused(f"no head_dim above {MAX_HEAD_DIM}, and head_dim_v is head_dim")
        if workload.backward and workload.group > 1:
            raise Refused("no backward with grouped heads")
        with _silent():
            prepared = _prepare(inputs)

        def run() -> Any:
            with _silent():
                return prepared.run()

        return Prepared(run, prepared.results)


def _prepare(inputs: Inputs) -> Prepared:
    import torch
    from aule import vulkan

    workload = inputs.workload
    q, k, v = (inputs.heads_first(name).contiguous().numpy() for name in ("q", "k", "v"))

    def results(returned: Any) -> list[Tensor]:
        arrays = returned if isinstance(returned, tuple) else (returned,)
        return [torch.from_numpy(x).transpose(1, 2) for x in arrays]

    device = vulkan.Aule()
    if not workload.backward:
        return Prepared(lambda: device.attention(q, k, v, causal=workload.causal), results)
    if not device.supports_backward:
        raise Refused("no backward on this device")
    dout = inputs.dout.transpose(1, 2).contiguous().numpy()
    out, lse = device.attention_forward_with_lse(q, k, v, causal=workload.causal)
    return Prepared(lambda: device.attention_backward(q, k, v, out, dout, lse, causal=workload.causal), results)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what the package prints and what its library writes to standard error at every call."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
