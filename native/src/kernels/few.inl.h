// Matrix products for a few query rows, as in decoding: lanes lie along the head dimension, every key and value is read
// once, where it lies, and asked for ahead. The speed of memory is the limit. The same shapes as mma.inl.h, except that
// scores and weights are dense: R rows for each key, where R is a power of two.
#pragma once
#include "lanes.inl.h"
#include "mma.inl.h"

namespace anyattn {
namespace {

// More rows than this fill the lanes of a vector half.
template <class C>
constexpr int kFewRows = lanes<C> / 2;
constexpr int kFewKeys = 32;  // most keys of a tile; a multiple of 2 lanes
// Registers for sums of values.
constexpr int kFewSums = kVectorBytes == 64 ? 16 : 8;

// Keys that share each load of a query.
template <class C, int R>
constexpr int kKeysOfLoad = kVectorBytes < 64 || lanes<C> / R == 2 ? 2
                            : R == 1                               ? 8
                                                                   : 4;

// S[j R + r] = <key j, Q[r]> for n keys, and for more up to a whole vector.
template <class C, int T, int R>
ANYATTN_NOINLINE void few_scores(const char *const *keys, int64_t n, const C *Q, int64_t stride, int64_t dim, C *S,
                                 Ahead &ahead) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>, K = width / R, size = dtype_size(T), G = kKeysOfLoad<C, R>;
    const int64_t whole = dim / width * width;
    for (int64_t j = 0; j < n; j += K, keys += K) {
        V acc[width];
        ANYATTN_UNROLL
        for (int i = 0; i < K; i += G) {
            V sum[G][R];
            clear<C>(sum);
            const auto add = [&](int64_t d, const auto &load_key) {
                V k[G];
                if (d * size % 64 == 0) ahead.fetch_lines(G);
                ANYATTN_UNROLL
                for (int g = 0; g < G; ++g) k[g] = load_key(keys[i + g] + d * size);
                ANYATTN_UNROLL
                for (int r = 0; r < R; ++r) {
                    V q = load<V>(Q + r * stride + d);
                    in_register(q);
                    ANYATTN_UNROLL
                    for (int g = 0; g < G; ++g) sum[g][r] = k[g] * q + sum[g][r];
                }
            };
            for (int64_t d = 0; d < whole; d += width) add(d, [](const char *at) { return load_whole(at, T, C()); });
            if (whole < dim) add(whole, [&](const char *at) { return load_part<C>(at, T, dim - whole); });
            ANYATTN_UNROLL
            for (int g = 0; g < G; ++g) {
                ANYATTN_UNROLL
                for (int r = 0; r < R; ++r) acc[(i + g) * R + r] = sum[g][r];
            }
        }
        store(S + j * R, sum_each<C>(acc));
    }
}

// O[r][x] = alpha[r] O[r][x] + acc[r][x].
template <class C, int R, int N>
ANYATTN_INLINE void add_sums(const typename Lanes<C>::V (&acc)[R][N], C *O, int64_t stride, const C *alpha) {
    ANYATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        ANYATTN_UNROLL
        for (int x = 0; x < N; ++x) {
            C *o = O + r * stride + x * lanes<C>;
            store(o, load<typename Lanes<C>::V>(o) * splat(alpha[r]) + acc[r][x]);
        }
    }
}

// O[r][..] = alpha[r] O[r][..] + sum over n keys of P[j R + r] value j[..], for R rows and N vectors (of which the last
// may have fewer than all of its `left` elements).
template <class C, int T, int R, int N, bool whole>
ANYATTN_NOINLINE void few_values(const char *const *values, int64_t offset, int64_t left, const C *P, int64_t n, C *O,
                                 int64_t stride, const C *alpha, Ahead &ahead) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>, size = dtype_size(T);
    V acc[R][N];
    clear<C>(acc);
    for (int64_t j = 0; j < n; ++j) {
        ahead.fetch_lines((N * width * size + 63) / 64);
        V v[N];
        ANYATTN_UNROLL
        for (int x = 0; x < N; ++x) {
            const char *at = values[j] + offset + x * width * size;
            v[x] = whole ? load_whole(at, T, C()) : load_part<C>(at, T, left - x * width);
        }
        ANYATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            const V p = splat(P[j * R + r]);
            ANYATTN_UNROLL
            for (int x = 0; x < N; ++x) acc[r][x] = p * v[x] + acc[r][x];
        }
    }
    add_sums<C>(acc, O, stride, alpha);
}

// body(Int<N>(), Int<whole>(), d) for groups of N, N / 2, ... 1 units that cover [0, dim). The last unit may not be whole.
template <int N, class Body>
ANYATTN_INLINE void for_groups(int64_t dim, int64_t unit, const Body &body, int64_t d = 0) {
    for (; d + N * unit <= dim; d += N * unit) body(Int<N>(), Int<true>(), d);
    if constexpr (N > 1) {
        for_groups<N / 2>(dim, unit, body, d);
    } else if (d < dim) {
        body(Int<1>(), Int<false>(), d);
    }
}

