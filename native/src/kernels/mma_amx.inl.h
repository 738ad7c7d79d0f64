// Matrix products of bfloat16 by tile registers (Intel AMX), accumulated in float. The shapes of mma.inl.h, with panels of
// 16 queries: a score tile of 16 keys, and a tile of 16 columns of O^T, are then 1 KiB without gaps. A tile product sums
// over 32 numbers, a step: A has them in its rows, and B has them in pairs, one row for each pair.
//
//   S^T  [key][query]   A: keys as they lie in memory      B: queries, pairs along the head dimension
//   O^T  [d][query]     A: V^T [d][key]                    B: weights, pairs along keys
//   dQ^T [d][query]     A: K^T [d][key]                    B: dS, pairs along keys
//   dV   [key][d]       A: P^T [key][query]                B: rows of dout, pairs along queries
//   dK   [key][d]       A: dS^T [key][query]               B: rows of q, pairs along queries
//
// Operands that several products share stay in registers. Every C is stored as soon as it is complete.
#pragma once
#include "few.inl.h"
#include "tile_products.inl.h"

namespace anyattn {
namespace {

// The first n of 32 bfloat16 numbers at p, in pairs; of 16, widened. Zeros follow them.
ANYATTN_INLINE U32 load_words(const char *p, int64_t n) {
    if (n >= kStep) return load<U32>(p);
    alignas(64) char buffer[kVectorBytes] = {};
    load_bytes(buffer, p, 2 * n);
    return load<U32>(buffer);
}

ANYATTN_INLINE U32 load_widened(const char *p, int64_t n) {
    alignas(64) char buffer[kVectorBytes] = {};
    if (n < kSide) load_bytes(buffer, p, 2 * n);
    return __builtin_convertvector(load<Lanes<float>::Half>(n >= kSide ? p : buffer), U32);
}

// Pairs of bfloat16 numbers, to nearest even: of each lane `low` in the low half.
ANYATTN_INLINE U32 narrow_pairs(F32 low, F32 high) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    alignas(64) static constexpr uint8_t order[64] = {0,  1,  32, 33, 2,  3,  34, 35, 4,  5,  36, 37, 6,  7,  38, 39,
                                                      8,  9,  40, 41, 10, 11, 42, 43, 12, 13, 44, 45, 14, 15, 46, 47,
                                                      16, 17, 48, 49, 18, 19, 50, 51, 20, 21, 52, 53, 22, 23, 54, 55,
                                                      24, 25, 56, 57, 26, 27, 58, 59, 28, 29, 60, 61, 30, 31, 62, 63};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (U32)_mm512_permutexvar_epi8(_mm512_load_si512(order), both);
#else
    const auto rounded = [](F32 x) {
        const U32 bits = (U32)x, one = splat(UINT32_C(1));
        const U32 nearest = bits + splat(UINT32_C(0x7fff)) + (bits >> 16 & one);
        return x == x ? nearest : bits | splat(UINT32_C(0x400000));
    };
    return rounded(low) >> 16 | (rounded(high) & splat(UINT32_C(0xffff0000)));
#endif
}

// 16 bfloat16 numbers each to two places.
ANYATTN_INLINE void narrow_rows(char *first, char *second, F32 a, F32 b) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    store(first, _mm512_castsi512_si256(both));
    store(second, _mm512_extracti64x4_epi64(both, 1));
#else
    narrow_bfloat16(first, a);
    narrow_bfloat16(second, b);
#endif
}

// 2^(a b): 1.7e-7 relative, and exactly 1 for 0. Denormal results are flushed.
ANYATTN_INLINE F32 exp2_of_weight(F32 a, F32 b) {
#if defined(__AVX512DQ__)
    const F32 x = a * b, f = (F32)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 for infinities
    F32 p = splat(0.00186503376f);
    p = p * f + splat(0.00902269781f);
    p = p * f + splat(0.0557944849f);
    p = p * f + splat(0.240166605f);
    p = p * f + splat(0.693151057f);
    p = p * f + splat(1.0f);
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)x);  // times 2^floor(x)
#else
    const F32 limit = splat(128.0f), x = a * b;
    return x >= limit ? splat(infinity(0.0f)) : exp2(x);
#endif
}

