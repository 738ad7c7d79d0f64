"""Conversion of the scalars of a call, which may be Python or NumPy numbers, arrays or tensors.

Each becomes a plain Python value because scalars are part of the key of cached plans. Tensors do not compare equal by
value, and their values may change.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from .frameworks import is_jax

_ACCEPTED = "Pass a number of Python or NumPy, or an array or a tensor of one element."


def real(name: str, value: Any) -> float:
    """Return a real number as a float.

    Raises:
        TypeError: it is no real number, or a tensor that requires a gradient.
    """
    if type(value) is float or _is_symbolic(value):
        return value  # type: ignore[no-any-return]
    found = _element(name, value)
    if not isinstance(found, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a real number, got {value!r}. {_ACCEPTED}")
    try:
        return float(found)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value!r}.") from None


def integer(name: str, value: Any) -> int:
    """Return an integer as an int. Raises TypeError for anything else, floating-point numbers included."""
    if type(value) is int or _is_symbolic(value):
        return value  # type: ignore[no-any-return]
    found = _element(name, value)
    if not isinstance(found, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {value!r}. {_ACCEPTED}")
    return int(found)


def flag(name: str, value: Any) -> bool:
    """Return a truth value, which an integer may stand for, as a bool. Raises TypeError for anything else."""
    if value is True or value is False:
        return value
    found = _element(name, value)
    if not isinstance(found, (int, numbers.Integral)):  # "False" would be true
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(found)


def _is_symbolic(value: Any) -> bool:
    """Return whether torch.export stands for the number by a symbol."""
    return type(value).__name__ in ("SymInt", "SymFloat")


def _element(name: str, value: Any) -> Any:
    """Return the number in an array or a tensor of one element; anything else as it is."""
    if hasattr(type(value), "__torch_function__"):
        from .frameworks.torch.scalars import element

        return element(name, value)
    if is_jax(value, with_values=True):
        value = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.size == 1:
        if value.dtype.kind in "biuf":
            return value.item()
        if value.dtype.name == "bfloat16":
            return float(value.item())
    return value