template <class Compute>
struct Few {
    using C = Compute;
    using V = typename Lanes<C>::V;
    using Packed = C;
    using Task = NoTask;
    // See Plain.
    static constexpr int panel = anyattn::panel<C>, score_keys = kFewKeys, key_step = 2;
    static constexpr int most_blocks = 4;
    static constexpr bool weights_in_scores = false;
    // About 4 KiB of keys: the next tile reaches L1 meanwhile. One row needs more keys to fill two vectors.
    static int64_t tile_keys(const anyattn_call &call, int64_t rows) {
        const int64_t bytes = call.head_dim * dtype_size(call.k.dtype);
        return rows == 1 || bytes * kFewKeys <= 4096 ? kFewKeys : kFewKeys / 2;
    }
    static ANYATTN_INLINE V weight(V x, V factor) { return exp2(x, factor); }

    // A table of rows: the last is repeated past the end.
    struct Keys {
        const char *const *rows;
        int32_t dtype;
    };

    // body(Int<R>()) for the smallest R = 1, 2, 4, ... that is not less than `rows`.
    template <int R = 1, class Body>
    static ANYATTN_INLINE void for_rows(int rows, const Body &body) {
        if constexpr (R >= kFewRows<C>) {
            body(Int<R>());
        } else {
            if (rows <= R) return body(Int<R>());
            for_rows<2 * R>(rows, body);
        }
    }

    // Quantised keys of float64 queries are computed by Plain, see with_rows, and others by the base, see computes.
    template <class Body>
    static ANYATTN_INLINE void with_few_dtype(int32_t dtype, const Body &body) {
        if constexpr (sizeof(C) == 8 || ANYATTN_HAS_BASE) {
            with_dtype<C>(dtype, body);
        } else {
            with_key_dtype<C>(dtype, body);
        }
    }

    static int64_t packed_size(int64_t dim) { return kFewRows<C> * round_up(dim, lanes<C>); }
    static void pack(C *packed, const char *const *rows, int32_t dtype, int64_t n, int64_t dim, C factor) {
        const int64_t stride = round_up(dim, lanes<C>), size = dtype_size(dtype);
        for (int64_t r = 0; r < kFewRows<C>; ++r) {
            for (int64_t d = 0; d < dim; d += lanes<C>) {
                const V q = r < n ? load_part<C>(rows[r] + d * size, dtype, dim - d) * splat(factor) : V{};
                store(packed + r * stride + d, q);
            }
        }
    }
    static C query_factor(double scale) { return Plain<C>::query_factor(scale); }
    static double score_factor(double scale) { return Plain<C>::score_factor(scale); }

    // Lanes without a row hold no products: nothing there may be NaN.
    static void clean(C *S) { __builtin_memset(S, 0, sizeof(C) * panel * (kFewKeys + lanes<C>)); }

    static int64_t key_buffer(int64_t, int, int64_t) { return (kFewKeys + lanes<C>)*(int64_t)sizeof(char *); }

    static Keys load_keys(const KeyRows &keys, int64_t j, int64_t n, int64_t, int, char *buffer) {
        const char **rows = reinterpret_cast<const char **>(buffer);
        keys.for_each(j, n, [&](int64_t r, const char *row) { rows[r] = row; });
        for (int64_t r = n; r < n + lanes<C>; ++r) rows[r] = rows[n - 1];
        return {rows, keys.rows.dtype};
    }

    template <int R>
    static ANYATTN_INLINE void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const C *q, C *S,
                                      TileAhead &ahead) {
        with_few_dtype(keys.dtype, [&](auto t) {
            few_scores<C, decltype(t)::value, R>(keys.rows + first, n, q, round_up(dim, lanes<C>), dim, S, ahead.k);
        });
    }

    // The dense weights of two vectors, from S[at] on.
    static ANYATTN_INLINE void store_p(C *S, int64_t at, V p0, V p1) {
        store(S + at, p0);
        store(S + at + lanes<C>, p1);
    }

    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, const C *P, int count, C *O,
                           const C *alpha, TileAhead &ahead) {
        const int64_t stride = round_up(dim, lanes<C>);
        for_rows(count, [&](auto r) {
            with_few_dtype(keys.dtype, [&](auto t) {
                constexpr int R = decltype(r)::value, T = decltype(t)::value;
                for_groups<kFewSums / R>(dim, lanes<C>, [&](auto vectors, auto whole, int64_t d) {
                    few_values<C, T, R, decltype(vectors)::value, decltype(whole)::value>(
                        keys.rows + first, d * dtype_size(T), dim - d, P, n, O + d, stride, alpha, ahead.v);
                });
            });
        });
    }

    static int64_t out_size(int64_t dim) { return packed_size(dim); }
    static void unpack(char *const *rows, int32_t dtype, const C *out, int64_t n, int64_t dim, const C *alpha) {
        write_rows(rows, dtype, out, round_up(dim, lanes<C>), n, dim, alpha);
    }
    // alpha null: 1.
    static void write_rows(char *const *rows, int32_t dtype, const C *out, int64_t stride, int64_t n, int64_t dim,
                           const C *alpha) {
        const int64_t size = dtype_size(dtype);
        for (int64_t r = 0; r < n; ++r) {
            const V factor = splat(alpha ? alpha[r] : C(1));
            for (int64_t d = 0; d < dim; d += lanes<C>) {
                store_part(rows[r] + d * size, dtype, load<V>(out + r * stride + d) * factor, dim - d);
            }
        }
    }
};

}  // namespace
}  // namespace anyattn
