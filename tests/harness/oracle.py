"""Second definition, which tests the reference: each rule of the mask is a predicate, torch computes gradients.

It shares only the dropout bits with the package. test_philox compares these bits with published vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from anyattn.definition import philox

if TYPE_CHECKING:
    from anyattn.testing import Case, CaseInputs, Span


LEAVES = ("q", "k", "v", "bias", "sink")


def visible(case: Case, span: Span) -> np.ndarray:
    """Return the keys in the interval of each query, rule by rule: booleans (n_q, n_k)."""
    p = np.arange(span.n_q)[:, None] + span.offset
    c = np.arange(span.n_k)[None, :] - span.leftpad
    seen = np.broadcast_to(c >= 0, (span.n_q, span.n_k)).copy()
    left, right = case.window or (None, None)
    if case.causal:
        seen &= c <= p
    if right is not None:
        seen &= c <= p + right
    if left is not None:
        seen &= c >= p - left
    if case.chunk:
        seen &= np.floor_divide(c, case.chunk) == np.floor_divide(p, case.chunk)
    return seen


def listed(inputs: CaseInputs, span: Span, h_kv: int) -> np.ndarray:
    """Return the keys in the list of each query, key by key: booleans (n_q, n_k)."""
    lists = np.asarray(inputs.arguments["kv_indices"])
    if inputs.case.kv_indices == "heads":
        lists = lists[h_kv] if inputs.packed else lists[:, h_kv]
    of_rows = [set(row.tolist()) for row in lists[span.rows]]
    found = [[j in row for j in range(span.n_k)] for row in of_rows]
    return np.array(found, bool).reshape(span.n_q, span.n_k)


def attention(inputs: CaseInputs) -> dict[str, np.ndarray | None]:
    """Return out, lse and every gradient for the case's dout and dlse, in float64."""
    leaves = {name: _leaf(inputs.arguments.get(name)) for name in LEAVES}
    out = np.zeros((*inputs.arguments["q"].shape[:-1], inputs.case.head_dim_v))
    lse = np.full(inputs.lse_shape, -np.inf)
    for loss in _losses(inputs, leaves, _leaf(inputs.dout), _leaf(inputs.dlse), out, lse):
        loss.backward()
    grads = {f"d{name}": _grad(leaf) for name, leaf in leaves.items()}
    if inputs.case.stored:  # quantised keys and values have no gradients
        grads.update(dk=None, dv=None)
    return {"out": out, "lse": lse, **grads}


def second(inputs: CaseInputs) -> dict[str, np.ndarray | None]:
    """Differentiate <gradients, tangents> of all arrays, in float64. The derivative by dout and dlse is the tangent."""
    import torch

    leaves = {name: _leaf(inputs.arguments.get(name)) for name in LEAVES}
    saved = {
        "dout": _leaf(inputs.dout),
        "dlse": _leaf(np.zeros(inputs.lse_shape) if inputs.dlse is None else inputs.dlse),
    }
    used = {name: x for name, x in leaves.items() if x is not None}
    tangents = {name: np.nan_to_num(x.astype(np.float64)) for name, x in inputs.tangents.items()}
    every = {**used, **saved}
    results = {name: np.zeros(x.shape) for name, x in every.items()}
    for loss in _losses(inputs, leaves, *saved.values()):
        first = torch.autograd.grad(loss, list(used.values()), create_graph=True, materialize_grads=True)
        along = 0 * loss + sum(  # the gradients may not depend on anything
            (grad * torch.from_numpy(tangents[f"t{name}"])).sum()
            for name, grad in zip(used, first, strict=True)
            if f"t{name}" in tangents
        )
        found = torch.autograd.grad(along, list(every.values()), materialize_grads=True)
        for name, x in zip(every, found, strict=True):
            results[name] += x.numpy()
    return {f"d{name}": results.get(name) for name in (*LEAVES, *saved)}


def _losses(
    inputs: CaseInputs,
    leaves: dict[str, Any],
    dout: Any,
    dlse: Any,
    out: np.ndarray | None = None,
    lse: np.ndarray | None = None,
) -> Iterator[Any]:
    """Yield <out, dout> + <lse, dlse> of each head, whose graph is then freed, and write its out and lse."""
    import torch

    for span in inputs.spans:
        for h in range(inputs.case.nheads_kv * inputs.case.group):
            o, line, live = _head(inputs, leaves, span, h)
            where = inputs.lse_rows(span, h)
            if out is not None and lse is not None:
                out[(*_pair(span.rows), h)] = o.detach().numpy()
                lse[where] = np.where(live, line.detach().numpy(), -np.inf)
            loss = (o * dout[(*_pair(span.rows), h)]).sum()
            if dlse is not None:
                loss = loss + (line * dlse[where])[torch.from_numpy(live)].sum()
            yield loss


