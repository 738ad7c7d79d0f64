#include <cmath>
#include <functional>

#include "check.h"
#include "fixture.h"
#include "reference.h"

namespace {

using Change = std::function<void(anyattn_call &)>;

// The call is refused with this status by words that name the field, and nothing is written.
void check_refused(int32_t pass, int32_t status, const char *name, const Change &change, const Config &config = {}) {
    Fixture fixture(config);
    anyattn_call &call = fixture.call;
    const anyattn_array out = call.out, dq = call.dq;
    change(call);
    const int32_t found = pass == ANYATTN_FORWARD ? anyattn_forward(&call) : anyattn_backward(&call);
    if (found == status && std::string(fixture.message()).find(name) != std::string::npos) {
        CHECK(std::isnan(get(out, {0, 0, 0, 0})));
        CHECK(std::isnan(get(dq, {0, 0, 0, 0})));
        return;
    }
    CHECK(!"refused as expected");
    std::printf("  %s: status %d, expected %d: %s\n", name, found, status, fixture.message());
}

void check_forward(int32_t status, const char *name, const Change &change, const Config &config = {}) {
    check_refused(ANYATTN_FORWARD, status, name, change, config);
}

Config packed() {
    Config config;
    config.batch = 3;
    config.packed_q = config.packed_k = true;
    return config;
}

int32_t *table(const int32_t *entries) { return const_cast<int32_t *>(entries); }

}  // namespace

TEST(sizes) {
    const int32_t bad = ANYATTN_INVALID_DIMENSION;
    check_forward(bad, "batch", [](anyattn_call &c) { c.batch = -1; });
    check_forward(bad, "batch", [](anyattn_call &c) { c.batch = int64_t(1) << 32; });
    check_forward(bad, "seqlen_q", [](anyattn_call &c) { c.seqlen_q = -1; });
    check_forward(bad, "seqlen_k", [](anyattn_call &c) { c.seqlen_k = INT64_MAX; });
    check_forward(bad, "nheads", [](anyattn_call &c) { c.nheads = 0; });
    check_forward(bad, "nheads_kv", [](anyattn_call &c) { c.nheads_kv = 0; });
    check_forward(bad, "nheads (3) must be a multiple of nheads_kv (2)", [](anyattn_call &c) {
        c.nheads = 3;
        c.nheads_kv = 2;
    });
    check_forward(bad, "head_dim", [](anyattn_call &c) { c.head_dim = 0; });
    check_forward(bad, "head_dim_v", [](anyattn_call &c) { c.head_dim_v = INT64_MIN; });
    check_forward(bad, "batch_k", [](anyattn_call &c) {
        c.batch = 4;
        c.batch_k = 3;
    });
    check_forward(bad, "total_q", [](anyattn_call &c) { c.total_q = -5; });
    check_forward(bad, "batch * nheads * seqlen_q", [](anyattn_call &c) {
        c.batch = c.batch_k = INT32_MAX;
        c.seqlen_q = int64_t(1) << 40;
    });
}

TEST(strides) {
    const int32_t bad = ANYATTN_INVALID_DIMENSION;
    check_forward(bad, "last stride of q", [](anyattn_call &c) { c.q.stride[3] = 2; });
    check_forward(bad, "stride 1 of k", [](anyattn_call &c) { c.k.stride[1] = INT64_MAX; });
    check_forward(bad, "stride 1 of v", [](anyattn_call &c) { c.v.stride[1] = INT64_MIN; });
    check_forward(bad, "stride 1 of out is 0", [](anyattn_call &c) { c.out.stride[1] = 0; });
    Config bias;
    bias.bias = 0;
    check_forward(bad, "last stride of bias", [](anyattn_call &c) { c.bias.stride[3] = -1; }, bias);
}

TEST(quantised_keys) {
    const auto quantised = [](anyattn_call &c) { c.k.dtype = c.v.dtype = ANYATTN_INT8; };
    check_forward(ANYATTN_NULL_POINTER, "k_scale", quantised);
    check_forward(ANYATTN_INVALID_DTYPE, "k has dtype int8 and v float32",
                  [](anyattn_call &c) { c.k.dtype = ANYATTN_INT8; });
    check_forward(ANYATTN_INVALID_VALUE, "v_scale is given", [](anyattn_call &c) { c.v_scale = c.q; });
    check_forward(ANYATTN_INVALID_DTYPE, "k_scale has dtype none", [&](anyattn_call &c) {
        quantised(c);
        c.k_scale.data = c.q.data;
    });
    check_refused(ANYATTN_BACKWARD, ANYATTN_INVALID_DTYPE, "k has dtype int8 (7); accepted here: float32", quantised);
}

