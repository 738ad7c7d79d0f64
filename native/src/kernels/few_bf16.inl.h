// few.inl.h for bfloat16 pairs (vdpbf16ps): a key's own pairs along the head dimension, and two values put together. Keys
// and values are bfloat16, or bytes that are widened to bfloat16.
#pragma once
#include "bytes.inl.h"
#include "few.inl.h"
#include "mma_bf16.inl.h"

namespace anyattn {
namespace {

ANYATTN_INLINE F32 multiply_vectors(__m512i a, __m512i b, F32 acc) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

// The first n bytes at p, then zeros.
ANYATTN_INLINE __m512i load_some(const char *p, int64_t n) {
    if (n >= 64) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(n > 0 ? (UINT64_C(1) << n) - 1 : 0, p);
}

// The elements of 64 bytes of keys or values: as pairs of one key along the head dimension, and as pairs of two values. Both
// leave elements in another order, which depends on their size alone.
template <int T>
struct Elements {
    static constexpr int count = 32, score_vectors = 1, value_vectors = 2;
    static ANYATTN_INLINE void of_key(__m512i (&to)[1], __m512i x) { to[0] = x; }
    static ANYATTN_INLINE void of_values(__m512i *to, __m512i x, __m512i y) {
        to[0] = _mm512_unpacklo_epi16(x, y);
        to[1] = _mm512_unpackhi_epi16(x, y);
    }
    // Puts sums of values back in order: of every 8, four lie in the first vector and four in the second.
    static void order(float *o) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        const __m512 low = _mm512_loadu_ps(o), high = _mm512_loadu_ps(o + 16);
        _mm512_storeu_ps(o, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(o + 16, _mm512_permutex2var_ps(low, second, high));
    }
};

struct ByteElements {
    static constexpr int count = 64, score_vectors = 2, value_vectors = 4;
    // Of every 16, four lie in each of the four vectors.
    static void order(float *o) {
        float from[64];
        __builtin_memcpy(from, o, sizeof from);
        for (int i = 0; i < 64; ++i) o[i] = from[i % 16 / 4 * 16 + i / 16 * 4 + i % 4];
    }
};

template <int T>
struct WidenedElements : ByteElements {
    static ANYATTN_INLINE void of_key(__m512i (&to)[2], __m512i x) {
        const WidenedBytes<T> wide(x);
        to[0] = wide.first();
        to[1] = wide.second();
    }
    static ANYATTN_INLINE void of_values(__m512i *to, __m512i x, __m512i y) {
        const WidenedBytes<T> low(_mm512_unpacklo_epi8(x, y)), high(_mm512_unpackhi_epi8(x, y));
        to[0] = low.first();
        to[1] = low.second();
        to[2] = high.first();
        to[3] = high.second();
    }
};
template <>
struct Elements<ANYATTN_INT8> : WidenedElements<ANYATTN_INT8> {};
template <>
struct Elements<ANYATTN_FLOAT8_E4M3FN> : WidenedElements<ANYATTN_FLOAT8_E4M3FN> {};
template <>
struct Elements<ANYATTN_FLOAT8_E5M2> : WidenedElements<ANYATTN_FLOAT8_E5M2> {};

// S[j R + r] = <key j, Q[r]> for n keys, and for more up to a whole vector. bytes: of a key.
template <int T, int R>
ANYATTN_NOINLINE void few_score_pairs(const char *const *keys, int64_t n, const Pair *Q, int64_t stride, int64_t bytes,
                                      float *S, Ahead &ahead) {
    using E = Elements<T>;
    constexpr int X = E::score_vectors, K = 16 / R, G = X == 1 ? kKeysOfLoad<float, R> : 2;
    const int64_t whole = bytes / 64 * 64;
    for (int64_t j = 0; j < n; j += K, keys += K) {
        F32 acc[16];
        ANYATTN_UNROLL
        for (int i = 0; i < K; i += G) {
            F32 sum[G][R];
            clear<float>(sum);
            const auto add = [&](int64_t at, const auto &load_key) {
                __m512i k[G][X];
                ahead.fetch_lines(G);
                ANYATTN_UNROLL
                for (int g = 0; g < G; ++g) E::of_key(k[g], load_key(keys[i + g] + at));
                const Pair *from = Q + at / 4 * X;
                ANYATTN_UNROLL
                for (int r = 0; r < R; ++r) {
                    ANYATTN_UNROLL
                    for (int x = 0; x < X; ++x) {
                        __m512i q = _mm512_loadu_si512(from + r * stride + 16 * x);
                        in_register(q);
                        ANYATTN_UNROLL
                        for (int g = 0; g < G; ++g) sum[g][r] = multiply_vectors(k[g][x], q, sum[g][r]);
                    }
                }
            };
            for (int64_t at = 0; at < whole; at += 64) add(at, [](const char *p) { return _mm512_loadu_si512(p); });
            if (whole < bytes) add(whole, [&](const char *p) { return load_some(p, bytes - whole); });
            ANYATTN_UNROLL
            for (int g = 0; g < G; ++g) {
                ANYATTN_UNROLL
                for (int r = 0; r < R; ++r) acc[(i + g) * R + r] = sum[g][r];
            }
        }
        store(S + j * R, sum_each<float>(acc));
    }
}

// O[r][..] = alpha[r] O[r][..] + sum over n keys of P[r] value[..], for some of R rows and N vectors of values, of which the
// last may have fewer than all of its bytes. Weights are pairs of keys j and j + K, as the vectors of a few rows leave them.
template <int T, int R, int some, int N, bool whole>
ANYATTN_NOINLINE void few_value_pairs(const char *const *values, int64_t offset, int64_t left, const Pair *P, int64_t n,
                                      float *O, int64_t stride, const float *alpha, Ahead &ahead) {
    using E = Elements<T>;
    constexpr int X = E::value_vectors, K = 16 / R;
    F32 acc[some][N * X];
    clear<float>(acc);
    const auto load_value = [&](const char *value, int x) {
        const char *at = value + offset + 64 * x;
        return whole ? _mm512_loadu_si512(at) : load_some(at, left - 64 * x);
    };
    for (int64_t j = 0; j < n; j += 2 * K, values += K) {
        for (const char *const *end = values + K; values < end; ++values, P += R) {
            ahead.fetch_lines(2 * N);
            __m512i v[N * X];
            ANYATTN_UNROLL
            for (int x = 0; x < N; ++x) E::of_values(v + X * x, load_value(values[0], x), load_value(values[K], x));
            ANYATTN_UNROLL
            for (int r = 0; r < some; ++r) {
                ANYATTN_UNROLL
                for (int x = 0; x < N * X; ++x) acc[r][x] = multiply_pairs(P[r], v[x], acc[r][x]);
            }
        }
    }
    add_sums<float>(acc, O, stride, alpha);
}

// E: Elements of the dtypes of the keys.
template <class E>
struct FewPairs : Few<float> {
    using Packed = Pair;
    static constexpr bool is_wide = E::score_vectors == 1;

