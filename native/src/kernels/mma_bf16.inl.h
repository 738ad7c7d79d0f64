// Matrix products of bfloat16 pairs (vdpbf16ps), accumulated in float, in the shapes of mma.inl.h. A pair holds two
// neighbours along the summed axis: from one row of k, q or dout in place, or from two interleaved rows.
#pragma once
#include "mma.inl.h"

namespace anyattn {
namespace {

using Pair = int32_t;  // two bfloat16 numbers, the first one low

ANYATTN_INLINE F32 multiply_pairs(Pair a, __m512i b, F32 acc) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

ANYATTN_INLINE __m512i narrow_pair(F32 high, F32 low) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Lane i: (low[i], high[i]).
ANYATTN_INLINE __m512i pair_weights(F32 low, F32 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, narrow_pair(high, low));
}

// acc[i][c] += sum over n steps of A[i * row + t * step] * B[t][c]: A read as scalar pairs, B as vectors.
template <int M, int N>
ANYATTN_INLINE void sum_pairs(F32 (&acc)[M][N], const char *A, int64_t row, int64_t step, const Pair *B, int64_t stride,
                              int64_t n) {
    for (int64_t t = 0; t < n; ++t) {
        __m512i b[N];
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) b[c] = _mm512_loadu_si512(B + 16 * c);
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            const Pair a = load<Pair>(A + i * row);
            ANYATTN_UNROLL
            for (int c = 0; c < N; ++c) acc[i][c] = multiply_pairs(a, b[c], acc[i][c]);
        }
        A += step;
        B += stride;
    }
}

template <int M, int N>
ANYATTN_NOINLINE void multiply_key_pairs(const char *K, int64_t row, int64_t pairs, const Pair *Q, float *S, F32 *top) {
    F32 acc[M][N] = {};
    sum_pairs(acc, K, row, sizeof(Pair), Q, panel<float>, pairs);
    ANYATTN_UNROLL
    for (int c = 0; c < N; ++c) {
        F32 highest = top[c];
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            store(S + i * panel<float> + 16 * c, acc[i][c]);
            highest = larger(highest, acc[i][c]);
        }
        top[c] = highest;
    }
}

template <int M, int N>
ANYATTN_NOINLINE void add_value_pairs(const Pair *values, int64_t stride, const Pair *P, int64_t pairs, float *O,
                                      const float *alpha) {
    F32 acc[M][N] = {};
    sum_pairs(acc, (const char *)values, sizeof(Pair), stride * (int64_t)sizeof(Pair), P, panel<float>, pairs);
    ANYATTN_UNROLL
    for (int c = 0; c < N; ++c) {
        const F32 factor = alpha ? load<F32>(alpha + 16 * c) : splat(1.0f);
        ANYATTN_UNROLL
        for (int i = 0; i < M; ++i) {
            float *o = O + i * panel<float> + 16 * c;
            store(o, load<F32>(o) * factor + acc[i][c]);
        }
    }
}

template <int M, int N>
ANYATTN_NOINLINE void add_query_pairs(const Pair *P, const Pair *B, int64_t stride, int64_t pairs, float *out,
                                      int64_t out_stride) {
    F32 acc[M][N] = {};
    sum_pairs(acc, (const char *)P, panel<float> / 2 * sizeof(Pair), sizeof(Pair), B, stride, pairs);
    ANYATTN_UNROLL
    for (int i = 0; i < M; ++i) {
        ANYATTN_UNROLL
        for (int c = 0; c < N; ++c) {
            float *to = out + i * out_stride + 16 * c;
            store(to, load<F32>(to) + acc[i][c]);
        }
    }
}

// Raw bits of the first n bfloat16 numbers at p, then zeros.
ANYATTN_INLINE __m512i load_pairs(const char *p, int64_t n) {
    if (n >= 32) return _mm512_loadu_si512(p);
    const __mmask32 mask = n > 0 ? (__mmask32)((UINT64_C(1) << n) - 1) : 0;
    return _mm512_maskz_loadu_epi16(mask, p);
}

