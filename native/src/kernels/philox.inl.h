// Dropout: Philox4x32 with 7 rounds (Salmon et al., SC 2011), one counter per query lane and 8 keys.
#pragma once
#include "kernels.h"
#include "vector.inl.h"

namespace anyattn {
namespace {

struct Counter {
    U32 word[4];
};

ANYATTN_INLINE U32 low_words(U64 even, U64 odd) { return (U32)((even & splat(UINT64_C(0xffffffff))) | odd << 32); }
ANYATTN_INLINE U32 high_words(U64 even, U64 odd) { return low_words(even >> 32, odd >> 32); }

ANYATTN_INLINE Counter philox(Counter c, uint64_t seed) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    ANYATTN_UNROLL
    for (int round = 0; round < 7; ++round) {
        const U64 even0 = multiply_wide((U64)c.word[0], 0xD2511F53);
        const U64 odd0 = multiply_wide((U64)c.word[0] >> 32, 0xD2511F53);
        const U64 even1 = multiply_wide((U64)c.word[2], 0xCD9E8D57);
        const U64 odd1 = multiply_wide((U64)c.word[2] >> 32, 0xCD9E8D57);
        c = {{high_words(even1, odd1) ^ c.word[1] ^ splat(key0), low_words(even1, odd1),
              high_words(even0, odd0) ^ c.word[3] ^ splat(key1), low_words(even0, odd0)}};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return c;
}

ANYATTN_INLINE void store_kept(float *to, U32 kept, float value) { store(to, (F32)(kept & (U32)splat(value))); }

ANYATTN_INLINE void store_kept(double *to, U32 kept, double value) {
    for (int i = 0; i < lanes<float>; ++i) to[i] = kept[i] ? value : 0.0;
}

// Indices that the counters of one tile use: queries and heads by lane, keys by row.
struct DropoutCounter {
    uint64_t seed;
    uint32_t offset, threshold;
    int64_t key;  // of row 0
    int64_t width;
    alignas(64) uint32_t query[kBlockQ], head[kBlockQ];
};

// keep[key][lane] = value where the entry survives, else 0, for n keys and `width` of P lanes.
template <class C, int P>
ANYATTN_NOINLINE void fill_keep(C *keep, const DropoutCounter &d, int64_t n, C value) {
    const Lanes<float>::I threshold = (Lanes<float>::I)splat(d.threshold);
    for (int64_t group = d.key / 8; group * 8 < d.key + n; ++group) {
        for (int64_t c = 0; c < d.width; c += lanes<float>) {
            const U32 query = load<U32>(d.query + c), head = load<U32>(d.head + c);
            const Counter bits = philox({{splat((uint32_t)group), query, head, splat(d.offset)}}, d.seed);
            ANYATTN_UNROLL
            for (int x = 0; x < 8; ++x) {
                const int64_t j = group * 8 + x - d.key;
                const U32 word = bits.word[x / 2];
                const U32 half = x % 2 ? word >> 16 : word & splat(UINT32_C(0xffff));
                if (j < 0 || j >= n) continue;
                store_kept(keep + j * P + c, (U32)((Lanes<float>::I)half >= threshold), value);
            }
        }
    }
}

}  // namespace
}  // namespace anyattn
