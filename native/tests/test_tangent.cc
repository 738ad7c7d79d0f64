#include <string>

#include "check.h"
#include "fixture.h"
#include "reference.h"

static void remove_tangents(anyattn_call &call, unsigned absent) {
    anyattn_array *const tangents[] = {&call.tq, &call.tk, &call.tv, &call.tbias, &call.tsink};
    for (int i = 0; i < 5; ++i) {
        if (absent >> i & 1) tangents[i]->data = nullptr;
    }
}

// The tangent after the forward pass, and both in one call.
static void check_tangent(Config config, unsigned absent = 0) {
    for (int32_t target : targets()) {
        config.target = target;
        Fixture after(config), together(config);
        remove_tangents(after.call, absent);
        remove_tangents(together.call, absent);
        CHECK(after.forward() == ANYATTN_SUCCESS);
        CHECK(after.tangent() == ANYATTN_SUCCESS);
        CHECK(tangent_matches(after.call));
        CHECK(together.forward_tangent() == ANYATTN_SUCCESS);
        CHECK(forward_matches(together.call));
        CHECK(tangent_matches(together.call));
    }
}

static std::string bits_of(const anyattn_call &call, const anyattn_array &array) {
    std::string bits;
    for (int64_t b = 0; b < call.batch; ++b)
        for (int64_t i = 0; i < call.seqlen_q; ++i)
            for (int64_t h = 0; h < call.nheads; ++h)
                for (int64_t d = 0; d < call.head_dim_v; ++d) {
                    const double x = get(array, {b, i, h, d});
                    bits.append(reinterpret_cast<const char *>(&x), sizeof x);
                }
    return bits;
}

static Config with_everything() {
    Config config;
    config.batch = 2;
    config.nheads = 6;
    config.nheads_kv = 2;
    config.seqlen_q = 80;
    config.seqlen_k = 120;
    config.head_dim = 24;
    config.head_dim_v = 40;
    config.bias = 2;
    config.mask = 1;
    config.sink = config.alibi = config.strided = true;
    config.softcap = 2;
    config.dropout = 20000;
    return config;
}

TEST(sizes) {
    for (const Config &config : edge_sizes()) check_tangent(config);
}

TEST(any_tangent_may_be_absent) {
    for (unsigned absent = 0; absent < 32; ++absent) check_tangent(with_everything(), absent);
}

TEST(dtypes_and_sequences) {
    for (int32_t dtype : kDtypes) {
        for (int kind = 0; kind < 6; ++kind) {
            Config config = with_everything();
            config.dtype = dtype;
            config.result = kind & 1 && dtype != ANYATTN_FLOAT64 ? ANYATTN_FLOAT32 : 0;
            config.batch = 4;
            config.seed = uint32_t(kind) + 1;
            config.flags = kind == 1 ? ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT : kind == 3 ? 0 : ANYATTN_HAS_RIGHT;
            config.left = 30;
            config.chunk = kind == 3 ? 50 : 0;
            config.packed_q = kind % 2;
            config.packed_k = kind == 1;
            config.paged = kind == 2;
            config.cache_batch_idx = kind == 3;
            config.seqused_q = config.seqused_k = kind > 1;
            config.leftpad = kind == 4;
            check_tangent(config);
        }
    }
}

TEST(lists_of_keys_and_single_queries) {
    for (int64_t entries : {-1, 0, 1, 40, 130}) {
        for (int64_t seqlen_q : {1, 3, 66}) {
            Config config = with_everything();
            config.seqlen_q = seqlen_q;
            if (seqlen_q == 1) config.nheads = 140;  // more that share a key than a block has rows
            config.kv_indices = entries;
            config.lists_of_heads = seqlen_q == 3;
            check_tangent(config);
        }
    }
}

TEST(any_number_of_threads_gives_the_same_bits_without_workspace) {
    Config config = with_everything();
    config.seqlen_q = 700;
    config.flags = ANYATTN_HAS_RIGHT;
    std::string first, first_together;
    Fixture sizes(config);
    CHECK(anyattn_workspace(&sizes.call, ANYATTN_TANGENT) == 0);
    CHECK(anyattn_workspace(&sizes.call, ANYATTN_FORWARD_TANGENT) == 0);
    for (int32_t threads : {1, 2, 5, 16}) {
        config.threads = threads;
        Fixture after(config), together(config);
        CHECK(after.forward() == ANYATTN_SUCCESS && after.tangent() == ANYATTN_SUCCESS);
        CHECK(together.forward_tangent() == ANYATTN_SUCCESS);
        const std::string bits = bits_of(after.call, after.call.tout);
        const std::string bits_together = bits_of(together.call, together.call.tout);
        if (first.empty()) first = bits, first_together = bits_together;
        CHECK(bits == first && bits_together == first_together);
        CHECK(bits_of(after.call, after.call.out) == bits_of(together.call, together.call.out));
    }
}

// Few rows are two passes, of which the first one divides the keys among threads and needs a workspace.
TEST(forward_tangent_of_few_rows_has_the_workspace_of_the_forward_pass) {
    Config config;
    config.seqlen_q = 4;
    config.seqlen_k = 3000;
    Fixture fixture(config);
    const int64_t bytes = anyattn_workspace(&fixture.call, ANYATTN_FORWARD);
    CHECK(bytes > 0 && anyattn_workspace(&fixture.call, ANYATTN_FORWARD_TANGENT) == bytes);
    CHECK(fixture.forward_tangent() == ANYATTN_SUCCESS);
    CHECK(forward_matches(fixture.call) && tangent_matches(fixture.call));
}

TEST(tangents_of_what_is_absent_are_refused) {
    Config config;
    config.bias = 0;
    config.sink = true;
    Fixture fixture(config);
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    anyattn_call call = fixture.call;
    call.bias.data = nullptr;
    CHECK(anyattn_tangent(&call) == ANYATTN_NULL_POINTER);
    CHECK(std::string(fixture.message()) == "bias is null and tbias is not");
    call = fixture.call;
    call.sink.data = nullptr;
    CHECK(anyattn_tangent(&call) == ANYATTN_NULL_POINTER);
    call = fixture.call;
    call.tq.dtype = ANYATTN_FLOAT16;
    CHECK(anyattn_tangent(&call) == ANYATTN_INVALID_DTYPE);
    call = fixture.call;
    call.tlse.data = nullptr;
    CHECK(anyattn_tangent(&call) == ANYATTN_NULL_POINTER);
    CHECK(anyattn_forward_tangent(&call) == ANYATTN_NULL_POINTER);
    call = fixture.call;
    call.lse.data = nullptr;
    CHECK(anyattn_forward_tangent(&call) == ANYATTN_NULL_POINTER);
}
