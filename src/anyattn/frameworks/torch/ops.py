"""The operators of all passes, `anyattn::forward` and others: schemas, kernels, fakes and flop formulas.

Dense, packed and paged calls use one operator. Arrays come in the order of the pass's inputs, then the options, so the
schemas follow from the definition. No argument is mutated, because Inductor misplaces a mutated view that was made
inside a graph. Sizes and window bounds are SymInt, so that one graph serves every length.
"""

from __future__ import annotations

import operator
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...config import package
from ...definition.inputs import (
    GRADIENTS,
    NO_EXTRAS,
    Extras,
    Gradients,
    Inputs,
    Saved,
    SecondGradients,
    Tangents,
    flatten,
    make_inputs,
)
from ...definition.options import Options
from ...definition.passes import BACKWARD, FORWARD, FORWARD_TANGENT, SECOND, TANGENT, Pass
from ...definition.problem import described
from ...definition.validate import make_problem
from ...runtime import execute
from .adapter import adapter, to_unit_stride

DEVICES = ("CPU", "CUDA", "XPU", "MPS")  # dispatch keys of the kernels; the backend is chosen inside the kernel
_TYPES = {
    "float": "Scalar",
    "int": "SymInt",
    "str": "str",
    "bool": "bool",
}  # type in Python -> in a schema; may be symbols
_OPTIONAL = ("dlse", *Tangents._fields, *Extras._fields)
_WANTS = tuple(f"want_d{name}" for name in GRADIENTS)  # flags for the gradients of optional arrays


def schema(pass_: Pass, flags: Sequence[str] = ()) -> str:
    """Return the schema of a pass's operator: its arrays, the options, the backend, and boolean flags."""
    arrays = [f"Tensor? {name}=None" if name in _OPTIONAL else f"Tensor {name}" for name in pass_.inputs]
    scalars = [
        f"{_schema_type(kind)} {name}={_literal(Options._field_defaults[name])}"
        for name, kind in Options.__annotations__.items()
    ]
    flags = [f"bool {name}=True" for name in flags]
    results = ", ".join(f"Tensor {name}" for name in pass_.outputs)
    return f"{pass_}({', '.join([*arrays, *scalars, 'str backend=' + _literal(''), *flags])}) -> ({results})"


def _schema_type(annotation: Any) -> str:
    """Return the schema type of an annotation, for example "float?" for "float | None"."""
    kind, _, optional = getattr(annotation, "__forward_arg__", annotation).partition(" | ")
    return _TYPES[kind] + ("?" if optional else "")


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _arguments(fields: Sequence[str], defaults: Sequence[Any]) -> Any:
    """Return a NamedTuple type for an operator's arguments. The dispatcher removes trailing defaults."""
    return namedtuple("Arguments", fields, defaults=defaults)


NAMESPACE = package.NAME.replace(".", "_")  # "anyattn"; a vendored copy in the process has its own
library = torch.library.Library(NAMESPACE, "DEF")
library.define(schema(FORWARD))
library.define(schema(BACKWARD, _WANTS))
library.define(schema(TANGENT))
library.define(schema(SECOND))
library.define(schema(FORWARD_TANGENT))
operators = getattr(torch.ops, NAMESPACE)

_SCALARS = (*Options._fields, "backend")
_Forward = _arguments((*FORWARD.inputs, *_SCALARS), (*NO_EXTRAS, *Options(), ""))
_Backward = _arguments(
    (*BACKWARD.inputs, *_SCALARS, *_WANTS), (None, *NO_EXTRAS, *Options(), "", *(True for _ in _WANTS))
)
_NO_TANGENTS = (None,) * len(Tangents._fields)
_OPTIONAL_VALUES = (*_NO_TANGENTS, *NO_EXTRAS, *Options(), "")
_WITH_TANGENTS = {
    TANGENT: _arguments((*TANGENT.inputs, *_SCALARS), _OPTIONAL_VALUES),
    SECOND: _arguments((*SECOND.inputs, *_SCALARS), (None, *_OPTIONAL_VALUES)),
    FORWARD_TANGENT: _arguments((*FORWARD_TANGENT.inputs, *_SCALARS), _OPTIONAL_VALUES),
}
_inputs = operator.attrgetter("q", "k", "v", *Extras._fields)
_saved = operator.attrgetter(*Saved._fields)
_tangents = operator.attrgetter(*Tangents._fields)
_options = operator.attrgetter(*Options._fields)
_wants = operator.attrgetter(*_WANTS)


