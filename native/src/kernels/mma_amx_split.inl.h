// Matrix products of float32 and float16 by tile registers (Intel AMX): the operands of mma_amx.inl.h, once for each part
// of their numbers, see parts.inl.h. Vectors multiply the numbers that tiles cannot multiply (ExtremeRows), for each result
// alone, so that no result depends on numbers that its own sum does not have.
#pragma once
#include "mma_amx.inl.h"
#include "parts.inl.h"

namespace anyattn {
namespace {

template <int Parts>
struct AmxSplit {
    using Few = anyattn::Few<float>;
    using C = float;
    using V = F32;
    using Packed = uint32_t;
    using Task = ConfiguredTiles;

    // Parts of rows, for scores, and of their columns, for sums over keys. extreme: of 64 rows each.
    struct Keys {
        const char *rows, *columns;
        int64_t rows_part, columns_part;  // bytes of a part
        KeyRows source;
        int64_t j;  // of row 0 in source
        ExtremeRows extreme[4];
    };
    // As in Amx, once for each part.
    struct Gradients {
        char *p, *ds;
        uint32_t *ds_keys;
    };
    struct Rows {
        const char *pairs;
        int64_t part;  // bytes
        StridedRows source;
        ExtremeRows extreme;
    };

    // See Plain.
    static constexpr int panel = kSide, score_keys = kChunk, key_step = kStep;
    static constexpr int most_blocks = 8, most_backward_blocks = 8;
    static constexpr bool weights_in_scores = false, finds_top = false;
    // Products of parts that sums leave out. Scores leave out none, because their absolute error grows with their size.
    static constexpr int kSkip = Parts == 2 ? 1 : 0;
    static constexpr int64_t kKeyPairs = kChunk / 2 * panel;  // words of a part of the weights of a score tile

    static int64_t tile_keys(const anyattn_call &call, int64_t rows) { return Amx::tile_keys(call, rows); }
    static ANYATTN_INLINE V weight(V x, V factor) {
        return x * factor >= splat(128.0f) ? splat(infinity(0.0f)) : exp2(x, factor);
    }
    static float query_factor(double scale) { return Few::query_factor(scale); }
    static double score_factor(double scale) { return Few::score_factor(scale); }

    // A packed panel: the extreme lanes, its columns as floats [d][16], and parts of [step] tiles.
    static constexpr int64_t kHead = kSide;
    static int64_t columns_size(int64_t dim) { return steps_of(dim) * kStep * panel; }
    static int64_t part_size(int64_t dim) { return steps_of(dim) * kSide * panel; }
    static int64_t packed_size(int64_t dim) { return kHead + columns_size(dim) + Parts * part_size(dim); }

    static ANYATTN_NOINLINE void pack(Packed *packed, const char *const *rows, int32_t dtype, int64_t n, int64_t dim,
                                      float factor) {
        U32 multiplied{};  // lanes that tiles multiply
        ExtremeRows extreme{};
        for (int64_t x = 0; x < n; ++x) {
            classify(&extreme, x, rows[x], dtype, dim, factor);
            multiplied[x] = extreme.any >> x & 1 ? 0 : ~UINT32_C(0);
        }
        packed[0] = uint32_t(extreme.any);
        float *columns = reinterpret_cast<float *>(packed + kHead);
        uint32_t *parts = packed + kHead + columns_size(dim);
        for (int64_t d = 0; d < steps_of(dim) * kStep; d += kSide) {
            F32 r[kSide] = {};
            if (d < dim) load_tile<float>(r, rows, d * dtype_size(dtype), dtype, n, dim - d);
            transpose<float>(r);
            for (int x = 0; x < kSide; x += 2) {
                const F32 a = r[x] * splat(factor), b = r[x + 1] * splat(factor);
                store(columns + (d + x) * panel, a);
                store(columns + (d + x + 1) * panel, b);
                U32 low[Parts], high[Parts];
                split_nearest((F32)((U32)a & multiplied), low);
                split_nearest((F32)((U32)b & multiplied), high);
                store_pairs(parts + (d + x) / 2 * panel, part_size(dim), low, high);
            }
        }
    }

