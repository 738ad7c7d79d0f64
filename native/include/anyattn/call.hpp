// Attention, its gradients, tangents and second derivatives, and appending to a KV cache.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "translation.hpp"

namespace anyattn {

// Memory that successive calls share. It grows to the size that the largest of them needs.
class Workspace {
  public:
    [[nodiscard]] bool reserve(int64_t bytes) {
        if (bytes <= size_) return true;
        constexpr size_t alignment = 64;
        const auto room = static_cast<uint64_t>(bytes) + alignment;
        if (room > std::numeric_limits<size_t>::max() / 2) return false;
        std::unique_ptr<char[]> block(new (std::nothrow) char[static_cast<size_t>(room)]);
        if (!block) return false;
        block_ = std::move(block);
        data_ = block_.get() + (alignment - reinterpret_cast<uintptr_t>(block_.get()) % alignment) % alignment;
        size_ = bytes;
        return true;
    }
    void *data() const { return data_; }
    int64_t size() const { return size_; }

  private:
    std::unique_ptr<char[]> block_;
    char *data_ = nullptr;
    int64_t size_ = 0;
};

// Attention and its derivatives.
struct Call : Settings {
    ConstArray q;  // (batch, seqlen_q, nheads, head_dim)
    ConstArray k, v;  // (batch, seqlen_k, nheads_kv, head_dim or head_dim_v)
    Array out;  // (batch, seqlen_q, nheads, head_dim_v); an input of backward
    Array lse;  // (batch, nheads, seqlen_q), packed (nheads, total_q); optional in forward

    ConstArray dout, dlse;  // shaped like out and lse; dlse is optional
    Array dq, dk, dv, dbias, dsink;  // shaped like the inputs; dbias and dsink are optional
    bool accumulate = false;  // adds to dq, dk, dv instead of overwriting them

    ConstArray tq, tk, tv, tbias, tsink;  // tangents, shaped like the inputs; absent: zeros
    Array tout, tlse;  // the derivatives of out and lse along the tangents

    std::optional<double> scale;  // head_dim ** -0.5
    double softcap = 0;  // 0: off
    bool causal = false;  // the same as right = 0
    std::optional<int64_t> left, right;  // most keys before and after its position that a query attends to
    int64_t chunk = 0;  // 0: off
    bool top_left = false;  // query i is at key i; otherwise the last query is at the last key
    ConstArray bias, mask;  // (batch or 1, nheads or 1, seqlen_q or 1, seqlen_k or 1); mask false: masked
    ConstArray alibi_slopes;  // (nheads) or (batch, nheads)
    ConstArray sink;  // (nheads)
    ConstArray
        kv_indices;  // int32 (batch, seqlen_q, n) or (batch, nheads_kv, seqlen_q, n), packed without batch: key slots
    Table seqused_q, seqused_k;  // (batch): rows and keys in use
    Table leftpad_k, offset;  // (batch): first key in use; position of row 0
    int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // packed or paged: maximum length; 0: computed
    bool batch_invariant = false;  // gradients do not depend on the other sequences
    bool fast = false;  // float32 products may use 16 of the 24 bits of each number, where this is faster

    double dropout_p = 0;
    uint64_t rng_state[2] = {0, 0};  // seed, offset
    int64_t query_start = 0, key_start = 0;  // added to the indices that dropout counts by

    Workspace *workspace = nullptr;  // null: allocated for each call

    Status forward() const { return run(ANYATTN_FORWARD); }
    Status backward() const { return run(ANYATTN_BACKWARD); }
    Status tangent() const { return run(ANYATTN_TANGENT); }
    Status second() const { return run(ANYATTN_SECOND); }
    Status forward_tangent() const { return run(ANYATTN_FORWARD_TANGENT); }
    // Returns the bytes of workspace that a pass needs, or a negative status.
    int64_t workspace_bytes(anyattn_pass pass) const;