    template <class Body>
    static ANYATTN_INLINE void with_elements([[maybe_unused]] int32_t dtype, const Body &body) {
        if constexpr (is_wide) {
            body(Int<ANYATTN_BFLOAT16>());
        } else {
            if (dtype == ANYATTN_INT8) return body(Int<ANYATTN_INT8>());
            if (dtype == ANYATTN_FLOAT8_E4M3FN) return body(Int<ANYATTN_FLOAT8_E4M3FN>());
            body(Int<ANYATTN_FLOAT8_E5M2>());
        }
    }
    static int64_t padded(int64_t dim) { return round_up(dim, E::count); }

    static int64_t packed_size(int64_t dim) { return kFewRows<float> * padded(dim) / 2; }
    // In the order in which Elements::of_key leaves a key.
    static void pack(Pair *packed, const char *const *rows, int32_t, int64_t n, int64_t dim, float factor) {
        const __m512i signs = sign_flips(factor);
        if (factor == 0) n = 0;
        const auto load_query = [&](int64_t r, int64_t d) {
            return r < n ? _mm512_xor_si512(load_pairs(rows[r] + 2 * d, dim - d), signs) : __m512i{};
        };
        for (int64_t r = 0; r < kFewRows<float>; ++r) {
            for (int64_t d = 0; d < dim; d += E::count, packed += E::count / 2) {
                const __m512i low = load_query(r, d);
                if (is_wide) {
                    _mm512_storeu_si512(packed, low);
                } else {
                    const __m512i high = load_query(r, d + 32);
                    _mm512_storeu_si512(packed, _mm512_shuffle_i64x2(low, high, 0x88));
                    _mm512_storeu_si512(packed + 16, _mm512_shuffle_i64x2(low, high, 0xdd));
                }
            }
        }
    }
    static float query_factor(double scale) { return Dot::query_factor(scale); }
    static double score_factor(double scale) { return Dot::score_factor(scale); }

