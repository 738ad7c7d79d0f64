#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

namespace anyattn {
namespace {

constexpr int64_t kMaxLength = int64_t(1) << 40;  // rows, slots, pages, positions and window bounds
constexpr int64_t kMaxCount = INT32_MAX;          // batch entries and heads: the tables are int32
constexpr int64_t kMaxHeadDim = int64_t(1) << 20;
constexpr int64_t kMaxElements = int64_t(1) << 59;  // an array of float64 still has 63 bits of bytes
constexpr uint32_t kKnownFlags = ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT | ANYATTN_TOP_LEFT | ANYATTN_ROTARY_INTERLEAVED |
                                 ANYATTN_ACCUMULATE | ANYATTN_BATCH_INVARIANT | ANYATTN_HAS_KV_INDICES | ANYATTN_FAST;

using Call = anyattn_call;

int32_t check_range(const Call &call, const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_DIMENSION, "%s is %lld; accepted: %lld to %lld", name, (long long)value,
                  (long long)low, (long long)high);
}

int32_t check_scalar(const Call &call, const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_VALUE, "%s is %lld; accepted: %lld to %lld", name, (long long)value,
                  (long long)low, (long long)high);
}

// Tasks and rows have consecutive numbers, so that their product must fit in 63 bits with a wide margin.
int32_t check_product(const Call &call, const char *names, std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes) {
        if (size == 0) return ANYATTN_SUCCESS;
    }
    for (int64_t size : sizes) {
        if (product > kMaxElements / size) {
            return refuse(call, ANYATTN_INVALID_DIMENSION, "%s is more than 2^59", names);
        }
        product *= size;
    }
    return ANYATTN_SUCCESS;
}

int32_t check_heads(const Call &call) {
    int32_t status;
    if ((status = check_range(call, "nheads", call.nheads, 1, kMaxCount)) ||
        (status = check_range(call, "nheads_kv", call.nheads_kv, 1, kMaxCount)) ||
        (status = check_range(call, "head_dim", call.head_dim, 1, kMaxHeadDim)) ||
        (status = check_range(call, "head_dim_v", call.head_dim_v, 1, kMaxHeadDim))) {
        return status;
    }
    if (call.nheads % call.nheads_kv == 0) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_DIMENSION, "nheads (%lld) must be a multiple of nheads_kv (%lld)",
                  (long long)call.nheads, (long long)call.nheads_kv);
}

int32_t check_lengths(const Call &call) {
    const struct {
        const char *name;
        int64_t value, high;
    } sizes[] = {{"batch", call.batch, kMaxCount},
                 {"batch_k", call.batch_k, kMaxCount},
                 {"seqlen_q", call.seqlen_q, kMaxLength},
                 {"seqlen_k", call.seqlen_k, kMaxLength},
                 {"total_q", call.total_q, kMaxLength},
                 {"total_k", call.total_k, kMaxLength},
                 {"num_pages", call.num_pages, kMaxCount},
                 {"page_size", call.page_size, kMaxLength},
                 {"max_pages", call.max_pages, kMaxLength},
                 {"seqlen_new", call.seqlen_new, kMaxLength},
                 {"rotary_positions", call.rotary_positions, kMaxLength},
                 {"num_indices", call.num_indices, kMaxLength},
                 {"score_words", call.score_words, kMaxCount},
                 {"num_captured", call.num_captured, kMaxCount},
                 {"num_captured_indices", call.num_captured_indices, kMaxCount},
                 {"mask_block_q", call.mask_block_q, kMaxLength},
                 {"mask_block_k", call.mask_block_k, kMaxLength}};
    for (const auto &size : sizes) {
        if (const int32_t status = check_range(call, size.name, size.value, 0, size.high)) return status;
    }
    int32_t status;
    if ((status = check_product(call, "batch * nheads * seqlen_q", {call.batch, call.nheads, call.seqlen_q})) ||
        (status =
             check_product(call, "batch_k * nheads_kv * seqlen_k", {call.batch_k, call.nheads_kv, call.seqlen_k})) ||
        (status = check_product(call, "batch * nheads_kv * seqlen_k", {call.batch, call.nheads_kv, call.seqlen_k})) ||
        (status =
             check_product(call, "batch * nheads_kv * seqlen_new", {call.batch, call.nheads_kv, call.seqlen_new})) ||
        (status = check_product(call, "nheads * (batch + total_q)", {call.nheads, call.batch + call.total_q})) ||
        (status = check_product(call, "nheads_kv * (batch + total_k)", {call.nheads_kv, call.batch + call.total_k})) ||
        (status = check_product(call, "batch * max_pages", {call.batch, call.max_pages})) ||
        (status = check_product(call, "batch * nheads_kv * seqlen_q * (num_indices + 1)",
                                {call.batch, call.nheads_kv, call.seqlen_q, call.num_indices + 1})) ||
        (status = check_product(call, "nheads_kv * total_q * (num_indices + 1)",
                                {call.nheads_kv, call.total_q, call.num_indices + 1}))) {
        return status;
    }
    return ANYATTN_SUCCESS;
}

