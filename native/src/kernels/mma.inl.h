// Matrix products of a tile in float or double. Lanes are queries: queries are packed as columns, and keys and values
// are read in place, one broadcast number at a time. Only dK and dV have lanes along the head dimension.
// Every loop keeps its accumulators in registers and adds them to memory at the end, because a sum of sums loses fewer
// digits than one long sum. Only `Plain` and the other product classes know the layout of operands.
#pragma once
#include "load.inl.h"
#include "peak.inl.h"

namespace anyattn {
namespace {

// Keys of a tile: a multiple of every register tile's rows, and a score tile that fits 32 KiB of L1.
constexpr int kKeys = 96;
constexpr int kTileKeys = kKeys + 2;  // with a spare row, for code that works on pairs of keys

// Products in one sum along the head dimension. Short sums have smaller rounding errors.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kChain = 32;
#else
constexpr int64_t kChain = 16;  // every product is rounded too
#endif

// body(Int<M>(), i) for register tiles of M rows that cover [0, n).
template <class Body>
ANYATTN_INLINE void for_tiles(int64_t n, const Body &body) {
    int64_t i = 0;
    for (; n - i >= 6 && n - i != 8; i += 6) body(Int<6>(), i);
    for (; n - i >= 4; i += 4) body(Int<4>(), i);
    for (; n - i >= 2; i += 2) body(Int<2>(), i);
    for (; n - i >= 1; i += 1) body(Int<1>(), i);
}

template <class C>
constexpr int vectors_of(int rows) {
    return (rows + lanes<C> - 1) / lanes<C>;
}

// body(Int<N>()) for the N vectors that hold the queries of a panel, so that short blocks compute no empty vectors.
template <class Body>
ANYATTN_INLINE void for_width(int vectors, const Body &body) {
    if (vectors == 1) return body(Int<1>());
    if (vectors == 2) return body(Int<2>());
    body(Int<kPanelVectors>());
}

// body(Int<N>(), d) for groups of N vectors that cover [0, dim).
template <class C, class Body>
ANYATTN_INLINE void for_vectors(int64_t dim, const Body &body) {
    constexpr int N = kPanelVectors, width = lanes<C>;
    int64_t d = 0;
    for (; dim - d > (N - 1) * width; d += N * width) body(Int<N>(), d);
    for (; dim - d > width; d += 2 * width) body(Int<2>(), d);
    for (; dim - d > 0; d += width) body(Int<1>(), d);
}

template <class C, int M, int N>
ANYATTN_INLINE void clear(typename Lanes<C>::V (&acc)[M][N]) {
    ANYATTN_UNROLL
    for (int i = 0; i < M; ++i) {
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) acc[i][c] = typename Lanes<C>::V{};
    }
}

template <class C, int M, int N>
ANYATTN_INLINE void add_tile(typename Lanes<C>::V (&acc)[M][N], const C *S) {
    ANYATTN_UNROLL
    for (int i = 0; i < M; ++i) {
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) acc[i][c] += load<typename Lanes<C>::V>(S + i * panel<C> + c * lanes<C>);
    }
}

// S[i][lane] = <K[i], Q[lane]> for M keys; top rises to the maximum of each lane.
template <class C, int M, int N>
ANYATTN_NOINLINE void multiply_keys(const C *K, int64_t stride, int64_t dim, const C *Q, C *S,
                                    typename Lanes<C>::V *top) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int64_t chain = sizeof(C) == 8 ? dim : kChain;
    V acc[M][N];
    for (int64_t d = 0; d < dim; d += chain) {
        const int64_t n = min64(chain, dim - d);
        clear<C>(acc);
        for (int64_t x = 0; x < n; ++x) {
            V q[N];
            ANYATTN_UNROLL
            for (int c = 0; c < N; ++c) q[c] = load<V>(Q + c * width);
            ANYATTN_UNROLL
            for (int i = 0; i < M; ++i) {
                const V k = splat(K[i * stride + x]);
                ANYATTN_UNROLL
                for (int c = 0; c < N; ++c) acc[i][c] = k * q[c] + acc[i][c];
            }
            Q += panel<C>;
        }
        K += n;
        if (d > 0) add_tile<C>(acc, S);
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            ANYATTN_UNROLL
            for (int c = 0; c < N; ++c) store(S + i * panel<C> + c * width, acc[i][c]);
        }
    }
    ANYATTN_UNROLL
    for (int c = 0; c < N; ++c) {
        V highest = top[c];
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) highest = larger(highest, acc[i][c]);
        top[c] = highest;
    }
}

