"""Arrays of a case: views of larger buffers of NaN. Masked keys hold stale values or NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import bounds
from ..definition.mask import Mask
from ..definition.quantised import quantise
from ..definition.sequences import is_listed
from .cases import BROADCASTS, Case
from .inputs import Array, CaseInputs, Span, numpy_dtype
from .layouts import embedded, scattered


def make_inputs(case: Case) -> CaseInputs:
    """Make the arrays of a case. Every call makes equal arrays."""
    return _Builder(case).build()


def visible(case: Case, span: Span, kv_indices: Array | None = None) -> npt.NDArray[np.bool_]:
    """Return the keys that are visible by the interval and the lists: (nheads_kv or 1, n_q, n_k)."""
    left, right = bounds(case.causal, case.window)
    positions, keys = np.arange(span.n_q) + span.offset, np.arange(span.n_k)
    first, end = Mask(left, right, case.chunk).bounds(positions, span.n_k, span.leftpad)
    seen = np.asarray((first[:, None] <= keys) & (keys < end[:, None]))[None]
    if kv_indices is None:
        return seen
    lists = kv_indices[_rows_of_lists(span)]
    return seen & is_listed(lists if lists.ndim == 3 else lists[None], span.n_k)


def _rows_of_lists(span: Span) -> tuple[Any, ...]:
    """Return the index of a sequence's rows in kv_indices, with or without an axis of KV heads."""
    *entry, rows = span.rows if isinstance(span.rows, tuple) else (span.rows,)
    return (*entry, ..., rows, slice(None))


