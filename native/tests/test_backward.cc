#include "check.h"
#include "fixture.h"
#include "reference.h"

static void check_backward(Config config) {
    for (int32_t target : targets()) {
        config.target = target;
        Fixture fixture(config);
        CHECK(fixture.forward() == ANYATTN_SUCCESS);
        CHECK(fixture.backward() == ANYATTN_SUCCESS);
        CHECK(backward_matches(fixture.call));
    }
}

TEST(sizes) {
    for (const Config &config : edge_sizes()) check_backward(config);
}

TEST(dtypes_and_accumulation) {
    for (int32_t dtype : kDtypes) {
        for (int kind = 0; kind < 4; ++kind) {
            Config config;
            config.dtype = dtype;
            config.result = kind & 1 && dtype != ANYATTN_FLOAT64 ? ANYATTN_FLOAT32 : dtype;
            config.flags = kind & 2 ? ANYATTN_ACCUMULATE : 0;
            config.seqlen_q = 70;
            config.seqlen_k = 150;
            config.head_dim = 40;
            config.head_dim_v = 24;
            config.dlse = true;
            check_backward(config);
        }
    }
}

// One task per (sequence, KV head), or several that are added up; in place where the gradients are whole vectors.
TEST(splits) {
    for (int64_t batch : {1, 3, 9}) {
        for (int64_t head_dim : {24, 64}) {
            Config config;
            config.batch = batch;
            config.nheads = 4;
            config.nheads_kv = 2;
            config.head_dim = config.head_dim_v = head_dim;
            config.seqlen_q = batch < 9 ? 1400 : 200;  // a split has to be worth its work
            config.seqlen_k = batch < 9 ? 400 : 66;
            config.flags = ANYATTN_HAS_RIGHT;
            check_backward(config);
        }
    }
}

TEST(sequences) {
    for (int32_t dtype : kDtypes) {
        for (int kind = 0; kind < 10; ++kind) {
            Config config;
            config.dtype = dtype;
            config.batch = kind < 5 ? 4 : 17;
            config.head_dim = config.head_dim_v = kind < 5 ? 8 : 16;
            config.seqlen_q = kind < 5 ? 67 : 20;
            config.seqlen_k = 75;
            config.seed = uint32_t(kind) + 1;
            config.flags = ANYATTN_HAS_RIGHT | (kind == 4 ? ANYATTN_ACCUMULATE : 0);
            config.packed_q = kind % 5 != 1;
            config.packed_k = kind % 5 == 0 || kind % 5 == 3;
            config.cache_batch_idx = kind % 5 == 1 || kind % 5 == 4;
            config.seqused_q = kind % 5 == 1 || kind % 5 == 3;
            config.seqused_k = kind % 5 > 0;
            config.leftpad = kind % 5 > 2;
            config.sink = kind % 2;
            check_backward(config);
        }
    }
}

TEST(bias_gradient_of_many_tiles) {
    for (int axes : {0, 2, 4, 8, 15}) {
        Config config;
        config.batch = 2;
        config.nheads = 4;
        config.seqlen_q = 130;
        config.seqlen_k = 300;
        config.seqused_q = config.seqused_k = true;
        config.bias = axes;
        check_backward(config);
    }
}

// Beyond results: nothing where dk and dv can take the sums of a head, and one split less where there are several.
TEST(workspace_of_few_and_many_heads) {
    const auto workspace = [](const Config &config) {
        Fixture fixture(config);
        return anyattn_workspace(&fixture.call, ANYATTN_BACKWARD);
    };
    for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_BFLOAT16}) {
        Config config;
        config.seqlen_q = config.seqlen_k = 2048;
        config.head_dim = config.head_dim_v = 64;
        config.dtype = dtype;
        config.nheads = config.nheads_kv = 8;
        CHECK(workspace(config) == 0);
        config.nheads = config.nheads_kv = 1;
        const int64_t sums = 2048 * (64 + 64) * 4, bytes = workspace(config);
        CHECK(bytes > 0 && bytes % sums == 0 && bytes / sums <= (dtype == ANYATTN_FLOAT32 ? 15 : 16));
    }
}

TEST(workspace_of_the_caller) {
    Config config;
    config.seqlen_q = config.seqlen_k = 70;
    config.sink = true;
    Fixture fixture(config);
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    const int64_t bytes = anyattn_workspace(&fixture.call, ANYATTN_BACKWARD);
    CHECK(bytes > 0);
    CHECK(anyattn_workspace(&fixture.call, ANYATTN_FORWARD) == 0);
    CHECK(anyattn_workspace(&fixture.call, 7) == -ANYATTN_INVALID_VALUE);
    const anyattn_array memory = fixture.memory.array(ANYATTN_BOOL, {1, 1, 1, bytes});
    fixture.call.workspace = memory.data;
    fixture.call.workspace_bytes = bytes;
    CHECK(fixture.backward() == ANYATTN_SUCCESS);
    CHECK(backward_matches(fixture.call));
    fixture.call.workspace_bytes = bytes - 1;
    CHECK(anyattn_backward(&fixture.call) == ANYATTN_INVALID_VALUE);
}
