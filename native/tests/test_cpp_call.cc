// Calls of anyattn.hpp, made from the fixtures' arrays: each must compute what the C struct of the fixture describes.
#include "anyattn.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "check.h"
#include "fixture.h"
#include "reference.h"

namespace {

using anyattn::Array;
using anyattn::Status;
using anyattn::Table;

Array described(const anyattn_array &from, std::initializer_list<int64_t> shape, int first_stride = 0) {
    Array array;
    if (!from.data) return array;
    array.data = from.data;
    array.dtype = from.dtype;
    for (int64_t size : shape) {
        array.shape[array.rank] = size;
        array.stride[array.rank] = from.stride[array.rank + first_stride];
        ++array.rank;
    }
    return array;
}

// Packed arrays have three axes.
Array rows(const anyattn_array &from, const Index &dims, bool packed) {
    if (packed) return described(from, {dims.b, dims.c, dims.d}, 1);
    return described(from, {dims.a, dims.b, dims.c, dims.d});
}

Array statistics(const anyattn_call &call, const anyattn_array &from) {
    if (call.cu_seqlens_q) return described(from, {call.nheads, call.total_q}, 1);
    return described(from, {call.batch, call.nheads, call.seqlen_q});
}

Array scores(const anyattn_call &call, const anyattn_array &from) {
    Array array = described(from, {call.batch, call.nheads, call.seqlen_q, call.seqlen_k});
    for (int axis = 0; axis < array.rank; ++axis) {
        if (array.stride[axis] != 0) continue;
        array.shape[axis] = 1;
        array.stride[axis] = 12345;  // of an axis of length 1, it is not used
    }
    return array;
}

Array lists(const anyattn_call &call, bool packed) {
    const anyattn_array &from = call.kv_indices;
    const int64_t heads = call.nheads_kv, rows = packed ? call.total_q : call.seqlen_q, entries = call.num_indices;
    if (from.stride[1] && packed) return described(from, {heads, rows, entries}, 1);
    if (from.stride[1]) return described(from, {call.batch, heads, rows, entries});
    if (packed) return described(from, {rows, entries}, 2);
    Array array = described(from, {call.batch, rows, entries}, 1);
    array.stride[0] = from.stride[0];
    return array;
}

Table per_sequence(const anyattn_call &call, const int32_t *entries, int64_t each = 1, int64_t more = 0) {
    return entries ? Table(entries, call.batch * each + more) : Table();
}

void set_options(const anyattn_call &from, anyattn::Call *to) {
    to->num_threads = from.num_threads;
    to->target = from.target;
    to->scale = from.scale;
    to->softcap = from.softcap;
    if (from.flags & ANYATTN_HAS_LEFT) to->left = from.left;
    if (from.flags & ANYATTN_HAS_RIGHT) to->right = from.right;
    to->top_left = from.flags & ANYATTN_TOP_LEFT;
    to->accumulate = from.flags & ANYATTN_ACCUMULATE;
    to->batch_invariant = from.flags & ANYATTN_BATCH_INVARIANT;
    to->fast = from.flags & ANYATTN_FAST;
    to->chunk = from.chunk;
    to->dropout_p = from.dropout_threshold / 65536.0;
    if (from.rng_state) std::copy_n(from.rng_state, 2, to->rng_state);
    to->query_start = from.query_start;
    to->key_start = from.key_start;
    to->max_seqlen_q = from.seqlen_q;
    to->max_seqlen_k = from.seqlen_k;
}

anyattn::Call cpp_call(const anyattn_call &from) {
    const Index q = dims_q(from, from.head_dim), out = dims_q(from, from.head_dim_v);
    const Index k = dims_k(from, from.head_dim), v = dims_k(from, from.head_dim_v);
    const bool packed_q = from.cu_seqlens_q, packed_k = from.cu_seqlens_k;
    anyattn::Call to;
    to.cu_seqlens_q = per_sequence(from, from.cu_seqlens_q, 1, 1);
    to.cu_seqlens_k = per_sequence(from, from.cu_seqlens_k, 1, 1);
    to.block_table = per_sequence(from, from.block_table, from.max_pages);
    to.cache_batch_idx = per_sequence(from, from.cache_batch_idx);
    to.seqused_q = per_sequence(from, from.seqused_q);
    to.seqused_k = per_sequence(from, from.seqused_k);
    to.leftpad_k = per_sequence(from, from.leftpad_k);
    to.offset = per_sequence(from, from.offset);
    to.q = rows(from.q, q, packed_q), to.dq = rows(from.dq, q, packed_q);
    to.out = rows(from.out, out, packed_q), to.dout = rows(from.dout, out, packed_q);
    to.k = rows(from.k, k, packed_k), to.dk = rows(from.dk, k, packed_k);
    to.v = rows(from.v, v, packed_k), to.dv = rows(from.dv, v, packed_k);
    to.lse = statistics(from, from.lse), to.dlse = statistics(from, from.dlse);
    to.bias = scores(from, from.bias), to.mask = scores(from, from.mask), to.dbias = scores(from, from.dbias);
    to.alibi_slopes = described(from.alibi_slopes, {from.batch, from.nheads});
    to.sink = described(from.sink, {from.nheads}), to.dsink = described(from.dsink, {from.nheads});
    to.kv_indices = lists(from, packed_q);
    to.tq = rows(from.tq, q, packed_q), to.tk = rows(from.tk, k, packed_k), to.tv = rows(from.tv, v, packed_k);
    to.tbias = scores(from, from.tbias), to.tsink = described(from.tsink, {from.nheads});
    to.tout = rows(from.tout, out, packed_q), to.tlse = statistics(from, from.tlse);
    set_options(from, &to);
    return to;
}

std::vector<double> values(const anyattn_array &array, const Index &dims) {
    std::vector<double> found;
    for (int64_t n = 0; array.data && n < dims.a * dims.b * dims.c * dims.d; ++n) {
        found.push_back(
            get(array, {n / dims.d / dims.c / dims.b, n / dims.d / dims.c % dims.b, n / dims.d % dims.c, n % dims.d}));
    }
    return found;
}

// Second derivatives have the bits that the C function computes.
void check_second(const Config &config) {
    Fixture cpp(config), c(config);
    CHECK(cpp.forward() == ANYATTN_SUCCESS && c.forward() == ANYATTN_SUCCESS);
    CHECK(cpp_call(cpp.call).second() == Status::SUCCESS && c.second() == ANYATTN_SUCCESS);
    const Index q = dims_q(c.call, c.call.head_dim), k = dims_k(c.call, c.call.head_dim);
    const Index v = dims_k(c.call, c.call.head_dim_v);
    CHECK(values(cpp.call.dq, q) == values(c.call.dq, q));
    CHECK(values(cpp.call.dk, k) == values(c.call.dk, k));
    CHECK(values(cpp.call.dv, v) == values(c.call.dv, v));
    CHECK(values(cpp.call.dsink, {config.nheads, 1, 1, 1}) == values(c.call.dsink, {config.nheads, 1, 1, 1}));
}

void check_both(const Config &config) {
    Fixture fixture(config);
    anyattn::Workspace workspace;
    anyattn::Call call = cpp_call(fixture.call);
    if (config.seed % 2) call.workspace = &workspace;
    CHECK(call.forward() == Status::SUCCESS);
    CHECK(forward_matches(fixture.call));
    CHECK(call.tangent() == Status::SUCCESS);
    CHECK(tangent_matches(fixture.call));
    CHECK(call.forward_tangent() == Status::SUCCESS);
    CHECK(forward_matches(fixture.call) && tangent_matches(fixture.call));
    if (config.paged) return;
    check_second(config);
    CHECK(call.backward() == Status::SUCCESS);
    CHECK(backward_matches(fixture.call));
    CHECK(call.workspace_bytes(ANYATTN_BACKWARD) == anyattn_workspace(&fixture.call, ANYATTN_BACKWARD));
    CHECK(!call.workspace || workspace.size() == call.workspace_bytes(ANYATTN_BACKWARD));
}

Config medium(uint32_t seed) {
    Config config;
    config.seed = seed;
    config.batch = 3;
    config.seqlen_q = 66;
    config.seqlen_k = 76;  // not a whole number of pages
    config.nheads = 4;
    config.nheads_kv = 2;
    config.head_dim = 24;
    config.head_dim_v = 17;
    return config;
}

}  // namespace

