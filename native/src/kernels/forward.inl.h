// out and lse of one block of query rows: online softmax over tiles of keys.
// Milakov and Gimelshein (2018); Dao, "FlashAttention-2" (2023), algorithm 1.
#pragma once
#include "score.inl.h"

namespace anyattn {
namespace {

template <class M>
struct ForwardScratch {
    using C = typename M::C;
    int64_t packed_size, out_size;  // of one panel
    typename M::Packed *q;
    C *out, *S, *added, *keep;
    C *m, *l, *alpha;  // per row: maximum, sum, rescale of this tile
    char *k, *v;

    ForwardScratch(const anyattn_call &call, Arena &arena) {
        const int64_t tile = kTileKeys * panel<C>;
        packed_size = M::packed_size(call.head_dim);
        out_size = M::out_size(call.head_dim_v);
        q = arena.take<typename M::Packed>(packed_size * (kBlockQ / panel<C>));
        out = arena.take<C>(out_size * (kBlockQ / panel<C>));
        S = arena.take<C>(tile);
        added = call.bias.data || call.mask.data ? arena.take<C>(tile) : nullptr;
        keep = call.dropout_threshold ? arena.take<C>(tile) : nullptr;
        m = arena.take<C>(kBlockQ);
        l = arena.take<C>(kBlockQ);
        alpha = arena.take<C>(kBlockQ);
        k = arena.take<char>(M::key_buffer(call.head_dim, kSumDim));
        v = arena.take<char>(M::key_buffer(call.head_dim_v, kSumKeys));
    }
};

// What a block's rows got from some of its keys: sums of values, maximum, sum of weights; row by row.
template <class C>
struct ForwardPartial {
    C *data;
    int64_t dim;  // whole vectors