// Rows 2 w and 2 w + 1 of 32 as pairs [w][16], for columns from `offset` bytes on. Null rows are zeros.
ANYATTN_INLINE void pair_rows(U32 *x, const char *const *rows, int64_t offset, int64_t left) {
    ANYATTN_UNROLL
    for (int w = 0; w < kSide; ++w) {
        const char *first = rows[2 * w], *second = rows[2 * w + 1];
        const U32 low = first ? load_widened(first + offset, left) : U32{};
        const U32 high = second ? load_widened(second + offset, left) : U32{};
        x[w] = low | high << 16;
    }
}

// Only the sign of queries changes, as in the tile products, because both share partial results.
struct FewAmx : Few<float> {
    static float query_factor(double scale) { return scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f; }
    static double score_factor(double scale) { return scale < 0 ? -scale : scale > 0 ? scale : 1.0; }
};

struct Amx {
    using Few = FewAmx;
    using C = float;
    using V = F32;
    using Packed = uint32_t;
    using Task = Tiles;

    // Rows, for scores; their columns for sums over keys, [64 keys][16 columns][step] tiles of 16 columns by 32 keys.
    struct Keys {
        const char *rows;
        int64_t stride;  // bytes
        const char *columns;
    };
    // P and dS of a block: [32 queries][64 keys] rows of 32 queries. dS of a panel as pairs along keys, [key / 2][16].
    struct Gradients {
        char *p, *ds;
        uint32_t *ds_keys;
    };
    // Rows of q or dout as pairs along queries: [32 queries][16 columns] tiles.
    struct Rows {
        const char *pairs;
    };

    // See Plain.
    static constexpr int panel = kSide, score_keys = kChunk, key_step = kStep;
    static constexpr int most_blocks = 8, most_backward_blocks = 8;
    static constexpr bool weights_in_scores = false, finds_top = false;
    static constexpr int64_t kUnitBytes = kChunk * kRow;  // of P or dS of 32 queries

    // Keys that stay in L2 while all panels of all blocks read them.
    static int64_t tile_keys(const anyattn_call &call, int64_t) {
        const int64_t dim = max64(call.head_dim, call.head_dim_v);
        return kChunk * (dim <= 128 ? 4 : dim <= 256 ? 2 : 1);
    }
    static ANYATTN_INLINE V weight(V x, V factor) { return exp2_of_weight(x, factor); }
    static float query_factor(double scale) { return Few::query_factor(scale); }
    static double score_factor(double scale) { return Few::score_factor(scale); }

    static int64_t packed_size(int64_t dim) { return steps_of(dim) * kSide * panel; }
    static void pack(Packed *packed, const char *const *rows, int32_t, int64_t n, int64_t dim, float factor) {
        const U32 signs = splat(factor < 0 ? UINT32_C(0x80008000) : UINT32_C(0));
        if (factor == 0) n = 0;
        for (int64_t d = 0; d < dim; d += kStep, packed += kSide * panel) {
            F32 r[kSide] = {};
            for (int x = 0; x < kSide && x < n; ++x) r[x] = (F32)(load_words(rows[x] + 2 * d, dim - d) ^ signs);
            transpose<float>(r);
            ANYATTN_UNROLL
            for (int x = 0; x < kSide; ++x) store(packed + x * panel, r[x]);
        }
    }

    static int64_t rows_bytes(int64_t dim, int64_t keys) { return keys * steps_of(dim) * kRow; }
    static int64_t key_buffer(int64_t dim, int use, int64_t keys) {
        return (use & kSumDim ? rows_bytes(dim, keys) : 0) + (use & kSumKeys ? keys * sides_of(dim) * kStep : 0);
    }

    // Rows are read in place if each fills whole cache lines, they are close together, and they fill whole tiles. Loading a
    // tile of other rows takes 6 times as long.
    static Keys load_keys(const KeyRows &keys, int64_t j, int64_t n, int64_t dim, int use, char *buffer) {
        const char *rows[4 * kChunk];
        keys.for_each(j, n, [&](int64_t i, const char *row) { rows[i] = row; });
        for (int64_t i = n; i < round_up(n, kStep); ++i) rows[i] = nullptr;
        Keys result{n > 0 ? rows[0] : nullptr, keys.rows.stride, nullptr};
        const bool aligned = reinterpret_cast<uintptr_t>(result.rows) % kRow == 0 && dim % kStep == 0;
        const bool whole = keys.in_order() && keys.rows.stride == 2 * dim && n % kSide == 0;
        if ((use & kSumDim) && !(aligned && whole)) {
            result.rows = buffer;
            result.stride = steps_of(dim) * kRow;
            copy_keys(buffer, rows, round_up(n, kSide), dim);
        }
        if (use & kSumKeys) {
            char *columns = buffer + (use & kSumDim ? rows_bytes(dim, kChunk) : 0);
            pack_columns(columns, rows, n, dim);
            result.columns = columns;
        }
        return result;
    }

