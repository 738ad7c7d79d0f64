#include "check.h"
#include "dense.h"

using anyattn::bfloat16;
using anyattn::float16;

// A storage type of somebody else's.
struct Brain {
    uint16_t bits;
};
template <>
struct anyattn::Dtype<Brain> : std::integral_constant<int32_t, ANYATTN_BFLOAT16> {};

template <class T>
static void check_dense() {
    for (int64_t dim : {32, 64, 128, 40}) {
        Dense<T> dense;
        dense.dim = dim;
        dense.causal = dim != 64;
        dense.make();
        CHECK(dense.matches());
    }
}

TEST(float32_and_float16) {
    check_dense<float>();
    check_dense<float16>();
}

// Every dtype through a Call, with results of its own type and of the statistics' type.
template <class T, class Result, class Statistic>
static void check_call() {
    Dense<T> dense;
    dense.batch = 1;
    dense.make();
    std::vector<Result> results[4], dout(dense.dO.begin(), dense.dO.end());
    for (auto &result : results) result.resize(dense.Q.size());
    std::vector<Statistic> lse(dense.L.size());
    const auto heads_first = [&](auto &values) {
        return anyattn::swap_axes<1, 2>(anyattn::view(values.data(), {1, dense.heads, dense.seqlen, dense.dim}));
    };
    anyattn::Call call;
    call.q = heads_first(dense.Q), call.k = heads_first(dense.K), call.v = heads_first(dense.V);
    call.out = heads_first(results[0]), call.dout = heads_first(dout);
    call.dq = heads_first(results[1]), call.dk = heads_first(results[2]), call.dv = heads_first(results[3]);
    call.lse = anyattn::view(lse.data(), {1, dense.heads, dense.seqlen});
    call.scale = dense.scale;
    CHECK(call.forward() == anyattn::Status::SUCCESS);
    CHECK(call.backward() == anyattn::Status::SUCCESS);

    anyattn_call described = dense.described();
    const int32_t dtype = anyattn::Dtype<Result>::value;
    described.out.data = results[0].data(), described.out.dtype = dtype;
    described.dq.data = results[1].data(), described.dq.dtype = dtype;
    described.dk.data = results[2].data(), described.dk.dtype = dtype;
    described.dv.data = results[3].data(), described.dv.dtype = dtype;
    described.lse.data = lse.data(), described.lse.dtype = anyattn::Dtype<Statistic>::value;
    described.dout.data = dout.data(), described.dout.dtype = dtype;
    CHECK(forward_matches(described));
    CHECK(backward_matches(described));
}

TEST(calls) {
    check_call<float, float, float>();
    check_call<float16, float16, float>();
    check_call<float16, float, float>();
    check_call<bfloat16, bfloat16, float>();
    check_call<bfloat16, float, float>();
    check_call<double, double, double>();
}

TEST(types_of_others) {
    Brain one{0x3f80};
    CHECK(anyattn::view(&one, {1, 1, 1, 1}).dtype == ANYATTN_BFLOAT16);
    const uint8_t seen = 1;
    CHECK(anyattn::view(&seen, {1, 1, 1, 1}).dtype == ANYATTN_BOOL);
}

TEST(every_16_bit_float_there_and_back) {
    for (uint32_t n = 0; n < 65536; ++n) {
        float16 half;
        bfloat16 brain;
        half.bits = brain.bits = static_cast<uint16_t>(n);
        const float from_half = half, from_brain = brain;
        if (std::isnan(from_half)) {
            CHECK((n & 0x7c00) == 0x7c00 && (n & 0x3ff) && std::isnan(float(float16(from_half))));
        } else {
            CHECK(from_half == anyattn::float_from_float16(half.bits) && float16(from_half).bits == n);
        }
        if (std::isnan(from_brain)) {
            CHECK(std::isnan(float(bfloat16(from_brain))));
        } else {
            CHECK(bfloat16(from_brain).bits == n);
        }
    }
}

// Bits of every kind: normal, subnormal, halfway between two neighbours, beyond the range.
TEST(rounding_is_to_nearest_even) {
    std::mt19937 random(1);
    for (int n = 0; n < 200000; ++n) {
        uint32_t bits = static_cast<uint32_t>(random());
        if (n % 2) bits &= 0xfffff000;
        const float x = anyattn::float_from_bits(bits);
        if (std::isnan(x)) continue;
        CHECK(float16(x).bits == anyattn::float16_from_float(x));
        CHECK(bfloat16(x).bits == anyattn::bfloat16_from_float(x));
    }
}