    ForwardPartial(const anyattn_call &call, const void *memory)
        : data(static_cast<C *>(const_cast<void *>(memory))), dim(round_up(call.head_dim_v, lanes<C>)) {}
    static int64_t row_size(const anyattn_call &call) { return round_up(call.head_dim_v, lanes<C>) + lanes<C>; }
    C *out(int64_t r) const { return data + r * (dim + lanes<C>); }
    C &m(int64_t r) const { return out(r)[dim]; }
    C &l(int64_t r) const { return out(r)[dim + 1]; }
};

// S to P in place; m, l and alpha of the panel for its new maximum. Rows where nothing was seen yet stay at -inf and 0.
// Works on pairs of keys: S has a row to spare.
template <class M>
ANYATTN_NOINLINE void softmax_pass(typename M::C *S, int64_t n, int vectors, typename M::C factor,
                                   const typename M::V *top, typename M::C *keep, typename M::C *m, typename M::C *l,
                                   typename M::C *alpha) {
    using C = typename M::C;
    using V = typename M::V;
    constexpr int width = lanes<C>;
    for (int c = 0; c < vectors; ++c) {
        const V before = load<V>(m + c * width), now = larger(before, top[c] * splat(factor));
        const V base = now == splat(-infinity(C())) ? V{} : now;
        const V rescale = exp2(before - base);
        V sum0{}, sum1{};
        if (n % 2) {
            store(S + n * panel<C> + c * width, splat(-infinity(C())));
            if (keep) store(keep + n * panel<C> + c * width, V{});
        }
        for (int64_t j = 0; j < n; j += 2) {
            const int64_t at = j * panel<C> + c * width;
            V p0 = exp2(load<V>(S + at) * splat(factor) - base);
            V p1 = exp2(load<V>(S + at + panel<C>) * splat(factor) - base);
            sum0 += p0;
            sum1 += p1;
            if (keep) {
                p0 *= load<V>(keep + at);
                p1 *= load<V>(keep + at + panel<C>);
            }
            M::store_p(S, j, c, p0, p1);
        }
        store(m + c * width, now);
        store(l + c * width, load<V>(l + c * width) * rescale + (sum0 + sum1));
        store(alpha + c * width, rescale);
    }
}

// The sink joins the sum; alpha becomes what the sums of values are divided by, inverted; lse where asked for.
template <class C>
ANYATTN_NOINLINE void finish_rows(const Block<C> &block, C *m, C *l, C *alpha) {
    using V = typename Lanes<C>::V;
    alignas(64) C sink[kBlockQ];
    for (int r = 0; r < block.rows; ++r) sink[r] = r % block.per_head == 0 ? block.sink(r) : sink[r - 1];
    for (int c = block.rows; c % lanes<C>; ++c) sink[c] = 0;
    for (int c = 0; c < block.rows; c += lanes<C>) {
        const V before = load<V>(m + c), logit = load<V>(sink + c) * splat(C(kLog2e));
        const V now = larger(before, logit), base = now == splat(-infinity(C())) ? V{} : now;
        const V rescale = exp2(before - base), sum = load<V>(l + c) * rescale + exp2(logit - base);
        store(m + c, now);
        store(l + c, sum);
        store(alpha + c, sum == V{} ? V{} : rescale / sum);
    }
    if (!block.call.lse.data) return;
    for (int r = 0; r < block.rows; ++r) {
        const Rows lse = row_values(block.call.lse, block.call, block.s, block.head(r), block.row(r));
        const double value = l[r] == 0 ? -infinity(0.0) : double(m[r]) * kLn2 + __builtin_log(double(l[r]));
        store(lse.row(0), C(value));
    }
}

// out, m and l of keys [begin, end), unfinished.
template <class M>
void attend(const Block<typename M::C> &block, const ForwardScratch<M> &w, int64_t begin, int64_t end) {
    using C = typename M::C;
    using V = typename M::V;
    const anyattn_call &call = block.call;
    const RowTable q = block.table(call.q);
    for (int p = 0; p < block.panels; ++p) {
        M::pack(w.q + p * w.packed_size, q.row + p * panel<C>, q.dtype, block.panel_rows(p), call.head_dim,
                M::query_factor(call.scale));
    }
    __builtin_memset(w.out, 0, (size_t)(block.panels * w.out_size * (int64_t)sizeof(C)));
    for (int i = 0; i < kBlockQ; ++i) {
        w.m[i] = -infinity(C());
        w.l[i] = 0;
    }
    M::clean(w.S);
    const KeyRows k = key_rows(call.k, call, block.s, block.h_kv), v = key_rows(call.v, call, block.s, block.h_kv);
    for (int64_t j0 = begin; j0 < end; j0 += M::tile_keys) {
        const int64_t j1 = min64(j0 + M::tile_keys, end);
        const auto keys = M::load_keys(k, j0, j1 - j0, call.head_dim, kSumDim, w.k);
        const auto values = M::load_keys(v, j0, j1 - j0, call.head_dim_v, kSumKeys, w.v);
        const Ahead next = next_tile<M>(block, k, v, j1);
        for (int p = 0; p < block.panels; ++p) {
            const int64_t first = block.panel_begin(p, j0), n = block.panel_end(p, j1) - first, row = p * panel<C>;
            if (n <= 0) continue;
            const int rows = block.panel_rows(p);
            V top[kPanelVectors];
            for (V &x : top) x = splat(-infinity(C()));
            M::scores(keys, first - j0, n, call.head_dim, w.q + p * w.packed_size, rows, w.S, top,
                      p == 0 ? next : Ahead{});
            const C factor =
                score_tile(block, p, first, n, M::score_factor(call.scale), w.added, (C *)nullptr, w.S, top);
            if (w.keep) keep_tile(w.keep, block, p, first, n);
            softmax_pass<M>(w.S, n, block.panel_vectors(p), factor, top, w.keep, w.m + row, w.l + row, w.alpha + row);
            M::accumulate(values, first - j0, n, call.head_dim_v, w.S, rows, w.out + p * w.out_size, w.alpha + row);
        }
    }
}

template <class M>
void forward_block(const anyattn_call &call, const QueryBlock &rows, int64_t begin, int64_t end, void *partial,
                   void *memory) {
    using C = typename M::C;
    const Block<C> block(call, rows);
    Arena arena{static_cast<char *>(memory), 0};
    const ForwardScratch<M> w(call, arena);
    attend(block, w, begin, end);
    RowTable out;
    if (partial) {
        const ForwardPartial<C> target(call, partial);
        out.dtype = dtype_of<C>;
        for (int r = 0; r < block.rows; ++r) {
            target.m(r) = w.m[r];
            target.l(r) = w.l[r];
            out.row[r] = reinterpret_cast<char *>(target.out(r));
        }
    } else {
        finish_rows(block, w.m, w.l, w.alpha);
        out = block.table(call.out);
    }
    for (int p = 0; p < block.panels; ++p) {
        M::unpack(out.row + p * panel<C>, out.dtype, w.out + p * w.out_size, block.panel_rows(p), call.head_dim_v,
                  partial ? nullptr : w.alpha + p * panel<C>);
    }
}

// The maximum, sum and rescaled values of both.
template <class C>
void merge_partial(const anyattn_call &call, const QueryBlock &rows, void *into, const void *from) {
    using V = typename Lanes<C>::V;
    const ForwardPartial<C> a(call, into), b(call, from);
    for (int64_t r = 0; r < rows.heads * rows.rows; ++r) {
        const C m = a.m(r) > b.m(r) ? a.m(r) : b.m(r), base = m == -infinity(C()) ? 0 : m;
        const V old = exp2(splat(a.m(r) - base)), add = exp2(splat(b.m(r) - base));
        for (int64_t d = 0; d < a.dim; d += lanes<C>) {
            store(a.out(r) + d, load<V>(a.out(r) + d) * old + load<V>(b.out(r) + d) * add);
        }
        a.l(r) = a.l(r) * old[0] + b.l(r) * add[0];
        a.m(r) = m;
    }
}

template <class C>
void finish_partial(const anyattn_call &call, const QueryBlock &rows, const void *memory) {
    using V = typename Lanes<C>::V;
    const Block<C> block(call, rows);
    const ForwardPartial<C> partial(call, memory);
    alignas(64) C m[kBlockQ] = {}, l[kBlockQ] = {}, alpha[kBlockQ];
    for (int r = 0; r < block.rows; ++r) {
        m[r] = partial.m(r);
        l[r] = partial.l(r);
    }
    finish_rows(block, m, l, alpha);
    const RowTable out = block.table(call.out);
    const int64_t size = dtype_size(out.dtype);
    for (int r = 0; r < block.rows; ++r) {
        for (int64_t d = 0; d < call.head_dim_v; d += lanes<C>) {
            store_part(out.row[r] + d * size, out.dtype, load<V>(partial.out(r) + d) * splat(alpha[r]),
                       call.head_dim_v - d);
        }
    }
}

}  // namespace
}  // namespace anyattn
