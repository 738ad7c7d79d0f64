// Forward pass of a block of query rows: online softmax over tiles of keys.
// Dao, "FlashAttention-2" (2023), algorithm 1.
#pragma once
#include <new>

#include "few_softmax.inl.h"

namespace anyattn {
namespace {

// A task reads about kRunBytes contiguous bytes before it moves to another address. kStateBytes keeps the state of a
// task's blocks in L2.
constexpr int64_t kRunBytes = 4096, kStateBytes = 256 * 1024;

// Intermediate results of one block.
template <class M>
struct ForwardState {
    using C = typename M::C;
    typename M::Packed *q;
    C *out, *m, *l;  // sums of values; per row: maximum, sum of weights

    static int64_t panels() { return kBlockQ / M::panel; }
    static int64_t q_size(const anyattn_call &call) { return M::packed_size(call.head_dim); }
    static int64_t out_size(const anyattn_call &call) { return M::out_size(call.head_dim_v); }

    ForwardState(const anyattn_call &call, Arena &arena) {
        q = arena.take<typename M::Packed>(q_size(call) * panels());
        out = arena.take<C>(out_size(call) * panels());
        m = arena.take<C>(kBlockQ);
        l = arena.take<C>(kBlockQ);
    }
};

template <class M>
int64_t most_blocks(const anyattn_call &call) {
    Arena arena{nullptr, 0};
    ForwardState<M>(call, arena);
    return max64(1, kStateBytes / arena.used);
}

template <class M>
int64_t most_groups(const anyattn_call &call) {
    const auto bytes = [](const anyattn_array &array, int64_t dim) { return max64(1, dim * dtype_size(array.dtype)); };
    const auto apart = [](const anyattn_array &array) { return array.stride[2] > array.stride[1]; };
    if (apart(call.k) || apart(call.v)) return 1;
    const int64_t run = kRunBytes / min64(bytes(call.k, call.head_dim), bytes(call.v, call.head_dim_v));
    return max64(1, min64(call.nheads_kv, min64(run, most_blocks<M>(call))));
}

// Scratch memory that the blocks of a task share.
template <class M>
struct ForwardScratch {
    using C = typename M::C;
    C *S, *P, *added, *keep, *registers, *alpha;  // see SoftmaxRows
    char *k, *v;
    C *k_scale, *v_scale;  // of the tile's keys; null: not quantised
    KeyRows *k_rows, *v_rows, *k_scale_rows, *v_scale_rows;
    Block<M> *blocks;
    ForwardState<M> *states;

    ForwardScratch(const anyattn_call &call, int64_t count, Arena &arena) {
        const int64_t tile = kTileKeys * M::panel;
        S = arena.take<C>(tile);
        P = M::weights_in_scores ? S : arena.take<C>(tile);
        added = has_added(call) ? arena.take<C>(tile) : nullptr;
        registers = take_registers<C>(call, arena);
        keep = call.dropout_threshold ? arena.take<C>(tile) : nullptr;
        alpha = arena.take<C>(kBlockQ);
        const int64_t keys = M::tile_keys(call, 1);
        k = arena.take<char>(M::key_buffer(call.head_dim, kSumDim, keys));
        v = arena.take<char>(M::key_buffer(call.head_dim_v, kSumKeys, keys));
        k_scale = is_quantised(call) ? arena.take<C>(keys + kScalesAfter<C>) : nullptr;
        v_scale = is_quantised(call) ? arena.take<C>(keys + kScalesAfter<C>) : nullptr;
        k_rows = arena.take<KeyRows>(count);
        v_rows = arena.take<KeyRows>(count);
        k_scale_rows = arena.take<KeyRows>(is_quantised(call) ? count : 0);
        v_scale_rows = arena.take<KeyRows>(is_quantised(call) ? count : 0);
        blocks = arena.take<Block<M>>(count);
        states = arena.take<ForwardState<M>>(count);
        for (int64_t i = 0; i < count; ++i) {
            const ForwardState<M> state(call, arena);
            if (arena.base) new (states + i) ForwardState<M>(state);
        }
    }
};

// Partial results of a block over some of its keys. Each row stores its sums of values, maximum and sum of weights.
template <class C>
struct ForwardPartial {
    C *data;
    int64_t dim;  // head_dim_v rounded up to whole vectors

