#include <cmath>

#include "check.h"
#include "fixture.h"
#include "reference.h"

namespace {

struct Append {
    int32_t dtype = ANYATTN_FLOAT32, angles = ANYATTN_FLOAT32;
    int64_t rotary_dim = 6, seqlen_new = 70, seqlen_q = 70;
    uint32_t flags = ANYATTN_HAS_RIGHT;
    bool paged = false, cache_batch_idx = false, in_place = false;
};

constexpr int64_t kBatch = 3, kSlots = 90, kPositions = 95;

// x cos - y sin, x sin + y cos over the pairs of the first rotary_dim values.
std::vector<double> rotated(const anyattn_call &call, const anyattn_array &array, Index at, int64_t position) {
    std::vector<double> row;
    for (int64_t d = 0; d < call.head_dim; ++d) row.push_back(get(array, {at.a, at.b, at.c, d}));
    const std::vector<double> old = row;
    const int64_t half = call.rotary_dim / 2;
    for (int64_t d = 0; d < half; ++d) {
        const bool pairs = call.flags & ANYATTN_ROTARY_INTERLEAVED;
        const size_t x = size_t(pairs ? 2 * d : d), y = size_t(pairs ? 2 * d + 1 : d + half);
        const double cos = get(call.rotary_cos, {position, d, 0, 0}), sin = get(call.rotary_sin, {position, d, 0, 0});
        row[x] = old[x] * cos - old[y] * sin;
        row[y] = old[x] * sin + old[y] * cos;
    }
    return row;
}

bool near(int32_t dtype, double x, double y) {
    const double eps = dtype == ANYATTN_FLOAT64   ? 1e-14
                       : dtype == ANYATTN_FLOAT32 ? 1e-6
                       : dtype == ANYATTN_FLOAT16 ? 6e-4
                                                  : 5e-3;
    return std::abs(x - y) <= eps * (1 + std::abs(y)) || (std::isnan(x) && std::isnan(y));
}

bool row_is(const anyattn_array &array, Index at, const std::vector<double> &want) {
    for (size_t d = 0; d < want.size(); ++d) {
        if (!near(array.dtype, get(array, {at.a, at.b, at.c, int64_t(d)}), want[d])) return false;
    }
    return true;
}

std::vector<double> values(const anyattn_array &array, Index at, int64_t dim) {
    std::vector<double> row;
    for (int64_t d = 0; d < dim; ++d) row.push_back(get(array, {at.a, at.b, at.c, d}));
    return row;
}

void check_append(const Append &append) {
    Config config;
    config.batch = kBatch;
    config.seqlen_q = append.seqlen_q;
    config.seqlen_k = kSlots;
    config.nheads = 4;
    config.nheads_kv = 2;
    config.head_dim_v = 5;
    config.dtype = append.dtype;
    config.flags = append.flags;
    config.paged = append.paged;
    config.cache_batch_idx = append.cache_batch_idx;
    config.strided = true;
    Fixture f(config);
    anyattn_call &call = f.call;
    Memory &memory = f.memory;
    const std::vector<int32_t> lengths = {0, 7, int32_t(kSlots - append.seqlen_new)};
    call.cache_seqlens = lengths.data();
    call.seqlen_new = append.seqlen_new;
    call.new_k = memory.normal(append.dtype, {kBatch, append.seqlen_new, 2, 8}, 1);
    call.new_v = memory.normal(append.dtype, {kBatch, append.seqlen_new, 2, 5}, 2);
    call.rotary_dim = int32_t(append.rotary_dim);
    call.rotary_positions = kPositions;
    const Index angles = {1, 1, kPositions, append.rotary_dim / 2};
    for (anyattn_array *table : {&call.rotary_cos, &call.rotary_sin}) {
        *table = memory.normal(append.angles, angles);
        table->stride[0] = append.rotary_dim / 2;
        table->stride[1] = 1;
    }
    const anyattn_array old_q = call.q, q = memory.normal(append.dtype, {kBatch, append.seqlen_q, 4, 8}, 3);
    call.q = q;
    call.out = append.in_place ? old_q : memory.array(append.dtype, {kBatch, append.seqlen_q, 4, 8});
    if (append.in_place) {
        for (int64_t b = 0; b < kBatch; ++b)
            for (int64_t i = 0; i < append.seqlen_q; ++i)
                for (int64_t h = 0; h < 4; ++h)
                    for (int64_t d = 0; d < 8; ++d) set(old_q, {b, i, h, d}, get(q, {b, i, h, d}));
        call.q = old_q;
    }
    CHECK(anyattn_append(&call) == ANYATTN_SUCCESS);
    bool right = true;
    for (int64_t b = 0; b < kBatch; ++b) {
        const Place place(call, b);
        for (int64_t j = 0; j < kSlots; ++j) {
            const int64_t t = j - lengths[size_t(b)];
            for (int64_t h = 0; h < 2 && t >= 0 && t < append.seqlen_new; ++h) {
                right = right && row_is(call.k, place.key(j, h), rotated(call, call.new_k, {b, t, h, 0}, j)) &&
                        values(call.v, place.key(j, h), 5) == values(call.new_v, {b, t, h, 0}, 5);
            }
        }
        for (int64_t i = 0; i < append.seqlen_q; ++i) {
            const int64_t position = lengths[size_t(b)] + (append.flags & ANYATTN_HAS_RIGHT ? i : 0);
            for (int64_t h = 0; h < 4; ++h) {
                right = right && row_is(call.out, {b, i, h, 0}, rotated(call, q, {b, i, h, 0}, position));
            }
        }
    }
    CHECK(right);
}

}  // namespace

