"""JAX on the CPU: jax.nn.dot_product_attention as XLA compiles it, and anyattn inside the same programs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..inputs import Inputs
from ..workloads import Workload
from .base import LIMIT_BYTES, Prepared, Refused, installed, refuse

if TYPE_CHECKING:
    from torch import Tensor


class JaxNn:
    """jax.nn.dot_product_attention in a compiled program, with a dense mask where it has no argument for one."""

    name = "jax.nn"
    package = "jax"

    def absent(self) -> str | None:
        return installed("jax")

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        workload = inputs.workload
        _check(workload, threads)
        refuse(
            workload, softcap=workload.softcap, sink=workload.sink, head_dim_v=workload.head_dim != workload.head_dim_v,
            float16_on_the_CPU=workload.dtype == "float16",
        )  # fmt: skip
        if workload.matrix_bytes > LIMIT_BYTES:
            raise Refused(f"its matrix of scores would take {workload.matrix_bytes / 2**30:.1f} GiB")
        return _program(inputs, *self._call(inputs))

    def _call(self, inputs: Inputs) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return a function of q, k, v and other arrays, and these other arrays."""
        import jax

        workload = inputs.workload
        square = workload.seqlen_q == workload.seqlen_k
        if workload.causal and square and not (workload.window or workload.bias or workload.mask or workload.alibi):
            return functools.partial(jax.nn.dot_product_attention, is_causal=True), {}
        return jax.nn.dot_product_attention, {"bias": inputs.additive, "mask": inputs.visible}


class AnyattnJax(JaxNn):
    """`anyattn.attention` of JAX arrays in a compiled program."""

    name = "anyattn JAX"

    def prepare(self, inputs: Inputs, threads: int) -> Prepared | None:
        _check(inputs.workload, threads)
        return _program(inputs, *self._call(inputs))

    def _call(self, inputs: Inputs) -> tuple[Callable[..., Any], dict[str, Any]]:
        from ... import attention

        workload = inputs.workload
        options = {"causal": workload.causal, "window": workload.window, "softcap": workload.softcap}
        others = {name: getattr(inputs, name) for name in ("bias", "mask", "alibi_slopes", "sink")}
        return functools.partial(attention, **options), others


def _check(workload: Workload, threads: int) -> None:
    refuse(
        workload, packed_sequences=workload.packed, KV_cache=workload.cache, pages=workload.page_size,
        dropout=workload.dropout_p,
    )  # fmt: skip
    if threads != processors():
        raise Refused(f"XLA computes on all {processors()} processors, not on {threads}")


def processors() -> int:
    """Return the number of processors that XLA uses."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _program(inputs: Inputs, attend: Callable[..., Any], others: dict[str, Any]) -> Prepared:
    """Prepare the compiled forward pass, or the gradients from a saved forward pass."""
    import jax

    arrays = [_given(x) for x in (inputs.q, inputs.k, inputs.v)]
    given = {name: _given(x) for name, x in others.items() if x is not None}
    if not inputs.workload.backward:
        forward = jax.jit(attend)
        return Prepared(lambda: jax.block_until_ready(forward(*arrays, **given)), lambda out: [_back(out)])
    _, pull = jax.jit(lambda arrays, given: jax.vjp(lambda *xs: attend(*xs, **given), *arrays))(arrays, given)
    gradients, dout = jax.jit(lambda pull, dout: pull(dout)), _given(inputs.dout)
    return Prepared(lambda: jax.block_until_ready(gradients(pull, dout)), lambda grads: [_back(x) for x in grads])


def _given(x: Tensor | None) -> Any:
    """Return a copy of a tensor as a JAX array."""
    import jax.numpy as jnp
    import torch

    if x is None:
        return None
    if x.dtype is torch.bfloat16:
        return jnp.asarray(x.contiguous().view(torch.uint16).numpy()).view(jnp.bfloat16)
    return jnp.array(x.numpy())


def _back(x: Any) -> Tensor:
    """Return a JAX array as a tensor."""
    import numpy as np
    import torch

    values = np.asarray(x)
    if values.dtype.name != "bfloat16":
        return torch.from_numpy(values.copy())
    return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
