// Translates arrays with shapes into the sizes and strides of anyattn_call, and checks that the shapes agree.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "arrays.hpp"

namespace anyattn {

// Storage of the rows, and how the call runs.
struct Settings {
    Table cu_seqlens_q, cu_seqlens_k;  // (batch + 1): q or k and v are packed, (total, nheads, dim)
    Table block_table;  // (batch, max_pages): k and v are pages, (num_pages, page_size, nheads_kv, dim)
    Table cache_batch_idx;  // (batch): each sequence's entry of k and v

    int32_t num_threads = 0;  // 0: the number of the runtime
    int32_t target = 0;  // 0: the best of this machine; else 1 + an index of anyattn_target_name
    anyattn_parallel_for parallel_for = nullptr;
    void *parallel_for_user = nullptr;
    anyattn_poll poll = nullptr;  // called regularly in the calling thread; nonzero ends the call: INTERRUPTED
    void *poll_user = nullptr;
};

namespace detail {

// An anyattn_call under construction, and its first error.
class Translation {
  public:
    explicit Translation(const Settings &settings) : settings_(settings) {
        message()[0] = 0;
        call.size = sizeof call;
        call.num_threads = settings.num_threads;
        call.target = settings.target;
        call.parallel_for = settings.parallel_for;
        call.parallel_for_user = settings.parallel_for_user;
        call.poll = settings.poll;
        call.poll_user = settings.poll_user;
        call.message = message();
        call.message_bytes = kMessageBytes;
    }

    // Only the first error is kept.
    ANYATTN_PRINTF(3, 4) void fail(Status reason, const char *format, ...) {
        if (status != Status::SUCCESS) return;
        status = reason;
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(message(), kMessageBytes, format, arguments);
        va_end(arguments);
    }

    // Sets batch and the sizes of q.
    void queries(const ConstArray &q, int64_t longest) {
        const bool packed = present(settings_.cu_seqlens_q);
        expect_rank("q", q, packed ? 3 : 4);
        if (packed) starts("cu_seqlens_q", settings_.cu_seqlens_q, -1);
        if (status != Status::SUCCESS) return;
        call.batch = packed ? settings_.cu_seqlens_q.size - 1 : q.shape[0];
        call.seqlen_q = packed ? bound(settings_.cu_seqlens_q, longest) : q.shape[1];
        call.total_q = packed ? q.shape[0] : 0;
        call.nheads = q.shape[q.rank - 2];
        call.head_dim = q.shape[q.rank - 1];
        call.cu_seqlens_q = settings_.cu_seqlens_q.data;
        put("q", q, &call.q, q);
    }

    // Sets the sizes and the storage of k and v.
    void keys(const ConstArray &k, const ConstArray &v, int64_t longest) {
        const bool packed = present(settings_.cu_seqlens_k), paged = present(settings_.block_table);
        expect_rank("k", k, packed && !paged ? 3 : 4);
        expect_rank("v", v, packed && !paged ? 3 : 4);
        if (packed) starts("cu_seqlens_k", settings_.cu_seqlens_k, call.batch + 1);
        if (status != Status::SUCCESS) return;
        call.nheads_kv = k.shape[k.rank - 2];
        call.head_dim_v = v.shape[v.rank - 1];
        call.cu_seqlens_k = settings_.cu_seqlens_k.data;
        if (paged) {
            pages(k, longest);
        } else {
            call.total_k = packed ? k.shape[0] : 0;
            call.batch_k = packed ? 0 : k.shape[0];
            call.seqlen_k = packed ? bound(settings_.cu_seqlens_k, longest) : k.shape[1];
        }
        call.cache_batch_idx = per_sequence("cache_batch_idx", settings_.cache_batch_idx);
        put("k", k, &call.k, with_dim(k, call.head_dim));
        put("v", v, &call.v, with_dim(k, call.head_dim_v));
    }

    // Sets an array of rows that has the shape of another one. Packed arrays have no batch axis.
    void put(const char *name, const ConstArray &from, anyattn_array *to, const ConstArray &expected) {
        place(name, from, to, expected, 4 - expected.rank);
    }

    // Sets lse or dlse, whose axes are (batch, nheads, rows).
    void put_statistics(const char *name, const ConstArray &from, anyattn_array *to, const ConstArray &q) {
        const ConstArray expected =
            q.rank == 3 ? shaped({q.shape[1], q.shape[0]}) : shaped({q.shape[0], q.shape[2], q.shape[1]});
        place(name, from, to, expected, 3 - expected.rank);
    }

    // Sets bias, mask or dbias. An axis of length 1 is broadcast.
    void put_scores(const char *name, ConstArray from, anyattn_array *to) {
        if (from.rank == 0) return;
        ConstArray expected = shaped({call.batch, call.nheads, call.seqlen_q, call.seqlen_k});
        for (int axis = 0; axis < 4 && from.rank == 4; ++axis) {
            if (from.shape[axis] != 1) continue;
            from.stride[axis] = 0;
            expected.shape[axis] = 1;
        }
        put(name, from, to, expected);
    }

    // Sets kv_indices, with or without an axis of KV heads.
    void put_lists(const char *name, const ConstArray &from, anyattn_array *to) {
        if (from.rank == 0) return;
        const bool packed = present(settings_.cu_seqlens_q), of_heads = from.rank == (packed ? 3 : 4);
        const int64_t heads = call.nheads_kv, rows = packed ? call.total_q : call.seqlen_q;
        call.num_indices = from.shape[from.rank - 1];
        call.flags |= ANYATTN_HAS_KV_INDICES;
        if (packed) {
            put(name, from, to, of_heads ? shaped({heads, rows, call.num_indices}) : shaped({rows, call.num_indices}));
        } else if (of_heads) {
            put(name, from, to, shaped({call.batch, heads, rows, call.num_indices}));
        } else {
            put(name, from, to, shaped({call.batch, rows, call.num_indices}));
            to->stride[0] = to->stride[1];
            to->stride[1] = 0;
        }
    }