TEST(every_dtype_and_layout) {
    for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_FLOAT16, ANYATTN_BFLOAT16, ANYATTN_FLOAT64}) {
        for (int kind = 0; kind < 6; ++kind) {
            Append append;
            append.dtype = dtype;
            append.angles = kind % 2 ? dtype : ANYATTN_FLOAT32;
            append.flags = kind < 3 ? ANYATTN_HAS_RIGHT : ANYATTN_ROTARY_INTERLEAVED;
            append.paged = kind == 2 || kind == 5;
            append.cache_batch_idx = kind == 1;
            append.rotary_dim = kind == 4 ? 0 : kind == 3 ? 8 : 6;
            append.in_place = kind == 3;
            append.seqlen_new = kind == 5 ? 1 : 70;
            append.seqlen_q = kind == 5 ? 1 : 70;
            check_append(append);
        }
    }
}

// Every slot that is not appended to keeps its bits: NaN in, NaN out.
TEST(other_slots_stay) {
    Config config;
    config.batch = 2;
    config.seqlen_k = 10;
    Fixture f(config);
    Memory::fill(f.call.k, dims_k(f.call, 8), [] { return 3.0; });
    const int32_t lengths[] = {2, 9};
    f.call.cache_seqlens = lengths;
    f.call.seqlen_new = 1;
    f.call.new_k = f.memory.normal(ANYATTN_FLOAT32, {2, 1, 1, 8});
    f.call.new_v = f.memory.normal(ANYATTN_FLOAT32, {2, 1, 1, 8});
    f.call.q.data = nullptr;
    CHECK(anyattn_append(&f.call) == ANYATTN_SUCCESS);
    for (int64_t b = 0; b < 2; ++b) {
        for (int64_t j = 0; j < 10; ++j) {
            CHECK((get(f.call.k, {b, j, 0, 4}) == 3.0) == (j != lengths[b]));
        }
    }
}