    static int64_t rows_bytes(int64_t dim, int64_t keys) { return round_up(keys, kChunk) * steps_of(dim) * kRow; }
    static int64_t columns_bytes(int64_t dim, int64_t keys) { return round_up(keys, kChunk) * sides_of(dim) * kStep; }
    static int64_t key_buffer(int64_t dim, int use, int64_t keys) {
        return Parts * ((use & kSumDim ? rows_bytes(dim, keys) : 0) + (use & kSumKeys ? columns_bytes(dim, keys) : 0));
    }

    static Keys load_keys(const KeyRows &keys, int64_t j, int64_t n, int64_t dim, int use, char *buffer) {
        const char *rows[4 * kChunk];
        const int32_t dtype = keys.rows.dtype;
        keys.for_each(j, n, [&](int64_t i, const char *row) { rows[i] = row; });
        for (int64_t i = n; i < round_up(n, kStep); ++i) rows[i] = nullptr;
        char *columns = buffer + (use & kSumDim ? Parts * rows_bytes(dim, n) : 0);
        Keys result{buffer, columns, rows_bytes(dim, n), columns_bytes(dim, n), keys, j, {}};
        for (int64_t i = 0; i < n; i += kChunk) {
            result.extreme[i / kChunk] = take_extreme(rows + i, dtype, min64(kChunk, n - i), dim);
        }
        if (use & kSumDim) split_rows(buffer, result.rows_part, rows, dtype, round_up(n, kSide), dim);
        if (use & kSumKeys) split_columns(columns, result.columns_part, rows, dtype, n, dim);
        return result;
    }

    // [part][key][step] rows of whole steps.
    static ANYATTN_NOINLINE void split_rows(char *to, int64_t part, const char *const *rows, int32_t dtype, int64_t n,
                                            int64_t dim) {
        for (int64_t r = 0; r < n; ++r) {
            for (int64_t d = 0; d < steps_of(dim) * kStep; d += kSide, to += kRow / 2) {
                U32 parts[Parts];
                split_nearest(moderate(numbers(rows[r], d, dtype, dim)), parts);
                store_row(to, part, parts);
            }
        }
    }

    // Rows 2 w and 2 w + 1 of 32 as pairs [part][w][16], for columns from d on.
    static ANYATTN_INLINE void split_pairs(uint32_t *to, int64_t part, const char *const *rows, int32_t dtype,
                                           int64_t d, int64_t dim) {
        for (int w = 0; w < kSide; ++w) {
            U32 low[Parts], high[Parts];
            split_nearest(moderate(numbers(rows[2 * w], d, dtype, dim)), low);
            split_nearest(moderate(numbers(rows[2 * w + 1], d, dtype, dim)), high);
            store_pairs(to + w * kSide, part, low, high);
        }
    }

    // [part][64 keys][16 columns][step] tiles of 16 columns by 32 keys.
    static ANYATTN_NOINLINE void split_columns(char *to, int64_t part, const char *const *rows, int32_t dtype,
                                               int64_t n, int64_t dim) {
        const int64_t chunk_bytes = sides_of(dim) * 2 * kTileBytes;
        for (int64_t j = 0; j < n; j += kStep) {
            char *tiles = to + j / kChunk * chunk_bytes + j % kChunk / kStep * kTileBytes;
            for (int64_t d = 0; d < dim; d += kSide, tiles += 2 * kTileBytes) {
                alignas(64) uint32_t pairs[Parts * kSide * kSide];
                split_pairs(pairs, kSide * kSide, rows + j, dtype, d, dim);
                for (int i = 0; i < Parts; ++i) {
                    F32 r[kSide];
                    ANYATTN_UNROLL
                    for (int w = 0; w < kSide; ++w) r[w] = load<F32>(pairs + (i * kSide + w) * kSide);
                    transpose<float>(r);
                    ANYATTN_UNROLL
                    for (int w = 0; w < kSide; ++w) store(tiles + i * part + w * kRow, r[w]);
                }
            }
        }
    }