class _Builder:
    """Arrays of one case while they are made. Their values depend on the order of the samples from `rng`."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        self.dtype = numpy_dtype(case.dtype)
        self.compute = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
        self.buffers: list[Array] = []
        self.tables: dict[str, Any] = {}
        self.spans: list[Span] = []
        self.other = "any" if case.layout == "any" else "bshd"  # layout of all arrays except q, k and v
        self.page_size = case.page_size or int(self.rng.choice([1, 3, 16, 50]))

    def build(self) -> CaseInputs:
        case = self.case
        self._draw_lengths()
        self.kv_indices = self._draw_kv_indices() if case.kv_indices else None
        stale = (np.nan, 1e3, np.inf)[case.seed % 3]
        q, k, v = self._draw_qkv(stale)
        given: dict[str, Any] = {}
        if case.stored:
            k, given["k_scale"] = self._quantise(k)
            v, given["v_scale"] = self._quantise(v)
        given |= dict(zip(("q", "k", "v"), self._place(q, k, v), strict=True))
        given |= self._scalars() | self.tables
        if case.bias:
            given["bias"] = self._bias(stale)
        if case.mask:
            given["mask"] = self._mask()
        if case.alibi:
            shape = (case.nheads,) if case.alibi == "h" else (case.batch, case.nheads)
            low, high = (2.0, 4.0) if case.content == "steep" else (0.01, 0.5)
            given["alibi_slopes"] = self._aside(self.rng.uniform(low, high, shape).astype(self.compute))
        if case.sink:
            raised = {"big_sink": 40.0, "no_sink": -np.inf}.get(case.content, 0.0)
            given["sink"] = self._aside((self.rng.standard_normal(case.nheads) + raised).astype(self.compute))
        if case.dropout_p:
            given["rng_state"] = self._aside(self.rng.integers(-(2**62), 2**62, 2))
        dout, dlse = self._gradients()
        rows = case.seqlen_q if not case.packed else q.shape[0]
        return CaseInputs(case, given, self.spans, rows, self.slots, dout, dlse, self.buffers)

    def _scalars(self) -> dict[str, Any]:
        case = self.case
        names = ("causal", "window", "chunk", "softcap", "scale", "alignment", "dropout_p")
        return {name: getattr(case, name) for name in names}

    def _lengths(self, longest: int) -> Array:
        """Sample one length per sequence; one of them is the longest."""
        lengths = self.rng.integers(0, longest + 1, self.case.batch)
        if self.case.batch:
            lengths[self.rng.integers(self.case.batch)] = longest
        if self.case.content == "empty_sequences":
            lengths[::2] = 0
        return lengths

    def _draw_lengths(self) -> None:
        """Sample the spans and the tables."""
        case, rng = self.case, self.rng
        n_q, n_k = np.full(case.batch, case.seqlen_q), np.full(case.batch, case.seqlen_k)
        if case.lengths not in ("full", "leftpad", "paged"):
            n_q = self._lengths(case.seqlen_q)
        if case.lengths not in ("full", "leftpad"):
            n_k = self._lengths(case.seqlen_k)
        leftpad = rng.integers(0, n_k + 1) if case.lengths in ("leftpad", "both") else np.zeros(case.batch, int)
        self.slots = case.seqlen_k
        starts_q, starts_k = self._starts(n_q), self._starts(n_k)
        if case.lengths in ("seqused", "both"):
            self.tables |= {"seqused_q": n_q, "seqused_k": n_k}
        if case.lengths in ("leftpad", "both"):
            self.tables["leftpad_k"] = leftpad
        if case.packed:
            self.tables["cu_seqlens_q"] = starts_q
            self.total_q = int(starts_q[-1]) + 2  # with rows outside every sequence, at both ends
            if case.seed % 2:
                self.tables["max_seqlen_q"] = case.seqlen_q
        if case.lengths in ("varlen", "varlen_seqused"):
            self.tables["cu_seqlens_k"] = starts_k
            self.slots = int(starts_k[-1]) + 2
        if case.lengths == "varlen_seqused":
            n_q, n_k = rng.integers(0, n_q + 1), rng.integers(0, n_k + 1)
            self.tables |= {"seqused_q": n_q, "seqused_k": n_k}
        if case.paged:
            self._draw_pages(n_k, starts_k)
        aligned = n_k - leftpad - n_q if case.alignment == "bottom-right" else np.zeros_like(n_q)
        offset = self._draw_offset(aligned)
        self.tables = {name: self._table(x) if isinstance(x, np.ndarray) else x for name, x in self.tables.items()}
        for b in range(case.batch):
            sizes = (int(n_q[b]), int(n_k[b]), int(leftpad[b]), int(offset[b]))
            self.spans.append(Span(b, *sizes, *self._places(b, sizes, starts_q, starts_k)))

    def _starts(self, lengths: Array) -> Array:
        return np.concatenate([[1], 1 + np.cumsum(lengths)]).astype(np.int64)

    def _table(self, table: Array) -> Any:
        """Return a table as callers pass it: int32, int64, or a list."""
        kind = self.case.seed % 3
        if kind == 2 and table.size and self.case.layout != "any":
            return table.tolist()
        return self._aside(table.astype(np.int64 if kind else np.int32))

    def _aside(self, array: Array) -> Array:
        """Return an array in another layout, only for the layout "any"."""
        return self.embed(array, "any") if self.case.layout == "any" else array

    def _draw_offset(self, aligned: Array) -> Array:
        case, rng = self.case, self.rng
        if not case.offset:
            return aligned
        if case.content == "offset_outside":
            each = np.full(case.batch, -case.seqlen_q - 10)
        else:
            each = rng.integers(-case.seqlen_q - 1, case.seqlen_k + 2, case.batch)
        if case.offset == "int":
            number = int(rng.integers(-5, case.seqlen_k + 1))
            self.tables["offset"] = number
            return np.full(case.batch, number)
        self.tables["offset"] = each
        return each

    def _draw_kv_indices(self) -> Array:
        """Sample lists with repeated, masked and missing keys. Lists of unused queries are garbage."""
        case, rng = self.case, self.rng
        n = int(rng.choice((1, 7, 40, 130)))
        rows = (self.total_q,) if case.packed else (case.batch, case.seqlen_q)
        heads = (case.nheads_kv,) if case.kv_indices == "heads" else ()
        shape = (*heads, *rows, n) if case.packed else (*rows[:1], *heads, *rows[1:], n)
        indices = np.full(shape, 2**31 - 1 if case.seed % 2 else -5)
        for span in self.spans:
            where = _rows_of_lists(span)
            slots = span.n_k if case.packed and not case.paged else self.slots
            drawn = rng.integers(-1, slots, indices[where].shape) if slots else np.full(indices[where].shape, -1)
            indices[where] = np.where(rng.random(drawn.shape) < 0.1, -1, drawn)
        self.tables["kv_indices"] = self._table(indices)
        return indices

    def _draw_pages(self, n_k: Array, starts_k: Array) -> None:
        """Sample more pages than needed, in random order; entries past a sequence's pages are garbage."""
        size, batch = self.page_size, self.case.batch
        used = -(-n_k // size)
        columns = max(1, -(-self.case.seqlen_k // size))
        self.num_pages = int(used.sum()) + 3
        order = self.rng.permutation(self.num_pages)
        self.block_table = np.full((batch, columns), 2**31 - 1 if self.case.seed % 2 else -5, np.int64)
        taken = 0
        for b in range(batch):
            self.block_table[b, : used[b]] = order[taken : taken + used[b]]
            taken += int(used[b])
        self.slots = columns * size
        self.tables["block_table"] = self.block_table
        if self.case.packed and self.case.seed % 2:
            self.tables["cu_seqlens_k"] = starts_k  # with pages it only gives the lengths
        else:
            self.tables["seqused_k"] = n_k

    def _places(self, b: int, sizes: tuple[int, ...], starts_q: Array, starts_k: Array) -> tuple[Any, Any]:
        """Return the indices of a sequence's rows in q and of its key slots in k."""
        n_q, n_k, *_ = sizes
        rows: Any = slice(int(starts_q[b]), int(starts_q[b]) + n_q) if self.case.packed else (b, slice(0, n_q))
        if self.case.paged:
            places = np.arange(n_k)
            slots: Any = (self.block_table[b][places // self.page_size], places % self.page_size)
        elif self.case.packed:
            slots = slice(int(starts_k[b]), int(starts_k[b]) + n_k)
        else:
            slots = (b, slice(0, n_k))
        return rows, slots

    def _draw_qkv(self, stale: float) -> tuple[Array, Array, Array]:
        """Sample float64 values in the shapes of the call."""
        case = self.case
        lead_q = (self.total_q,) if case.packed else (case.batch, case.seqlen_q)
        if case.paged:
            lead_k: tuple[int, ...] = (self.num_pages, self.page_size)
        else:
            lead_k = (self.slots,) if case.packed else (case.batch, case.seqlen_k)
        q = np.full((*lead_q, case.nheads, case.head_dim), stale)
        k = np.full((*lead_k, case.nheads_kv, case.head_dim), stale)
        v = np.full((*lead_k, case.nheads_kv, case.head_dim_v), stale)
        for span in self.spans:
            q[span.rows] = self._queries((span.n_q, case.nheads, case.head_dim))
            seen = np.any(visible(case, span, self.kv_indices), axis=1).T[..., None]
            if case.layout in ("expanded", "any"):  # heads may share memory
                seen = seen.any(axis=1, keepdims=True)
            k[span.slots] = np.where(seen, self._keys((span.n_k, case.nheads_kv, case.head_dim)), stale)
            v[span.slots] = np.where(seen, self.rng.standard_normal((span.n_k, case.nheads_kv, case.head_dim_v)), stale)
        return q, k, v

    def _quantise(self, x: Array) -> tuple[Array, Any]:
        """Return the stored values and the scales of keys or values. The scales of stale slots are NaN."""
        stored, scale = quantise(x, self.case.stored)
        if self.case.scales != "slots":
            heads = (self.case.nheads_kv,)
            shape = {"one": (), "heads": heads, "sequences": (self.case.batch, *heads)}[self.case.scales]
            largest = scale[np.isfinite(scale)].max(initial=0.0)
            scale = np.asarray(largest * self.rng.uniform(0.5, 1.0, shape), np.float32)
            return stored.view(numpy_dtype(self.case.stored)), float(scale) if shape == () else self._aside(scale)
        scale = scale[None] if self.case.packed and not self.case.paged else scale
        return stored.view(numpy_dtype(self.case.stored)), self._aside(scale)

    def _queries(self, shape: tuple[int, ...]) -> Array:
        values = self.rng.standard_normal(shape)
        if self.case.content == "huge":
            return values * 150
        if self.case.content in ("all_negative", "rising", "falling"):
            return np.abs(values) * 8
        return values

    def _keys(self, shape: tuple[int, ...]) -> Array:
        values = self.rng.standard_normal(shape)
        ramp = np.linspace(0, 3, max(1, shape[0]))[: shape[0], None, None]
        content = self.case.content
        if content == "equal_keys":
            values[:] = values[:1]
        elif content == "all_negative":
            values = -np.abs(values) * 3
        elif content == "rising":
            values = ramp + 0 * values
        elif content == "falling":
            values = 3 - ramp + 0 * values
        return values

    def _place(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        kind = numpy_dtype(self.case.stored or self.case.dtype)
        if self.case.layout == "packed":
            if not self.case.stored and q.shape[:-2] == k.shape[:-2] and q.shape[-1] == v.shape[-1]:
                whole = self.embed(np.concatenate([q, k, v], axis=-2).astype(self.dtype), "bshd")
                n, n_kv = q.shape[-2], k.shape[-2]
                return whole[..., :n, :], whole[..., n : n + n_kv, :], whole[..., n + n_kv :, :]
            pair = self.embed(np.concatenate([k, v], axis=-1).astype(kind), "bshd")
            return self.embed(q.astype(self.dtype), "bshd"), pair[..., : k.shape[-1]], pair[..., k.shape[-1] :]
        if self.case.layout == "any":
            return self._any(q), self._any(k, kind), self._any(v, kind)
        if self.case.layout == "expanded":
            k, v = (np.broadcast_to(self.embed(x[..., :1, :].astype(kind), "bshd"), x.shape) for x in (k, v))
            return self.embed(q.astype(self.dtype), "bshd"), k, v
        q = self.embed(q.astype(self.dtype), self.case.layout)
        k, v = (self.embed(x.astype(kind), self.case.layout) for x in (k, v))
        return q, k, v

    def _any(self, x: Array, kind: Any = None) -> Array:
        """Lay an array out randomly. Sometimes all heads share memory."""
        x = x.astype(kind or self.dtype)
        if self.rng.random() < 0.2:
            return np.broadcast_to(self.embed(x[..., :1, :], "any"), x.shape)
        return self.embed(x, "any")

    def embed(self, values: Array, layout: str) -> Array:
        """Return a view with these values inside a larger buffer, and keep the buffer."""
        view, buffer = scattered(values, self.rng) if layout == "any" else embedded(values, layout)
        self.buffers.append(buffer)
        return view

    def _visible(self) -> Array:
        """Return which scores are not masked: (batch, nheads, rows, slots)."""
        seen = np.zeros((self.case.batch, self.case.nheads, self.case.seqlen_q, self.slots), bool)
        for span in self.spans:
            of_heads = visible(self.case, span, self.kv_indices)
            of_heads = np.broadcast_to(of_heads, (self.case.nheads_kv, span.n_q, span.n_k))
            seen[span.index, :, : span.n_q, : span.n_k] = np.repeat(of_heads, self.case.group, axis=0)
        return seen

    def _bias(self, stale: float) -> Array:
        case = self.case
        sizes = (case.batch, case.nheads, case.seqlen_q, self.slots)
        shape = BROADCASTS[case.bias](*sizes)
        values = self.rng.standard_normal(shape)
        if case.content == "bias_lines":
            values[self.rng.random(shape) < 0.2] = -np.inf
            values[..., 3:6, :] = -np.inf
            values[..., 10:40] = -np.inf
        full = (1,) * (4 - len(shape)) + shape
        axes = tuple(axis for axis in range(4) if full[axis] == 1)
        needed = np.broadcast_to(self._visible().any(axis=axes, keepdims=True), full).reshape(shape)
        values = np.where(needed, values, stale)
        placed = self.embed(values.astype(numpy_dtype(case.bias_dtype or case.dtype)), self.other)
        return np.broadcast_to(placed, sizes) if case.bias == "expanded" else placed

    def _mask(self) -> Array:
        case = self.case
        sizes = (case.batch, case.nheads, case.seqlen_q, self.slots)
        values = self.rng.random(BROADCASTS[case.mask](*sizes)) < 0.7
        if case.content == "mask_lines":
            values[..., 3:6, :] = False
            values[..., 10:40] = False
        placed = self.embed(values, self.other)
        return np.broadcast_to(placed, sizes) if case.mask == "expanded" else placed

    def _gradients(self) -> tuple[Array, Array | None]:
        """Sample dout and dlse, NaN in rows that belong to no sequence."""
        case = self.case
        lead = (self.total_q,) if case.packed else (case.batch, case.seqlen_q)
        dout = np.full((*lead, case.nheads, case.head_dim_v), np.nan)
        dlse = np.full((case.nheads, *lead) if case.packed else (case.batch, case.nheads, case.seqlen_q), np.nan)
        for span in self.spans:
            dout[span.rows] = self.rng.standard_normal(dout[span.rows].shape)
            where = (slice(None), span.rows) if case.packed else (span.rows[0], slice(None), span.rows[1])
            dlse[where] = self.rng.standard_normal(dlse[where].shape)
        layout = case.layout if case.layout in ("bhsd", "reversed", "last") else self.other
        placed = self._any(dout) if layout == "any" else self.embed(dout.astype(self.dtype), layout)
        return placed, self.embed(dlse.astype(self.compute), self.other) if case.dlse else None
