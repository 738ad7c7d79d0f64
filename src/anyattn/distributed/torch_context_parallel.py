"""PyTorch's own context_parallel for tensors on a CPU, where PyTorch has no operator for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .api import attention, plain_backward

_SEQUENCE = 2  # dimension of the sequence in (batch, nheads, rows, head_dim)


@contextmanager
def torch_context_parallel() -> Iterator[None]:
    """Let `torch.distributed.tensor.experimental.context_parallel` compute on CPU tensors in the block.

    PyTorch replaces three GPU operators there, and raises an error for the operator of CPU tensors. In the block that
    operator runs the ring of `anyattn.distributed.attention`, forward and backward, with PyTorch's division of the
    sequence. Dropout and masks other than causal are not available, as in PyTorch.
    `anyattn.distributed.context_parallel` has no such limits.

    Raises:
        NotImplementedError: this version of PyTorch has no table of operators for context_parallel.

    >>> from torch.distributed.tensor.experimental import context_parallel
    >>> import torch, anyattn.distributed as ad
    >>> _ = torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    >>> mesh, x = torch.distributed.init_device_mesh("cpu", (1,)), torch.ones(1, 2, 8, 16)
    >>> with ad.torch_context_parallel(), context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
    ...     torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([1, 2, 8, 16])
    >>> torch.distributed.destroy_process_group()
    """
    table, _ = _hooks()
    handlers = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _backward,
    }
    table.update(handlers)
    try:
        yield
    finally:
        for operator in handlers:
            table.pop(operator, None)


def _hooks() -> tuple[dict[Any, Any], Any]:
    """Return PyTorch's table of operators for context_parallel and its options."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        return _attention.custom_ops, _attention._cp_options
    except (ImportError, AttributeError):
        raise NotImplementedError(
            f"torch must have operators for context_parallel that can be replaced, as 2.13 has, got "
            f"{torch.__version__}. Use anyattn.distributed.context_parallel."
        ) from None


def _forward(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    """Compute (out, lse) as DTensors. PyTorch calls it with query, key, value, dropout_p and is_causal."""
    q, k, v = arguments[:3]
    options = _options(q, *arguments[3:], **keywords)
    out, lse = attention(*_rows(q, k, v), return_lse=True, schedule="ring", **options)
    return _wrapped(out.transpose(1, 2), q), _wrapped(lse, q)


def _backward(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """Compute the gradients of query, key and value as DTensors."""
    q, lse = arguments[1], arguments[5].to_local()
    options = _options(q, *arguments[6:], **keywords)
    dout, q_rows, k_rows, v_rows, out = _rows(*arguments[:5])
    grads = plain_backward(dout, q_rows, k_rows, v_rows, out, lse, **options)
    return tuple(_wrapped(x.transpose(1, 2), q) for x in grads[:3])


def _options(
    q: Any, dropout_p: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None, scale: float | None = None
) -> dict[str, Any]:
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask must be None in PyTorch's context_parallel, got a tensor. "
            "Use anyattn.distributed.context_parallel."
        )
    if q.device_mesh.ndim != 1 or not q.placements[0].is_shard(_SEQUENCE):
        raise NotImplementedError(
            f"query must be divided along its sequence over a mesh with one dimension, got {q.placements}."
        )
    _, torch_options = _hooks()
    balanced = torch_options.enable_load_balance and q.device_mesh.size() > 1
    options = {"causal": is_causal, "alignment": "top-left", "scale": scale, "dropout_p": dropout_p}
    return {**options, "group": q.device_mesh, "sharding": "zigzag" if balanced else "contiguous"}


def _rows(*tensors: Any) -> list[Tensor]:
    """Return this rank's tensors as (batch, rows, nheads, head_dim)."""
    return [x.to_local().transpose(1, 2) for x in tensors]


def _wrapped(local: Tensor, like: Any) -> Any:
    """Return a DTensor of this rank's rows, divided like another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)