ANYATTN_INLINE __m512i widen_bits(const char *p, int64_t n) {
    const __mmask16 mask = n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}

// pairs[r / 2][d] = (row r, row r + 1) for n rows; zero where there is no row, and up to a whole vector of d.
template <class Row>
ANYATTN_INLINE void pair_rows(Pair *pairs, int64_t stride, int64_t n, int64_t dim, const Row &row) {
    for (int64_t r = 0; r < n; r += 2, pairs += stride) {
        const char *first = row(r), *second = r + 1 < n ? row(r + 1) : nullptr;
        for (int64_t d = 0; d < dim; d += 16) {
            __m512i x = widen_bits(first + 2 * d, dim - d);
            if (second) x = _mm512_or_si512(x, _mm512_slli_epi32(widen_bits(second + 2 * d, dim - d), 16));
            _mm512_storeu_si512(pairs + d, x);
        }
    }
}

ANYATTN_NOINLINE void pair_keys(Pair *pairs, int64_t stride, const KeyRows &keys, int64_t j, int64_t n, int64_t dim) {
    pair_rows(pairs, stride, n, dim, [&](int64_t r) { return keys.row(j + r); });
}

ANYATTN_NOINLINE void pair_queries(Pair *pairs, int64_t stride, const StridedRows &rows, int64_t n, int64_t dim) {
    pair_rows(pairs, stride, n, dim, [&](int64_t r) { return rows.row(r); });
}

ANYATTN_INLINE __m512i sign_flips(float factor) { return _mm512_set1_epi16(factor < 0 ? (short)0x8000 : 0); }

// Rows as columns of pairs, [d / 2][lane], every sign flipped where factor is negative; zeros where it is 0.
ANYATTN_NOINLINE void pack_pairs(Pair *packed, const char *const *rows, int64_t n, int64_t dim, float factor) {
    const __m512i signs = sign_flips(factor);
    if (factor == 0) n = 0;
    for (int c = 0; c < panel<float>; c += 16) {
        for (int64_t d = 0; d < dim; d += 32) {
            F32 r[16] = {};
            for (int x = 0; x < 16 && c + x < n; ++x) {
                r[x] = (F32)_mm512_xor_si512(load_pairs(rows[c + x] + 2 * d, dim - d), signs);
            }
            transpose<float>(r);
            ANYATTN_UNROLL
            for (int x = 0; x < 16; ++x) store(packed + (d / 2 + x) * panel<float> + c, r[x]);
        }
    }
}

// Runs n rounds of independent sums in registers, like peak_rounds; returns their floating-point operations.
ANYATTN_NOINLINE double peak_pairs(int64_t n, volatile double *sink) {
    const __m512bh pairs = (__m512bh)_mm512_set1_epi32(int(*sink));
    F32 acc[kRows][kPanelVectors], sum{};
    float start = 0;
    for_sums(acc, [&](F32 &x) { x = splat(start++); });
    for (int64_t round = 0; round < n; ++round) {
        for_sums(acc, [&](F32 &x) { x = (F32)_mm512_dpbf16_ps((__m512)x, pairs, pairs); });
    }
    for_sums(acc, [&](F32 &x) { sum += x; });
    *sink = double(sum[0]);
    return 4.0 * double(n) * kSums * lanes<float>;
}

struct FewDot;

struct Dot {
    using Few = FewDot;
    using C = float;
    using V = F32;
    using Packed = Pair;
    using Task = NoTask;

    struct Keys {
        const char *rows;
        int64_t stride;  // bytes
        Pair *pairs;
        int64_t pair_stride;
    };
    // P and dS as pairs along queries [key][32]; dS as pairs along keys [key / 2][64].
    struct Gradients {
        Pair *p, *ds, *ds_keys;
    };
    // Rows of q or dout, in pairs.
    struct Rows {
        const Pair *data;
        int64_t stride;
    };

