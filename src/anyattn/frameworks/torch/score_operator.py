"""Operator of attention with score functions in graphs of torch.compile.

Dynamo cannot trace a call that passes symbols to a Python function. It can trace the function itself, with a tensor of
one number for the score and for each index, and it makes the tensors that the function reads inputs of the graph. It
does so for operators named "flex_attention" that take the arguments of torch's own.

The operator is not lowered. Where the graph runs or is traced further, the operator calls the functions, which are
graphs then, with symbols, and computes attention as a call without torch.compile does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from ...config import package
from ...definition.inputs import Extras, Inputs, make_inputs
from ...definition.options import Options
from . import fastpath

Function = Callable[..., Any]
Compute = Callable[[Inputs, Options, tuple[Any, Any], bool, str | None], tuple[Tensor, Tensor]]


class Operator(HigherOrderOperator):
    """Attention with the arguments of torch's flex_attention.

    compute: returns (out, lse) of inputs, options, (score_mod, mask_mod), return_lse and a backend.
    """

    def __init__(self, compute: Compute) -> None:
        super().__init__(f"{package.NAME.replace('.', '_')}_attention")
        self.__name__, self.__module__ = "flex_attention", __name__
        self._compute = compute

    def __call__(
        self,
        like: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Function,
        given: tuple[Any, ...],
        scale: None,
        kernel_options: None,
        score_arrays: Sequence[Any] = (),
        mask_arrays: Sequence[Any] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return out, and lse with its last two axes exchanged: they have the axes of `like`, and all but its last."""
        query, has_score, has_mask, return_lse, backend, *fields, mask_mod = given
        extras, options = fields[: len(Extras._fields)], fields[len(Extras._fields) :]
        functions = (
            _bound(score_mod, score_arrays) if has_score else None,
            _bound(mask_mod, mask_arrays) if has_mask else None,
        )
        inputs = make_inputs(query, key, value, *extras)
        out, lse = self._compute(inputs, Options(*options), functions, return_lse, backend)
        return out, lse.transpose(-1, -2).contiguous()


def attention(
    operator: Operator,
    inputs: Inputs,
    options: Options,
    functions: tuple[Any, Any],
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of prepared inputs with (score_mod, mask_mod), as one operator of the graph."""
    q, k, v, extras = inputs
    score_mod, mask_mod = functions
    like = q.new_empty(()).expand(*q.shape[:-1], v.shape[-1])  # torch 2.6 takes the shape of out from an argument
    given = (q, score_mod is not None, mask_mod is not None, return_lse, backend, *extras, *options)
    score_mod = _unchanged if score_mod is None else score_mod
    mask_mod = _everything if mask_mod is None else mask_mod
    call = fastpath.outside_graphs(operator)
    out, lse = call(like, k, v, score_mod, (*given, mask_mod), None, None)
    return out, lse.transpose(-1, -2).contiguous()


def _bound(function: Function, arrays: Sequence[Any]) -> Function:
    """Return the function of the score and the indices. Numbers that torch.compile traces as symbols become fixed."""
    values = [_fixed(x) for x in arrays]
    return lambda *pair: function(*pair, *values)


def _fixed(x: Any) -> Any:
    numbers: dict[Any, Any] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return numbers[type(x)](x) if type(x) in numbers else x


def _unchanged(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score


def _everything(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return b >= 0
