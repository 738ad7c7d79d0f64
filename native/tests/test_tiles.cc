// The emulation of tile registers: in plain C++ and by vectors, and as the hardware computes where it is there.
#define ANYATTN_VECTOR_BYTES 64
#define ANYATTN_PANEL_VECTORS 4
#include "../src/kernels/tiles_emulated.inl.h"
#include "../src/kernels/tiles_hardware.inl.h"

#include <cstring>
#include <random>

#include "anyattn.h"
#include "check.h"

using anyattn::emulated::Tile;

namespace {

// Bits of bfloat16 numbers: what may differ between two ways to compute a sum of products.
enum Kind { kOrdinary, kAny, kNearUnderflow, kInfinities, kNans, kNearOverflow, kCancellation, kDenormals, kKinds };

struct Draw {
    std::mt19937 random;

    uint32_t below(uint32_t n) { return static_cast<uint32_t>(random() % n); }

    uint32_t half(int kind) {
        const uint32_t sign = below(2) << 15, fraction = below(128);
        switch (kind) {
            case kOrdinary:
                return sign | (0x3f80 - 0x80 * below(4)) | fraction;
            case kNearUnderflow:
                return sign | (40 + below(24)) << 7 | fraction;
            case kInfinities:
                return below(64) == 0 ? sign | 0x7f80 : sign | 0x3f80 | fraction;
            case kNans:
                return below(64) == 0 ? sign | 0x7f80 | fraction : sign | 0x3f80 | fraction;
            case kNearOverflow:
                return sign | (180 + below(14)) << 7 | fraction;
            case kCancellation:
                return sign | (100 + below(50)) << 7 | fraction;
            case kDenormals:
                return below(2) ? sign | fraction : sign | below(255) << 7 | fraction;
            default:
                return below(1 << 16);
        }
    }

    void tile(int kind, Tile &tile) {
        for (auto &row : tile)
            for (uint32_t &pair : row) pair = half(kind) | half(kind) << 16;
    }

    // float32 sums.
    void sums(int kind, Tile &tile) {
        const bool tiny = kind == kNearUnderflow || kind == kDenormals;
        for (auto &row : tile)
            for (uint32_t &x : row)
                x = tiny ? static_cast<uint32_t>(random()) & 0x81ffffff : half(kind) << 16 | below(1 << 16);
    }
};

bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

int differences(const Tile &a, const Tile &b) {
    int count = 0;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) count += a[i][j] != b[i][j] && !(is_nan(a[i][j]) && is_nan(b[i][j]));
    return count;
}

}  // namespace

TEST(vectors_compute_what_plain_steps_compute) {
    Draw draw{std::mt19937(1)};
    alignas(64) Tile a, b, plain, vectors;
    for (int kind = 0; kind < kKinds; ++kind) {
        int wrong = 0;
        for (int round = 0; round < 100; ++round) {
            draw.tile(kind, a);
            draw.tile(kind, b);
            draw.sums(kind, plain);
            __builtin_memcpy(vectors, plain, sizeof plain);
            anyattn::emulated::multiply_plain(plain, a, b);
            anyattn::emulated::multiply_vectors(vectors, a, b);
            wrong += differences(plain, vectors);
        }
        if (wrong) std::printf("kind %d: %d of 25600 differ\n", kind, wrong);
        CHECK(wrong == 0);
    }
}

#if defined(__x86_64__)
// Whether the library may use tiles here. It asks for the permission.
bool has_tiles() {
    for (int32_t i = 0; const char *name = anyattn_target_name(i); ++i) {
        if (!std::strcmp(name, "avx512amx")) return anyattn_target_available(i);
    }
    return false;
}

TEST(hardware_computes_what_plain_steps_compute) {
    if (!has_tiles()) return;
    Draw draw{std::mt19937(2)};
    alignas(64) Tile a, b, plain, tiles;
    for (int kind = 0; kind < kKinds; ++kind) {
        int wrong = 0;
        for (int round = 0; round < 1000; ++round) {
            draw.tile(kind, a);
            draw.tile(kind, b);
            draw.sums(kind, plain);
            anyattn::hardware::configure();
            anyattn::hardware::load<0>(plain, 64);
            anyattn::hardware::load<1>(a, 64);
            anyattn::hardware::load_once<2>(b, 64);
            anyattn::hardware::multiply<0, 1, 2>();
            anyattn::hardware::store<0>(tiles, 64);
            anyattn::hardware::release();
            anyattn::emulated::multiply_plain(plain, a, b);
            wrong += differences(plain, tiles);
        }
        if (wrong) std::printf("kind %d: %d of 256000 differ\n", kind, wrong);
        CHECK(wrong == 0);
    }
}
#endif

// Known results: pairs are summed from zero, and denormals are zeros.
TEST(a_product_of_known_numbers) {
    alignas(64) Tile a = {}, b = {}, c = {};
    const auto bits = anyattn::emulated::to_bits;
    a[0][0] = bits(2.0f) >> 16 | bits(3.0f);
    b[0][0] = bits(5.0f) >> 16 | bits(7.0f);
    c[0][0] = bits(1.0f);
    c[1][1] = 1;  // denormal
    anyattn::emulated::multiply_plain(c, a, b);
    CHECK(c[0][0] == bits(2.0f * 5.0f + 3.0f * 7.0f + 1.0f));
    CHECK(c[1][1] == 0 && c[15][15] == 0);
}
