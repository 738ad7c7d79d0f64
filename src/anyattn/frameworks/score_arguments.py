"""Calls with score_mod and mask_mod: parts of the functions become built-in arguments, documents packed sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..definition.inputs import Extras, Gradients, Inputs, Saved, replace_extras
from ..definition.options import Options
from ..definition.score import documents
from ..definition.score.patterns import CAUSAL, EVERY, INTERVAL, LENGTHS, MASK, Recognized, recognize
from ..definition.score.score_patterns import BIAS, SCALE, SLOPES, SOFTCAP, Operand
from .score_functions import Functions

DENSE_RANK = 4
ScoreFunctions = tuple[Any, Any]  # score_mod and mask_mod


class Use(NamedTuple):
    """Properties of the function that was called.

    Attributes:
        captured_gradients: it returns the gradients of captured arrays, concatenated, and has no autograd.
        recognized: parts of functions become built-in arguments.
        reshapes: it can pass queries and keys in another shape, and the number of keys.
    """

    captured_gradients: bool = False
    recognized: bool = True
    reshapes: bool = True


ATTENTION, CACHE, EXPLICIT, DESCRIPTION = Use(), Use(reshapes=False), Use(True), Use(True, recognized=False)


class Sequences(NamedTuple):
    """Shape of a call before its documents became packed sequences."""

    batch: int
    seqlen: int

    def rows(self, x: Any) -> Any:
        """Return (batch, seqlen, ...) as rows of packed sequences."""
        return x.reshape(-1, *x.shape[2:])

    def statistics(self, lse: Any) -> Any:
        """Return (batch, nheads, seqlen) as (nheads, total)."""
        return lse.swapaxes(0, 1).reshape(lse.shape[1], -1)

    def restore(self, out: Any, lse: Any) -> tuple[Any, Any]:
        """Return the results of packed sequences in the shapes of the call, contiguous. lse may be None."""
        out = out.reshape(self.batch, self.seqlen, *out.shape[1:])
        if lse is None:
            return out, None
        nheads = lse.shape[0]
        moved = lse.reshape(nheads, self.batch, self.seqlen).swapaxes(0, 1)
        return out, moved.reshape(-1).reshape(self.batch, nheads, self.seqlen)


class Call(NamedTuple):
    """Call whose functions are replaced.

    Attributes:
        inputs: with packed documents or not.
        options: with what is left of the functions.
        sequences: None without packed documents.
        zeros: the gradients of captured arrays if no function is left that reads one; None: no such array.
    """

    inputs: Inputs
    options: Options
    sequences: Sequences | None = None
    zeros: Any = None

    def saved(self, saved: Saved) -> Saved:
        """Return what the backward pass reads, like the inputs."""
        if self.sequences is None:
            return saved
        rows, statistics = self.sequences.rows, self.sequences.statistics
        dlse = None if saved.dlse is None else statistics(saved.dlse)
        return Saved(rows(saved.out), statistics(saved.lse), rows(saved.dout), dlse)

    def results(self, out: Any, lse: Any) -> tuple[Any, Any]:
        """Return out and lse in the shapes of the call. lse may be None."""
        return (out, lse) if self.sequences is None else self.sequences.restore(out, lse)

    def gradients(self, grads: Gradients) -> Gradients:
        """Return the gradients in the shapes of the call."""
        given = dict(zip(grads._fields, grads, strict=True))
        if grads.dcaptured is None:
            given["dcaptured"] = self.zeros
        if self.sequences is not None:
            for name in ("dq", "dk", "dv"):
                x = given[name]
                given[name] = x.reshape(self.sequences.batch, self.sequences.seqlen, *x.shape[1:])
        return Gradients(**given)


def with_traced(functions: Functions, inputs: Inputs, options: Options, use: Use) -> Call:
    """Return a call with traced functions; see Framework.with_functions."""
    if not use.recognized:
        return Call(*_replaced(functions, Recognized(functions.graph), inputs, options, every_array=True))
    zeros = None
    allowed = _allowed(inputs, options, use) - (frozenset() if use.reshapes else {LENGTHS})
    if use.captured_gradients:
        floats = sum(array.size for array in functions.graph.arrays if array.kind == "f")
        zeros = functions.zeros(floats) if floats else None
        allowed -= {BIAS}
    every, call = use.captured_gradients, None
    if use.reshapes:
        call = _with_documents(functions, inputs, options, allowed, every_array=every)
    if call is None:
        found = recognize(functions.graph, _nheads(inputs), allowed)
        found = _that_fits(functions, found, inputs, allowed)
        changed = _replaced(functions, found, inputs, options, every_array=every)
        call = Call(*changed)
    return call._replace(zeros=zeros)


def _allowed(inputs: Inputs, options: Options, use: Use) -> frozenset[str]:
    """Return the arguments that functions may become because the call does not use them, and CAUSAL if it is causal."""
    extras, used = inputs.extras, set()
    has_interval = options.left is not None or options.right is not None or options.chunk != 0
    if has_interval:
        used |= {INTERVAL, LENGTHS}
    moves = extras.offset is not None or extras.leftpad_k is not None
    if extras.alibi_slopes is not None or moves or (has_interval and not _is_aligned(inputs, options, use)):
        used |= {INTERVAL, SLOPES, LENGTHS}
    if not _is_dense(inputs):
        used |= {BIAS, MASK, LENGTHS}
    names = {BIAS: extras.bias, MASK: extras.mask, LENGTHS: extras.seqused_k}
    used |= {name for name, x in names.items() if x is not None}
    if options.softcap:
        used |= {SOFTCAP, SCALE}
    causal = {CAUSAL} if options.right == 0 and SLOPES not in used else set()
    return EVERY - used | causal


def _is_aligned(inputs: Inputs, options: Options, use: Use) -> bool:
    """Return whether the call's window has query i at position i, because of its alignment or of equal lengths."""
    if options.alignment == "top-left":
        return True
    extras = inputs.extras
    whole = _is_dense(inputs) and extras.seqused_q is None and extras.seqused_k is None
    return use.reshapes and whole and inputs.q.shape[-3] == inputs.k.shape[-3]


