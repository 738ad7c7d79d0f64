// Decoding through anyattn.hpp: rows are appended to a cache, dense or paged, and attended to.
#include "anyattn.hpp"

#include <cmath>
#include <random>

#include "check.h"

namespace {

using anyattn::Status;
using Floats = std::vector<float>;

constexpr int64_t kBatch = 2, kSlots = 24, kHeads = 4, kHeadsKv = 2, kDim = 8, kPage = 4;

Floats normal(int64_t size, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> distribution;
    Floats values(static_cast<size_t>(size));
    for (float &value : values) value = distribution(random);
    return values;
}

struct Cache {
    Floats k = Floats(kBatch * kSlots * kHeadsKv * kDim, NAN), v = k;
    std::vector<int32_t> pages = {7, 2, 5, 0, 11, 9, 1, 10, 3, 8, 4, 6};

    anyattn::Array view(Floats &values, bool paged) const {
        if (paged) return anyattn::view(values.data(), {kBatch * kSlots / kPage, kPage, kHeadsKv, kDim});
        return anyattn::view(values.data(), {kBatch, kSlots, kHeadsKv, kDim});
    }
};

// Sequence b has lengths[b] rows before a step, of `rows` new ones; all of them are kept in order in k and v.
void check_decoding(bool paged, int64_t rows) {
    const int64_t total = rows * 4;
    const Floats q = normal(kBatch * total * kHeads * kDim, 1);
    const Floats k = normal(kBatch * total * kHeadsKv * kDim, 2), v = normal(kBatch * total * kHeadsKv * kDim, 3);
    Floats whole(q.size()), out(static_cast<size_t>(kBatch * rows * kHeads * kDim));
    anyattn::Call prefill;
    prefill.q = anyattn::view(q.data(), {kBatch, total, kHeads, kDim});
    prefill.k = anyattn::view(k.data(), {kBatch, total, kHeadsKv, kDim});
    prefill.v = anyattn::view(v.data(), {kBatch, total, kHeadsKv, kDim});
    prefill.out = anyattn::view(whole.data(), {kBatch, total, kHeads, kDim});
    prefill.causal = true;
    CHECK(prefill.forward() == Status::SUCCESS);

    Cache cache;
    anyattn::Append append;
    anyattn::Call step;
    append.k = cache.view(cache.k, paged), append.v = cache.view(cache.v, paged);
    step.k = append.k, step.v = append.v;
    if (paged) append.block_table = step.block_table = cache.pages;
    step.causal = true;
    step.out = anyattn::view(out.data(), {kBatch, rows, kHeads, kDim});
    const auto new_rows = [&](const Floats &values, int64_t t, int64_t heads) {
        return anyattn::view(values.data() + t * heads * kDim, {kBatch, rows, heads, kDim},
                             {total * heads * kDim, heads * kDim, kDim, 1});
    };
    for (int32_t t = 0; t < total; t += int32_t(rows)) {
        const int32_t before[] = {t, t}, now[] = {t + int32_t(rows), t + int32_t(rows)};
        append.cache_seqlens = before;
        append.new_k = new_rows(k, t, kHeadsKv), append.new_v = new_rows(v, t, kHeadsKv);
        step.q = new_rows(q, t, kHeads);
        step.seqused_k = now;
        CHECK(append.run() == Status::SUCCESS);
        CHECK(step.forward() == Status::SUCCESS);
        for (size_t n = 0; n < out.size(); ++n) {
            const int64_t per_batch = rows * kHeads * kDim, b = int64_t(n) / per_batch, rest = int64_t(n) % per_batch;
            CHECK(std::abs(out[n] - whole[size_t((b * total + t) * kHeads * kDim + rest)]) < 1e-5);
        }
    }
}

}  // namespace

TEST(decoding) {
    for (bool paged : {false, true}) {
        for (int64_t rows : {1, 3, 6}) check_decoding(paged, rows);
    }
}

