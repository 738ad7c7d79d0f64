#include "fixture.h"

#include <cstdio>

#include "reference.h"

namespace {

// Starts of `batch` sequences of up to `longest` rows, with rows before the first and after the last.
std::vector<int32_t> draw_starts(Memory &memory, int64_t batch, int64_t longest, int64_t *total) {
    std::vector<int32_t> starts = {3};
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t rows = b == 0 ? longest : memory.below(longest + 1);
        starts.push_back(static_cast<int32_t>(starts.back() + rows));
    }
    *total = starts.back() + 2;
    return starts;
}

Index broadcast(Index dims, int bits) {
    return {bits & 1 ? 1 : dims.a, bits & 2 ? 1 : dims.b, bits & 4 ? 1 : dims.c, bits & 8 ? 1 : dims.d};
}

int32_t stats_of(int32_t dtype) { return dtype == ANYATTN_FLOAT64 ? ANYATTN_FLOAT64 : ANYATTN_FLOAT32; }

void drop_strides(anyattn_array *array, int bits) {
    for (int axis = 0; axis < 4; ++axis) {
        if (bits >> axis & 1) array->stride[axis] = 0;
    }
}

}  // namespace

std::vector<Config> edge_sizes() {
    std::vector<Config> found;
    for (int64_t seqlen : {0, 1, 63, 64, 65, 130}) {
        for (int64_t head_dim : {1, 8, 59, 64}) {
            Config config;
            config.seqlen_q = seqlen;
            config.seqlen_k = 130 - seqlen;
            config.head_dim = head_dim;
            config.head_dim_v = head_dim + 3;
            found.push_back(config);
        }
    }
    return found;
}

std::vector<int32_t> targets() {
    std::vector<int32_t> available;
    for (int32_t i = 0; anyattn_target_name(i); ++i) {
        if (anyattn_target_available(i)) available.push_back(i + 1);
    }
    return available;
}

Index dims_q(const anyattn_call &call, int64_t dim) {
    return call.cu_seqlens_q ? Index{1, call.total_q, call.nheads, dim}
                             : Index{call.batch, call.seqlen_q, call.nheads, dim};
}

Index dims_k(const anyattn_call &call, int64_t dim) {
    if (call.block_table) return {call.num_pages, call.page_size, call.nheads_kv, dim};
    return call.cu_seqlens_k ? Index{1, call.total_k, call.nheads_kv, dim}
                             : Index{call.batch_k, call.seqlen_k, call.nheads_kv, dim};
}

Fixture::Fixture(const Config &config) : memory(config.seed) {
    call.size = sizeof call;
    call.flags = config.flags;
    call.num_threads = config.threads;
    call.target = config.target;
    call.batch = config.batch;
    call.seqlen_q = config.seqlen_q;
    call.seqlen_k = config.seqlen_k;
    call.nheads = config.nheads;
    call.nheads_kv = config.nheads_kv;
    call.head_dim = config.head_dim;
    call.head_dim_v = config.head_dim_v;
    call.batch_k = config.batch;
    call.scale = config.scale;
    call.softcap = config.softcap;
    call.left = config.left;
    call.right = config.right;
    call.chunk = config.chunk;
    call.message = message_;
    call.message_bytes = sizeof message_;
    if (config.dropout) {
        call.dropout_threshold = config.dropout;
        call.query_start = 3;
        call.key_start = 5;
        call.rng_state = rng_state;
    }
    make_tables(config);
    make_inputs(config);
    if (config.kv_indices >= 0) make_lists(config);
    make_gradients(config);
    make_tangents(config);
    hide_unused();
}