// O[i][lane] = alpha[lane] O[i][lane] + sum over n keys of V[j][i] P[j][lane], for M columns i of V. alpha null: 1.
template <class C, int M, int N>
ANYATTN_NOINLINE void add_values(const C *values, int64_t stride, const C *P, int64_t n, C *O, const C *alpha) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    V acc[M][N];
    clear<C>(acc);
    for (int64_t j = 0; j < n; ++j) {
        V p[N];
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) p[c] = load<V>(P + j * panel<C> + c * width);
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            const V v = splat(values[i]);
            ANYATTN_UNROLL
            for (int c = 0; c < N; ++c) acc[i][c] = v * p[c] + acc[i][c];
        }
        values += stride;
    }
    ANYATTN_UNROLL
    for (int c = 0; c < N; ++c) {
        const V factor = alpha ? load<V>(alpha + c * width) : splat(C(1));
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            C *o = O + i * panel<C> + c * width;
            store(o, load<V>(o) * factor + acc[i][c]);
        }
    }
}

// out[j][0 .. N vectors) += sum over `rows` queries of P[j][query] B[query][..], for M keys j; P panel by panel.
template <class C, int M, int N>
ANYATTN_NOINLINE void add_queries(const C *P, int64_t panel_stride, const C *B, int64_t stride, int64_t rows, C *out,
                                  int64_t out_stride) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    V acc[M][N];
    clear<C>(acc);
    for (; rows > 0; rows -= panel<C>, P += panel_stride) {
        const int64_t count = min64(rows, panel<C>);
        for (int64_t x = 0; x < count; ++x) {
            V b[N];
            ANYATTN_UNROLL
            for (int c = 0; c < N; ++c) b[c] = load<V>(B + c * width);
            ANYATTN_UNROLL
            for (int i = 0; i < M; ++i) {
                const V p = splat(P[i * panel<C> + x]);
                ANYATTN_UNROLL
                for (int c = 0; c < N; ++c) acc[i][c] = p * b[c] + acc[i][c];
            }
            B += stride;
        }
    }
    ANYATTN_UNROLL
    for (int i = 0; i < M; ++i) {
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) {
            C *to = out + i * out_stride + c * width;
            store(to, load<V>(to) + acc[i][c]);
        }
    }
}

// Returns the largest power of two that does not exceed |scale|, with the sign of scale; 0 for 0. Products with it are
// exact.
template <class C>
C power_of_two(double scale) {
    if (scale == 0) return 0;
    constexpr int limit = sizeof(C) == 4 ? 126 : 1022;
    int exponent;
    const double fraction = __builtin_frexp(scale, &exponent);  // 0.5 to 1
    exponent = exponent - 1 < -limit ? -limit : exponent - 1 > limit ? limit : exponent - 1;
    return C(__builtin_ldexp(fraction < 0 ? -1.0 : 1.0, exponent));
}

// Use of the keys of a tile: in products that sum over the head dimension, or over keys.
enum KeyUse { kSumDim = 1, kSumKeys = 2 };

template <class Compute>
struct Few;

// P (with dropout) and dS of a tile in the compute type: P lanes for each key.
template <class C, int P>
struct GradientTiles {
    struct Gradients {
        C *p, *ds;
    };

    static Gradients from(const Gradients &g, int64_t key) { return {g.p + key * P, g.ds + key * P}; }

    static void clear(const Gradients &g, int64_t first, int64_t end) {
        if (end <= first) return;
        const size_t bytes = sizeof(C) * P * (size_t)(end - first);
        __builtin_memset(g.p + first * P, 0, bytes);
        __builtin_memset(g.ds + first * P, 0, bytes);
    }