TEST(storage) {
    for (uint32_t seed = 0; seed < 32; ++seed) {
        Config config = medium(seed);
        const uint32_t kind = seed % 4;  // dense, packed, paged, entries of a larger cache
        config.packed_q = seed / 4 % 2;
        config.packed_k = kind == 1;
        config.paged = kind == 2;
        config.cache_batch_idx = kind == 3;
        config.seqused_q = seed / 8 % 2;
        config.seqused_k = config.leftpad = seed / 16 % 2;
        config.strided = config.dlse = seed % 3 == 0;
        config.flags = seed % 5 == 0 ? 0 : ANYATTN_HAS_RIGHT;
        config.dtype = seed % 7 == 0 ? ANYATTN_BFLOAT16 : ANYATTN_FLOAT32;
        config.kv_indices = seed % 5 < 2 ? 40 : -1;
        config.lists_of_heads = seed % 5 == 1;
        check_both(config);
    }
}

TEST(features) {
    for (uint32_t seed = 0; seed < 32; ++seed) {
        Config config = medium(seed);
        config.flags = (seed % 2 ? ANYATTN_HAS_RIGHT : 0) | (seed % 3 ? ANYATTN_HAS_LEFT : 0) |
                       (seed % 5 ? 0 : ANYATTN_TOP_LEFT) | (seed % 7 ? 0 : ANYATTN_ACCUMULATE) |
                       (seed % 4 ? 0 : ANYATTN_BATCH_INVARIANT) | (seed % 5 ? 0 : ANYATTN_FAST);
        config.left = 20;
        config.right = 3;
        config.chunk = seed % 6 ? 0 : 25;
        config.softcap = seed % 3 == 1 ? 1.5 : 0;
        config.bias = seed % 4 == 1 ? int(seed) % 16 : -1;
        config.mask = seed % 4 == 2 ? int(seed) / 2 % 16 : -1;
        config.alibi = seed % 2;
        config.sink = config.offset = seed % 5 == 1;
        config.dropout = seed % 3 == 2 ? 20000 : 0;
        config.lse = true;
        check_both(config);
    }
}

