"""anyattn as a provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..inputs import SEED, Inputs
from .base import Prepared, differentiate

if TYPE_CHECKING:
    from torch import Tensor


class Anyattn:
    """Provider of the public functions on torch tensors: `attention`, `attention_varlen`, `attention_with_kvcache`."""

    name = "anyattn"
    package = "anyattn"
    backend: str | None = None  # name of a backend; None: automatic choice

    def absent(self) -> str | None:
        return None

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        """Return the call. `threads` is already active, because the backend follows the settings and torch."""
        workload = inputs.workload
        if workload.cache:
            return Prepared(self._cached(inputs), lambda out: [out])
        if not workload.backward:
            arrays = (inputs.q, inputs.k, inputs.v)
            return Prepared(lambda: self.attend(inputs, *arrays), lambda out: [out])
        run = differentiate([inputs.q, inputs.k, inputs.v], lambda *arrays: self.attend(inputs, *arrays), inputs.dout)
        return Prepared(run, list)

    def attend(self, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from ... import attention, attention_varlen

        workload, options = inputs.workload, _options(inputs, self.backend)
        if workload.dropout_p:
            options |= {"dropout_p": workload.dropout_p, "seed": SEED}
        if workload.packed:
            longest = workload.seqlen_q
            return attention_varlen(q, k, v, inputs.cu_seqlens, inputs.cu_seqlens, longest, longest, **options)
        return attention(q, k, v, **options)

    def _cached(self, inputs: Inputs) -> Any:
        import torch

        from ... import attention_with_kvcache

        workload, options = inputs.workload, _options(inputs, self.backend)
        arrays = inputs.pages if workload.page_size else {"k": inputs.k, "v": inputs.v, **inputs.scales}
        k, v = arrays["k"], arrays["v"]
        options |= {name: arrays[name] for name in inputs.scales}  # in pages like k and v
        options["block_table"] = inputs.block_table if workload.page_size else None
        options["cache_seqlens"] = torch.full((workload.batch,), workload.seqlen_k, dtype=torch.int32)
        return lambda: attention_with_kvcache(inputs.q, k, v, **options)


def _options(inputs: Inputs, backend: str | None) -> dict[str, Any]:
    """Return the options of the workload. Unused options are left out, as in a user's call."""
    workload = inputs.workload
    given = {
        "causal": workload.causal or None,
        "window": workload.window,
        "softcap": workload.softcap or None,
        "bias": inputs.bias,
        "mask": inputs.mask,
        "alibi_slopes": inputs.alibi_slopes,
        "sink": inputs.sink,
        **inputs.scales,
        "backend": backend,
    }
    return {name: value for name, value in given.items() if value is not None}