    // Rows j, j + 1 and X vectors from c on of P (with dropout) and dS.
    template <class V, int X>
    static ANYATTN_INLINE void store_gradients(const Gradients &g, int64_t j, int c, const V (&p)[2][X],
                                               const V (&ds)[2][X]) {
        ANYATTN_UNROLL
        for (int r = 0; r < 2; ++r) {
            ANYATTN_UNROLL
            for (int x = 0; x < X; ++x) {
                const int64_t at = (j + r) * P + (c + x) * lanes<C>;
                store(g.p + at, p[r][x]);
                store(g.ds + at, ds[r][x]);
            }
        }
    }
};

// Task state of products that need no state in their thread.
struct NoTask {};

template <class Compute>
struct Plain : GradientTiles<Compute, panel<Compute>> {
    using C = Compute;
    using Few = anyattn::Few<C>;  // the same for a few rows
    using V = typename Lanes<C>::V;
    using Packed = C;  // element of packed queries and of what weights dK and dV
    using Task = NoTask;  // what a thread holds while it computes

    struct Keys {
        const C *data;
        int64_t stride;
    };
    using Rows = Keys;  // of q or dout
    using Gradients = typename GradientTiles<C, anyattn::panel<C>>::Gradients;

    static constexpr int panel = anyattn::panel<C>;  // queries of a panel
    static constexpr int score_keys = kKeys;         // of a score tile
    static constexpr int key_step = 2;               // where a panel may begin in a tile of keys: multiples of this
    static constexpr int most_blocks = 4, most_backward_blocks = 4;  // that share a tile of keys
    // Whether P is stored in place of S, and whether scores() finds the maximum.
    static constexpr bool weights_in_scores = true, finds_top = true;

    static int64_t tile_keys(const anyattn_call &, int64_t) { return kKeys; }  // loaded at once in the forward pass
    // exp2(x factor), as a weight.
    static ANYATTN_INLINE V weight(V x, V factor) { return exp2(x, factor); }

    static int64_t packed_size(int64_t dim) { return round_up(dim, lanes<C>) * panel; }

    static void pack(Packed *packed, const char *const *rows, int32_t dtype, int64_t n, int64_t dim, C factor) {
        pack_panel(packed, rows, dtype, n, dim, factor);
    }
    // Returns the factor of packed queries, and the remaining factor of their products. Queries take the power
    // of two, which keeps their digits, so that a product overflows only if the score does.
    static C query_factor(double scale) { return power_of_two<C>(scale); }
    static double score_factor(double scale) { return scale == 0 ? 1.0 : scale / double(query_factor(scale)); }

    static int64_t key_buffer(int64_t dim, int, int64_t) {
        return kKeys * round_up(dim, lanes<C>) * (int64_t)sizeof(C);
    }

    // Returns the rows in place if possible, else copies, because rows far apart would evict each other from L1.
    static Keys load_keys(const KeyRows &keys, int64_t j, int64_t n, int64_t dim, int, char *buffer) {
        const bool dense = keys.in_order() && keys.rows.stride == dim * (int64_t)sizeof(C);
        if (dense && keys.rows.dtype == dtype_of<C>) return {reinterpret_cast<const C *>(keys.row(j)), dim};
        C *copy = reinterpret_cast<C *>(buffer);
        const int64_t stride = round_up(dim, lanes<C>);
        copy_keys(copy, stride, keys, j, n, dim);
        return {copy, stride};
    }

