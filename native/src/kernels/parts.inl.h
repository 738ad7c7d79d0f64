// Numbers as sums of bfloat16 parts, and their products by tile registers. Of float32, three parts lose nothing; of
// float16, two. A product of two numbers is the sum of the products of their parts, without those products that are
// smaller than a rounding of the result.
#pragma once
#include "tile_products.inl.h"

namespace anyattn {
namespace {

// Products of parts A[a] and B[b], the smallest first, so that their sum loses less.
template <int Parts>
struct PartProducts;

template <>
struct PartProducts<2> {
    static constexpr int count = 4, a[] = {1, 1, 0, 0}, b[] = {1, 0, 1, 0};
};

template <>
struct PartProducts<3> {
    static constexpr int count = 6, a[] = {2, 1, 0, 1, 0, 0}, b[] = {0, 1, 2, 0, 1, 0};
};

// Distances in bytes between the rows, steps, tiles and parts of an operand.
struct TileStrides {
    int64_t row, step, next, part;
};

// N tiles C without gaps = the sum over `steps` steps and all products of parts but the `Skip` smallest.
template <int Parts, int Skip, int N>
ANYATTN_NOINLINE void multiply_parts(const char *a, const TileStrides &as, const char *b, const TileStrides &bs,
                                     int64_t steps, char *c) {
    using Products = PartProducts<Parts>;
    tile::zero<0>();
    if constexpr (N > 1) tile::zero<1>();
    if constexpr (N > 2) tile::zero<2>();
    if constexpr (N > 3) tile::zero<3>();
    for (int x = Skip; x < Products::count; ++x) {
        const char *pa = a + Products::a[x] * as.part, *pb = b + Products::b[x] * bs.part;
        for (int64_t s = 0; s < steps; ++s, pa += as.step, pb += bs.step) {
            tile::load<6>(pb, kRow);
            tile::load_once<4>(pa, as.row);
            tile::multiply<0, 4, 6>();
            if constexpr (N > 1) {
                tile::load_once<5>(pa + as.next, as.row);
                tile::multiply<1, 5, 6>();
            }
            if constexpr (N > 2) {
                tile::load_once<4>(pa + 2 * as.next, as.row);
                tile::multiply<2, 4, 6>();
            }
            if constexpr (N > 3) {
                tile::load_once<5>(pa + 3 * as.next, as.row);
                tile::multiply<3, 5, 6>();
            }
        }
    }
    tile::store<0>(c, kRow);
    if constexpr (N > 1) tile::store<1>(c + kTileBytes, kRow);
    if constexpr (N > 2) tile::store<2>(c + 2 * kTileBytes, kRow);
    if constexpr (N > 3) tile::store<3>(c + 3 * kTileBytes, kRow);
}

// Distances in bytes between the parts of the operands of a WeightedUnit.
struct UnitParts {
    int64_t weights, rows;
};

constexpr int64_t kSumsRow = 2 * kRow;  // bytes of a row of sum_units

// c[32 keys][16 N columns] = the sum over units and all products of parts but the `Skip` smallest. weights, rows: offsets
// of the first key and column.
template <int Parts, int Skip, int N>
ANYATTN_NOINLINE void sum_units(const WeightedUnit *units, int64_t count, const UnitParts &parts, int64_t weights,
                                int64_t rows, char *c) {
    using Products = PartProducts<Parts>;
    tile::zero<0>();
    tile::zero<2>();
    if constexpr (N > 1) {
        tile::zero<1>();
        tile::zero<3>();
    }
    for (int x = Skip; x < Products::count; ++x) {
        for (const WeightedUnit *u = units; u < units + count; ++u) {
            const char *a = u->weights + Products::a[x] * parts.weights + weights;
            const char *b = u->rows + Products::b[x] * parts.rows + rows;
            tile::load_once<4>(a, kRow);
            tile::load_once<5>(a + kTileBytes, kRow);
            tile::load<6>(b, kRow);
            tile::multiply<0, 4, 6>();
            tile::multiply<2, 5, 6>();
            if constexpr (N > 1) {
                tile::load<7>(b + kTileBytes, kRow);
                tile::multiply<1, 4, 7>();
                tile::multiply<3, 5, 7>();
            }
        }
    }
    tile::store<0>(c, kSumsRow);
    tile::store<2>(c + kSide * kSumsRow, kSumsRow);
    if constexpr (N > 1) {
        tile::store<1>(c + kRow, kSumsRow);
        tile::store<3>(c + kSide * kSumsRow + kRow, kSumsRow);
    }
}

// out[key][0 .. dim) += the sum over units, for n keys. dim: whole tiles. Sums are added by vectors: one long chain of
// tile products would lose more digits.
template <int Parts, int Skip>
ANYATTN_NOINLINE void add_part_gradients(const WeightedUnit *units, int64_t count, const UnitParts &parts, int64_t n,
                                         int64_t dim, float *out, int64_t stride) {
    alignas(64) char sums[2 * kSide * kSumsRow];
    for (int64_t key = 0; key < n; key += 2 * kSide) {
        for (int64_t d = 0; d < dim; d += 2 * kSide) {
            const bool two = dim - d > kSide;
            if (two) {
                sum_units<Parts, Skip, 2>(units, count, parts, key * kRow, d * kRow, sums);
            } else {
                sum_units<Parts, Skip, 1>(units, count, parts, key * kRow, d * kRow, sums);
            }
            for (int64_t j = key; j < min64(n, key + 2 * kSide); ++j) {
                float *to = out + j * stride + d;
                const char *from = sums + (j - key) * kSumsRow;
                store(to, load<F32>(to) + load<F32>(from));
                if (two) store(to + kSide, load<F32>(to + kSide) + load<F32>(from + kRow));
            }
        }
    }
}

// State of a thread: configured tiles. Denormals stay, because results in float32 may have them.
class ConfiguredTiles {
  public:
    ConfiguredTiles() { tile::configure(); }
    ~ConfiguredTiles() { tile::release(); }
    ConfiguredTiles(const ConfiguredTiles &) = delete;
    ConfiguredTiles &operator=(const ConfiguredTiles &) = delete;
};

constexpr uint32_t kHighHalf = 0xffff0000;

// Parts of x, each in the high half: the nearest bfloat16 number to what the parts before it leave.
template <int Parts>
ANYATTN_INLINE void split_nearest(F32 x, U32 (&parts)[Parts]) {
    ANYATTN_UNROLL
    for (int i = 0; i < Parts; ++i) {
        const U32 bits = (U32)x, odd = bits >> 16 & splat(UINT32_C(1));
        parts[i] = (bits + splat(UINT32_C(0x7fff)) + odd) & splat(kHighHalf);
        x -= (F32)parts[i];
    }
}

// Parts of a weight. They are truncated, which takes fewer instructions and never overflows; the last of two is rounded.
template <int Parts>
ANYATTN_INLINE void split_weight(F32 x, U32 (&parts)[Parts]) {
    ANYATTN_UNROLL
    for (int i = 0; i < Parts; ++i) {
        const U32 half = splat(UINT32_C(0x8000));
        parts[i] = ((U32)x + (Parts == 2 && i == 1 ? half : U32{})) & splat(kHighHalf);
        x -= (F32)parts[i];
    }
}

// Parts of two vectors as pairs, each `stride` words behind the one before.
template <int Parts>
ANYATTN_INLINE void store_pairs(uint32_t *to, int64_t stride, const U32 (&low)[Parts], const U32 (&high)[Parts]) {
    ANYATTN_UNROLL
    for (int i = 0; i < Parts; ++i) store(to + i * stride, low[i] >> 16 | high[i]);
}

// Parts of one vector as bfloat16 numbers, each `stride` bytes behind the one before.
template <int Parts>
ANYATTN_INLINE void store_row(char *to, int64_t stride, const U32 (&parts)[Parts]) {
    ANYATTN_UNROLL
    for (int i = 0; i < Parts; ++i) {
        store(to + i * stride, __builtin_convertvector(parts[i] >> 16, Lanes<float>::Half));
    }
}

// Limits of what tiles multiply, as bits of floats: 2^55 and 2^-45. Sums of products of larger numbers may overflow. Where
// all numbers of a row are smaller, their lowest parts may be denormals, which tiles take for zeros.
constexpr uint32_t kMostSize = (127 + 55) << 23, kLeastSize = (127 - 45) << 23;

ANYATTN_INLINE U32 size_of(F32 x) { return (U32)x & splat(UINT32_C(0x7fffffff)); }

// Zeros in place of numbers that are infinite, NaN or larger than kMostSize.
ANYATTN_INLINE F32 moderate(F32 x) { return (F32)((U32)x & (U32)(size_of(x) <= splat(kMostSize))); }

// Rows of which tiles cannot multiply some numbers: those that are not moderate, or all of a tiny row. Vectors multiply
// these numbers. Bit i: row i.
struct ExtremeRows {
    uint64_t any, tiny;
};

// Adds row i of which all numbers are multiplied by `factor`.
ANYATTN_NOINLINE void classify(ExtremeRows *rows, int64_t i, const char *row, int32_t dtype, int64_t dim,
                               float factor) {
    U32 top{}, moderate_top{};
    for (int64_t d = 0; d < dim; d += kSide) {
        const F32 x = load_part<float>(row + d * dtype_size(dtype), dtype, dim - d) * splat(factor);
        const U32 size = size_of(x), limited = size_of(moderate(x));
        top = size > top ? size : top;
        moderate_top = limited > moderate_top ? limited : moderate_top;
    }
    uint32_t largest = 0, largest_moderate = 0;
    for (int x = 0; x < kSide; ++x) {
        largest = top[x] > largest ? top[x] : largest;
        largest_moderate = moderate_top[x] > largest_moderate ? moderate_top[x] : largest_moderate;
    }
    const bool tiny = largest_moderate != 0 && largest_moderate < kLeastSize;
    rows->any |= uint64_t(tiny || largest > kMostSize) << i;
    rows->tiny |= uint64_t(tiny) << i;
}

// Classifies n rows, at most 64, and replaces tiny ones by null, which stands for zeros.
inline ExtremeRows take_extreme(const char **rows, int32_t dtype, int64_t n, int64_t dim) {
    ExtremeRows extreme{};
    for (int64_t i = 0; i < n; ++i) {
        classify(&extreme, i, rows[i], dtype, dim, 1);
        if (extreme.tiny >> i & 1) rows[i] = nullptr;
    }
    return extreme;
}

// Numbers d to d + 15 of a row; zeros beyond its end, and of null.
ANYATTN_INLINE F32 numbers(const char *row, int64_t d, int32_t dtype, int64_t dim) {
    return row && d < dim ? load_part<float>(row + d * dtype_size(dtype), dtype, dim - d) : F32{};
}

// Zeros in place of the numbers of row i that tiles multiply.
ANYATTN_INLINE F32 extreme_numbers(const ExtremeRows &rows, int64_t i, F32 x) {
    return rows.tiny >> i & 1 ? x : (F32)((U32)x & (U32)(size_of(x) > splat(kMostSize)));
}

}  // namespace
}  // namespace anyattn
