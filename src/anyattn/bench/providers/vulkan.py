"""Vulkan, ours and aule-attention's, on the device that ANYATTN_VULKAN_DEVICE names or else the best; suite `vulkan`.

A software driver is taken too: what it says about GPUs is little, but both compute on the same one.
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
    """Our Vulkan backend, from tensors in host memory."""

    name = "anyattn Vulkan"
    backend = "vulkan"

    def absent(self) -> str | None:
        from ...runtime import dispatch

        return dispatch.get("vulkan").available(named=True)

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        """The device has its own threads."""
        return super().prepare(inputs, threads) if inputs.case.suite == SUITE else None


class Aule:
    """Its forward pass as its `flash_attention` calls it; its backward pass is in a module of its own."""

    name = "aule-attention Vulkan"
    package = "aule-attention"

    def absent(self) -> str | None:
        return installed("aule") and "not installed: pip install aule-attention==0.5.0"

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        case = inputs.case
        if case.suite != SUITE:
            return None
        refuse(
            case,
            packed_sequences=case.packed,
            KV_cache=case.cache or case.page_size,
            causal_mask_from_the_bottom_right=case.causal and case.seqlen_q != case.seqlen_k,
            window=case.window,
            softcap=case.softcap,
            bias=case.bias,
            mask=case.mask,
            ALiBi=case.alibi,
            sink=case.sink,
            dropout=case.dropout_p,
            **{case.dtype: case.dtype != "float32"},
        )
        if max(case.head_dim, case.head_dim_v) > MAX_HEAD_DIM or case.head_dim != case.head_dim_v:
            raise Refused(f"no head_dim above {MAX_HEAD_DIM}, and head_dim_v is head_dim")
        if case.backward and case.group > 1:
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

    case = inputs.case
    q, k, v = (inputs.heads_first(name).contiguous().numpy() for name in ("q", "k", "v"))

    def results(returned: Any) -> list[Tensor]:
        arrays = returned if isinstance(returned, tuple) else (returned,)
        return [torch.from_numpy(x).transpose(1, 2) for x in arrays]

    device = vulkan.Aule()
    if not case.backward:
        return Prepared(lambda: device.attention(q, k, v, causal=case.causal), results)
    if not device.supports_backward:
        raise Refused("no backward on this device")
    dout = inputs.dout.transpose(1, 2).contiguous().numpy()
    out, lse = device.attention_forward_with_lse(q, k, v, causal=case.causal)
    return Prepared(lambda: device.attention_backward(q, k, v, out, dout, lse, causal=case.causal), results)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the package prints and what its library writes to standard error, at every call."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