    // Of n rows of a chunk from `first` on.
    static ExtremeRows extreme_of(const Keys &keys, int64_t first, int64_t n) {
        const ExtremeRows &chunk = keys.extreme[first / kChunk];
        const uint64_t of_range = n < kChunk ? (UINT64_C(1) << n) - 1 : ~UINT64_C(0);
        return {chunk.any >> first % kChunk & of_range, chunk.tiny >> first % kChunk & of_range};
    }

    // Computes whole tiles of keys. Rows of S beyond n hold products of zeros or of later keys.
    static void scores(const Keys &keys, int64_t first, int64_t n, int64_t dim, const Packed *q, int, float *S, V *,
                       TileAhead &ahead) {
        ahead.fetch(kSide);
        const int64_t row = steps_of(dim) * kRow;
        const TileStrides a{row, kRow, kSide * row, keys.rows_part};
        const TileStrides b{kRow, kTileBytes, 0, part_size(dim) * (int64_t)sizeof(Packed)};
        const char *parts = reinterpret_cast<const char *>(q + kHead + columns_size(dim));
        with_steps(sides_of(n), [&](auto tiles) {
            multiply_parts<Parts, 0, decltype(tiles)::value>(keys.rows + first * row, a, parts, b, steps_of(dim),
                                                             reinterpret_cast<char *>(S));
        });
        const uint64_t extreme = extreme_of(keys, first, n).any;
        if (extreme || q[0]) extreme_scores(keys, first, n, extreme, dim, q, S);
    }

    // Replaces the scores of extreme keys and lanes. Sums are in chains of kChain, as in multiply_keys.
    static ANYATTN_NOINLINE void extreme_scores(const Keys &keys, int64_t first, int64_t n, uint64_t extreme,
                                                int64_t dim, const Packed *q, float *S) {
        const float *columns = reinterpret_cast<const float *>(q + kHead);
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t lanes = extreme >> i & 1 ? ~UINT32_C(0) : q[0];
            if (lanes == 0) continue;
            const char *row = keys.source.row(keys.j + first + i);
            V sum{}, chain{};
            for (int64_t d = 0; d < dim; d += kSide) {
                const F32 k = numbers(row, d, keys.source.rows.dtype, dim);
                for (int64_t x = 0; x < min64(kSide, dim - d); ++x) {
                    chain = splat(k[x]) * load<V>(columns + (d + x) * panel) + chain;
                }
                if ((d + kSide) % kChain) continue;
                sum += chain;
                chain = V{};
            }
            sum += chain;
            for (int x = 0; x < panel; ++x) {
                if (lanes >> x & 1) S[i * panel + x] = sum[x];
            }
        }
    }

    static ANYATTN_INLINE void store_p(float *P, int64_t j, int, V p0, V p1) {
        U32 low[Parts], high[Parts];
        split_weight(p0, low);
        split_weight(p1, high);
        store_pairs(reinterpret_cast<uint32_t *>(P) + j / 2 * panel, kKeyPairs, low, high);
    }

