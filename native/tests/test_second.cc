// Second derivatives against differences of the backward pass, which has a test of its own.
#include <cmath>
#include <vector>

#include "check.h"
#include "fixture.h"
#include "reference.h"

namespace {

template <class Body>
void for_each(Index dims, const Body &body) {
    for (int64_t a = 0; a < dims.a; ++a)
        for (int64_t b = 0; b < dims.b; ++b)
            for (int64_t c = 0; c < dims.c; ++c)
                for (int64_t d = 0; d < dims.d; ++d) body(Index{a, b, c, d});
}

struct Named {
    const char *name;
    anyattn_array array;
    Index dims;
};

// One of each element: an axis of stride 0 has one.
Index owned(const anyattn_array &array, Index dims) {
    const int64_t *s = array.stride;
    return {s[0] ? dims.a : 1, s[1] ? dims.b : 1, s[2] ? dims.c : 1, s[3] ? dims.d : 1};
}

std::vector<Named> gradients(const anyattn_call &c) {
    std::vector<Named> found = {{"dq", c.dq, dims_q(c, c.head_dim)},
                                {"dk", c.dk, dims_k(c, c.head_dim)},
                                {"dv", c.dv, dims_k(c, c.head_dim_v)}};
    if (c.dbias.data) found.push_back({"dbias", c.dbias, {c.batch, c.nheads, c.seqlen_q, c.seqlen_k}});
    if (c.dsink.data) found.push_back({"dsink", c.dsink, {c.nheads, 1, 1, 1}});
    return found;
}

std::vector<double> values(const anyattn_call &call) {
    std::vector<double> found;
    for (const Named &x : gradients(call)) for_each(x.dims, [&](Index i) { found.push_back(get(x.array, i)); });
    return found;
}

// Moves the inputs along the tangents.
void move(const anyattn_call &c, double step) {
    const Index scores = {c.batch, c.nheads, c.seqlen_q, c.seqlen_k};
    const auto add = [&](const anyattn_array &x, const anyattn_array &tangent, Index dims) {
        if (!tangent.data) return;
        for_each(owned(x, dims), [&](Index i) { set(x, i, get(x, i) + step * get(tangent, i)); });
    };
    add(c.q, c.tq, dims_q(c, c.head_dim));
    add(c.k, c.tk, dims_k(c, c.head_dim));
    add(c.v, c.tv, dims_k(c, c.head_dim_v));
    add(c.bias, c.tbias, scores);
    add(c.sink, c.tsink, {c.nheads, 1, 1, 1});
}

std::vector<double> moved_gradients(Fixture &fixture, double step) {
    move(fixture.call, step);
    CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
    return values(fixture.call);
}

void check_second(Config config, unsigned absent = 0) {
    config.dtype = ANYATTN_FLOAT64;
    for (int32_t target : targets()) {
        config.target = target;
        Fixture fixture(config);
        anyattn_call &call = fixture.call;
        anyattn_array *const tangents[] = {&call.tq, &call.tk, &call.tv, &call.tbias, &call.tsink};
        for (int i = 0; i < 5; ++i) {
            if (absent >> i & 1) tangents[i]->data = nullptr;
        }
        constexpr double step = 1e-5;
        const std::vector<double> after = moved_gradients(fixture, step);
        const std::vector<double> before = moved_gradients(fixture, -2 * step);
        move(call, step);
        CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.second() == ANYATTN_SUCCESS);
        CHECK(tangent_matches(call));
        size_t at = 0, wrong = 0;
        for (double x : values(call)) {
            const double want = (after[at] - before[at]) / (2 * step);
            wrong += !(std::abs(x - want) <= 1e-6 * (1 + std::abs(want)));
            ++at;
        }
        CHECK(wrong == 0);
    }
}

Config with_everything() {
    Config config;
    config.batch = 2;
    config.nheads = 6;
    config.nheads_kv = 2;
    config.seqlen_q = 80;
    config.seqlen_k = 120;
    config.head_dim = 12;
    config.head_dim_v = 20;
    config.bias = 2;
    config.mask = 1;
    config.sink = config.alibi = config.strided = config.dlse = true;
    config.softcap = 2;
    config.dropout = 20000;
    return config;
}

}  // namespace

TEST(sizes) {
    for (const Config &config : edge_sizes()) check_second(config);
}

TEST(any_tangent_may_be_absent) {
    for (unsigned absent = 0; absent < 32; ++absent) check_second(with_everything(), absent);
}

TEST(sequences_and_lists) {
    for (int kind = 0; kind < 6; ++kind) {
        Config config = with_everything();
        config.batch = 4;
        config.seed = uint32_t(kind) + 1;
        config.flags = kind == 1 ? ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT : ANYATTN_HAS_RIGHT;
        config.left = 30;
        config.chunk = kind == 3 ? 50 : 0;
        config.packed_q = kind % 2;
        config.packed_k = kind == 1;
        config.cache_batch_idx = kind == 3;
        config.seqused_q = config.seqused_k = kind > 1;
        config.leftpad = kind == 4;
        config.kv_indices = kind > 3 ? 20 : -1;
        config.lists_of_heads = kind == 5;
        check_second(config);
    }
}

// Heads that are split, and heads that are cut along rows and keys for many threads.
TEST(splits_and_parts_give_the_same_bits_for_any_number_of_threads) {
    for (int64_t heads : {1, 8}) {
        Config config;
        config.nheads = config.nheads_kv = heads;
        config.seqlen_q = config.seqlen_k = heads == 1 ? 1300 : 900;
        config.head_dim = config.head_dim_v = 16;
        config.sink = true;
        std::vector<double> first;
        for (int32_t threads : {1, 2, 16}) {
            config.threads = threads;
            Fixture fixture(config);
            CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.second() == ANYATTN_SUCCESS);
            if (first.empty()) first = values(fixture.call);
            CHECK(first == values(fixture.call));
        }
    }
}

TEST(bfloat16_is_computed_with_any_dtype_of_results) {
    for (int32_t result : {ANYATTN_BFLOAT16, ANYATTN_FLOAT32}) {
        Config config = with_everything();
        config.dtype = ANYATTN_BFLOAT16;
        config.result = result;
        for (int32_t target : targets()) {
            config.target = target;
            Fixture fixture(config);
            CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.second() == ANYATTN_SUCCESS);
            CHECK(tangent_matches(fixture.call));
        }
    }
}

TEST(cached_keys_and_missing_gradients_are_refused) {
    Config config;
    config.paged = true;
    Fixture paged(config);
    CHECK(anyattn_second(&paged.call) == ANYATTN_UNSUPPORTED);
    Fixture dense(Config{});
    CHECK(dense.forward() == ANYATTN_SUCCESS);
    anyattn_call call = dense.call;
    call.dk.data = nullptr;
    CHECK(anyattn_second(&call) == ANYATTN_NULL_POINTER);
    call = dense.call;
    call.tout.data = nullptr;
    CHECK(anyattn_second(&call) == ANYATTN_NULL_POINTER);
}
