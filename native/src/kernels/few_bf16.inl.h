// few.inl.h for bfloat16 pairs (vdpbf16ps): a key's own pairs along the head dimension, and two values put together.
#pragma once
#include "few.inl.h"
#include "mma_bf16.inl.h"

namespace anyattn {
namespace {

ANYATTN_INLINE F32 multiply_vectors(__m512i a, __m512i b, F32 acc) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

// S[j][0 .. R) = <key j, Q[0 .. R)> for 16 / R keys.
template <int R>
ANYATTN_NOINLINE void few_score_pairs(const char *const *keys, const Pair *Q, int64_t stride, int64_t dim, float *S,
                                      Ahead &ahead) {
    constexpr int K = 16 / R, G = K == 2 ? 2 : R == 1 ? 8 : 4;  // several keys for each load of Q, see few_scores
    F32 acc[16];
    const int64_t whole = dim / 32 * 32;
    ANYATTN_UNROLL
    for (int i = 0; i < K; i += G) {
        ahead.fetch(G);
        F32 sum[G][R];
        clear<float>(sum);
        const auto add = [&](int64_t d, const auto &load_key) {
            __m512i k[G];
            ANYATTN_UNROLL
            for (int g = 0; g < G; ++g) k[g] = load_key(keys[i + g] + 2 * d);
            ANYATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m512i q = _mm512_loadu_si512(Q + r * stride + d / 2);
                ANYATTN_UNROLL
                for (int g = 0; g < G; ++g) sum[g][r] = multiply_vectors(k[g], q, sum[g][r]);
            }
        };
        for (int64_t d = 0; d < whole; d += 32) add(d, [](const char *at) { return _mm512_loadu_si512(at); });
        if (whole < dim) add(whole, [&](const char *at) { return load_pairs(at, dim - whole); });
        ANYATTN_UNROLL
        for (int g = 0; g < G; ++g) {
            ANYATTN_UNROLL
            for (int r = 0; r < R; ++r) acc[(i + g) * R + r] = sum[g][r];
        }
    }
    store_sums<float, R>(S, acc);
}

// O[r][..] = alpha[r] O[r][..] + sum over n keys of P[j][r] value j[..], for R rows and N times 32 columns, of which the
// last may be fewer. Each 32 columns are two vectors: what unpacking leaves in the low and in the high halves.
template <int R, int N, bool whole>
ANYATTN_NOINLINE void few_value_pairs(const char *const *values, int64_t offset, int64_t left, const Pair *P, int64_t n,
                                      float *O, int64_t stride, const float *alpha, Ahead &ahead, int64_t every) {
    F32 acc[R][2 * N] = {};
    int64_t wait = every;
    const auto load_value = [&](int64_t j, int x) {
        const char *at = values[j] + offset + 64 * x;
        return whole ? _mm512_loadu_si512(at) : load_pairs(at, left - 32 * x);
    };
    for (int64_t j = 0; j < n; j += 2, P += panel<float>) {
        if (--wait == 0) {
            ahead.fetch(2);
            wait = every;
        }
        __m512i v[2 * N];
        ANYATTN_UNROLL
        for (int x = 0; x < N; ++x) {
            const __m512i first = load_value(j, x), second = j + 1 < n ? load_value(j + 1, x) : __m512i{};
            v[2 * x] = _mm512_unpacklo_epi16(first, second);
            v[2 * x + 1] = _mm512_unpackhi_epi16(first, second);
        }
        ANYATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            ANYATTN_UNROLL
            for (int x = 0; x < 2 * N; ++x) acc[r][x] = multiply_pairs(P[r], v[x], acc[r][x]);
        }
    }
    ANYATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        ANYATTN_UNROLL
        for (int x = 0; x < 2 * N; ++x) {
            float *o = O + r * stride + 16 * x;
            store(o, load<F32>(o) * splat(alpha[r]) + acc[r][x]);
        }
    }
}

struct FewDot : Few<float> {
    using Packed = Pair;

    static int64_t packed_size(int64_t dim) { return kFewRows<float> * round_up(dim, 32) / 2; }
    static void pack(Pair *packed, const char *const *rows, int32_t, int64_t n, int64_t dim, float factor) {
        const __m512i signs = sign_flips(factor);
        if (factor == 0) n = 0;
        for (int64_t r = 0; r < kFewRows<float>; ++r) {
            for (int64_t d = 0; d < dim; d += 32, packed += 16) {
                const __m512i q = r < n ? load_pairs(rows[r] + 2 * d, dim - d) : __m512i{};
                _mm512_storeu_si512(packed, _mm512_xor_si512(q, signs));
            }
        }
    }
    static float query_factor(double scale) { return Dot::query_factor(scale); }
    static double score_factor(double scale) { return Dot::score_factor(scale); }

    static void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Pair *q, int count, float *S,
                       V *top, TileAhead &ahead) {
        for_rows(count, [&](auto r) {
            constexpr int R = decltype(r)::value;
            for (int64_t j = 0; j < n; j += 16 / R) {
                few_score_pairs<R>(keys.rows + first + j, q, round_up(dim, 32) / 2, dim, S + j * panel, ahead.k);
            }
        });
        top[0] = highest(S, n);
    }

    static ANYATTN_INLINE void store_p(float *S, int64_t j, int c, V p0, V p1) { Dot::store_p(S, j, c, p0, p1); }

    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, const void *P, int count, float *O,
                           const float *alpha, TileAhead &ahead) {
        for_rows(count, [&](auto r) {
            constexpr int R = decltype(r)::value, N = kFewSums / R / 2;
            const int64_t every = max64(1, dim / (N * 32));
            const auto add = [&](auto groups, auto whole, int64_t d) {
                few_value_pairs<R, decltype(groups)::value, decltype(whole)::value>(
                    keys.rows + first, 2 * d, dim - d, static_cast<const Pair *>(P), n, O + d, round_up(dim, 32), alpha,
                    ahead.v, every);
            };
            int64_t d = 0;
            for (; d + N * 32 <= dim; d += N * 32) add(Int<N>(), Int<true>(), d);
            for (; d + 32 <= dim; d += 32) add(Int<1>(), Int<true>(), d);
            if (d < dim) add(Int<1>(), Int<false>(), d);
        });
    }

    static int64_t out_size(int64_t dim) { return kFewRows<float> * round_up(dim, 32); }
    // Columns back in order: of every 8, four lie in the low vector and four in the high one.
    static void unpack(char *const *rows, int32_t dtype, float *out, int64_t n, int64_t dim, const float *alpha) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        for (float *o = out; o < out + n * round_up(dim, 32); o += 32) {
            const __m512 low = _mm512_loadu_ps(o), high = _mm512_loadu_ps(o + 16);
            _mm512_storeu_ps(o, _mm512_permutex2var_ps(low, first, high));
            _mm512_storeu_ps(o + 16, _mm512_permutex2var_ps(low, second, high));
        }
        write_rows(rows, dtype, out, round_up(dim, 32), n, dim, alpha);
    }
};

}  // namespace
}  // namespace anyattn
