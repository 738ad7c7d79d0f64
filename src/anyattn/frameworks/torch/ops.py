"""The operators `anyattn::forward` and `anyattn::backward`: schemas, kernels, fakes and flop formulas.

Dense, packed and paged calls are one operator. No argument is mutated: a mutated view made inside a graph is misplaced
by Inductor. Sizes and window bounds are SymInt, so that one graph serves every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...definition.problem import INPUTS, SAVED, Options, make_problem
from ...runtime import execute
from .adapter import adapter, rows

DEVICES = ("CPU", "CUDA", "XPU", "MPS")  # dispatch keys of the kernels; which backend computes is decided below them
Arrays = tuple[Any, ...]  # Tensor or None, in the order of INPUTS

_OPTIONAL = ", ".join(f"Tensor? {name}{{0}}" for name in INPUTS[3:])
_SCALARS = (
    "float? scale=None, float softcap=0.0, SymInt? left=None, SymInt? right=None, SymInt chunk=0, "
    'str alignment="bottom-right", float dropout_p=0.0, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, '
    'bool deterministic=False, bool batch_invariant=False, str backend=""'
)
_DEFAULTS = (*[None] * len(INPUTS[3:]), *Options(), "")  # of what follows q, k, v in the schema of forward

library = torch.library.Library("anyattn", "DEF")
library.define(
    f"forward(Tensor q, Tensor k, Tensor v, {_OPTIONAL.format('=None')}, {_SCALARS}) -> (Tensor out, Tensor lse)"
)
library.define(
    f"backward(Tensor dout, Tensor q, Tensor k, Tensor v, {_OPTIONAL.format('')}, Tensor out, Tensor lse, "
    f"Tensor? dlse=None, {_SCALARS}, bool want_dbias=True, bool want_dsink=True) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)"
)


def contiguous_rows(arrays: Arrays, names: Sequence[str] = INPUTS) -> Arrays:
    """The arrays with contiguous last dimensions: themselves, but for the one kind of copy that is allowed."""
    return tuple([None if x is None else rows(name, x) for name, x in zip(names, arrays, strict=True)])


def forward_arguments(arguments: Sequence[Any]) -> tuple[Arrays, Options, str]:
    """(arrays, options, backend) of a call of `forward`; the dispatcher strips trailing defaults."""
    full = (*arguments, *_DEFAULTS[len(arguments) - 3 :])
    return full[:16], Options(*full[16:-1]), full[-1]


def backward_arguments(arguments: Sequence[Any]) -> tuple[Arrays, Arrays, Options, str, bool, bool]:
    """(saved, arrays, options, backend, want_dbias, want_dsink) of a call of `backward`."""
    defaults = (None, *Options(), "", True, True)  # from dlse on
    full = (*arguments, *defaults[len(arguments) - 19 :])
    dout, arrays, (out, lse, dlse), scalars = full[0], full[1:17], full[17:20], full[20:]
    return (out, lse, dout, dlse), arrays, Options(*scalars[:-3]), scalars[-3], scalars[-2], scalars[-1]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    arrays, options, backend = forward_arguments(arguments)
    return execute.forward(adapter, contiguous_rows(arrays), options, backend)


def _backward(*arguments: Any) -> Arrays:
    """Absent gradients are empty tensors here: a schema's results are always there."""
    saved, arrays, options, backend, want_dbias, want_dsink = backward_arguments(arguments)
    saved, arrays = contiguous_rows(saved, SAVED), contiguous_rows(arrays)
    wanted = {"want_dbias": want_dbias, "want_dsink": want_dsink}
    results = execute.backward(adapter, saved, arrays, options, backend, **wanted)
    return tuple(arguments[0].new_empty(0) if x is None else x for x in results)


@torch.library.register_fake("anyattn::forward", lib=library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    arrays, options, _ = forward_arguments(arguments)
    for name, x in zip(INPUTS, arrays, strict=True):
        if x is not None and x.device != arrays[0].device:
            raise ValueError(f"{name} is on {x.device} but q is on {arrays[0].device}")
    if arrays[0].is_meta and not any(isinstance(n, torch.SymInt) for x in arrays if x is not None for n in x.shape):
        given = zip(INPUTS, arrays, strict=True)  # nothing behind this one would refuse them
        make_problem({name: adapter.describe(x) for name, x in given if x is not None}, options)
    q, v, packed = arrays[0], arrays[2], arrays[7] is not None
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape, dtype=wide)


@torch.library.register_fake("anyattn::backward", lib=library)
def _fake_backward(*arguments: Any) -> Arrays:
    _, (q, k, v, bias, _, _, sink, *_), _, _, want_dbias, want_dsink = backward_arguments(arguments)
    wanted = (q, k, v, bias if want_dbias else None, sink if want_dsink else None)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _score_elements(shapes: Sequence[Any]) -> Any:
    """Entries of the score matrices of all heads, as if dense; packed sequences count as equally long."""
    given = dict(zip(INPUTS, shapes, strict=True))
    q, k, cu_seqlens_q, pages = given["q"], given["k"], given["cu_seqlens_q"], given["block_table"]
    batch, rows = (q[0], q[0] * q[1]) if cu_seqlens_q is None else (cu_seqlens_q[0] - 1, q[0])
    keys = k[1] if pages is None else pages[1] * k[1]
    if given["cu_seqlens_k"] is not None:
        keys = k[0] // max(batch, 1)
    return rows * q[-2] * keys


@register_flop_formula(torch.ops.anyattn.forward)
def _forward_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    shapes, _, _ = forward_arguments(arguments)
    return 2 * _score_elements(shapes) * (shapes[0][-1] + shapes[2][-1])


@register_flop_formula(torch.ops.anyattn.backward)
def _backward_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    shapes = backward_arguments(arguments)[1]
    return 2 * _score_elements(shapes) * (3 * shapes[0][-1] + 2 * shapes[2][-1])


for _key in DEVICES:
    library.impl("forward", _forward, _key)
    library.impl("backward", _backward, _key)

forward = torch.ops.anyattn.forward.default
backward = torch.ops.anyattn.backward.default