class ForwardArguments(NamedTuple):
    """Arguments of `anyattn::forward`."""

    inputs: Inputs
    options: Options
    backend: str


class BackwardArguments(NamedTuple):
    """Arguments of `anyattn::backward`. wants: for each of GRADIENTS, whether it is computed."""

    saved: Saved
    inputs: Inputs
    options: Options
    backend: str
    wants: tuple[bool, ...]


class TangentArguments(NamedTuple):
    """Arguments of `tangent`, `second` and `forward_tangent`. saved: (out, lse), Saved for `second`, or ()."""

    saved: tuple[Any, ...]
    tangents: Tangents
    inputs: Inputs
    options: Options
    backend: str


def forward_arguments(arguments: Sequence[Any]) -> ForwardArguments:
    """Return the arguments of a call of `forward`."""
    given = _Forward(*arguments)
    return ForwardArguments(make_inputs(*_inputs(given)), Options(*_options(given)), given.backend)


def backward_arguments(arguments: Sequence[Any]) -> BackwardArguments:
    """Return the arguments of a call of `backward`."""
    given = _Backward(*arguments)
    inputs, options = make_inputs(*_inputs(given)), Options(*_options(given))
    return BackwardArguments(Saved(*_saved(given)), inputs, options, given.backend, _wants(given))


def tangent_arguments(arguments: Sequence[Any], pass_: Pass = TANGENT) -> TangentArguments:
    """Return the arguments of a call of `tangent`, `second` or `forward_tangent`."""
    given = _WITH_TANGENTS[pass_](*arguments)
    saved: tuple[Any, ...] = ()
    if pass_ is not FORWARD_TANGENT:
        saved = (given.out, given.lse) if pass_ is TANGENT else Saved(*_saved(given))
    inputs, options = make_inputs(*_inputs(given)), Options(*_options(given))
    return TangentArguments(saved, Tangents(*_tangents(given)), inputs, options, given.backend)


def call_forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """Call the operator `forward`."""
    q, k, v, extras = inputs
    result: tuple[Tensor, Tensor] = forward(q, k, v, *extras, *options, backend)
    return result


def call_backward(
    saved: Saved, inputs: Inputs, options: Options, backend: str, wants: Sequence[bool] = ()
) -> Gradients:
    """Call the operator `backward`. Absent gradients are empty tensors."""
    q, k, v, extras = inputs
    return Gradients(*backward(q, k, v, *saved, *extras, *options, backend, *wants))