// A rotation by 90 degrees: (x, y) becomes (-y, x), in both orders of the pairs, for k and for q.
TEST(rotary) {
    const Floats cos(kSlots * 2, 0.f), sin(kSlots * 2, 1.f);
    const Floats rows = normal(kBatch * kHeadsKv * kDim, 4), queries = normal(kBatch * kHeads * kDim, 5);
    const int32_t lengths[] = {3, 0};
    for (bool interleaved : {false, true}) {
        Cache cache;
        Floats rotated(queries.size());
        anyattn::Append append;
        append.k = cache.view(cache.k, false), append.v = cache.view(cache.v, false);
        append.new_k = append.new_v = anyattn::view(rows.data(), {kBatch, 1, kHeadsKv, kDim});
        append.q = anyattn::view(queries.data(), {kBatch, 1, kHeads, kDim});
        append.out = anyattn::view(rotated.data(), {kBatch, 1, kHeads, kDim});
        append.rotary_cos = anyattn::view(cos.data(), {kSlots, 2});
        append.rotary_sin = anyattn::view(sin.data(), {kSlots, 2});
        append.rotary_interleaved = interleaved;
        append.cache_seqlens = lengths;
        CHECK(append.run() == Status::SUCCESS);
        const int64_t x = interleaved ? 2 : 1, y = 3;  // a pair
        const float *key = cache.k.data() + 3 * kHeadsKv * kDim;
        CHECK(key[x] == -rows[size_t(y)] && key[y] == rows[size_t(x)] && key[4] == rows[4]);
        CHECK(rotated[size_t(x)] == -queries[size_t(y)] && rotated[size_t(y)] == queries[size_t(x)]);
        CHECK(cache.v[3 * kHeadsKv * kDim] == rows[0] && std::isnan(cache.v[0]));
    }
}

// Row i of q at its own position, or all rows at the first: the angle is 90 degrees from position 4 on.
TEST(positions_of_queries) {
    Floats cos(kSlots * 2, 1.f), sin(kSlots * 2, 0.f);
    for (size_t n = 4 * 2; n < cos.size(); ++n) std::swap(cos[n], sin[n]);
    const Floats queries = normal(kBatch * 2 * kHeads * kDim, 6);
    const int32_t lengths[] = {3, 3};
    for (bool one_position : {false, true}) {
        Cache cache;
        Floats rotated(queries.size());
        anyattn::Append append;
        append.k = cache.view(cache.k, false), append.v = cache.view(cache.v, false);
        append.q = anyattn::view(queries.data(), {kBatch, 2, kHeads, kDim});
        append.out = anyattn::view(rotated.data(), {kBatch, 2, kHeads, kDim});
        append.rotary_cos = anyattn::view(cos.data(), {kSlots, 2});
        append.rotary_sin = anyattn::view(sin.data(), {kSlots, 2});
        append.cache_seqlens = lengths;
        append.one_position = one_position;
        CHECK(append.run() == Status::SUCCESS);
        const size_t second = kHeads * kDim;  // row 1, at position 4 or 3
        CHECK(rotated[0] == queries[0]);
        CHECK(rotated[second] == (one_position ? queries[second] : -queries[second + 2]));
        for (float value : cache.k) CHECK(std::isnan(value));
    }
}

TEST(refusals) {
    Cache cache;
    const Floats rows(kBatch * kHeadsKv * kDim, 1.f);
    const int32_t zeros[] = {0, 0}, lengths[] = {kSlots, 0}, too_many[] = {0, 0, 0};
    const auto refused = [&](Status status, const char *words, auto change) {
        anyattn::Append append;
        append.k = cache.view(cache.k, false), append.v = cache.view(cache.v, false);
        append.new_k = append.new_v = anyattn::view(rows.data(), {kBatch, 1, kHeadsKv, kDim});
        append.cache_seqlens = zeros;
        change(append);
        CHECK(append.run() == status);
        if (!std::strstr(anyattn::error_message(), words)) {
            CHECK(!"the words are there");
            std::printf("  %s: %s\n", words, anyattn::error_message());
        }
        for (float value : cache.k) CHECK(std::isnan(value));
    };
    using anyattn::Append;
    refused(Status::OUT_OF_RANGE, "cache_seqlens[0] is 24", [&](Append &a) { a.cache_seqlens = lengths; });
    refused(Status::INVALID_DIMENSION, "cache_seqlens has 3 entries; expected batch = 2",
            [&](Append &a) { a.cache_seqlens = too_many; });
    refused(Status::NULL_POINTER, "cache_seqlens", [](Append &a) { a.cache_seqlens = {}; });
    refused(Status::NULL_POINTER, "new_k is missing", [](Append &a) { a.new_k = {}; });
    refused(Status::NULL_POINTER, "k is missing", [](Append &a) { a.k = {}; });
    refused(Status::INVALID_DIMENSION, "new_v has shape (2, 1, 2, 7); expected (2, 1, 2, 8)",
            [](Append &a) { a.new_v.shape[3] = 7; });
    refused(Status::NULL_POINTER, "rotary_sin is missing",
            [&](Append &a) { a.rotary_cos = anyattn::view(rows.data(), {4, 2}); });
    refused(Status::INVALID_DIMENSION, "rotary_cos has",
            [&](Append &a) { a.rotary_cos = a.rotary_sin = anyattn::view(rows.data(), {1, int64_t(1) << 60}); });
}