TEST(refusals) {
    Config config;
    config.batch = 2;
    config.seqlen_k = 10;
    Fixture f(config);
    int32_t lengths[] = {2, 9};
    anyattn_call &call = f.call;
    call.seqlen_new = 1;
    call.new_k = f.memory.normal(ANYATTN_FLOAT32, {2, 2, 1, 8});
    call.new_v = f.memory.normal(ANYATTN_FLOAT32, {2, 2, 1, 8});
    CHECK(anyattn_append(&call) == ANYATTN_NULL_POINTER);
    call.cache_seqlens = lengths;
    CHECK(anyattn_append(&call) == ANYATTN_SUCCESS);
    call.seqlen_new = 2;
    CHECK(anyattn_append(&call) == ANYATTN_OUT_OF_RANGE);
    call.seqlen_new = 1;
    lengths[0] = -1;
    CHECK(anyattn_append(&call) == ANYATTN_OUT_OF_RANGE);
    lengths[0] = 0;
    for (int32_t rotary_dim : {-2, 3, 10}) {
        call.rotary_dim = rotary_dim;
        CHECK(anyattn_append(&call) == ANYATTN_INVALID_VALUE);
    }
    call.rotary_dim = 8;
    CHECK(anyattn_append(&call) == ANYATTN_OUT_OF_RANGE);  // no positions
    call.rotary_positions = 20;
    CHECK(anyattn_append(&call) == ANYATTN_NULL_POINTER);  // no cos
}

// A row of a quantised cache: max |x| / 127 is the scale, ties go to the even code.
TEST(quantised_cache) {
    Config config;
    config.seqlen_k = 4;
    Fixture f(config);
    anyattn_call &call = f.call;
    const float row[8] = {254, -254, 1, 3, -5, 0, 2, 254};
    const int8_t want[8] = {127, -127, 0, 2, -2, 0, 1, 127};
    int8_t k[4 * 8] = {}, v[4 * 8] = {};
    float scales[2][4] = {};
    int32_t length = 2;
    call.seqlen_new = 1;
    call.cache_seqlens = &length;
    call.q.data = nullptr;
    call.k = anyattn_contiguous(k, ANYATTN_INT8, 4, 1, 8);
    call.v = anyattn_contiguous(v, ANYATTN_INT8, 4, 1, 8);
    call.new_k = call.new_v = anyattn_contiguous(row, ANYATTN_FLOAT32, 1, 1, 8);
    CHECK(anyattn_append(&call) == ANYATTN_NULL_POINTER);  // no scales
    call.k_scale = anyattn_contiguous(scales[0], ANYATTN_FLOAT32, 4, 1, 1);
    call.v_scale = anyattn_contiguous(scales[1], ANYATTN_FLOAT32, 4, 1, 1);
    CHECK(anyattn_append(&call) == ANYATTN_SUCCESS);
    for (int i = 0; i < 8; ++i) {
        CHECK(k[2 * 8 + i] == want[i]);
        CHECK(v[2 * 8 + i] == want[i]);
    }
    for (int j = 0; j < 4; ++j) CHECK(scales[0][j] == (j == 2 ? 2.0f : 0.0f));
    call.k_scale.stride[1] = 0;
    CHECK(anyattn_append(&call) == ANYATTN_INVALID_DIMENSION);  // slots that share a scale
}

TEST(halves_round_to_nearest_even) {
    using namespace anyattn;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = uint16_t(bits);
        const float x = float_from_float16(half), y = float_from_bfloat16(half);
        CHECK(std::isnan(x) ? std::isnan(float_from_float16(float16_from_float(x))) : float16_from_float(x) == half);
        CHECK(std::isnan(y) ? std::isnan(float_from_bfloat16(bfloat16_from_float(y))) : bfloat16_from_float(y) == half);
        if ((bits & 0x7fff) >= 0x7bff) continue;
        // Between this number and the next, away from zero: the middle goes to the even one.
        const float next = float_from_float16(uint16_t(half + 1)), middle = x + (next - x) / 2;
        CHECK(float16_from_float(middle) == (half & 1 ? half + 1 : half));
        CHECK(float16_from_float(std::nextafter(middle, x)) == half);
        CHECK(float16_from_float(std::nextafter(middle, next)) == half + 1);
    }
    CHECK(float16_from_float(65519.0f) == 0x7bff);
    CHECK(float16_from_float(65520.0f) == 0x7c00);
    CHECK(bfloat16_from_float(std::numeric_limits<float>::max()) == 0x7f80);
}
