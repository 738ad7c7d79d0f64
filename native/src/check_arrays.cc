#include <initializer_list>

#include "check.h"

namespace anyattn {
namespace {

// Larger than any address space, and small enough that addresses a thousand rows after an array fit in 63 bits.
constexpr int64_t kMaxSpan = int64_t(1) << 52;

constexpr unsigned bit(int32_t dtype) { return 1u << dtype; }

constexpr unsigned kHalf = bit(ANYATTN_FLOAT16) | bit(ANYATTN_BFLOAT16);
constexpr unsigned kInputs = bit(ANYATTN_FLOAT32) | kHalf | bit(ANYATTN_FLOAT64);
constexpr unsigned kQuantised = bit(ANYATTN_INT8) | bit(ANYATTN_FLOAT8_E4M3FN) | bit(ANYATTN_FLOAT8_E5M2);
constexpr int32_t kLastDtype = ANYATTN_FLOAT8_E5M2;

const char *dtype_name(int32_t dtype) {
    static const char *const names[] = {"none", "float32", "float16", "bfloat16",      "float64",
                                        "bool", "int32",   "int8",    "float8_e4m3fn", "float8_e5m2"};
    return dtype >= 0 && dtype <= kLastDtype ? names[dtype] : "unknown";
}

enum Role { kInput, kOptional, kOutput, kOptionalOutput };

struct Field {
    const char *name;
    const anyattn_array &array;
    Role role;
    unsigned dtypes;
    int64_t dims[4];
    int last = 3;            // the axis that is contiguous; -1: none has to be
    bool broadcast = false;  // any axis may have stride 0, the last one too
};

int32_t check_dtype(const anyattn_call &call, const Field &field) {
    const int32_t dtype = field.array.dtype;
    if (dtype >= 0 && dtype <= kLastDtype && (field.dtypes & bit(dtype))) return ANYATTN_SUCCESS;
    char accepted[96] = "";
    size_t length = 0;
    for (int32_t d = ANYATTN_FLOAT32; d <= kLastDtype; ++d) {
        if (!(field.dtypes & bit(d))) continue;
        for (const char *c = length ? " or " : ""; *c; ++c) accepted[length++] = *c;
        for (const char *c = dtype_name(d); *c; ++c) accepted[length++] = *c;
    }
    accepted[length] = 0;
    return refuse(call, ANYATTN_INVALID_DTYPE, "%s has dtype %s (%d); accepted here: %s", field.name, dtype_name(dtype),
                  dtype, accepted);
}

int32_t check_last_stride(const anyattn_call &call, const Field &field) {
    if (field.last < 0 || field.dims[field.last] <= 1) return ANYATTN_SUCCESS;
    const int64_t stride = field.array.stride[field.last];
    if (stride == 1 || (field.broadcast && stride == 0)) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_DIMENSION, "the last stride of %s is %lld; accepted: 1%s", field.name,
                  (long long)stride, field.broadcast ? " or 0" : "");
}

int32_t check_strides(const anyattn_call &call, const Field &field) {
    int64_t extent = 0;
    for (int axis = 0; axis < 4; ++axis) {
        const int64_t steps = field.dims[axis] - 1, stride = field.array.stride[axis];
        if (stride == 0 && steps > 0 && !field.broadcast && field.role >= kOutput) {
            return refuse(call, ANYATTN_INVALID_DIMENSION,
                          "stride %d of %s is 0: its %lld rows would overwrite each other", axis, field.name,
                          (long long)field.dims[axis]);
        }
        const int64_t limit = (kMaxSpan - extent) / (steps > 0 ? steps : 1);
        if (stride > limit || stride < -limit) {
            return refuse(call, ANYATTN_INVALID_DIMENSION,
                          "stride %d of %s is %lld: the array spans more than 2^52 elements", axis, field.name,
                          (long long)stride);
        }
        extent += steps * (stride < 0 ? -stride : stride);
    }
    return check_last_stride(call, field);
}

int32_t check_field(const anyattn_call &call, const Field &field) {
    const bool required = field.role == kInput || field.role == kOutput;
    bool empty = false;
    for (int64_t dim : field.dims) empty = empty || dim == 0;
    if (!field.array.data) {
        if (!required || empty) return ANYATTN_SUCCESS;
        return refuse(call, ANYATTN_NULL_POINTER, "%s is null; it has %lld x %lld x %lld x %lld elements", field.name,
                      (long long)field.dims[0], (long long)field.dims[1], (long long)field.dims[2],
                      (long long)field.dims[3]);
    }
    if (const int32_t status = check_dtype(call, field)) return status;
    if (field.array.reserved) {
        return refuse(call, ANYATTN_UNSUPPORTED, "%s.reserved is %d; accepted: 0", field.name, field.array.reserved);
    }
    if (!empty &&
        reinterpret_cast<uintptr_t>(field.array.data) % static_cast<uintptr_t>(dtype_bytes(field.array.dtype))) {
        return refuse(call, ANYATTN_INVALID_VALUE,
                      "%s is at %p; accepted: a multiple of the %lld bytes of its elements", field.name,
                      field.array.data, (long long)dtype_bytes(field.array.dtype));
    }
    if (!empty) return check_strides(call, field);
    Field nothing = field;  // strides of an empty array must be valid too, because addresses are computed with them
    for (int64_t &dim : nothing.dims) dim = 1;
    return check_strides(call, nothing);
}

int32_t check_fields(const anyattn_call &call, std::initializer_list<Field> fields) {
    for (const Field &field : fields) {
        if (const int32_t status = check_field(call, field)) return status;
    }
    return ANYATTN_SUCCESS;
}

// The dtypes that combine with q's dtype. 16-bit results may also be float32. Statistics are float32 or float64.
struct Dtypes {
    unsigned same, wide, stats;
    explicit Dtypes(int32_t dtype)
        : same(bit(dtype)),
          wide(bit(dtype) | (bit(dtype) & kHalf ? bit(ANYATTN_FLOAT32) : 0)),
          stats(dtype == ANYATTN_FLOAT64 ? bit(ANYATTN_FLOAT64) : bit(ANYATTN_FLOAT32)) {}
};

struct Shape {
    int64_t batch, rows;  // packed arrays: 1, total
};

Shape shape_q(const anyattn_call &call) {
    return call.cu_seqlens_q ? Shape{1, call.total_q} : Shape{call.batch, call.seqlen_q};
}

Shape shape_k(const anyattn_call &call) {
    if (call.block_table) return {call.num_pages, call.page_size};
    return call.cu_seqlens_k ? Shape{1, call.total_k} : Shape{call.batch_k, call.seqlen_k};
}

// The scales of quantised k and v: of every slot if append writes them.
int32_t check_scales(const anyattn_call &call, Role role) {
    const Shape k = shape_k(call);
    const int64_t sequences = role == kOutput ? 1 : call.batch;
    const Field fields[] = {
        {"k_scale", call.k_scale, role, bit(ANYATTN_FLOAT32), {k.batch, k.rows, call.nheads_kv, sequences}, -1},
        {"v_scale", call.v_scale, role, bit(ANYATTN_FLOAT32), {k.batch, k.rows, call.nheads_kv, sequences}, -1}};
    const bool quantised = is_quantised(call.k.dtype);
    if ((quantised || is_quantised(call.v.dtype)) && call.k.dtype != call.v.dtype) {
        return refuse(call, ANYATTN_INVALID_DTYPE, "k has dtype %s and v %s; accepted: one dtype",
                      dtype_name(call.k.dtype), dtype_name(call.v.dtype));
    }
    for (const Field &field : fields) {
        if (!quantised && field.array.data) {
            return refuse(call, ANYATTN_INVALID_VALUE, "%s is given, and k has dtype %s; accepted: null", field.name,
                          dtype_name(call.k.dtype));
        }
        if (!quantised) continue;
        if (const int32_t status = check_field(call, field)) return status;
    }
    return ANYATTN_SUCCESS;
}

int32_t check_inputs(const anyattn_call &call, const Dtypes &dtypes, int32_t pass) {
    const Shape q = shape_q(call), k = shape_k(call);
    const int64_t heads = call.nheads, heads_kv = call.nheads_kv, d = call.head_dim, d_v = call.head_dim_v;
    const bool forward = pass == ANYATTN_FORWARD, writes = forward || pass == ANYATTN_FORWARD_TANGENT;
    const unsigned bias = dtypes.same | bit(ANYATTN_FLOAT32), stored = dtypes.same | (forward ? kQuantised : 0);
    // lse is stored as (batch, nheads, row), without a fourth axis.
    const Role out = writes ? kOutput : kInput, lse = forward ? kOptionalOutput : out;
    const Field lists = {
        "kv_indices", call.kv_indices, kInput, bit(ANYATTN_INT32), {q.batch, heads_kv, q.rows, call.num_indices}};
    if (call.flags & ANYATTN_HAS_KV_INDICES) {
        if (const int32_t status = check_field(call, lists)) return status;
    }
    return check_fields(
        call,
        {{"q", call.q, kInput, dtypes.same, {q.batch, q.rows, heads, d}},
         {"k", call.k, kInput, stored, {k.batch, k.rows, heads_kv, d}},
         {"v", call.v, kInput, stored, {k.batch, k.rows, heads_kv, d_v}},
         {"out", call.out, out, dtypes.wide, {q.batch, q.rows, heads, d_v}},
         {"lse", call.lse, lse, dtypes.stats, {q.batch, heads, q.rows, 1}, 2},
         {"bias", call.bias, kOptional, bias, {call.batch, heads, call.seqlen_q, call.seqlen_k}, 3, true},
         {"mask", call.mask, kOptional, bit(ANYATTN_BOOL), {call.batch, heads, call.seqlen_q, call.seqlen_k}, 3, true},
         {"alibi_slopes", call.alibi_slopes, kOptional, dtypes.stats, {call.batch, heads, 1, 1}, -1},
         {"sink", call.sink, kOptional, dtypes.stats, {heads, 1, 1, 1}, -1}});
}

// Arrays of the score program, and its block mask.
int32_t check_functions(const anyattn_call &call, const Dtypes &dtypes) {
    const int64_t n = call.num_captured, blocks_q = call.mask_block_q, blocks_k = call.mask_block_k;
    if (call.mask_blocks.data && (blocks_q < 1 || blocks_k < 1)) {
        return refuse(call, ANYATTN_INVALID_DIMENSION,
                      "mask_block_q and mask_block_k are %lld and %lld; accepted: >= 1", (long long)blocks_q,
                      (long long)blocks_k);
    }
    const auto blocks = [](int64_t rows, int64_t block) { return block > 0 ? (rows + block - 1) / block : 0; };
    const int64_t rows = blocks(call.seqlen_q, blocks_q), keys = blocks(call.seqlen_k, blocks_k);
    return check_fields(
        call,
        {{"captured", call.captured, kOptional, dtypes.stats, {n, 1, 1, 1}, 0},
         {"captured_indices",
          call.captured_indices,
          kOptional,
          bit(ANYATTN_INT32),
          {call.num_captured_indices, 1, 1, 1},
          0},
         {"dcaptured", call.dcaptured, kOptionalOutput, dtypes.stats, {n, 1, 1, 1}, 0},
         {"mask_blocks", call.mask_blocks, kOptional, bit(ANYATTN_BOOL), {call.batch, call.nheads, rows, keys}, 3}});
}

int32_t check_gradients(const anyattn_call &call, const Dtypes &dtypes) {
    const Shape q = shape_q(call), k = shape_k(call);
    const int64_t heads = call.nheads, heads_kv = call.nheads_kv, d = call.head_dim, d_v = call.head_dim_v;
    const double elements = double(call.batch) * double(heads) * double(call.seqlen_q) * double(call.seqlen_k);
    if (call.dbias.data && elements > 0x1p59) {
        return refuse(call, ANYATTN_INVALID_DIMENSION, "dbias has more than 2^59 elements before it is summed");
    }
    if (call.dbias.data && !call.bias.data) return refuse(call, ANYATTN_NULL_POINTER, "bias is null and dbias is not");
    if (call.dsink.data && !call.sink.data) return refuse(call, ANYATTN_NULL_POINTER, "sink is null and dsink is not");
    const unsigned bias = dtypes.wide | bit(ANYATTN_FLOAT32);
    return check_fields(
        call, {{"dout", call.dout, kInput, dtypes.wide, {q.batch, q.rows, heads, d_v}},
               {"dlse", call.dlse, kOptional, dtypes.stats, {q.batch, heads, q.rows, 1}, 2},
               {"dq", call.dq, kOutput, dtypes.wide, {q.batch, q.rows, heads, d}},
               {"dk", call.dk, kOutput, dtypes.wide, {k.batch, k.rows, heads_kv, d}},
               {"dv", call.dv, kOutput, dtypes.wide, {k.batch, k.rows, heads_kv, d_v}},
               {"dbias", call.dbias, kOptionalOutput, bias, {call.batch, heads, call.seqlen_q, call.seqlen_k}, 3, true},
               {"dsink", call.dsink, kOptionalOutput, dtypes.stats, {heads, 1, 1, 1}, -1}});
}

int32_t check_tangents(const anyattn_call &call, const Dtypes &dtypes) {
    const Shape q = shape_q(call), k = shape_k(call);
    const int64_t heads = call.nheads, heads_kv = call.nheads_kv, d = call.head_dim, d_v = call.head_dim_v;
    if (call.tbias.data && !call.bias.data) return refuse(call, ANYATTN_NULL_POINTER, "bias is null and tbias is not");
    if (call.tsink.data && !call.sink.data) return refuse(call, ANYATTN_NULL_POINTER, "sink is null and tsink is not");
    const unsigned bias = dtypes.same | bit(ANYATTN_FLOAT32);
    return check_fields(
        call, {{"tq", call.tq, kOptional, dtypes.same, {q.batch, q.rows, heads, d}},
               {"tk", call.tk, kOptional, dtypes.same, {k.batch, k.rows, heads_kv, d}},
               {"tv", call.tv, kOptional, dtypes.same, {k.batch, k.rows, heads_kv, d_v}},
               {"tbias", call.tbias, kOptional, bias, {call.batch, heads, call.seqlen_q, call.seqlen_k}, 3, true},
               {"tsink", call.tsink, kOptional, dtypes.stats, {heads, 1, 1, 1}, -1},
               {"tout", call.tout, kOutput, dtypes.wide, {q.batch, q.rows, heads, d_v}},
               {"tlse", call.tlse, kOutput, dtypes.stats, {q.batch, heads, q.rows, 1}, 2}});
}

int32_t check_append(const anyattn_call &call, const Dtypes &dtypes) {
    const Shape q = shape_q(call), k = shape_k(call);
    const int64_t heads = call.nheads, heads_kv = call.nheads_kv, d = call.head_dim, d_v = call.head_dim_v;
    const int64_t fresh = call.seqlen_new, half = call.rotary_dim / 2;
    const unsigned angles = dtypes.same | bit(ANYATTN_FLOAT32);
    int32_t status = ANYATTN_SUCCESS;
    if (fresh > 0) {
        const unsigned stored = dtypes.same | kQuantised;
        status = check_fields(call, {{"k", call.k, kOutput, stored, {k.batch, k.rows, heads_kv, d}},
                                     {"v", call.v, kOutput, stored, {k.batch, k.rows, heads_kv, d_v}},
                                     {"new_k", call.new_k, kInput, dtypes.same, {call.batch, fresh, heads_kv, d}},
                                     {"new_v", call.new_v, kInput, dtypes.same, {call.batch, fresh, heads_kv, d_v}}});
        if (!status) status = check_scales(call, kOutput);
    }
    if (!status && call.q.data) {
        status = check_fields(call, {{"q", call.q, kInput, dtypes.same, {q.batch, q.rows, heads, d}},
                                     {"out", call.out, kOutput, dtypes.same, {q.batch, q.rows, heads, d}}});
    }
    if (status || call.rotary_dim == 0) return status;
    return check_fields(call,
                        {{"rotary_cos", call.rotary_cos, kInput, angles, {call.rotary_positions, half, 1, 1}, 1},
                         {"rotary_sin", call.rotary_sin, kInput, angles, {call.rotary_positions, half, 1, 1}, 1}});
}

}  // namespace

int32_t check_arrays(const anyattn_call &call, int32_t pass) {
    const bool append = pass == ANYATTN_APPEND;
    const bool from_k = append && call.seqlen_new > 0;
    if (append && !from_k && !call.q.data) return ANYATTN_SUCCESS;
    const bool quantised = from_k && is_quantised(call.k.dtype);
    const Field base = {quantised ? "new_k"
                        : from_k  ? "k"
                                  : "q",
                        quantised ? call.new_k
                        : from_k  ? call.k
                                  : call.q,
                        kInput,
                        kInputs,
                        {0, 0, 0, 0}};
    if (const int32_t status = check_dtype(call, base)) return status;
    const Dtypes dtypes(base.array.dtype);
    if (append) return check_append(call, dtypes);
    int32_t status = check_inputs(call, dtypes, pass);
    if (!status && call.score_program) status = check_functions(call, dtypes);
    if (!status) status = check_scales(call, kInput);
    if (!status && has_gradients(pass)) status = check_gradients(call, dtypes);
    if (!status && has_tangents(pass)) status = check_tangents(call, dtypes);
    return status;
}

}  // namespace anyattn