    static void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Packed *q, int rows, C *S, V *top,
                       TileAhead &ahead) {
        const C *k = keys.data + first * keys.stride;
        for_width(vectors_of<C>(rows), [&](auto width) {
            for_tiles(n, [&](auto m, int64_t j) {
                ahead.fetch(decltype(m)::value);
                multiply_keys<C, decltype(m)::value, decltype(width)::value>(k + j * keys.stride, keys.stride, dim, q,
                                                                             S + j * panel, top);
            });
        });
    }

    static void clean(C *) {}
    static int64_t out_size(int64_t dim) { return packed_size(dim); }
    static void unpack(char *const *rows, int32_t dtype, const C *out, int64_t n, int64_t dim, const C *factors) {
        unpack_panel<C, panel>(rows, dtype, out, n, dim, factors, false);
    }

    // Rows j and j + 1 of P, vector c, into the tile that add_values reads (the score tile).
    static ANYATTN_INLINE void store_p(C *S, int64_t j, int c, V p0, V p1) {
        store(S + j * panel + c * lanes<C>, p0);
        store(S + (j + 1) * panel + c * lanes<C>, p1);
    }

    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, const C *P, int rows, C *O,
                           const C *alpha, TileAhead &) {
        const C *v = keys.data + first * keys.stride;
        for_width(vectors_of<C>(rows), [&](auto width) {
            for_tiles(dim, [&](auto m, int64_t d) {
                add_values<C, decltype(m)::value, decltype(width)::value>(v + d, keys.stride, P, n, O + d * panel,
                                                                          alpha);
            });
        });
    }

    static constexpr int64_t kWeights = kBlockQ / panel * kTileKeys * panel;
    static int64_t gradients_size() { return 2 * kWeights * (int64_t)sizeof(C); }
    static Gradients gradients(char *buffer) {
        C *p = reinterpret_cast<C *>(buffer);
        return {p, p + kWeights};
    }
    static Gradients panel_of(const Gradients &g, int p) { return Plain::from(g, p * kTileKeys); }

    // Rows of q or dout as the second operand of dK and dV: whole vectors.
    static int64_t row_buffer(int64_t dim) { return kBlockQ * round_up(dim, lanes<C>) * (int64_t)sizeof(C); }

    static Rows load_rows(const StridedRows &rows, int64_t n, int64_t dim, char *buffer) {
        // Copy rows that are far apart. They would evict each other from L1, and every tile of keys reads them again.
        const bool dense = rows.stride == dim * (int64_t)sizeof(C);
        if (rows.dtype == dtype_of<C> && dim % lanes<C> == 0 && dense) {
            return {reinterpret_cast<const C *>(rows.data), rows.stride / (int64_t)sizeof(C)};
        }
        C *copy = reinterpret_cast<C *>(buffer);
        const int64_t stride = round_up(dim, lanes<C>);
        copy_rows(copy, stride, rows, n, dim);
        return {copy, stride};
    }

    // out[j] += sum over queries of weights[j][query] rows[query], for the keys of the tile.
    static void accumulate_rows(const C *weights, int64_t n, const Keys &rows, int64_t count, int64_t dim, C *out,
                                int64_t out_stride) {
        for_vectors<C>(dim, [&](auto width, int64_t d) {
            for_tiles(n, [&](auto m, int64_t j) {
                add_queries<C, decltype(m)::value, decltype(width)::value>(weights + j * panel, kTileKeys * panel,
                                                                           rows.data + d, rows.stride, count,
                                                                           out + j * out_stride + d, out_stride);
            });
        });
    }

    // For all `count` blocks, see WeightedRows.
    template <class Weighted>
    static void accumulate_dk(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, C *out, int64_t stride) {
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            accumulate_rows(w->gradients.ds, n, w->q, w->rows, dim, out, stride);
        }
    }
    template <class Weighted>
    static void accumulate_dv(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, C *out, int64_t stride) {
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            accumulate_rows(w->gradients.p, n, w->dout, w->rows, dim, out, stride);
        }
    }
    static void accumulate_dq(const Gradients &g, const Keys &k, int64_t first, int64_t n, int64_t dim, int rows,
                              C *dq) {
        TileAhead none{};
        accumulate(k, first, n, dim, g.ds + first * panel, rows, dq, nullptr, none);
    }

    static double peak(int64_t n, volatile double *sink) { return peak_rounds<C>(n, sink); }
};

template <class M>
constexpr bool is_plain = false;
template <class C>
constexpr bool is_plain<Plain<C>> = true;

// The products M that compute a dtype. An instruction set with faster products for a dtype specializes this.
template <int32_t dtype>
struct Products {
    using M = Plain<float>;
};

template <>
struct Products<ANYATTN_FLOAT64> {
    using M = Plain<double>;
};

// The products of queries of a dtype with quantised keys and values; void: those of float32.
template <int32_t dtype>
struct ByteProducts {
    using M = void;
};

}  // namespace
}  // namespace anyattn