TEST(empty) {
    for (int which = 0; which < 3; ++which) {
        Config config = medium(1);
        (which == 0 ? config.batch : which == 1 ? config.seqlen_q : config.seqlen_k) = 0;
        check_both(config);
    }
}

TEST(causal_is_right_0_and_scale_has_a_default) {
    Config config = medium(1);
    config.flags = ANYATTN_HAS_RIGHT;
    config.scale = 1 / std::sqrt(24.);
    Fixture fixture(config);
    anyattn::Call call = cpp_call(fixture.call);
    call.causal = true;
    call.right.reset();
    call.scale.reset();
    CHECK(call.forward() == Status::SUCCESS);
    CHECK(forward_matches(fixture.call));
}

// One slope a head, for all sequences.
TEST(slopes_of_heads) {
    Config config = medium(1);
    config.alibi = true;
    Fixture fixture(config);
    fixture.call.alibi_slopes.stride[0] = 0;
    anyattn::Call call = cpp_call(fixture.call);
    call.alibi_slopes = anyattn::view(static_cast<const float *>(fixture.call.alibi_slopes.data), {4});
    CHECK(call.forward() == Status::SUCCESS);
    CHECK(forward_matches(fixture.call));
}

// The caller's own loop runs all tasks, one after the other.
TEST(parallel_for_of_the_caller) {
    Fixture fixture(medium(1));
    anyattn::Call call = cpp_call(fixture.call);
    int loops = 0;
    call.num_threads = 2;
    call.parallel_for_user = &loops;
    call.parallel_for = [](void *user, int64_t tasks, int32_t, anyattn_body body, void *context) {
        ++*static_cast<int *>(user);
        for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    };
    CHECK(call.forward() == Status::SUCCESS);
    CHECK(loops > 0);
    CHECK(forward_matches(fixture.call));
}

// Tables come from whatever holds int32 values.
TEST(tables) {
    const int32_t plain[] = {3, 1};
    std::vector<int32_t> vector = {3, 1};
    const std::array<int32_t, 2> array = {3, 1};
    for (const Table &table : {Table(plain), Table(vector), Table(array), Table(plain, 2)}) {
        CHECK(table.size == 2 && table.data[0] == 3);
    }
    CHECK(Table().size < 0);
    vector.clear();
    CHECK(Table(vector).size == 0);
}

TEST(workspace_is_used) {
    Config config = medium(1);
    config.sink = true;  // its gradient has a sum for each block of rows
    Fixture fixture(config);
    anyattn::Workspace workspace;
    anyattn::Call call = cpp_call(fixture.call);
    call.workspace = &workspace;
    CHECK(call.forward() == Status::SUCCESS);
    CHECK(workspace.reserve(call.workspace_bytes(ANYATTN_BACKWARD)) && workspace.size() > 0);
    const std::vector<char> before(static_cast<size_t>(workspace.size()), 0x5a);
    std::memcpy(workspace.data(), before.data(), before.size());
    CHECK(call.backward() == Status::SUCCESS);
    CHECK(std::memcmp(workspace.data(), before.data(), before.size()) != 0);
    CHECK(backward_matches(fixture.call));
}

TEST(workspace_grows_and_stays) {
    anyattn::Workspace workspace;
    CHECK(workspace.reserve(0) && workspace.size() == 0);
    CHECK(workspace.reserve(1000) && workspace.size() == 1000);
    void *const data = workspace.data();
    CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0);
    CHECK(workspace.reserve(500) && workspace.data() == data && workspace.size() == 1000);
    CHECK(!workspace.reserve(int64_t(1) << 60) && workspace.data() == data);
    CHECK(!workspace.reserve(std::numeric_limits<int64_t>::max()) && workspace.size() == 1000);
}