TEST(pointers) {
    const int32_t bad = ANYATTN_NULL_POINTER;
    CHECK(anyattn_forward(nullptr) == bad);
    CHECK(anyattn_workspace(nullptr, ANYATTN_BACKWARD) == -bad);
    check_forward(bad, "q", [](anyattn_call &c) { c.q.data = nullptr; });
    check_forward(bad, "v", [](anyattn_call &c) { c.v.data = nullptr; });
    check_forward(bad, "out", [](anyattn_call &c) { c.out.data = nullptr; });
    check_forward(bad, "rng_state", [](anyattn_call &c) { c.dropout_threshold = 1; });
    check_refused(ANYATTN_BACKWARD, bad, "lse", [](anyattn_call &c) { c.lse.data = nullptr; });
    check_refused(ANYATTN_BACKWARD, bad, "dout", [](anyattn_call &c) { c.dout.data = nullptr; });
    check_refused(ANYATTN_BACKWARD, bad, "dk", [](anyattn_call &c) { c.dk.data = nullptr; });
    check_refused(ANYATTN_BACKWARD, bad, "bias", [](anyattn_call &c) { c.dbias = c.dq; });
    check_refused(ANYATTN_BACKWARD, bad, "sink", [](anyattn_call &c) { c.dsink = c.lse; });
    check_forward(ANYATTN_INVALID_VALUE, "q is at",
                  [](anyattn_call &c) { c.q.data = static_cast<char *>(c.q.data) + 2; });
}

TEST(dtypes) {
    const int32_t bad = ANYATTN_INVALID_DTYPE;
    check_forward(bad, "q has dtype none", [](anyattn_call &c) { c.q.dtype = 0; });
    check_forward(bad, "q has dtype unknown (-7)", [](anyattn_call &c) { c.q.dtype = -7; });
    check_forward(bad, "q has dtype int32", [](anyattn_call &c) { c.q.dtype = ANYATTN_INT32; });
    check_forward(bad, "k has dtype float16 (2); accepted here: float32",
                  [](anyattn_call &c) { c.k.dtype = ANYATTN_FLOAT16; });
    check_forward(bad, "out", [](anyattn_call &c) { c.out.dtype = ANYATTN_FLOAT64; });
    check_forward(bad, "lse", [](anyattn_call &c) { c.lse.dtype = ANYATTN_FLOAT64; });
    check_forward(ANYATTN_UNSUPPORTED, "v.reserved", [](anyattn_call &c) { c.v.reserved = 1; });
    Config more;
    more.bias = more.mask = 0;
    more.sink = more.alibi = true;
    check_forward(bad, "bias", [](anyattn_call &c) { c.bias.dtype = ANYATTN_BOOL; }, more);
    check_forward(bad, "mask", [](anyattn_call &c) { c.mask.dtype = ANYATTN_FLOAT32; }, more);
    check_forward(bad, "sink", [](anyattn_call &c) { c.sink.dtype = ANYATTN_FLOAT16; }, more);
    check_forward(bad, "alibi_slopes", [](anyattn_call &c) { c.alibi_slopes.dtype = ANYATTN_BFLOAT16; }, more);
    check_refused(ANYATTN_BACKWARD, bad, "dq", [](anyattn_call &c) { c.dq.dtype = ANYATTN_FLOAT16; });
}