def _head(inputs: CaseInputs, leaves: dict[str, Any], span: Span, h: int) -> tuple[Any, Any, np.ndarray]:
    """Return (out, lse, rows that have an lse) of one head. Reads only keys in the interval of some row."""
    import torch

    case, given = inputs.case, inputs.arguments
    seen = visible(case, span)
    if case.kv_indices:
        seen &= listed(inputs, span, h // case.group)
    used = np.flatnonzero(seen.any(axis=0))
    seen = seen[:, used]
    q = leaves["q"][(*_pair(span.rows), h)]
    place = tuple(index[used] for index in _pair(span.slots)[-2:]) if case.lengths.startswith("paged") else None
    if place is None:
        *first, slots = _pair(span.slots)
        place = (*first, np.arange(slots.start, slots.stop)[used])
    k, v = leaves["k"][(*place, h // case.group)], leaves["v"][(*place, h // case.group)]
    if case.stored:
        k, v = (
            k * _stored_scale(inputs, "k_scale", span, place, h),
            v * _stored_scale(inputs, "v_scale", span, place, h),
        )
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    s = scale * (q @ k.T)
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    if leaves["bias"] is not None:
        s = s + _part(leaves["bias"], inputs, span, h, used)
        seen = seen & (_part(np.asarray(given["bias"], np.float64), inputs, span, h, used) > -np.inf)
    if given.get("mask") is not None:
        seen = seen & _part(given["mask"], inputs, span, h, used)
    if given.get("alibi_slopes") is not None:
        slopes = np.asarray(given["alibi_slopes"], np.float64)
        slope = slopes[h] if slopes.ndim == 1 else slopes[span.index, h]
        distance = np.abs(np.arange(span.n_q)[:, None] + span.offset - (used - span.leftpad)[None, :])
        s = s - torch.from_numpy(slope * distance)
    s = s.masked_fill(torch.from_numpy(~seen), -torch.inf)
    columns = [s]
    live = seen.any(axis=1)
    if leaves["sink"] is not None:
        columns.append(leaves["sink"][h].expand(span.n_q, 1))
        live = live | bool(np.isfinite(given["sink"][h]))
    safe = torch.where(torch.from_numpy(live)[:, None], torch.cat(columns, dim=1), 0.0)
    if safe.shape[1] == 0:
        return torch.zeros(span.n_q, case.head_dim_v, dtype=torch.float64), torch.zeros(span.n_q).double(), live
    line = torch.logsumexp(safe, dim=1)
    p = torch.exp(s - line[:, None]) if len(used) else s
    if case.dropout_p:
        head = span.index * case.nheads_kv * case.group + h
        kept = philox.keep(inputs.rng_state, case.dropout_p, head, np.arange(span.n_q), used)
        p = p * torch.from_numpy(kept / (1 - round(case.dropout_p * 65536) / 65536))
    return p @ v, line, live


def _stored_scale(inputs: CaseInputs, name: str, span: Span, place: Any, h: int) -> Any:
    """Return the scales of quantised keys or values, (used, 1) or (1, 1), by a separate rule for each shape."""
    import torch

    scale, h_kv = np.asarray(inputs.arguments[name], np.float64), h // inputs.case.group
    if inputs.case.scales == "slots":
        found = (scale[0] if inputs.case.lengths.startswith("varlen") else scale)[(*place, h_kv)]
    elif inputs.case.scales == "sequences":
        found = scale[span.index, h_kv]
    else:
        found = scale[h_kv] if inputs.case.scales == "heads" else scale
    return torch.from_numpy(np.array(found)).reshape(-1, 1)


def _part(array: Any, inputs: CaseInputs, span: Span, h: int, used: np.ndarray) -> Any:
    """Return the entries (n_q, used) of a dense bias or mask."""
    sizes = (inputs.case.batch, inputs.case.nheads_kv * inputs.case.group, inputs.rows, inputs.slots)
    shape = (1,) * (4 - array.ndim) + tuple(array.shape)
    full = array.reshape(shape)
    full = full.expand(sizes) if hasattr(full, "expand") else np.broadcast_to(full, sizes)
    return full[span.index, h][: span.n_q][:, used]


def _pair(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _leaf(array: Any) -> Any:
    import torch

    if array is None:
        return None
    return torch.from_numpy(np.array(array, np.float64)).requires_grad_()


def _grad(leaf: Any) -> np.ndarray | None:
    if leaf is None:
        return None
    return np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