def call_tangent(
    out: Tensor, lse: Tensor, tangents: Tangents, inputs: Inputs, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """Call the operator `tangent`."""
    q, k, v, extras = inputs
    result: tuple[Tensor, Tensor] = tangent(q, k, v, out, lse, *tangents, *extras, *options, backend)
    return result


def call_forward_tangent(
    tangents: Tangents, inputs: Inputs, options: Options, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the operator `forward_tangent`."""
    q, k, v, extras = inputs
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    result = forward_tangent(q, k, v, *tangents, *extras, *options, backend)
    return result


def call_second(saved: Saved, tangents: Tangents, inputs: Inputs, options: Options, backend: str) -> SecondGradients:
    """Call the operator `second`; gradients that are absent are empty tensors."""
    q, k, v, extras = inputs
    return SecondGradients(*second(q, k, v, *saved, *tangents, *extras, *options, backend))


def contiguous_inputs(inputs: Inputs) -> Inputs:
    """Return the inputs with contiguous last dimensions. Only inputs that need it are copied."""
    q, k, v, extras = inputs
    if extras is not NO_EXTRAS:
        extras = Extras(*[None if x is None else to_unit_stride(name, x) for name, x in extras._asdict().items()])
    return Inputs(to_unit_stride("q", q), to_unit_stride("k", k), to_unit_stride("v", v), extras)


def contiguous_saved(saved: Saved) -> Saved:
    """Return the saved arrays with contiguous last dimensions."""
    return Saved(*[None if x is None else to_unit_stride(name, x) for name, x in saved._asdict().items()])


def absent(wants: Sequence[bool]) -> list[str]:
    """Return the names of the gradients that are not wanted."""
    return [f"d{name}" for name, want in zip(GRADIENTS, wants, strict=True) if not want]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options, backend = forward_arguments(arguments)
    return execute.forward(adapter, contiguous_inputs(inputs), options, backend)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients. Absent ones are empty tensors, because a schema has no optional results."""
    saved, inputs, options, backend, wants = backward_arguments(arguments)
    saved, inputs = contiguous_saved(saved), contiguous_inputs(inputs)
    results = execute.backward(adapter, saved, inputs, options, backend, absent=absent(wants))
    return tuple(inputs.q.new_empty(0) if x is None else x for x in results)


def _tangent(*arguments: Any) -> tuple[Tensor, Tensor]:
    saved, tangents, inputs, options, backend = tangent_arguments(arguments)
    out, lse = (to_unit_stride("out", x) for x in saved)
    return execute.tangent(adapter, out, lse, _contiguous(tangents), contiguous_inputs(inputs), options, backend)


def _forward_tangent(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, tangents, inputs, options, backend = tangent_arguments(arguments, FORWARD_TANGENT)
    return execute.forward_tangent(adapter, _contiguous(tangents), contiguous_inputs(inputs), options, backend)


def _second(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute second derivatives; absent gradients are empty tensors."""
    saved, tangents, inputs, options, backend = tangent_arguments(arguments, SECOND)
    given = contiguous_saved(Saved(*saved)), _contiguous(tangents), contiguous_inputs(inputs)
    results = execute.second(adapter, *given, options, backend)
    return tuple(inputs.q.new_empty(0) if x is None else x for x in results)


def _contiguous(tangents: Tangents) -> Tangents:
    """Return the tangents with contiguous last dimensions."""
    return Tangents(*[None if x is None else to_unit_stride(name, x) for name, x in tangents._asdict().items()])


@torch.library.register_fake(f"{NAMESPACE}::tangent", lib=library)
def _fake_tangent(*arguments: Any) -> tuple[Tensor, Tensor]:
    (out, lse), *_ = tangent_arguments(arguments)
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


@torch.library.register_fake(f"{NAMESPACE}::forward_tangent", lib=library)
def _fake_forward_tangent(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, inputs, options, backend = tangent_arguments(arguments, FORWARD_TANGENT)
    q, k, v, extras = inputs
    out, lse = _fake_forward(q, k, v, *extras, *options, backend)
    return out, lse, out.new_empty(out.shape), lse.new_empty(lse.shape)


@torch.library.register_fake(f"{NAMESPACE}::second", lib=library)
def _fake_second(*arguments: Any) -> tuple[Tensor, ...]:
    saved, _, inputs, _, _ = tangent_arguments(arguments, SECOND)
    q, k, v, extras = inputs
    like = (q, k, v, *[getattr(extras, name) for name in GRADIENTS], saved[0], saved[1])
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


@torch.library.register_fake(f"{NAMESPACE}::forward", lib=library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options, _ = forward_arguments(arguments)
    q, _, v, extras = inputs
    dtype = compute_dtype(q) if options.partial else q.dtype
    arrays = flatten(inputs)
    _check_devices(FORWARD, arrays, q)
    if q.is_meta and not any(isinstance(n, torch.SymInt) for x in arrays if x is not None for n in x.shape):
        # no kernel runs after this fake to refuse them
        make_problem(described(FORWARD.inputs, arrays, adapter.describe), options)
    packed = extras.cu_seqlens_q is not None
    lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype), q.new_empty(lse_shape, dtype=compute_dtype(q))


def _check_devices(pass_: Pass, arrays: Sequence[Any], q: Tensor) -> None:
    for name, x in zip(pass_.inputs, arrays, strict=False):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}.")


def compute_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of scores, softmax and lse."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


@torch.library.register_fake(f"{NAMESPACE}::backward", lib=library)
def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    saved, inputs, options, _, wants = backward_arguments(arguments)
    q, k, v, extras = inputs
    _check_devices(BACKWARD, flatten(inputs, saved), q)
    optional = [getattr(extras, name) if want else None for name, want in zip(GRADIENTS, wants, strict=True)]
    wide = compute_dtype(q) if options.partial else None
    stored = (None, None) if extras.k_scale is not None else (k, v)  # quantised keys and values have no gradients
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape, dtype=wide or x.dtype) for x in (q, *stored, *optional)
    )


def _score_elements(inputs: Inputs) -> Any:
    """Return the number of score entries of all heads as if dense. Packed sequences count as equally long."""
    q, k, _, extras = inputs  # these are shapes
    packed, pages = extras.cu_seqlens_q, extras.block_table
    batch, queries = (q[0], q[0] * q[1]) if packed is None else (packed[0] - 1, q[0])
    keys = k[1] if pages is None else pages[1] * k[1]
    if extras.cu_seqlens_k is not None:
        keys = k[0] // max(batch, 1)
    if extras.kv_indices is not None:
        keys = min(keys, extras.kv_indices[-1])
    return queries * q[-2] * keys


@register_flop_formula(operators.forward)
def _forward_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    shapes = forward_arguments(arguments).inputs
    return 2 * _score_elements(shapes) * (shapes.q[-1] + shapes.v[-1])


@register_flop_formula(operators.backward)
def _backward_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    shapes = backward_arguments(arguments).inputs
    return 2 * _score_elements(shapes) * (3 * shapes.q[-1] + 2 * shapes.v[-1])


@register_flop_formula(operators.tangent)
def _tangent_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    _, tangents, shapes, _, _ = tangent_arguments(arguments)
    products_q = 1 + sum(x is not None for x in (tangents.tq, tangents.tk))
    products_v = 1 + (tangents.tv is not None)
    return 2 * _score_elements(shapes) * (products_q * shapes.q[-1] + products_v * shapes.v[-1])


@register_flop_formula(operators.forward_tangent)
def _forward_tangent_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    _, tangents, shapes, _, _ = tangent_arguments(arguments, FORWARD_TANGENT)
    products_q = 1 + sum(x is not None for x in (tangents.tq, tangents.tk))
    products_v = 2 + (tangents.tv is not None)
    return 2 * _score_elements(shapes) * (products_q * shapes.q[-1] + products_v * shapes.v[-1])


@register_flop_formula(operators.second)
def _second_flops(*arguments: Any, out_shape: Any = None, **rest: Any) -> Any:
    _, _, shapes, _, _ = tangent_arguments(arguments, SECOND)
    return 2 * _score_elements(shapes) * (10 * shapes.q[-1] + 5 * shapes.v[-1])


for _key in DEVICES:
    library.impl("forward", _forward, _key)
    library.impl("backward", _backward, _key)
    library.impl("tangent", _tangent, _key)
    library.impl("second", _second, _key)
    library.impl("forward_tangent", _forward_tangent, _key)

forward = operators.forward.default
backward = operators.backward.default
tangent = operators.tangent.default
second = operators.second.default
forward_tangent = operators.forward_tangent.default