    // See Plain.
    static constexpr int panel = Plain<float>::panel, score_keys = kKeys, key_step = 2;
    static constexpr int most_blocks = 4, most_backward_blocks = 4;
    static constexpr bool weights_in_scores = true, finds_top = true;
    static int64_t tile_keys(const anyattn_call &, int64_t) { return kKeys; }
    static ANYATTN_INLINE V weight(V x, V factor) { return exp2(x, factor); }

    static int64_t packed_size(int64_t dim) { return round_up(dim, 32) / 2 * panel; }
    static void pack(Packed *packed, const char *const *rows, int32_t, int64_t n, int64_t dim, float factor) {
        pack_pairs(packed, rows, n, dim, factor);
    }
    static void clean(float *) {}
    static int64_t out_size(int64_t dim) { return Plain<float>::out_size(dim); }
    static void unpack(char *const *rows, int32_t dtype, const float *out, int64_t n, int64_t dim,
                       const float *factors) {
        Plain<float>::unpack(rows, dtype, out, n, dim, factors);
    }
    // Only the sign of queries changes. The maximum of products times a factor > 0 is the maximum of the scores.
    static float query_factor(double scale) { return scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f; }
    static double score_factor(double scale) { return scale < 0 ? -scale : scale > 0 ? scale : 1.0; }

    static int64_t rows_bytes(int64_t dim) { return kKeys * round_up(dim, 32) * 2; }
    static int64_t key_buffer(int64_t dim, int use, int64_t) {
        const int64_t pairs = use & kSumKeys ? (kKeys / 2 + 1) * round_up(dim, 16) * (int64_t)sizeof(Pair) : 0;
        return rows_bytes(dim) + pairs;
    }

    static Keys load_keys(const KeyRows &keys, int64_t j, int64_t n, int64_t dim, int use, char *buffer) {
        Keys result{keys.row(j), keys.rows.stride, nullptr, round_up(dim, 16)};
        // Copy all other rows: rows far apart would evict each other from L1, and with an odd length a pair would reach into
        // the next row.
        const bool dense = keys.in_order() && keys.rows.stride == 2 * dim && dim % 2 == 0;
        if ((use & kSumDim) && !dense) {
            result.rows = buffer;
            result.stride = round_up(dim, 32) * 2;
            for (int64_t r = 0; r < n; ++r) {
                for (int64_t d = 0; d < dim; d += 32) {
                    _mm512_storeu_si512(buffer + r * result.stride + 2 * d,
                                        load_pairs(keys.row(j + r) + 2 * d, dim - d));
                }
            }
        }
        if (use & kSumKeys) {
            Pair *pairs = reinterpret_cast<Pair *>(buffer + rows_bytes(dim));
            pair_keys(pairs, result.pair_stride, keys, j, n, dim);
            result.pairs = pairs;
        }
        return result;
    }