    // first: a multiple of key_step. P has rows for whole steps. The sums of a tile are added to O by vectors, see
    // add_part_gradients.
    static void accumulate(const Keys &keys, int64_t first, int64_t n, int64_t dim, float *P, int, float *O,
                           const float *alpha, TileAhead &) {
        if (alpha) Amx::rescale(O, sides_of(dim) * kSide, load<V>(alpha));
        for (int i = 0; i < Parts; ++i) {
            for (int64_t j = (n + 1) / 2; j < steps_of(n) * kSide; ++j) store(P + i * kKeyPairs + j * panel, V{});
        }
        const char *v = keys.columns + first / kChunk * sides_of(dim) * 2 * kTileBytes;
        v += first % kChunk / kStep * kTileBytes;
        const TileStrides a{kRow, kTileBytes, 2 * kTileBytes, keys.columns_part};
        const TileStrides b{kRow, kTileBytes, 0, kKeyPairs * (int64_t)sizeof(float)};
        alignas(64) float sums[4 * kSide * panel];
        for (int64_t d = 0; d < sides_of(dim); d += 4) {
            const int64_t tiles = min64(4, sides_of(dim) - d);
            with_steps(tiles, [&](auto count) {
                multiply_parts<Parts, kSkip, decltype(count)::value>(v + d * 2 * kTileBytes, a,
                                                                     reinterpret_cast<const char *>(P), b, steps_of(n),
                                                                     reinterpret_cast<char *>(sums));
            });
            float *o = O + d * kSide * panel;
            for (int64_t x = 0; x < tiles * kSide * panel; x += panel) store(o + x, load<V>(o + x) + load<V>(sums + x));
        }
        if (extreme_of(keys, first, n).any) add_extreme_keys(keys, first, n, dim, P, O);
    }

    // O[d][16] += the sum over extreme numbers v[key][d] of their products with P[key][16].
    static ANYATTN_NOINLINE void add_extreme_keys(const Keys &keys, int64_t first, int64_t n, int64_t dim,
                                                  const float *P, float *O) {
        const ExtremeRows extreme = extreme_of(keys, first, n);
        for (int64_t d = 0; d < dim; d += kSide, O += kSide * panel) {
            V sums[kSide] = {};
            for (int64_t i = 0; i < n; ++i) {
                if (!(extreme.any >> i & 1)) continue;
                const char *row = keys.source.row(keys.j + first + i);
                const F32 v = extreme_numbers(extreme, i, numbers(row, d, keys.source.rows.dtype, dim));
                const V p = weight_of_key(P, i);
                for (int x = 0; x < kSide; ++x) sums[x] = splat(v[x]) * p + sums[x];
            }
            for (int64_t x = 0; x < kSide; ++x) store(O + x * panel, load<V>(O + x * panel) + sums[x]);
        }
    }

    static ANYATTN_INLINE V weight_of_key(const float *P, int64_t key) {
        V sum{};
        for (int part = Parts - 1; part >= 0; --part) {
            const U32 pairs = load<U32>(P + part * kKeyPairs + key / 2 * panel);
            sum += (V)(key % 2 ? pairs & splat(kHighHalf) : pairs << 16);
        }
        return sum;
    }

    static void clean(float *) {}
    static int64_t out_size(int64_t dim) { return Amx::out_size(dim); }
    static void unpack(char *const *rows, int32_t dtype, const float *out, int64_t n, int64_t dim,
                       const float *factors) {
        Amx::unpack(rows, dtype, out, n, dim, factors);
    }

    // P, dS: [part][32 queries][64 keys] rows of 32 queries. ds_keys: [part][key / 2][16].
    static constexpr int64_t kUnits = Amx::kUnits, kUnitBytes = Amx::kUnitBytes, kWeightsPart = kUnits * kUnitBytes;
    static int64_t gradients_size() { return Parts * (2 * kWeightsPart + kKeyPairs * (int64_t)sizeof(float)); }
    // Write zeros for panels without rows, because they share tiles with other panels.
    static Gradients gradients(char *buffer) {
        __builtin_memset(buffer, 0, 2 * Parts * kWeightsPart);
        char *ds = buffer + Parts * kWeightsPart;
        return {buffer, ds, reinterpret_cast<uint32_t *>(ds + Parts * kWeightsPart)};
    }
    static Gradients from(const Gradients &g, int64_t key) {
        return {g.p + key * kRow, g.ds + key * kRow, g.ds_keys + key / 2 * panel};
    }
    static Gradients panel_of(const Gradients &g, int p) {
        const int64_t offset = p / 2 * kUnitBytes + p % 2 * (kRow / 2);
        return {g.p + offset, g.ds + offset, g.ds_keys};
    }

