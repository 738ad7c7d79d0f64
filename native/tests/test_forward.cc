#include "check.h"
#include "fixture.h"
#include "reference.h"

// Runs on every instruction set of this machine.
static void check_forward(Config config) {
    for (int32_t target : targets()) {
        config.target = target;
        Fixture fixture(config);
        CHECK(fixture.forward() == ANYATTN_SUCCESS);
        CHECK(forward_matches(fixture.call));
    }
}

TEST(sizes) {
    for (const Config &config : edge_sizes()) check_forward(config);
}

TEST(dtypes) {
    for (int32_t dtype : kDtypes) {
        for (bool wide : {false, true}) {
            Config config;
            config.dtype = dtype;
            config.result = wide && dtype != ANYATTN_FLOAT64 ? ANYATTN_FLOAT32 : dtype;
            config.seqlen_q = 70;
            config.seqlen_k = 150;
            config.head_dim = 40;
            config.head_dim_v = 24;
            check_forward(config);
        }
    }
}

TEST(groups_batches_and_strides) {
    Config config;
    config.batch = 3;
    config.nheads = 8;
    for (int64_t nheads_kv : {1, 2, 8}) {
        config.nheads_kv = nheads_kv;
        config.strided = nheads_kv == 2;
        config.lse = nheads_kv != 8;
        check_forward(config);
    }
}

TEST(empty_batches_and_keys) {
    Config config;
    config.batch = 0;
    check_forward(config);
    config.batch = 2;
    config.seqlen_k = 0;
    check_forward(config);
    config.sink = true;
    check_forward(config);
}

TEST(sequences) {
    for (int32_t dtype : kDtypes) {
        for (int kind = 0; kind < 6; ++kind) {
            Config config;
            config.dtype = dtype;
            config.batch = 4;
            config.seqlen_q = 67;
            config.seqlen_k = 75;
            config.seed = uint32_t(kind) + 1;
            config.flags = ANYATTN_HAS_RIGHT;
            config.packed_q = kind != 1 && kind != 2;
            config.packed_k = kind == 0 || kind == 3;
            config.paged = kind == 2 || kind == 4;
            config.cache_batch_idx = kind == 1;
            config.seqused_q = kind == 1 || kind == 3;
            config.seqused_k = kind > 0;
            config.leftpad = kind > 2;
            check_forward(config);
        }
    }
}

// Strides that walk backwards, and one key for all rows.
TEST(negative_and_zero_strides) {
    Config config;
    config.seqlen_k = 20;
    Fixture fixture(config);
    anyattn_array &k = fixture.call.k, &v = fixture.call.v;
    k.data = address(k, {0, 19, 0, 0});
    k.stride[1] = -k.stride[1];
    v.stride[1] = 0;
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    CHECK(forward_matches(fixture.call));
}

TEST(scale_may_be_negative_or_zero) {
    Config config;
    config.seqlen_k = 90;
    for (double scale : {-1.5, 0.0, 30.0}) {
        config.scale = scale;
        check_forward(config);
    }
}

// A caller that knows only the first fields, and one that knows more than the library.
TEST(callers_of_other_versions) {
    struct Newer {
        anyattn_call call;
        int64_t more[3];
    } newer{};
    Fixture fixture({});
    newer.call = fixture.call;
    newer.call.size = sizeof newer;
    CHECK(anyattn_forward(&newer.call) == ANYATTN_SUCCESS);
    CHECK(forward_matches(fixture.call));
    newer.more[1] = 1;
    CHECK(anyattn_forward(&newer.call) == ANYATTN_UNSUPPORTED);
    fixture.call.size = offsetof(anyattn_call, dout);
    fixture.call.bias.dtype = 77;  // not looked at: absent
    CHECK(anyattn_forward(&fixture.call) == ANYATTN_SUCCESS);
}