    // The table of rows, and a row of zeros.
    static int64_t table_bytes() { return round_up(Few<float>::key_buffer(0, 0, 0), 64); }
    static int64_t key_buffer(int64_t dim, int, int64_t) { return table_bytes() + round_up(2 * dim, 64); }

    template <int R>
    static ANYATTN_INLINE void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Pair *q, float *S,
                                      TileAhead &ahead) {
        with_elements(keys.dtype, [&](auto t) {
            constexpr int T = decltype(t)::value;
            few_score_pairs<T, R>(keys.rows + first, n, q, padded(dim) / 2, dim * dtype_size(T), S, ahead.k);
        });
    }

    static ANYATTN_INLINE void store_p(float *S, int64_t at, V p0, V p1) { store(S + at / 2, pair_weights(p0, p1)); }

    // A single key of a pair must be paired with zeros: another value may be masked, and 0 times infinity is not 0.
    template <int K>
    static const char *const *whole_pairs(const Keys &keys, int64_t first, int64_t n, int64_t bytes,
                                          const char **table) {
        if (n % (2 * K) == 0) return keys.rows + first;
        char *zeros = reinterpret_cast<char *>(const_cast<const char **>(keys.rows)) + table_bytes();
        __builtin_memset(zeros, 0, (size_t)bytes);
        for (int64_t j = 0; j < n; ++j) table[j] = keys.rows[first + j];
        for (int64_t j = n; j < round_up(n, 2 * K); ++j) table[j] = zeros;
        return table;
    }

    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, const void *P, int count, float *O,
                           const float *alpha, TileAhead &ahead) {
        for_rows(count, [&](auto rows) {
            with_elements(keys.dtype, [&](auto t) {
                constexpr int R = decltype(rows)::value, T = decltype(t)::value, X = E::value_vectors;
                constexpr int some = R * X > kFewSums ? kFewSums / X : R, N = kFewSums / some / X;
                const char *table[kFewKeys];
                const char *const *values = whole_pairs<16 / R>(keys, first, n, dim * dtype_size(T), table);
                for (int r = 0; r < R; r += some) {
                    for_groups<N>(dim, E::count, [&](auto groups, auto whole, int64_t d) {
                        few_value_pairs<T, R, some, decltype(groups)::value, decltype(whole)::value>(
                            values, d * dtype_size(T), (dim - d) * dtype_size(T), static_cast<const Pair *>(P) + r, n,
                            O + r * padded(dim) + d, padded(dim), alpha + r, ahead.v);
                    });
                }
            });
        });
    }

    static int64_t out_size(int64_t dim) { return kFewRows<float> * padded(dim); }
    static void unpack(char *const *rows, int32_t dtype, float *out, int64_t n, int64_t dim, const float *alpha) {
        for (float *o = out; o < out + n * padded(dim); o += E::count) E::order(o);
        write_rows(rows, dtype, out, padded(dim), n, dim, alpha);
    }
};

struct FewDot : FewPairs<Elements<ANYATTN_BFLOAT16>> {};

// Products of bfloat16 queries with bytes. Only the sign of queries changes, as for a few of them, because both share
// partial results.
struct BytesDot : Plain<float> {
    using Few = FewPairs<ByteElements>;
    static float query_factor(double scale) { return Dot::query_factor(scale); }
    static double score_factor(double scale) { return Dot::score_factor(scale); }
};

template <>
struct ByteProducts<ANYATTN_BFLOAT16> {
    using M = BytesDot;
};

}  // namespace
}  // namespace anyattn