    static void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Packed *q, int rows, float *S,
                       V *top, TileAhead &ahead) {
        const char *k = keys.rows + first * keys.stride;
        for_width(vectors_of<float>(rows), [&](auto width) {
            for_tiles(n, [&](auto m, int64_t j) {
                ahead.fetch(decltype(m)::value);
                multiply_key_pairs<decltype(m)::value, decltype(width)::value>(k + j * keys.stride, keys.stride,
                                                                               (dim + 1) / 2, q, S + j * panel, top);
            });
        });
    }

    // Written to row j / 2 of the tile, which was read before.
    static ANYATTN_INLINE void store_p(float *S, int64_t j, int c, V p0, V p1) {
        store(S + j / 2 * panel + 16 * c, pair_weights(p0, p1));
    }

    // Keys in pairs from `first`, which is even. A single last key must be paired with zero: its neighbour may be masked for
    // these queries, and 0 times infinity is not 0.
    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, const void *P, int rows, float *O,
                           const float *alpha, TileAhead &) {
        Pair *v = keys.pairs + first / 2 * keys.pair_stride, *last = v + n / 2 * keys.pair_stride;
        Pair *saved = keys.pairs + kKeys / 2 * keys.pair_stride;
        if (n % 2) {
            for (int64_t d = 0; d < keys.pair_stride; ++d) {
                saved[d] = last[d];
                last[d] &= 0xffff;
            }
        }
        for_width(vectors_of<float>(rows), [&](auto width) {
            for_tiles(dim, [&](auto m, int64_t d) {
                add_value_pairs<decltype(m)::value, decltype(width)::value>(
                    v + d, keys.pair_stride, static_cast<const Pair *>(P), (n + 1) / 2, O + d * panel, alpha);
            });
        });
        if (n % 2) __builtin_memcpy(last, saved, (size_t)keys.pair_stride * sizeof(Pair));
    }

    static constexpr int64_t tile_pairs = kTileKeys * panel / 2;
    static int64_t gradients_size() { return 3 * tile_pairs * (int64_t)sizeof(Pair); }
    static Gradients gradients(char *buffer) {
        Pair *p = reinterpret_cast<Pair *>(buffer);
        return {p, p + tile_pairs, p + 2 * tile_pairs};
    }
    static Gradients from(const Gradients &g, int64_t key) {
        const int64_t offset = key * panel / 2;
        return {g.p + offset, g.ds + offset, g.ds_keys + offset};
    }
    static Gradients panel_of(const Gradients &g, int) { return g; }

    static void clear(const Gradients &g, int64_t first, int64_t end) {
        if (end <= first) return;
        const Gradients part = from(g, first);
        const size_t bytes = (size_t)((end - first) * panel / 2) * sizeof(Pair);
        __builtin_memset(part.p, 0, bytes);
        __builtin_memset(part.ds, 0, bytes);
    }

    static ANYATTN_INLINE void store_gradients(const Gradients &g, int64_t j, int c, const V (&p)[2][2],
                                               const V (&ds)[2][2]) {
        ANYATTN_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int64_t at = ((j + r) * panel + c * 16) / 2;
            store(g.p + at, narrow_pair(p[r][1], p[r][0]));
            store(g.ds + at, narrow_pair(ds[r][1], ds[r][0]));
            store_p(reinterpret_cast<float *>(g.ds_keys), j, c + r, ds[0][r], ds[1][r]);
        }
    }

    static int64_t row_buffer(int64_t dim) { return kBlockQ / 2 * round_up(dim, 16) * (int64_t)sizeof(Pair); }
    static Rows load_rows(const StridedRows &rows, int64_t n, int64_t dim, char *buffer) {
        Pair *pairs = reinterpret_cast<Pair *>(buffer);
        pair_queries(pairs, round_up(dim, 16), rows, n, dim);
        return {pairs, round_up(dim, 16)};
    }

    static void accumulate_rows(const Pair *weights, int64_t n, const Rows &rows, int64_t count, int64_t dim,
                                float *out, int64_t out_stride) {
        for_vectors<float>(dim, [&](auto width, int64_t d) {
            for_tiles(n, [&](auto m, int64_t j) {
                add_query_pairs<decltype(m)::value, decltype(width)::value>(weights + j * panel / 2, rows.data + d,
                                                                            rows.stride, (count + 1) / 2,
                                                                            out + j * out_stride + d, out_stride);
            });
        });
    }
    template <class Weighted>
    static void accumulate_dk(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, float *out,
                              int64_t stride) {
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            accumulate_rows(w->gradients.ds, n, w->q, w->rows, dim, out, stride);
        }
    }
    template <class Weighted>
    static void accumulate_dv(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, float *out,
                              int64_t stride) {
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            accumulate_rows(w->gradients.p, n, w->dout, w->rows, dim, out, stride);
        }
    }
    static void accumulate_dq(const Gradients &g, const Keys &k, int64_t first, int64_t n, int64_t dim, int rows,
                              float *dq) {
        TileAhead none{};
        accumulate(k, first, n, dim, from(g, first).ds_keys, rows, dq, nullptr, none);
    }

    static double peak(int64_t n, volatile double *sink) { return peak_pairs(n, sink); }
};

template <>
struct Products<ANYATTN_BFLOAT16> {
    using M = Dot;
};

}  // namespace
}  // namespace anyattn