void Fixture::make_tables(const Config &config) {
    if (config.packed_q) {
        cu_q = draw_starts(memory, config.batch, config.seqlen_q, &call.total_q);
        call.cu_seqlens_q = cu_q.data();
    }
    if (config.packed_k) {
        cu_k = draw_starts(memory, config.batch, config.seqlen_k, &call.total_k);
        call.cu_seqlens_k = cu_k.data();
    }
    if (config.cache_batch_idx) {
        call.batch_k = config.batch + 2;
        for (int64_t b = 0; b < config.batch; ++b) entries.push_back(static_cast<int32_t>(config.batch + 1 - b));
        call.cache_batch_idx = entries.data();
    }
    if (config.paged) {
        call.page_size = 3;
        call.max_pages = (config.seqlen_k + 2) / 3;
        call.num_pages = config.batch * call.max_pages + 2;
        for (int64_t i = 0; i < config.batch * call.max_pages; ++i) {
            pages.push_back(static_cast<int32_t>((i * 7 + 1) % (call.num_pages - (call.num_pages % 7 == 0))));
        }
        call.block_table = pages.data();
    }
    const auto used = [&](bool on, const std::vector<int32_t> &cu, int64_t seqlen, std::vector<int32_t> *table) {
        for (int64_t b = 0; on && b < config.batch; ++b) {
            const int64_t rows = cu.empty() ? seqlen : cu[size_t(b) + 1] - cu[size_t(b)];
            table->push_back(static_cast<int32_t>(b == 1 ? 0 : memory.below(rows + 1)));
        }
        return on ? table->data() : nullptr;
    };
    call.seqused_q = used(config.seqused_q, cu_q, config.seqlen_q, &used_q);
    call.seqused_k = used(config.seqused_k, cu_k, config.seqlen_k, &used_k);
    for (int64_t b = 0; config.leftpad && b < config.batch; ++b) {
        leftpad.push_back(static_cast<int32_t>(memory.below(Place(call, b).n_k + 1)));
    }
    call.leftpad_k = config.leftpad ? leftpad.data() : nullptr;
    for (int64_t b = 0; config.offset && b < config.batch; ++b) {
        offsets.push_back(static_cast<int32_t>(memory.below(config.seqlen_k + 4) - 2));
    }
    call.offset = config.offset ? offsets.data() : nullptr;
}

void Fixture::make_inputs(const Config &config) {
    const int64_t d = call.head_dim, d_v = call.head_dim_v, gap = config.strided ? 3 : 0;
    const int32_t stats = stats_of(config.dtype);
    const int32_t result = config.result ? config.result : config.dtype;
    call.q = memory.normal(config.dtype, dims_q(call, d), gap);
    call.k = memory.normal(config.dtype, dims_k(call, d), gap);
    call.v = memory.normal(config.dtype, dims_k(call, d_v), gap);
    call.out = memory.array(result, dims_q(call, d_v), gap);
    const Index rows = dims_q(call, 1);
    if (config.lse) call.lse = memory.array(stats, {rows.a, rows.c, rows.b, 1});
    const Index scores = {call.batch, call.nheads, call.seqlen_q, call.seqlen_k};
    if (config.bias >= 0) {
        call.bias = memory.normal(config.dtype, broadcast(scores, config.bias));
        drop_strides(&call.bias, config.bias);
    }
    if (config.mask >= 0) {
        const Index dims = broadcast(scores, config.mask);
        call.mask = memory.array(ANYATTN_BOOL, dims);
        Memory::fill(call.mask, dims, [this] { return memory.below(4) != 0; });
        drop_strides(&call.mask, config.mask);
    }
    if (config.alibi) {
        call.alibi_slopes = memory.normal(stats, {1, 1, call.batch, call.nheads});
        call.alibi_slopes.stride[0] = call.nheads;
        call.alibi_slopes.stride[1] = 1;
    }
    if (config.sink) {
        call.sink = memory.normal(stats, {1, 1, 1, call.nheads});
        call.sink.stride[0] = 1;
    }
}

// Lists with keys that are named twice, keys that are masked and no keys. Those of unused rows are INT32_MAX.
void Fixture::make_lists(const Config &config) {
    const Index rows = dims_q(call, 1);
    const int64_t heads = config.lists_of_heads ? call.nheads_kv : 1;
    call.flags |= ANYATTN_HAS_KV_INDICES;
    call.num_indices = config.kv_indices;
    call.kv_indices = memory.array(ANYATTN_INT32, {rows.a, heads, rows.b, call.num_indices});
    for (int64_t b = 0; b < call.batch; ++b) {
        const Place place(call, b);
        const int64_t slots = call.cu_seqlens_k ? cu_k[size_t(b) + 1] - cu_k[size_t(b)] : call.seqlen_k;
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < place.n_q; ++i)
                for (int64_t entry = 0; entry < call.num_indices; ++entry) {
                    const Index row = place.row(i, 0);
                    set(call.kv_indices, {row.a, h, row.b, entry}, double(memory.below(slots + 1) - 1));
                }
    }
    if (heads == 1) call.kv_indices.stride[1] = 0;
}