def _is_dense(inputs: Inputs) -> bool:
    extras = inputs.extras
    tables = (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.block_table, extras.cache_batch_idx, extras.kv_indices)
    return inputs.q.ndim == inputs.k.ndim == DENSE_RANK and all(x is None for x in tables)


def _that_fits(functions: Functions, found: Recognized, inputs: Inputs, allowed: frozenset[str]) -> Recognized:
    """Return the functions without arguments whose arrays are too small for the call, which raises later."""
    sizes = _sizes(inputs)
    operands = {BIAS: found.score.bias, MASK: found.mask}
    if found.lengths is not None:
        operands[LENGTHS] = Operand(found.lengths.array, (0,))
    small = set()
    for name, operand in operands.items():
        if operand is not None:
            shape = functions.graph.arrays[operand.array].shape
            if any(size < sizes[axis] for size, axis in zip(shape, operand.axes, strict=True)):
                small.add(name)
    return recognize(functions.graph, _nheads(inputs), allowed - small) if small else found


def _nheads(inputs: Inputs) -> int:
    """Return the number of query heads as an integer, which it is not where torch traces every size as a symbol."""
    return int(inputs.q.shape[-2])


def _sizes(inputs: Inputs) -> tuple[int, ...]:
    """Return batch, nheads, seqlen_q and seqlen_k of a dense call."""
    q, k = inputs.q, inputs.k
    return (q.shape[0], q.shape[-2], q.shape[-3], k.shape[-3])