    static void clear(const Gradients &g, int64_t first, int64_t end) {
        for (int64_t i = 0; i < Parts; ++i) {
            const int64_t part = i * kWeightsPart;
            Amx::clear({g.p + part, g.ds + part, nullptr}, first, end);
        }
    }

    static ANYATTN_INLINE void store_gradients(const Gradients &g, int64_t j, int, const V (&p)[2][1],
                                               const V (&ds)[2][1]) {
        U32 low[Parts], high[Parts];
        split_weight(p[0][0], low);
        split_weight(p[1][0], high);
        store_row(g.p + j * kRow, kWeightsPart, low);
        store_row(g.p + (j + 1) * kRow, kWeightsPart, high);
        split_weight(ds[0][0], low);
        split_weight(ds[1][0], high);
        store_row(g.ds + j * kRow, kWeightsPart, low);
        store_row(g.ds + (j + 1) * kRow, kWeightsPart, high);
        store_pairs(g.ds_keys + j / 2 * panel, kKeyPairs, low, high);
    }

    static int64_t rows_part(int64_t dim) { return kUnits * sides_of(dim) * kTileBytes; }
    static int64_t row_buffer(int64_t dim) { return Parts * rows_part(dim); }
    static Rows load_rows(const StridedRows &rows, int64_t n, int64_t dim, char *buffer) {
        const char *of_block[kBlockQ] = {};
        for (int64_t i = 0; i < n; ++i) of_block[i] = rows.row(i);
        const Rows result{buffer, rows_part(dim), rows, take_extreme(of_block, rows.dtype, n, dim)};
        for (int64_t i = 0; i < kBlockQ; i += kUnit) {
            for (int64_t d = 0; d < dim; d += kSide, buffer += kTileBytes) {
                split_pairs(reinterpret_cast<uint32_t *>(buffer), result.part / 4, of_block + i, rows.dtype, d, dim);
            }
        }
        return result;
    }

    // See Amx.
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
        add_part_gradients<Parts, kSkip>(units, used, {kWeightsPart, rows_part(dim)}, n, sides_of(dim) * kSide, out,
                                         stride);
        for (const Weighted *w = blocks; w < blocks + count; ++w) {
            if ((w->*rows).extreme.any) add_extreme_rows(w->*rows, w->panels, weights(*w), n, dim, out, stride);
        }
    }

    // out[key] += the sum over extreme numbers, of the rows of visible panels, of their products with the row's weight.
    static ANYATTN_NOINLINE void add_extreme_rows(const Rows &rows, unsigned panels, const char *weights, int64_t n,
                                                  int64_t dim, float *out, int64_t stride) {
        const StridedRows &source = rows.source;
        for (int64_t j = 0; j < n; ++j, out += stride, weights += kRow) {
            for (int64_t d = 0; d < dim; d += kSide) {
                V sum{};
                for (int64_t i = 0; i < kBlockQ; ++i) {
                    if (!(rows.extreme.any >> i & 1) || !(panels >> i / panel & 1)) continue;
                    const F32 row = extreme_numbers(rows.extreme, i, numbers(source.row(i), d, source.dtype, dim));
                    sum = splat(weight_of_query(weights, i)) * row + sum;
                }
                store(out + d, load<V>(out + d) + sum);
            }
        }
    }

    static float weight_of_query(const char *weights, int64_t i) {
        float sum = 0;
        for (int part = Parts - 1; part >= 0; --part) {
            uint16_t half;
            __builtin_memcpy(&half, weights + part * kWeightsPart + i / kUnit * kUnitBytes + i % kUnit * 2,
                             sizeof half);
            sum += emulated::from_bits(uint32_t(half) << 16);
        }
        return sum;
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

    // Operations of the products, not of their parts.
    static double peak(int64_t n, volatile double *sink) { return peak_tiles(n, sink) / PartProducts<Parts>::count; }
};

template <>
struct Products<ANYATTN_FLOAT32> {
    using M = AmxSplit<3>;
};

template <>
struct Products<ANYATTN_FLOAT16> {
    using M = AmxSplit<2>;
};

}  // namespace
}  // namespace anyattn
