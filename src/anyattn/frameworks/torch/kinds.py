"""Kinds of tensors: those whose memory holds their values, and those that are refused because they mean more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
_Base: Any = Tensor
_OWN_FUNCTIONS = (_Base.__torch_function__.__func__, torch._C._disabled_torch_function_impl)


def dense(name: str, array: Any) -> Tensor:
    """Return a tensor whose values can be read directly.

    Subclasses that only carry a label are read as tensors. Subclasses with a `__torch_dispatch__`, such as DTensor and
    FakeTensor, are handled by the operators.

    Raises:
        TypeError: not a tensor; a nested or a sparse tensor; or a subclass with its own `__torch_function__`. A mask
            object such as torch's CausalBias holds no values that could be read.
    """
    if type(array) in PLAIN and array.layout is torch.strided and not array.is_nested:  # most common
        return array  # type: ignore[no-any-return]
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor like q, got {type(array).__name__}. Use one framework.")
    if type(array) not in PLAIN:
        _check_subclass(name, array)
    if array.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one. "
            "Use anyattn.sdpa, or anyattn.attention_varlen on its values and offsets."
        )
    if array.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}. Pass {name}.to_dense().")
    return array


def causal_bias(mask: Tensor) -> Any:
    """Return the mask if it is a torch.nn.attention.bias.CausalBias, a triangle without values, else None."""
    named = type(mask).__name__ == "CausalBias" and hasattr(mask, "variant")
    return mask if named else None


def _check_subclass(name: str, x: Tensor) -> None:
    kind: Any = type(x)
    functions = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    if functions in _OWN_FUNCTIONS or kind.__torch_dispatch__ is not _Base.__torch_dispatch__:
        return
    hint = "Pass causal=True with an alignment" if causal_bias(x) is not None else "Pass its values as a torch.Tensor"
    raise TypeError(
        f"{name} must be a tensor whose values can be read, got {kind.__name__}, which defines its own meaning. {hint}."
    )