    static ANYATTN_NOINLINE void copy_keys(char *to, const char *const *rows, int64_t n, int64_t dim) {
        for (int64_t r = 0; r < n; ++r) {
            for (int64_t d = 0; d < dim; d += kStep, to += kRow) {
                store(to, rows[r] ? load_words(rows[r] + 2 * d, dim - d) : U32{});
            }
        }
    }

    static ANYATTN_NOINLINE void pack_columns(char *to, const char *const *rows, int64_t n, int64_t dim) {
        const int64_t chunk_bytes = sides_of(dim) * 2 * kTileBytes;
        for (int64_t j = 0; j < n; j += kStep) {
            char *tiles = to + j / kChunk * chunk_bytes + j % kChunk / kStep * kTileBytes;
            for (int64_t d = 0; d < dim; d += kSide, tiles += 2 * kTileBytes) {
                U32 x[kSide];
                pair_rows(x, rows + j, 2 * d, dim - d);
                F32 r[kSide];
                ANYATTN_UNROLL
                for (int i = 0; i < kSide; ++i) r[i] = (F32)x[i];
                transpose<float>(r);
                ANYATTN_UNROLL
                for (int i = 0; i < kSide; ++i) store(tiles + i * kRow, r[i]);
            }
        }
    }

    // Computes whole tiles of keys. Rows of S beyond n hold products of zeros or of later keys.
    static void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Packed *q, int, float *S, V *,
                       TileAhead &ahead) {
        ahead.fetch(kSide);
        const char *k = keys.rows + first * keys.stride, *b = reinterpret_cast<const char *>(q);
        for (int64_t s = 0; s < steps_of(dim); s += 4) {
            with_steps(steps_of(dim) - s, [&](auto steps) {
                multiply_tiles<decltype(steps)::value>(k + s * kRow, keys.stride, kRow, kSide * keys.stride,
                                                       b + s * kTileBytes, reinterpret_cast<char *>(S), sides_of(n),
                                                       s > 0);
            });
        }
    }

    static void clean(float *) {}
    static int64_t out_size(int64_t dim) { return sides_of(dim) * kSide * panel; }
    static void unpack(char *const *rows, int32_t dtype, const float *out, int64_t n, int64_t dim,
                       const float *factors) {
        unpack_panel<float, panel>(rows, dtype, out, n, dim, factors, false);
    }

    static ANYATTN_INLINE void store_p(float *P, int64_t j, int, V p0, V p1) {
        store(P + j / 2 * panel, narrow_pairs(p0, p1));
    }

    // first: a multiple of key_step. P has rows for whole steps.
    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, float *P, int, float *O,
                           const float *alpha, TileAhead &) {
        if (alpha) rescale(O, sides_of(dim) * kSide, load<V>(alpha));
        for (int64_t j = (n + 1) / 2; j < steps_of(n) * kSide; ++j) store(P + j * panel, V{});
        const char *v = keys.columns + first / kChunk * sides_of(dim) * 2 * kTileBytes;
        v += first % kChunk / kStep * kTileBytes;
        with_steps(steps_of(n), [&](auto steps) {
            constexpr int count = decltype(steps)::value < 2 ? 1 : 2;
            multiply_tiles<count>(v, kRow, kTileBytes, 2 * kTileBytes, reinterpret_cast<const char *>(P),
                                  reinterpret_cast<char *>(O), sides_of(dim), true);
        });
    }

    // The factor is nearly always 1, because a base rises only in a row's first keys.
    static ANYATTN_NOINLINE void rescale(float *O, int64_t rows, V alpha) {
        const V one = splat(1.0f);
        if (!any_exceeds(absolute(alpha - one), V{})) return;
        for (int64_t d = 0; d < rows; ++d) store(O + d * panel, load<V>(O + d * panel) * alpha);
    }

    static constexpr int64_t kUnits = kBlockQ / kUnit;
    static int64_t gradients_size() { return 2 * kUnits * kUnitBytes + kChunk / 2 * kRow; }
    // Write zeros for panels without rows, because they share tiles with other panels.
    static Gradients gradients(char *buffer) {
        __builtin_memset(buffer, 0, 2 * kUnits * kUnitBytes);
        char *ds = buffer + kUnits * kUnitBytes;
        return {buffer, ds, reinterpret_cast<uint32_t *>(ds + kUnits * kUnitBytes)};
    }
    static Gradients from(const Gradients &g, int64_t key) {
        return {g.p + key * kRow, g.ds + key * kRow, g.ds_keys + key / 2 * panel};
    }
    static Gradients panel_of(const Gradients &g, int p) {
        const int64_t offset = p / 2 * kUnitBytes + p % 2 * (kRow / 2);
        return {g.p + offset, g.ds + offset, g.ds_keys};
    }

    static void clear(const Gradients &g, int64_t first, int64_t end) {
        for (int64_t j = first; j < end; ++j) {
            __builtin_memset(g.p + j * kRow, 0, kRow / 2);
            __builtin_memset(g.ds + j * kRow, 0, kRow / 2);
        }
    }

    static ANYATTN_INLINE void store_gradients(const Gradients &g, int64_t j, int, const V (&p)[2][1],
                                               const V (&ds)[2][1]) {
        narrow_rows(g.p + j * kRow, g.p + (j + 1) * kRow, p[0][0], p[1][0]);
        narrow_rows(g.ds + j * kRow, g.ds + (j + 1) * kRow, ds[0][0], ds[1][0]);
        store(g.ds_keys + j / 2 * panel, narrow_pairs(ds[0][0], ds[1][0]));
    }

    static int64_t row_buffer(int64_t dim) { return kUnits * sides_of(dim) * kTileBytes; }
    static Rows load_rows(const StridedRows &rows, int64_t n, int64_t dim, char *buffer) {
        char *to = buffer;
        for (int64_t i = 0; i < kBlockQ; i += kUnit) {
            const char *of_unit[kUnit];
            for (int64_t r = 0; r < kUnit; ++r) of_unit[r] = i + r < n ? rows.row(i + r) : nullptr;
            for (int64_t d = 0; d < dim; d += kSide, to += kTileBytes) {
                U32 x[kSide];
                pair_rows(x, of_unit, 2 * d, dim - d);
                ANYATTN_UNROLL
                for (int w = 0; w < kSide; ++w) store(to + w * kRow, x[w]);
            }
        }
        return {buffer};
    }

    // The units of all blocks with visible keys: weights(block), and the rows that they weight.
    template <class Weighted, class Weights>
    static void accumulate_units(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, float *out,
                                 int64_t stride, Rows Weighted::*rows, const Weights &weights) {
        WeightedUnit units[most_backward_blocks * kUnits];
        int64_t used = 0;
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            for (int64_t u = 0; u < kUnits; ++u) {
                if (!(w->panels >> 2 * u & 3)) continue;
                units[used++] = {weights(*w) + u * kUnitBytes, (w->*rows).pairs + u * sides_of(dim) * kTileBytes};
            }
        }
        add_key_gradients(units, used, n, sides_of(dim) * kSide, reinterpret_cast<char *>(out), stride * 4);
    }
    template <class Weighted>
    static void accumulate_dk(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, float *out,
                              int64_t stride) {
        accumulate_units(blocks, count, n, dim, out, stride, &Weighted::q,
                         [](const Weighted &w) { return w.gradients.ds; });
    }
    template <class Weighted>
    static void accumulate_dv(const Weighted *blocks, int64_t count, int64_t n, int64_t dim, float *out,
                              int64_t stride) {
        accumulate_units(blocks, count, n, dim, out, stride, &Weighted::dout,
                         [](const Weighted &w) { return w.gradients.p; });
    }
    static void accumulate_dq(const Gradients &g, const Keys &k, int64_t first, int64_t n, int64_t dim, int rows,
                              float *dq) {
        TileAhead none{};
        accumulate(k, first, n, dim, reinterpret_cast<float *>(from(g, first).ds_keys), rows, dq, nullptr, none);
    }

    static double peak(int64_t n, volatile double *sink) { return peak_tiles(n, sink); }
};

template <>
struct Products<ANYATTN_BFLOAT16> {
    using M = Amx;
};

}  // namespace
}  // namespace anyattn
