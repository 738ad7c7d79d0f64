// Gradient of the bias, tile by tile. dS is computed again and summed over the broadcast axes of the bias, in double
// and in a fixed order.
#pragma once
#include "backward.inl.h"

namespace anyattn {
namespace {

template <class M>
struct DbiasScratch {
    using C = typename M::C;
    TileScratch<M> tiles;
    BackwardRows<M> packed;
    double *sum;  // [key][row]; one key or one row if that axis is broadcast

    DbiasScratch(const anyattn_call &call, Arena &arena) : tiles(call, arena), packed(call, arena) {
        sum = arena.take<double>(M::score_keys * kBlockQ);
    }
};

// Tile of dbias that one task owns. An axis of stride 0 has one element, the sum over the whole axis.
struct DbiasTile {
    const anyattn_call &call;
    int64_t b, h, i0, j0;
    int64_t rows, keys;

    bool summed(int axis) const { return call.dbias.stride[axis] == 0; }
    int64_t row_step() const { return summed(2) ? 0 : 1; }
    int64_t key_step() const { return summed(3) ? 0 : kBlockQ; }
};

template <class C, int P>
ANYATTN_NOINLINE void sum_tile(double *sum, const C *ds, int64_t n, int64_t rows, int64_t key_step, int64_t row_step) {
    for (int64_t j = 0; j < n; ++j, ds += P, sum += key_step) {
        if (row_step) {
            for (int64_t x = 0; x < rows; ++x) sum[x] += double(ds[x]);
        } else {
            for (int64_t x = 0; x < rows; ++x) sum[0] += double(ds[x]);
        }
    }
}

// Adds dS of panel p and keys [j, j + n) to the sums of the tile.
template <class C, int P>
void add_panel(double *sums, const DbiasTile &tile, const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n,
               const C *ds) {
    const int64_t row = block.i0 - tile.i0 + p * P;
    block.for_runs(j, n, [&](int64_t i, int64_t slot, int64_t count) {
        double *sum = sums + (slot - tile.j0) * tile.key_step() + row * tile.row_step();
        sum_tile<C, P>(sum, ds + i * P, count, block.panel_rows(p), tile.key_step(), tile.row_step());
    });
}

// Adds dS of a block and keys [begin, end) to the sums of the tile.
template <class M>
void add_dbias(const Block<M> &block, const DbiasTile &tile, const DbiasScratch<M> &w, int64_t begin, int64_t end,
               const void *statistics) {
    using C = typename M::C;
    using Out = GradientTiles<C, M::panel>;
    const anyattn_call &call = block.call;
    pack_rows<M>(block, w.packed);
    load_statistics(block, statistics, RowStatistics<C>(w.packed.rows));
    const KeyRows k = block.keys(call.k), v = block.keys(call.v);
    TileAhead none{};
    for (int64_t j0 = begin; j0 < end && !stopped(call); j0 += M::score_keys) {
        const int64_t n = min64(M::score_keys, end - j0);
        const auto keys = M::load_keys(k, j0, n, call.head_dim, kSumDim, w.tiles.k);
        const auto values = M::load_keys(v, j0, n, call.head_dim_v, kSumDim, w.tiles.v);
        for (int p = 0; p < block.panels; ++p) {
            const typename Out::Gradients ds{w.tiles.S, w.tiles.T};  // overwrites the products
            const Range r =
                fill_gradients<M, Out>(block, w.packed, w.tiles, keys, values, p, j0, j0 + n, C(1), false, ds, none);
            add_panel(w.sum, tile, block, p, j0 + r.first, r.n, Out::from(ds, r.first).ds);
        }
    }
}

template <class C>
void write_dbias(const DbiasTile &tile, const double *sum) {
    const anyattn_array &dbias = tile.call.dbias;
    const int64_t size = dtype_size(dbias.dtype);
    const int64_t first = tile.b * dbias.stride[0] + tile.h * dbias.stride[1] + tile.j0 * dbias.stride[3];
    for (int64_t i = 0; i < tile.rows; ++i) {
        char *row = static_cast<char *>(dbias.data) + (first + (tile.i0 + i) * dbias.stride[2]) * size;
        for (int64_t j = 0; j < tile.keys; j += lanes<C>) {
            const int64_t n = min64(lanes<C>, tile.keys - j);
            typename Lanes<C>::V x{};
            for (int64_t r = 0; r < n; ++r) x[r] = C(sum[(j + r) * tile.key_step() + i * tile.row_step()]);
            store_part(row + j * size, dbias.dtype, x, n);
        }
    }
}

// Computes and writes one tile of dbias. Scratch: memory in which add_dbias computes dS.
template <class M, class Scratch>
void dbias_tile(const anyattn_call &call, int64_t bias_b, int64_t bias_h, int64_t block_q, int64_t block_k,
                void *statistics, void *memory) {
    using C = typename M::C;
    DbiasTile tile{call, bias_b, bias_h, block_q * kBlockQ, block_k * M::score_keys, 1, 1};
    if (!tile.summed(2)) tile.rows = min64(kBlockQ, call.seqlen_q - tile.i0);
    if (!tile.summed(3)) tile.keys = min64(M::score_keys, call.seqlen_k - tile.j0);
    Arena arena{static_cast<char *>(memory), 0};
    const Scratch w(call, arena);
    __builtin_memset(w.sum, 0, sizeof(double) * M::score_keys * kBlockQ);
    const int64_t b_end = tile.summed(0) ? call.batch : bias_b + 1, h_end = tile.summed(1) ? call.nheads : bias_h + 1;
    for (int64_t b = bias_b; b < b_end; ++b) {
        const Sequence s = sequence(call, b);
        const int64_t i_end = tile.summed(2) ? s.n_q : min64(s.n_q, tile.i0 + tile.rows);
        for (int64_t h = bias_h; h < h_end; ++h) {
            const int64_t rows = has_key_lists(call) ? 1 : kBlockQ;
            for (int64_t i = tile.i0; i < i_end; i += rows) {
                const Block<M> block(call, {b, h, 1, i, min64(rows, s.n_q - i)}, M::score_factor(call.scale));
                const int64_t begin = tile.summed(3) ? block.begin : block.key_at(tile.j0);
                const int64_t end = tile.summed(3) ? block.end : block.key_at(tile.j0 + tile.keys);
                if (begin < end && !stopped(call)) add_dbias<M>(block, tile, w, begin, end, statistics);
            }
        }
    }
    write_dbias<C>(tile, w.sum);
}

}  // namespace
}  // namespace anyattn