    ForwardPartial(const anyattn_call &call, const void *memory)
        : data(static_cast<C *>(const_cast<void *>(memory))), dim(round_up(call.head_dim_v, lanes<C>)) {}
    static int64_t row_size(const anyattn_call &call) { return round_up(call.head_dim_v, lanes<C>) + lanes<C>; }
    C *out(int64_t r) const { return data + r * (dim + lanes<C>); }
    C &m(int64_t r) const { return out(r)[dim]; }
    C &l(int64_t r) const { return out(r)[dim + 1]; }
};

// Adds the sink to the sum of weights, sets alpha to the inverse of that sum, and writes lse if it is present.
template <class C, int P>
ANYATTN_NOINLINE void finish_rows(const ScoreBlock<C, P> &block, const C *m, C *l, C *alpha) {
    using V = typename Lanes<C>::V;
    const bool has_sink = block.call.sink.data;
    const V none{};
    // Maximum minus sink in log2 units, in double because both may be large and nearly equal.
    alignas(64) C excess[kBlockQ] = {};
    for (int r = 0; has_sink && r < block.rows; ++r) {
        const double sink = double(block.sink(r)), gap = (double(m[r]) * block.units.unit - sink) * kLog2e;
        excess[r] = sink == -infinity(0.0) ? infinity(C()) : C(gap);
    }
    for (int c = 0; c < block.rows; c += lanes<C>) {
        const V gap = load<V>(excess + c), before = load<V>(l + c);
        const V rescale = has_sink ? exp2(smaller(gap, none)) : splat(C(1));
        const V sum = has_sink ? before * rescale + exp2(smaller(-gap, none)) : before;
        store(l + c, sum);
        store(alpha + c, sum == none ? none : rescale / sum);
    }
    if (!block.call.lse.data) return;
    for (int r = 0; r < block.rows; ++r) {
        const StridedRows lse = row_values(block.call.lse, block.call, block.s, block.head(r), block.row(r));
        const double top = double(m[r]) * block.units.unit, sink = double(block.sink(r));
        const double value = l[r] == 0 ? -infinity(0.0) : (sink > top ? sink : top) + __builtin_log(double(l[r]));
        store(lse.row(0), C(value));
    }
}

template <class M>
void start(const Block<M> &block, const ForwardState<M> &state) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    const RowTable q = block.table(call.q);
    for (int p = 0; p < block.panels; ++p) {
        M::pack(state.q + p * state.q_size(call), q.row + p * M::panel, q.dtype, block.panel_rows(p), call.head_dim,
                M::query_factor(call.scale));
    }
    __builtin_memset(state.out, 0, (size_t)(block.panels * state.out_size(call) * (int64_t)sizeof(C)));
    clear_sums(state.m, state.l);
}

// Adds one tile of keys [j0, j1), panel by panel, and within a panel by score tiles.
template <class M>
void attend(const Block<M> &block, const ForwardState<M> &state, const ForwardScratch<M> &w,
            const typename M::Keys &keys, const typename M::Keys &values, int64_t j0, int64_t j1, TileAhead &next) {
    const anyattn_call &call = block.call;
    using Softmax = std::conditional_t<kIsFew<M>, FewSoftmax<M>, SoftmaxRows<M>>;
    const SoftmaxRows<M> rows{w.S, w.P, w.added, w.keep, w.registers, state.m, state.l, w.alpha, w.k_scale, w.v_scale};
    const Softmax softmax{rows};
    for (int p = 0; p < block.panels; ++p) {
        for (int64_t j = j0; j < j1; j += M::score_keys) {
            const auto [first, n, use] = visible_keys(block, p, j, min64(j + M::score_keys, j1), M::key_step);
            if (n == 0) continue;
            softmax.add_keys(block, p, keys, j0, first, n, use, state.q + p * state.q_size(call), next);
            M::accumulate(values, first - j0, n, call.head_dim_v, w.P, block.panel_rows(p),
                          state.out + p * state.out_size(call), w.alpha + p * M::panel, next);
        }
    }
}

// Writes the rows of a block: out and lse, or the partial.
template <class M>
void write_block(const Block<M> &block, const ForwardState<M> &state, typename M::C *alpha,
                 const ForwardPartial<typename M::C> *partial) {
    using C = typename M::C;
    const anyattn_call &call = block.call;
    RowTable out;
    if (partial) {
        out.dtype = dtype_of<C>;
        for (int r = 0; r < block.rows; ++r) {
            partial->m(r) = state.m[r];
            partial->l(r) = state.l[r];
            out.row[r] = reinterpret_cast<char *>(partial->out(r));
        }
    } else {
        finish_rows(block, state.m, state.l, alpha);
        out = block.table(call.out);
    }
    for (int p = 0; p < block.panels; ++p) {
        M::unpack(out.row + p * M::panel, out.dtype, state.out + p * state.out_size(call), block.panel_rows(p),
                  call.head_dim_v, partial ? nullptr : alpha + p * M::panel);
    }
}

// Block `index` of a set.
inline QueryBlock block_of(const anyattn_call &call, const BlockSet &set, int64_t index) {
    const QueryBlock &first = set.first;
    const int64_t h = first.h + index / set.shared() * (call.nheads / call.nheads_kv) + index % set.heads;
    const int64_t skipped = index / set.heads % set.row_blocks * kBlockQ;
    return {first.b, h, first.heads, first.i0 + skipped, min64(kBlockQ / first.heads, first.rows - skipped)};
}

template <class M>
void forward_blocks(const anyattn_call &call, const BlockSet &set, int64_t begin, int64_t end, void *partial,
                    void *memory) {
    using C = typename M::C;
    Arena arena{static_cast<char *>(memory), 0};
    const ForwardScratch<M> w(call, set.count(), arena);
    for (int64_t i = 0; i < set.count(); ++i)
        start<M>(*new (w.blocks + i) Block<M>(call, block_of(call, set, i), M::score_factor(call.scale)), w.states[i]);
    for (int64_t g = 0; g < set.groups; ++g) {
        const Block<M> &block = w.blocks[g * set.shared()];
        w.k_rows[g] = block.keys(call.k);
        w.v_rows[g] = block.keys(call.v);
        if (!is_quantised(call)) continue;
        w.k_scale_rows[g] = scale_rows(call.k_scale, call, block.s, block.h_kv, block.slots);
        w.v_scale_rows[g] = scale_rows(call.v_scale, call, block.s, block.h_kv, block.slots);
    }
    M::clean(w.S);
    const int64_t tile_keys = M::tile_keys(call, w.blocks[0].rows);
    for (int64_t j0 = begin; j0 < end && !stopped(call); j0 += tile_keys) {
        const int64_t j1 = min64(j0 + tile_keys, end);
        TileAhead next = next_tile(call, w.k_rows, w.v_rows, set.groups, j1, min64(j1 + tile_keys, end));
        for (int64_t i = 0; i < set.count();) {
            const int64_t g = i / set.shared();
            if (all_hidden<M>(w.blocks + g * set.shared(), set.shared(), j0, j1)) {
                i = (g + 1) * set.shared();
                continue;
            }
            const auto keys = M::load_keys(w.k_rows[g], j0, j1 - j0, call.head_dim, kSumDim, w.k);
            const auto values = M::load_keys(w.v_rows[g], j0, j1 - j0, call.head_dim_v, kSumKeys, w.v);
            if (is_quantised(call)) {
                load_scales(w.k_scale, w.k_scale_rows[g], j0, j1 - j0);
                load_scales(w.v_scale, w.v_scale_rows[g], j0, j1 - j0);
            }
            for (; i < (g + 1) * set.shared(); ++i) attend<M>(w.blocks[i], w.states[i], w, keys, values, j0, j1, next);
        }
    }
    for (int64_t i = 0; i < set.count(); ++i) {
        const int64_t row = (w.blocks[i].h - set.first.h) * set.first.rows;
        const ForwardPartial<C> target(
            call, static_cast<C *>(partial) + (partial ? row * ForwardPartial<C>::row_size(call) : 0));
        write_block<M>(w.blocks[i], w.states[i], w.alpha, partial ? &target : nullptr);
    }
}

// Combines the maximum, the sum and the rescaled values of both partial results.
template <class M>
void merge_partial(const anyattn_call &call, const QueryBlock &rows, void *into, const void *from) {
    using C = typename M::C;
    using V = typename M::V;
    const ForwardPartial<C> a(call, into), b(call, from);
    const C factor = ScoreUnits<C>(call, M::score_factor(call.scale)).factor;
    for (int64_t r = 0; r < rows.heads * rows.rows; ++r) {
        const C m = a.m(r) > b.m(r) ? a.m(r) : b.m(r), base = m == -infinity(C()) ? 0 : m;
        const V old = exp2(splat((a.m(r) - base) * factor)), add = exp2(splat((b.m(r) - base) * factor));
        for (int64_t d = 0; d < a.dim; d += lanes<C>) {
            store(a.out(r) + d, load<V>(a.out(r) + d) * old + load<V>(b.out(r) + d) * add);
        }
        a.l(r) = a.l(r) * old[0] + b.l(r) * add[0];
        a.m(r) = m;
    }
}

template <class M>
void finish_partial(const anyattn_call &call, const QueryBlock &rows, const void *memory) {
    using C = typename M::C;
    using V = typename M::V;
    const Block<M> block(call, rows, M::score_factor(call.scale));
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