void Fixture::make_gradients(const Config &config) {
    const int64_t d = call.head_dim, d_v = call.head_dim_v, gap = config.strided ? 1 : 0;
    const int32_t result = config.result ? config.result : config.dtype;
    call.dout = memory.normal(result, dims_q(call, d_v), gap);
    call.dq = memory.array(result, dims_q(call, d), gap);
    call.dk = memory.array(result, dims_k(call, d), gap);
    call.dv = memory.array(result, dims_k(call, d_v), gap);
    const Index rows = dims_q(call, 1);
    if (config.dlse) call.dlse = memory.normal(call.lse.dtype, {rows.a, rows.c, rows.b, 1});
    if (config.bias >= 0) {
        call.dbias =
            memory.array(result, broadcast({call.batch, call.nheads, call.seqlen_q, call.seqlen_k}, config.bias));
        drop_strides(&call.dbias, config.bias);
    }
    if (config.sink) {
        call.dsink = memory.array(call.sink.dtype, {1, 1, 1, call.nheads});
        call.dsink.stride[0] = 1;
    }
    if (!(config.flags & ANYATTN_ACCUMULATE)) return;
    Memory::fill(call.dq, dims_q(call, d), [] { return 1.0; });
    Memory::fill(call.dk, dims_k(call, d), [] { return 1.0; });
    Memory::fill(call.dv, dims_k(call, d_v), [] { return 1.0; });
}

void Fixture::make_tangents(const Config &config) {
    const int64_t d = call.head_dim, d_v = call.head_dim_v, gap = config.strided ? 2 : 0;
    const Index rows = dims_q(call, 1);
    call.tq = memory.normal(config.dtype, dims_q(call, d), gap);
    call.tk = memory.normal(config.dtype, dims_k(call, d), gap);
    call.tv = memory.normal(config.dtype, dims_k(call, d_v), gap);
    call.tout = memory.array(call.out.dtype, dims_q(call, d_v), gap);
    call.tlse = memory.array(stats_of(config.dtype), {rows.a, rows.c, rows.b, 1});
    if (config.bias >= 0) {
        const Index scores = {call.batch, call.nheads, call.seqlen_q, call.seqlen_k};
        call.tbias = memory.normal(config.dtype, broadcast(scores, config.bias));
        drop_strides(&call.tbias, config.bias);
    }
    if (config.sink) {
        call.tsink = memory.normal(call.sink.dtype, {1, 1, 1, call.nheads});
        call.tsink.stride[0] = 1;
    }
}

// NaN in every key and value that no row may see, and in every row of no sequence.
void Fixture::hide_unused() {
    const Index keys = dims_k(call, 1), rows = dims_q(call, 1);
    std::vector<char> used_keys(static_cast<size_t>(keys.a * keys.b)), used_rows(static_cast<size_t>(rows.a * rows.b));
    for (int64_t b = 0; b < call.batch; ++b) {
        const Place place(call, b);
        for (int64_t j = place.leftpad; j < place.n_k; ++j) {
            if (!place.selects(j)) continue;
            const Index at = place.key(j, 0);
            used_keys[static_cast<size_t>(at.a * keys.b + at.b)] = 1;
        }
        for (int64_t i = 0; i < place.n_q; ++i) {
            const Index at = place.row(i, 0);
            used_rows[static_cast<size_t>(at.a * rows.b + at.b)] = 1;
        }
    }
    const auto hide = [](const anyattn_array &array, const Index &dims, const std::vector<char> &used) {
        for (size_t n = 0; n < used.size(); ++n) {
            const int64_t a = static_cast<int64_t>(n) / dims.b, b = static_cast<int64_t>(n) % dims.b;
            for (int64_t c = 0; c < dims.c && !used[n]; ++c) {
                for (int64_t d = 0; d < dims.d; ++d) set(array, {a, b, c, d}, kNan);
            }
        }
    };
    hide(call.k, dims_k(call, call.head_dim), used_keys);
    hide(call.v, dims_k(call, call.head_dim_v), used_keys);
    hide(call.q, dims_q(call, call.head_dim), used_rows);
    hide(call.dout, dims_q(call, call.head_dim_v), used_rows);
    hide(call.tk, dims_k(call, call.head_dim), used_keys);
    hide(call.tv, dims_k(call, call.head_dim_v), used_keys);
    hide(call.tq, dims_q(call, call.head_dim), used_rows);
}

int32_t Fixture::expect(int32_t status) const {
    if (status) std::printf("  %s: %s\n", anyattn_error_string(status), message_);
    return status;
}
