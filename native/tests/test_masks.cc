#include "check.h"
#include "fixture.h"
#include "reference.h"

static void check_both(Config config) {
    for (int32_t target : targets()) {
        config.target = target;
        Fixture fixture(config);
        CHECK(fixture.forward() == ANYATTN_SUCCESS);
        CHECK(forward_matches(fixture.call));
        CHECK(fixture.backward() == ANYATTN_SUCCESS);
        CHECK(backward_matches(fixture.call));
    }
}

static Config medium() {
    Config config;
    config.batch = 2;
    config.seqlen_q = 70;
    config.seqlen_k = 90;
    return config;
}

TEST(intervals) {
    struct Case {
        uint32_t flags;
        int64_t left, right, chunk;
    };
    const Case cases[] = {
        {ANYATTN_HAS_RIGHT, 0, 0, 0},
        {ANYATTN_HAS_RIGHT | ANYATTN_TOP_LEFT, 0, 0, 0},
        {ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT, 7, 0, 0},
        {ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT, 3, 11, 0},
        {ANYATTN_HAS_LEFT, 0, 0, 0},
        {ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT, -2, 5, 0},
        {ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT, 5, -6, 0},
        {0, 0, 0, 16},
        {ANYATTN_HAS_RIGHT, 0, 0, 25},
        {ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT, int64_t(1) << 40, int64_t(1) << 40, int64_t(1) << 40},
    };
    for (const Case &c : cases) {
        for (int64_t seqlen_k : {40, 90}) {
            for (bool offset : {false, true}) {
                Config config = medium();
                config.seqlen_k = seqlen_k;
                config.flags = c.flags;
                config.left = c.left;
                config.right = c.right;
                config.chunk = c.chunk;
                config.offset = offset;
                config.leftpad = offset;
                check_both(config);
            }
        }
    }
}

TEST(selected_keys) {
    for (int64_t entries : {0, 1, 30, 200}) {
        for (bool of_heads : {false, true}) {
            for (int64_t group : {1, 3, 70}) {
                Config config = medium();
                config.seqlen_q = group == 70 ? 5 : 70;
                config.nheads_kv = 2;
                config.nheads = 2 * group;
                config.kv_indices = entries;
                config.lists_of_heads = of_heads;
                config.flags = of_heads ? ANYATTN_HAS_RIGHT : 0;
                config.sink = config.dlse = true;
                check_both(config);
            }
        }
    }
}

TEST(selected_keys_with_everything_else) {
    for (int which = 0; which < 8; ++which) {
        Config config = medium();
        config.batch = 3;
        config.seqlen_q = 20;
        config.nheads = 4;
        config.nheads_kv = 2;
        config.kv_indices = 25;
        config.lists_of_heads = which & 1;
        config.packed_q = config.packed_k = which & 2;
        config.cache_batch_idx = !config.packed_k && which & 4;
        config.seqused_q = config.seqused_k = config.leftpad = which & 4;
        config.alibi = config.sink = config.dlse = config.strided = true;
        config.dropout = 9000;
        config.softcap = 2;
        config.flags = ANYATTN_HAS_LEFT | (which & 1 ? ANYATTN_ACCUMULATE : 0);
        config.left = 60;
        if (!config.packed_q) config.bias = which, config.mask = 7 - which;
        check_both(config);
    }
}

TEST(selected_keys_of_pages) {
    for (int32_t target : targets()) {
        Config config = medium();
        config.paged = config.seqused_k = true;
        config.kv_indices = 40;
        config.target = target;
        Fixture fixture(config);
        CHECK(fixture.forward() == ANYATTN_SUCCESS);
        CHECK(forward_matches(fixture.call));
    }
}

TEST(bias_and_mask_broadcast_over_any_axes) {
    for (int axes = 0; axes < 16; ++axes) {
        Config config = medium();
        config.bias = axes;
        config.mask = axes ^ 5;
        config.dtype = axes % 3 == 0 ? ANYATTN_FLOAT32 : axes % 3 == 1 ? ANYATTN_FLOAT64 : ANYATTN_BFLOAT16;
        check_both(config);
    }
}

TEST(score_changes) {
    Config config = medium();
    config.flags = ANYATTN_HAS_RIGHT;
    config.softcap = 1.5;
    check_both(config);
    config.alibi = true;
    config.nheads = 4;
    config.nheads_kv = 2;
    check_both(config);
    config.sink = true;
    config.dlse = true;
    check_both(config);
}

TEST(dropout) {
    for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_FLOAT16, ANYATTN_FLOAT64}) {
        Config config = medium();
        config.dtype = dtype;
        config.nheads = 4;
        config.dropout = 20000;
        config.flags = ANYATTN_HAS_RIGHT;
        check_both(config);
    }
}

TEST(everything_at_once) {
    for (uint32_t seed = 1; seed <= 4; ++seed) {
        Config config = medium();
        config.seed = seed;
        config.batch = 3;
        config.nheads = 4;
        config.nheads_kv = 2;
        config.head_dim = 24;
        config.head_dim_v = 17;
        config.flags = ANYATTN_HAS_RIGHT | ANYATTN_HAS_LEFT;
        config.left = 40;
        config.right = 3;
        config.softcap = 2;
        config.bias = int(seed) - 1;
        config.mask = 1;
        config.alibi = config.sink = config.dlse = config.strided = true;
        config.seqused_q = config.seqused_k = config.leftpad = true;
        config.dropout = 9000;
        check_both(config);
    }
}