TEST(scalars) {
    const int32_t bad = ANYATTN_INVALID_VALUE;
    for (double value : {double(INFINITY), -double(INFINITY), double(NAN)}) {
        check_forward(bad, "scale", [value](anyattn_call &c) { c.scale = value; });
        check_forward(bad, "softcap", [value](anyattn_call &c) { c.softcap = value; });
    }
    check_forward(bad, "softcap", [](anyattn_call &c) { c.softcap = -1; });
    check_forward(bad, "num_threads", [](anyattn_call &c) { c.num_threads = -1; });
    check_forward(bad, "num_threads", [](anyattn_call &c) { c.num_threads = 5000; });
    check_forward(bad, "chunk", [](anyattn_call &c) { c.chunk = -1; });
    check_forward(bad, "query_start", [](anyattn_call &c) { c.query_start = -1; });
    check_forward(bad, "left", [](anyattn_call &c) {
        c.flags |= ANYATTN_HAS_LEFT;
        c.left = INT64_MIN;
    });
    check_forward(bad, "right", [](anyattn_call &c) {
        c.flags |= ANYATTN_HAS_RIGHT;
        c.right = INT64_MAX;
    });
    Config dropout;
    dropout.dropout = 1;
    check_forward(bad, "dropout_threshold", [](anyattn_call &c) { c.dropout_threshold = 65536; }, dropout);
    check_forward(ANYATTN_UNSUPPORTED, "flags", [](anyattn_call &c) { c.flags |= 1u << 30; });
    check_forward(ANYATTN_UNSUPPORTED, "target", [](anyattn_call &c) { c.target = 99; });
    check_forward(ANYATTN_UNSUPPORTED, "target", [](anyattn_call &c) { c.target = -1; });
    check_forward(bad, "workspace", [](anyattn_call &c) {
        c.workspace = static_cast<char *>(c.q.data) + 4;
        c.workspace_bytes = 1 << 20;
    });
    alignas(64) static char room[64];
    Config rows;
    rows.seqlen_q = 999;
    rows.sink = true;  // whose partial gradients lie there for every instruction set
    const Change too_small = [](anyattn_call &c) {
        c.workspace = room;
        c.workspace_bytes = sizeof room;
    };
    check_refused(ANYATTN_BACKWARD, bad, "workspace_bytes is 64; needed: ", too_small, rows);
    for (char byte : room) CHECK(!byte);
    check_forward(ANYATTN_UNSUPPORTED, "size", [](anyattn_call &c) { c.size = 0xfffffff8u; });
    Fixture fixture({});
    for (uint32_t size : {0u, 4u, 13u}) {
        fixture.call.size = size;
        CHECK(anyattn_forward(&fixture.call) == bad);
    }
}

TEST(sequence_tables) {
    const int32_t bad = ANYATTN_OUT_OF_RANGE;
    check_forward(bad, "cu_seqlens_q[0]", [](anyattn_call &c) { table(c.cu_seqlens_q)[0] = -1; }, packed());
    check_forward(bad, "cu_seqlens_q[2]", [](anyattn_call &c) { table(c.cu_seqlens_q)[2] = 0; }, packed());
    check_forward(bad, "cu_seqlens_q[1]", [](anyattn_call &c) { --c.seqlen_q; }, packed());
    check_forward(bad, "cu_seqlens_k", [](anyattn_call &c) { c.total_k = c.cu_seqlens_k[3] - 1; }, packed());
    check_forward(bad, "cu_seqlens_k[3]", [](anyattn_call &c) { table(c.cu_seqlens_k)[3] = INT32_MAX; }, packed());
    Config used;
    used.batch = 2;
    used.seqused_q = used.seqused_k = used.leftpad = true;
    check_forward(bad, "seqused_q[1] is 6; accepted: 0 to 5", [](anyattn_call &c) { table(c.seqused_q)[1] = 6; }, used);
    check_forward(bad, "seqused_k[0]", [](anyattn_call &c) { table(c.seqused_k)[0] = -1; }, used);
    check_forward(bad, "leftpad_k[1]", [](anyattn_call &c) { table(c.leftpad_k)[1] = c.seqused_k[1] + 1; }, used);
    check_forward(bad, "leftpad_k[0]", [](anyattn_call &c) { table(c.leftpad_k)[0] = -1; }, used);
}