    void put_slopes(const char *name, const ConstArray &from, anyattn_array *to) {
        const ConstArray expected = from.rank == 2 ? shaped({call.batch, call.nheads}) : shaped({call.nheads});
        place(name, from, to, expected, 2 - expected.rank);
    }

    void put_heads(const char *name, const ConstArray &from, anyattn_array *to) {
        place(name, from, to, shaped({call.nheads}), 0);
    }

    void expect_rank(const char *name, const ConstArray &array, int rank) {
        if (array.rank == 0) return fail(Status::NULL_POINTER, "%s is missing", name);
        if (array.rank != rank) {
            fail(Status::INVALID_DIMENSION, "%s has %d axes; accepted here: %d", name, int(array.rank), rank);
        }
    }

    void put_angles(const ConstArray &cos, const ConstArray &sin) {
        if (cos.rank == 0 && sin.rank == 0) return;
        expect_rank("rotary_cos", cos, 2);
        expect_rank("rotary_sin", sin, 2);
        place("rotary_cos", cos, &call.rotary_cos, cos, 0);
        place("rotary_sin", sin, &call.rotary_sin, cos, 0);
        call.rotary_positions = cos.shape[0];
        call.rotary_dim = static_cast<int32_t>(multiply(2, cos.shape[1]));
        if (call.rotary_dim != multiply(2, cos.shape[1])) {
            fail(Status::INVALID_DIMENSION, "rotary_cos has %lld columns; accepted: at most head_dim / 2",
                 Integer(cos.shape[1]));
        }
    }

    const int32_t *per_sequence(const char *name, const Table &table) {
        if (present(table)) expect_size(name, table, call.batch, "batch");
        return table.data;
    }

    static ConstArray shaped(std::initializer_list<int64_t> shape) {
        ConstArray array;
        for (int64_t size : shape) array.shape[array.rank++] = size;
        return array;
    }

    static ConstArray with_dim(ConstArray array, int64_t dim) {
        array.shape[array.rank - 1] = dim;
        return array;
    }

    anyattn_call call{};
    Status status = Status::SUCCESS;

  private:
    // Copies an array that has this shape. Its strides go to the axes from `first` on. Absent arrays stay absent.
    void place(const char *name, const ConstArray &from, anyattn_array *to, const ConstArray &expected, int first) {
        if (from.rank == 0 || status != Status::SUCCESS) return;
        if (from.rank != expected.rank || std::memcmp(from.shape, expected.shape, sizeof from.shape) != 0) {
            return wrong_shape(name, from, expected);
        }
        for (int axis = 0; axis < from.rank; ++axis) to->stride[first + axis] = from.stride[axis];
        to->data = from.data;
        to->dtype = from.dtype;
    }

    void wrong_shape(const char *name, const ConstArray &found, const ConstArray &expected) {
        char shapes[2][96] = {};
        const ConstArray *const arrays[2] = {&found, &expected};
        for (int which = 0; which < 2; ++which) {
            size_t length = 0;
            for (int axis = 0; axis < arrays[which]->rank && axis < 4; ++axis) {
                length +=
                    static_cast<size_t>(std::snprintf(shapes[which] + length, sizeof shapes[which] - length,
                                                      axis ? ", %lld" : "%lld", Integer(arrays[which]->shape[axis])));
            }
        }
        fail(Status::INVALID_DIMENSION, "%s has shape (%s); expected (%s)", name, shapes[0], shapes[1]);
    }

    static bool present(const Table &table) { return table.size >= 0; }

    void expect_size(const char *name, const Table &table, int64_t size, const char *what) {
        if (table.size != size) {
            fail(Status::INVALID_DIMENSION, "%s has %lld entries; expected %s = %lld", name, Integer(table.size), what,
                 Integer(size));
        } else if (size > 0 && !table.data) {
            fail(Status::NULL_POINTER, "%s is null; it has %lld entries", name, Integer(size));
        }
    }

    // Sets the starts of packed sequences. batch < 0: the table of q defines the number of sequences.
    void starts(const char *name, const Table &table, int64_t size) {
        if (table.size == 0) fail(Status::INVALID_DIMENSION, "%s has no entries; expected batch + 1", name);
        expect_size(name, table, size < 0 ? table.size : size, "batch + 1");
    }

    static int64_t bound(const Table &starts, int64_t longest) {
        if (longest != 0) return longest;
        for (int64_t b = 0; b + 1 < starts.size; ++b) {
            const int64_t rows = int64_t(starts.data[b + 1]) - starts.data[b];
            if (rows > longest) longest = rows;
        }
        return longest;
    }

    void pages(const ConstArray &k, int64_t longest) {
        const Table &table = settings_.block_table;
        call.block_table = table.data;
        call.num_pages = k.shape[0];
        call.page_size = k.shape[1];
        call.max_pages = call.batch > 0 ? table.size / call.batch : 0;
        call.seqlen_k = longest ? longest : multiply(call.max_pages, call.page_size);
        expect_size("block_table", table, multiply(call.max_pages, call.batch), "batch * max_pages");
    }

    const Settings &settings_;
};

}  // namespace detail

}  // namespace anyattn