def _replaced(
    functions: Functions, found: Recognized, inputs: Inputs, options: Options, *, every_array: bool
) -> tuple[Inputs, Options]:
    """Return the inputs and the options with the recognized arguments and the rest of the functions."""
    if found.is_nothing and found.graph.score is found.graph.mask is None:
        return inputs, options
    score, packed = found.score, functions.packed(found.graph, every_array=every_array)
    arrays = {"captured": packed.captured, "captured_indices": packed.captured_indices}
    changes: dict[str, Any] = {"score": packed.score}
    if found.left is not None or found.right is not None or found.chunk:
        changes |= {"left": found.left, "right": found.right, "chunk": found.chunk}
    if found.left is not None or found.right is not None or found.chunk or score.slopes is not None:
        changes["alignment"] = "top-left"
    if score.slopes is not None:
        slopes = np.array(score.slopes) if isinstance(score.slopes, tuple) else functions.arrays[score.slopes]
        arrays["alibi_slopes"] = functions.join([slopes], True)
    if score.scale != 1:
        scale = inputs.q.shape[-1] ** -0.5 if options.scale is None else options.scale
        changes["scale"] = scale * score.scale
    if score.softcap:
        changes["softcap"] = score.softcap
    if score.bias is not None:
        arrays["bias"] = _broadcast(functions, score.bias, inputs, floats=True)
    if found.mask is not None:
        arrays["mask"] = _broadcast(functions, found.mask, inputs, floats=False)
    if found.lengths is not None:
        batch, _, _, seqlen_k = _sizes(inputs)
        added, lengths = found.lengths.added, functions.join([functions.arrays[found.lengths.array]], False)
        arrays["seqused_k"] = lengths[:batch].clip(-added, seqlen_k - added) + added
    given: dict[str, Any] = dict(zip(Options._fields, options, strict=True))
    q, k, v, extras = inputs
    extras = _with_arrays(extras, arrays)
    return Inputs(q, k, v, extras), Options(**{**given, **changes})


def _with_arrays(extras: Extras, arrays: dict[str, Any]) -> Extras:
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return replace_extras(extras, **arrays) if arrays else extras


def _broadcast(functions: Functions, operand: Operand, inputs: Inputs, *, floats: bool) -> Any:
    """Return the part of a captured array that a call reads, with four axes."""
    x, sizes = functions.convert(functions.arrays[operand.array], floats), _sizes(inputs)
    x = x[tuple([slice(0, sizes[axis]) for axis in operand.axes])]
    return x.reshape([sizes[axis] if axis in operand.axes else 1 for axis in range(DENSE_RANK)])


def _with_documents(
    functions: Functions, inputs: Inputs, options: Options, allowed: frozenset[str], *, every_array: bool
) -> Call | None:
    """Return the call with documents as packed sequences, or None if the call or the functions do not allow it."""
    q, k, v, extras = inputs
    given = [name for name, x in zip(Extras._fields, extras, strict=True) if x is not None]
    if not _is_dense(inputs) or q.shape[:2] != k.shape[:2] or 0 in q.shape or options.dropout_p or options.chunk:
        return None
    if not set(given) <= {"alibi_slopes", "sink"} or (extras.alibi_slopes is not None and extras.alibi_slopes.ndim > 1):
        return None
    found = documents.find(functions.graph, _nheads(inputs), allowed)
    if found is None:
        return None
    batch, seqlen = q.shape[:2]
    shape, values = functions.graph.arrays[found.array].shape, functions.host(functions.arrays[found.array])
    if values is None or shape[-1] < seqlen or (len(shape) > 1 and shape[0] < batch):
        return None
    values = values[..., :seqlen] if values.ndim == 1 else values[:batch, :seqlen]
    table = documents.boundaries(values, batch)
    if table is None:
        return None
    (_, _, _, extras), options = _replaced(functions, found.inside, inputs, options, every_array=every_array)
    sequences = Sequences(batch, seqlen)
    longest = int((table[1:] - table[:-1]).max())
    boundaries = functions.convert(table, False)
    extras = replace_extras(extras, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries)
    fields: dict[str, Any] = dict(zip(Options._fields, options, strict=True))
    options = Options(**{**fields, "max_seqlen_q": longest, "max_seqlen_k": longest})
    rows = sequences.rows
    return Call(Inputs(rows(q), rows(k), rows(v), extras), options, sequences)