TEST(key_lists) {
    Config lists;
    lists.batch = 2;
    lists.kv_indices = 4;
    const auto first = [](anyattn_call &c) { return static_cast<int32_t *>(c.kv_indices.data); };
    const int32_t bad = ANYATTN_OUT_OF_RANGE;
    check_forward(bad, "query 0, entry 2 is 7; accepted: -1 to 6", [&](anyattn_call &c) { first(c)[2] = 7; }, lists);
    check_forward(bad, "query 0, entry 0 is -2", [&](anyattn_call &c) { first(c)[0] = -2; }, lists);
    check_forward(ANYATTN_NULL_POINTER, "kv_indices", [](anyattn_call &c) { c.kv_indices.data = nullptr; }, lists);
    check_forward(
        ANYATTN_INVALID_DTYPE, "kv_indices", [](anyattn_call &c) { c.kv_indices.dtype = ANYATTN_FLOAT32; }, lists);
    check_forward(ANYATTN_INVALID_DIMENSION, "num_indices", [](anyattn_call &c) { c.num_indices = -1; }, lists);
    check_forward(
        ANYATTN_INVALID_DIMENSION, "num_indices", [](anyattn_call &c) { c.num_indices = int64_t(1) << 60; }, lists);
    check_forward(ANYATTN_INVALID_DIMENSION, "kv_indices", [](anyattn_call &c) { c.kv_indices.stride[3] = 2; }, lists);
    lists.seqused_q = true;  // no query of the second sequence
    Fixture fixture(lists);
    CHECK(fixture.call.seqused_q[1] == 0);
    for (int64_t i = 0; i < 5; ++i) set(fixture.call.kv_indices, {1, 0, i, 0}, INT32_MIN);
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
}

TEST(cache_tables) {
    const int32_t bad = ANYATTN_OUT_OF_RANGE;
    Config entries;
    entries.batch = 2;
    entries.cache_batch_idx = true;
    check_forward(bad, "cache_batch_idx[1]", [](anyattn_call &c) { table(c.cache_batch_idx)[1] = 4; }, entries);
    check_forward(bad, "cache_batch_idx[0]", [](anyattn_call &c) { table(c.cache_batch_idx)[0] = -1; }, entries);
    check_refused(
        ANYATTN_BACKWARD, ANYATTN_UNSUPPORTED, "cache_batch_idx",
        [](anyattn_call &c) { table(c.cache_batch_idx)[0] = c.cache_batch_idx[1]; }, entries);
    Config pages;
    pages.batch = 2;
    pages.paged = true;
    pages.seqused_k = true;
    const auto use = [](anyattn_call &c) { table(c.seqused_k)[0] = 4; };
    check_forward(
        bad, "block_table[1]",
        [&](anyattn_call &c) {
            use(c);
            table(c.block_table)[1] = int32_t(c.num_pages);
        },
        pages);
    check_forward(
        bad, "block_table[0]",
        [&](anyattn_call &c) {
            use(c);
            table(c.block_table)[0] = -1;
        },
        pages);
    check_forward(ANYATTN_INVALID_DIMENSION, "page_size", [](anyattn_call &c) { c.page_size = 0; }, pages);
    check_forward(ANYATTN_INVALID_DIMENSION, "seqlen_k", [](anyattn_call &c) { c.max_pages = 1; }, pages);
    check_forward(
        ANYATTN_UNSUPPORTED, "cache_batch_idx", [](anyattn_call &c) { c.cache_batch_idx = c.seqused_k; }, pages);
    check_refused(ANYATTN_BACKWARD, ANYATTN_UNSUPPORTED, "block_table", [](anyattn_call &) {}, pages);
    Fixture unused(pages);  // an entry after the last page in use may be anything
    use(unused.call);
    table(unused.call.block_table)[2] = -77;
    CHECK(unused.forward() == ANYATTN_SUCCESS);
}

// The partial sums of 2^40 keys fit into no memory. Nothing is read before that is known.
TEST(memory) {
    Config config;
    config.head_dim = config.head_dim_v = 9;
    check_refused(
        ANYATTN_BACKWARD, ANYATTN_OUT_OF_MEMORY, "bytes",
        [](anyattn_call &c) {
            c.seqlen_k = int64_t(1) << 40;
            c.head_dim = c.head_dim_v = 999;
        },
        config);
}

TEST(names) {
    CHECK(anyattn_version() == ANYATTN_VERSION);
    for (int32_t status = -1; status <= 9; ++status) CHECK(anyattn_error_string(status)[0]);
    int32_t count = 0;
    while (anyattn_target_name(count)) ++count;
    CHECK(count > 0);
    CHECK(anyattn_target_available(count - 1));  // the baseline
    CHECK(!anyattn_target_available(-1) && !anyattn_target_available(count));
    CHECK(!anyattn_target_name(-1));
    CHECK(anyattn_num_threads() > 0);
    CHECK(anyattn_thread_runtime()[0]);
}