  private:
    Status run(anyattn_pass pass) const;
};

// Writes new rows into a KV cache after cache_seqlens. With rotary tables, new keys are rotated first. To attend to the
// cache afterwards, use a Call with seqused_k = cache_seqlens + seqlen_new.
struct Append : Settings {
    Array k, v;  // the cache, stored as k and v of a Call
    ConstArray new_k, new_v;  // (batch, seqlen_new, nheads_kv, head_dim or head_dim_v)
    Table cache_seqlens;  // (batch): rows already stored
    ConstArray rotary_cos, rotary_sin;  // (positions, rotary_dim / 2)
    bool rotary_interleaved = false;  // pairs (0, 1), (2, 3), ... instead of halves
    ConstArray q;  // optional: rotated into out, row i at position cache_seqlens + i
    Array out;
    bool one_position = false;  // true: every row of q is at position cache_seqlens

    Status run() const;
};

namespace detail {

inline void put_options(const Call &from, Translation *to) {
    anyattn_call &call = to->call;
    call.scale = from.scale ? *from.scale : 1 / std::sqrt(static_cast<double>(call.head_dim > 0 ? call.head_dim : 1));
    call.softcap = from.softcap;
    call.left = from.left.value_or(0);
    call.right = from.causal ? 0 : from.right.value_or(0);
    call.chunk = from.chunk;
    call.flags =
        (from.left ? uint32_t(ANYATTN_HAS_LEFT) : 0) | (from.causal || from.right ? uint32_t(ANYATTN_HAS_RIGHT) : 0) |
        (from.top_left ? uint32_t(ANYATTN_TOP_LEFT) : 0) | (from.accumulate ? uint32_t(ANYATTN_ACCUMULATE) : 0) |
        (from.batch_invariant ? uint32_t(ANYATTN_BATCH_INVARIANT) : 0) | (from.fast ? uint32_t(ANYATTN_FAST) : 0);
    call.seqused_q = to->per_sequence("seqused_q", from.seqused_q);
    call.seqused_k = to->per_sequence("seqused_k", from.seqused_k);
    call.leftpad_k = to->per_sequence("leftpad_k", from.leftpad_k);
    call.offset = to->per_sequence("offset", from.offset);
    call.rng_state = from.rng_state;
    call.query_start = from.query_start;
    call.key_start = from.key_start;
    const double threshold = std::nearbyint(from.dropout_p * 65536);
    if (threshold >= 0 && threshold < 65536 && from.dropout_p >= 0) {
        call.dropout_threshold = static_cast<uint32_t>(threshold);
    } else {
        to->fail(Status::INVALID_VALUE, "dropout_p is %g; accepted: 0 <= dropout_p < 1", from.dropout_p);
    }
}

inline void put_tangents(const Call &from, const ConstArray &out, Translation *to) {
    anyattn_call &call = to->call;
    to->put("tq", from.tq, &call.tq, from.q);
    to->put("tk", from.tk, &call.tk, from.k);
    to->put("tv", from.tv, &call.tv, from.v);
    to->put_scores("tbias", from.tbias, &call.tbias);
    to->put_heads("tsink", from.tsink, &call.tsink);
    to->put("tout", from.tout, &call.tout, out);
    to->put_statistics("tlse", from.tlse, &call.tlse, from.q);
}

inline void put_arrays(const Call &from, anyattn_pass pass, Translation *to) {
    anyattn_call &call = to->call;
    const ConstArray out = Translation::with_dim(from.q, call.head_dim_v);
    to->put("out", from.out, &call.out, out);
    to->put_statistics("lse", from.lse, &call.lse, from.q);
    to->put_scores("bias", from.bias, &call.bias);
    to->put_scores("mask", from.mask, &call.mask);
    to->put_slopes("alibi_slopes", from.alibi_slopes, &call.alibi_slopes);
    to->put_heads("sink", from.sink, &call.sink);
    to->put_lists("kv_indices", from.kv_indices, &call.kv_indices);
    if (pass != ANYATTN_FORWARD && pass != ANYATTN_BACKWARD) put_tangents(from, out, to);
    if (pass != ANYATTN_BACKWARD && pass != ANYATTN_SECOND) return;
    to->put("dout", from.dout, &call.dout, out);
    to->put_statistics("dlse", from.dlse, &call.dlse, from.q);
    to->put("dq", from.dq, &call.dq, from.q);
    to->put("dk", from.dk, &call.dk, from.k);
    to->put("dv", from.dv, &call.dv, from.v);
    to->put_scores("dbias", from.dbias, &call.dbias);
    to->put_heads("dsink", from.dsink, &call.dsink);
}

inline Translation translate(const Call &from, anyattn_pass pass) {
    Translation to(from);
    to.queries(from.q, from.max_seqlen_q);
    to.keys(from.k, from.v, from.max_seqlen_k);
    if (to.status != Status::SUCCESS) return to;
    put_options(from, &to);
    put_arrays(from, pass, &to);
    return to;
}

}  // namespace detail

inline int64_t Call::workspace_bytes(anyattn_pass pass) const {
    const detail::Translation translated = detail::translate(*this, pass);
    if (translated.status != Status::SUCCESS) return -static_cast<int64_t>(translated.status);
    return anyattn_workspace(&translated.call, pass);
}

namespace detail {

inline int32_t compute(const anyattn_call &call, anyattn_pass pass) {
    switch (pass) {
        case ANYATTN_FORWARD:
            return anyattn_forward(&call);
        case ANYATTN_TANGENT:
            return anyattn_tangent(&call);
        case ANYATTN_SECOND:
            return anyattn_second(&call);
        case ANYATTN_FORWARD_TANGENT:
            return anyattn_forward_tangent(&call);
        default:
            return anyattn_backward(&call);
    }
}

}  // namespace detail

inline Status Call::run(anyattn_pass pass) const {
    detail::Translation translated = detail::translate(*this, pass);
    if (translated.status != Status::SUCCESS) return translated.status;
    anyattn_call &call = translated.call;
    if (workspace) {
        const int64_t bytes = anyattn_workspace(&call, pass);
        if (bytes < 0) return static_cast<Status>(-bytes);
        if (!workspace->reserve(bytes)) {
            return detail::refuse(Status::OUT_OF_MEMORY, "no memory for %lld bytes of workspace",
                                  detail::Integer(bytes));
        }
        call.workspace = workspace->data();
        call.workspace_bytes = workspace->size();
    }
    return static_cast<Status>(detail::compute(call, pass));
}

inline Status Append::run() const {
    using detail::Translation;
    Translation to(*this);
    anyattn_call &call = to.call;
    if (q.rank) {
        to.queries(q, 0);
        to.put("out", out, &call.out, q);
    } else {
        to.expect_rank("new_k", new_k, 4);
        call.batch = new_k.shape[0];
        call.nheads = new_k.shape[2];
        call.head_dim = new_k.shape[3];
    }
    to.keys(k, v, 0);
    call.seqlen_new = new_k.shape[1];
    to.put("new_k", new_k, &call.new_k,
           Translation::shaped({call.batch, call.seqlen_new, call.nheads_kv, call.head_dim}));
    to.put("new_v", new_v, &call.new_v,
           Translation::shaped({call.batch, call.seqlen_new, call.nheads_kv, call.head_dim_v}));
    call.cache_seqlens = to.per_sequence("cache_seqlens", cache_seqlens);
    to.put_angles(rotary_cos, rotary_sin);
    call.flags = (rotary_interleaved ? uint32_t(ANYATTN_ROTARY_INTERLEAVED) : 0) |
                 (one_position ? 0 : uint32_t(ANYATTN_HAS_RIGHT));
    return to.status == Status::SUCCESS ? static_cast<Status>(anyattn_append(&call)) : to.status;
}

}  // namespace anyattn
