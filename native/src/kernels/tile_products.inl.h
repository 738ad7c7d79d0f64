// Products of many tiles, and what a thread needs for them. See mma_amx.inl.h for the operands.
#pragma once
#include "mma.inl.h"
#include "tiles.inl.h"

namespace anyattn {
namespace {

constexpr int kSide = 16, kStep = 32;  // rows of a tile; numbers of a row
constexpr int64_t kRow = 64, kTileBytes = 1024;  // bytes
constexpr int64_t kChunk = 64;  // keys of a score tile
constexpr int64_t kUnit = 32;  // queries that a product for dK or dV sums over: two panels

constexpr int64_t steps_of(int64_t n) { return (n + kStep - 1) / kStep; }
constexpr int64_t sides_of(int64_t n) { return (n + kSide - 1) / kSide; }

// C (of one tile) = or += A times the step tiles in registers 0 .. Steps - 1, A's step tiles being `step` bytes apart.
template <int Steps, int C>
ANYATTN_INLINE void multiply_tile(const char *a, int64_t row, int64_t step, char *c, bool add) {
    if (add) {
        tile::load<C>(c, kRow);
    } else {
        tile::zero<C>();
    }
    tile::load_once<4>(a, row);
    tile::multiply<C, 4, 0>();
    if constexpr (Steps > 1) {
        tile::load_once<5>(a + step, row);
        tile::multiply<C, 5, 1>();
    }
    if constexpr (Steps > 2) {
        tile::load_once<4>(a + 2 * step, row);
        tile::multiply<C, 4, 2>();
    }
    if constexpr (Steps > 3) {
        tile::load_once<5>(a + 3 * step, row);
        tile::multiply<C, 5, 3>();
    }
    tile::store<C>(c, kRow);
}

// `count` tiles C without gaps from tiles A that are `next` bytes apart, by B's step tiles, which have no gaps.
template <int Steps>
ANYATTN_NOINLINE void multiply_tiles(const char *a, int64_t row, int64_t step, int64_t next, const char *b, char *c,
                                     int64_t count, bool add) {
    tile::load<0>(b, kRow);
    if constexpr (Steps > 1) tile::load<1>(b + kTileBytes, kRow);
    if constexpr (Steps > 2) tile::load<2>(b + 2 * kTileBytes, kRow);
    if constexpr (Steps > 3) tile::load<3>(b + 3 * kTileBytes, kRow);
    for (; count > 1; count -= 2, a += 2 * next, c += 2 * kTileBytes) {
        multiply_tile<Steps, 6>(a, row, step, c, add);
        multiply_tile<Steps, 7>(a + next, row, step, c + kTileBytes, add);
    }
    if (count > 0) multiply_tile<Steps, 6>(a, row, step, c, add);
}

// body(Int<N>()) for N steps, 1 to 4.
template <class Body>
ANYATTN_INLINE void with_steps(int64_t n, const Body &body) {
    if (n >= 4) return body(Int<4>());
    if (n == 3) return body(Int<3>());
    if (n == 2) return body(Int<2>());
    body(Int<1>());
}

// 32 queries of a block as operands of dK or dV: tiles of weights [key][query], and of rows, a tile for 16 columns.
struct WeightedUnit {
    const char *weights, *rows;
};

// M by N tiles C of float rows, `row` bytes apart, += the sum over units.
template <int M, int N>
ANYATTN_INLINE void add_units(const WeightedUnit *units, int64_t count, int64_t weights, int64_t rows, char *c,
                              int64_t row) {
    char *below = c + kSide * row;
    tile::load<0>(c, row);
    if constexpr (N > 1) tile::load<1>(c + kRow, row);
    if constexpr (M > 1) tile::load<2>(below, row);
    if constexpr (M > 1 && N > 1) tile::load<3>(below + kRow, row);
    for (const WeightedUnit *u = units; u < units + count; ++u) {
        tile::load_once<4>(u->weights + weights, kRow);
        tile::load<6>(u->rows + rows, kRow);
        tile::multiply<0, 4, 6>();
        if constexpr (N > 1) {
            tile::load<7>(u->rows + rows + kTileBytes, kRow);
            tile::multiply<1, 4, 7>();
        }
        if constexpr (M > 1) {
            tile::load_once<5>(u->weights + weights + kTileBytes, kRow);
            tile::multiply<2, 5, 6>();
        }
        if constexpr (M > 1 && N > 1) tile::multiply<3, 5, 7>();
    }
    tile::store<0>(c, row);
    if constexpr (N > 1) tile::store<1>(c + kRow, row);
    if constexpr (M > 1) tile::store<2>(below, row);
    if constexpr (M > 1 && N > 1) tile::store<3>(below + kRow, row);
}

// out[key][0 .. dim) += the sum over units, for n keys. dim: whole tiles.
ANYATTN_NOINLINE void add_key_gradients(const WeightedUnit *units, int64_t count, int64_t n, int64_t dim, char *out,
                                        int64_t row) {
    int64_t key = 0;
    for (; n - key >= kSide; key += n - key >= 2 * kSide ? 2 * kSide : kSide) {
        const bool two = n - key >= 2 * kSide;
        char *c = out + key * row;
        int64_t d = 0;
        for (; dim - d >= 2 * kSide; d += 2 * kSide, c += 2 * kRow) {
            if (two) {
                add_units<2, 2>(units, count, key * kRow, d * kRow, c, row);
            } else {
                add_units<1, 2>(units, count, key * kRow, d * kRow, c, row);
            }
        }
        if (d == dim) continue;
        if (two) {
            add_units<2, 1>(units, count, key * kRow, d * kRow, c, row);
        } else {
            add_units<1, 1>(units, count, key * kRow, d * kRow, c, row);
        }
    }
    // Rows after the last key belong to other tasks.
    for (int64_t d = 0; key < n && d < dim; d += kSide) {
        alignas(64) char c[kTileBytes] = {};
        for (int64_t i = key; i < n; ++i) __builtin_memcpy(c + (i - key) * kRow, out + i * row + d * 4, kRow);
        add_units<1, 1>(units, count, key * kRow, d * kRow, c, kRow);
        for (int64_t i = key; i < n; ++i) __builtin_memcpy(out + i * row + d * 4, c + (i - key) * kRow, kRow);
    }
}

// State of a thread while it computes. Tiles are configured only here, because each context switch saves them until they
// are released. Denormals are flushed, as tiles do, because some instructions take ten times as long with them.
class Tiles {
  public:
    Tiles() {
        tile::configure();
#if defined(__x86_64__)
        before_ = _mm_getcsr();
        _mm_setcsr(before_ | 0x8040);
#endif
    }
    ~Tiles() {
#if defined(__x86_64__)
        _mm_setcsr(before_);
#endif
        tile::release();
    }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

  private:
    [[maybe_unused]] unsigned before_ = 0;
};

// Runs n rounds of independent products in registers; returns their floating-point operations.
ANYATTN_NOINLINE double peak_tiles(int64_t n, volatile double *sink) {
    const Tiles tiles;
    alignas(64) float operand[kTileBytes / 4], sums[kTileBytes / 4];
    for (float &x : operand) x = float(*sink);
    tile::load<4>(operand, kRow);
    tile::load<5>(operand, kRow);
    tile::zero<0>();
    tile::zero<1>();
    tile::zero<2>();
    tile::zero<3>();
    for (int64_t round = 0; round < n; ++round) {
        tile::multiply<0, 4, 5>();
        tile::multiply<1, 4, 5>();
        tile::multiply<2, 4, 5>();
        tile::multiply<3, 4, 5>();
    }
    tile::store<0>(sums, kRow);
    *sink = double(sums[0]);
    return 4.0 * double(n) * 2 * kSide * kSide * kStep;
}

}  // namespace
}  // namespace anyattn