// How k and v are stored: dense, packed or paged.
int32_t check_storage(const Call &call, int32_t pass) {
    if (!call.block_table) {
        if (call.cu_seqlens_k && call.cache_batch_idx) {
            return refuse(call, ANYATTN_UNSUPPORTED, "cache_batch_idx needs dense k and v, and cu_seqlens_k is given");
        }
        if (!call.cu_seqlens_k && !call.cache_batch_idx && call.batch_k < call.batch) {
            return refuse(call, ANYATTN_INVALID_DIMENSION, "batch_k (%lld) is less than batch (%lld)",
                          (long long)call.batch_k, (long long)call.batch);
        }
        return ANYATTN_SUCCESS;
    }
    if (has_gradients(pass)) {
        return refuse(call, ANYATTN_UNSUPPORTED, "backward needs dense or packed k and v, and block_table is given");
    }
    if (call.cu_seqlens_k || call.cache_batch_idx) {
        return refuse(call, ANYATTN_UNSUPPORTED, "block_table excludes %s",
                      call.cu_seqlens_k ? "cu_seqlens_k" : "cache_batch_idx");
    }
    int32_t status;
    if ((status = check_range(call, "page_size", call.page_size, 1, kMaxLength)) ||
        (status = check_product(call, "num_pages * page_size * nheads_kv",
                                {call.num_pages, call.page_size, call.nheads_kv})) ||
        (status = check_product(call, "max_pages * page_size", {call.max_pages, call.page_size}))) {
        return status;
    }
    if (call.seqlen_k <= call.max_pages * call.page_size) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_DIMENSION, "seqlen_k (%lld) is more than max_pages * page_size (%lld * %lld)",
                  (long long)call.seqlen_k, (long long)call.max_pages, (long long)call.page_size);
}

int32_t check_rotary(const Call &call) {
    int32_t status;
    if ((status = check_scalar(call, "rotary_dim", call.rotary_dim, 0, call.head_dim))) return status;
    if (call.rotary_dim % 2 == 0) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_VALUE, "rotary_dim is %d; accepted: even", call.rotary_dim);
}

int32_t check_scalars(const Call &call) {
    if (call.flags & ~kKnownFlags) {
        return refuse(call, ANYATTN_UNSUPPORTED, "flags has bits 0x%x that this version does not know",
                      call.flags & ~kKnownFlags);
    }
    if (!std::isfinite(call.scale)) {
        return refuse(call, ANYATTN_INVALID_VALUE, "scale is %g; accepted: any finite number", call.scale);
    }
    if (!std::isfinite(call.softcap) || call.softcap < 0) {
        return refuse(call, ANYATTN_INVALID_VALUE, "softcap is %g; accepted: finite and >= 0", call.softcap);
    }
    if (call.dropout_threshold && !call.rng_state) {
        return refuse(call, ANYATTN_NULL_POINTER, "rng_state is null and dropout_threshold is %u",
                      call.dropout_threshold);
    }
    int32_t status;
    if ((status = check_scalar(call, "num_threads", call.num_threads, 0, 4096)) ||
        (status = check_scalar(call, "dropout_threshold", call.dropout_threshold, 0, 65535)) ||
        (status = check_scalar(call, "chunk", call.chunk, 0, kMaxLength)) ||
        (status = check_scalar(call, "query_start", call.query_start, 0, kMaxLength)) ||
        (status = check_scalar(call, "key_start", call.key_start, 0, kMaxLength))) {
        return status;
    }
    if ((call.flags & ANYATTN_HAS_LEFT) && (status = check_scalar(call, "left", call.left, -kMaxLength, kMaxLength))) {
        return status;
    }
    if ((call.flags & ANYATTN_HAS_RIGHT) &&
        (status = check_scalar(call, "right", call.right, -kMaxLength, kMaxLength))) {
        return status;
    }
    return ANYATTN_SUCCESS;
}

}  // namespace

int32_t refuse(const Call &call, int32_t status, const char *format, ...) {
    if (call.message && call.message_bytes > 0) {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(call.message, static_cast<size_t>(call.message_bytes), format, arguments);
        va_end(arguments);
    }
    return status;
}

int32_t check_sizes(const Call &call, int32_t pass) {
    int32_t status;
    if ((status = check_scalar(call, "pass", pass, ANYATTN_FORWARD, ANYATTN_FORWARD_TANGENT)) ||
        (status = check_heads(call)) || (status = check_lengths(call)) || (status = check_scalars(call)) ||
        (status = check_storage(call, pass))) {
        return status;
    }
    if (pass == ANYATTN_APPEND) return check_rotary(call);
    if (!has_gradients(pass)) return ANYATTN_SUCCESS;
    // The strides of dk and dv decide whether the backward may sum in place.
    constexpr int64_t span = int64_t(1) << 52;
    status = check_range(call, "stride 1 of dk", call.dk.stride[1], -span, span);
    return status ? status : check_range(call, "stride 1 of dv", call.dv.stride[1], -span, span);
}

}  // namespace anyattn
