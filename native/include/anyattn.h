/* anyattn: exact attention in O(N) memory on the host processor, forward and backward. C99; for C++ see anyattn.hpp.
 *
 * One struct describes a call. A zeroed struct with sizes, pointers and `scale` filled in is a plain dense call. Every
 * other field enables a feature. New fields are only appended. `size` states how much of the struct the caller knows.
 * If a field that the library does not know is nonzero, the call returns UNSUPPORTED. No state is kept between calls.
 * Every function is thread-safe. A refused call writes only to `message`. All pointers must point to host memory: the
 * library cannot recognize a pointer to device memory.
 *
 *     anyattn_call call = {.size = sizeof call};
 *     call.batch = 1, call.seqlen_q = call.seqlen_k = 512, call.nheads = 8, call.nheads_kv = 2;
 *     call.head_dim = call.head_dim_v = 64, call.scale = 0.125;
 *     call.q = anyattn_contiguous(q, ANYATTN_FLOAT32, 512, 8, 64);       likewise k, v (2 heads) and out
 *     call.lse = anyattn_contiguous(lse, ANYATTN_FLOAT32, 8, 512, 1);    wanted for the backward pass
 *     call.flags = ANYATTN_HAS_RIGHT;                                    causal: no key after a row's own
 *     int32_t status = anyattn_forward(&call);
 *
 * Packed sequences: batch is the number of sequences. cu_seqlens_q and cu_seqlens_k hold the first row of each sequence,
 * followed by total_q and total_k. seqlen_q and seqlen_k are the longest lengths. Decoding: anyattn_append writes new
 * rows into the cache, then anyattn_forward reads it with seqused_k = cache_seqlens + seqlen_new.
 *
 *     t_ij = scale <q_i, k_j>          s_ij = softcap(t_ij) + bias_ij - slope |p - c|
 *     lse_i = log sum_j exp(s_ij)      o_i = sum_j exp(s_ij - lse_i) v_j        j over the visible keys of row i
 */
#ifndef ANYATTN_H
#define ANYATTN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ANYATTN_API __declspec(dllexport)
#else
#define ANYATTN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ANYATTN_VERSION 0x000100 /* 0.1.0: one byte each */

/* Status that every function that computes returns, as an int32_t. 0 is success. */
typedef enum anyattn_status {
    ANYATTN_SUCCESS = 0,
    ANYATTN_INVALID_DIMENSION = 1, /* a size, a stride or the relation between sizes */
    ANYATTN_NULL_POINTER = 2,      /* an array that this call needs is missing */
    ANYATTN_INVALID_DTYPE = 3,
    ANYATTN_INVALID_VALUE = 4, /* a scalar: scale, softcap, dropout, window, flags */
    ANYATTN_OUT_OF_RANGE = 5,  /* an entry of a table: cu_seqlens, seqused, leftpad, block_table, kv_indices, ... */
    ANYATTN_UNSUPPORTED = 6,   /* fields or flags that this version does not know, an unavailable target */
    ANYATTN_OUT_OF_MEMORY = 7, /* `message` names the bytes */
    ANYATTN_INTERRUPTED = 8    /* `poll` ended the call: results are incomplete, inputs are unchanged */
} anyattn_status;

/* float64 arrays combine only with float64. 16-bit arrays may have float32 results, gradients and bias. For them lse,
 * dlse, alibi_slopes and sink are float32. */
typedef enum anyattn_dtype {
    ANYATTN_NONE = 0,
    ANYATTN_FLOAT32 = 1,
    ANYATTN_FLOAT16 = 2,
    ANYATTN_BFLOAT16 = 3,
    ANYATTN_FLOAT64 = 4,
    ANYATTN_BOOL = 5,
    ANYATTN_INT32 = 6,
    /* quantised k and v, with k_scale and v_scale */
    ANYATTN_INT8 = 7,
    ANYATTN_FLOAT8_E4M3FN = 8,
    ANYATTN_FLOAT8_E5M2 = 9
} anyattn_dtype;

typedef enum anyattn_flag {
    ANYATTN_HAS_LEFT = 1,           /* rows attend to at most `left` keys before their position */
    ANYATTN_HAS_RIGHT = 2,          /* and at most `right` after it; causal is right = 0 */
    ANYATTN_TOP_LEFT = 4,           /* position of row i is i (default: i + n_k - leftpad - n_q) */
    ANYATTN_ROTARY_INTERLEAVED = 8, /* append: pairs (0,1), (2,3), ... instead of halves */
    ANYATTN_ACCUMULATE = 16,        /* backward adds to dq, dk, dv instead of overwriting them */
    ANYATTN_BATCH_INVARIANT = 32,   /* a sequence's gradients do not depend on the other sequences */
    ANYATTN_HAS_KV_INDICES = 64,    /* each query attends only to the key slots in its list, kv_indices */
    ANYATTN_FAST = 128 /* float32 products may use 16 of the 24 bits of each number, where this is faster */
} anyattn_flag;

/* Strides are in elements. The last dimension is contiguous (a bias or mask may also have stride 0 there).
 * `data` null: the array is absent. */
typedef struct anyattn_array {
    void *data;
    int64_t stride[4];
    int32_t dtype;
    int32_t reserved;
} anyattn_array;

/* Calls body(context, task, worker) for every task in [0, tasks), with worker in [0, num_threads). If a task is left out,
 * the call fails and its results are incomplete. */
typedef void (*anyattn_body)(void *context, int64_t task, int32_t worker);
typedef void (*anyattn_parallel_for)(void *user, int64_t tasks, int32_t num_threads, anyattn_body body, void *context);

/* Returns nonzero to end the call. Long calls call it about every 20 ms, in the thread that made the call. */
typedef int32_t (*anyattn_poll)(void *user);

typedef struct anyattn_call {
    uint32_t size; /* sizeof(anyattn_call) of the caller */
    uint32_t flags;
    int32_t num_threads; /* 0: the number of the runtime */
    int32_t target; /* 0: the fastest for q's dtype; else 1 + an index of anyattn_target_name */

    int64_t batch;
    int64_t seqlen_q, seqlen_k; /* dense: rows of the arrays; packed: an upper bound of any sequence's length;
                                   paged: logical slots of a sequence, max_pages * page_size */
    int64_t nheads, nheads_kv;
    int64_t head_dim, head_dim_v;
    int64_t total_q, total_k; /* rows of packed q, of packed k and v (with cu_seqlens) */
    int64_t batch_k; /* batch entries of dense k and v (0: batch; more with cache_batch_idx) */
    int64_t num_pages, page_size, max_pages; /* paged k and v; entries per row of block_table */

    double scale, softcap; /* softcap 0: off */
    int64_t left, right, chunk; /* chunk 0: off */
    int64_t query_start, key_start; /* added to the indices that dropout counts by */
    uint32_t dropout_threshold; /* keep where a random 16-bit number >= threshold; 0: no dropout */
    int32_t rotary_dim; /* append: rotated part of head_dim */

    /* q, out, dout, dq: (batch, seqlen_q, nheads, dim); k, v, dk, dv: (batch_k, seqlen_k, nheads_kv, dim);
     * packed: stride[0] is not used; paged: (num_pages, page_size, nheads_kv, dim). */
    anyattn_array q, k, v, out;
    anyattn_array lse; /* (batch, nheads, row); packed: (unused, nheads, total_q) */
    anyattn_array bias; /* (batch, nheads, seqlen_q, seqlen_k), stride 0 where broadcast */
    anyattn_array mask; /* (batch, nheads, seqlen_q, seqlen_k), one byte each; 0: masked */
    anyattn_array alibi_slopes; /* (batch, nheads) stride[0], stride[1]; float32 (float64 for float64) */
    anyattn_array sink; /* (nheads) stride[0]; dtype of alibi_slopes */
    anyattn_array dout, dlse, dq, dk, dv;
    anyattn_array dbias; /* shaped like bias, contiguous where not broadcast; summed over axes of stride 0 */
    anyattn_array dsink; /* (nheads) stride[0] */
    anyattn_array new_k, new_v; /* append: (batch, seqlen_new, nheads_kv, dim) */
    anyattn_array rotary_cos, rotary_sin; /* append: (positions, rotary_dim / 2) stride[0] */
    int64_t seqlen_new, rotary_positions;

    const int32_t *cu_seqlens_q, *cu_seqlens_k; /* batch + 1: first row of each sequence, and the end of the last */
    /* batch each: rows and keys in use, first key in use, position of row 0 (overrides the flags) */
    const int32_t *seqused_q, *seqused_k, *leftpad_k, *offset;
    const int32_t *block_table; /* batch x max_pages */
    const int32_t *cache_batch_idx; /* batch: each sequence's entry of k and v */
    const int32_t *cache_seqlens; /* batch; append writes after these rows */
    const uint64_t *rng_state; /* seed, offset */

    void *workspace; /* anyattn_workspace bytes, 64-byte aligned; null: allocated by the call */
    int64_t workspace_bytes;
    anyattn_parallel_for parallel_for; /* null: an OpenMP runtime of this process, or anyattn's pool */
    void *parallel_for_user;
    char *message; /* buffer for the error message; may be null */
    int64_t message_bytes;

    /* (batch, nheads_kv, seqlen_q, num_indices) int32, stride 0 where KV heads share lists; packed: stride[0] is not
     * used, rows are those of q. Entries are key slots of the query's sequence, in any order; -1: no key. A slot that is
     * listed twice counts once. Lists of unused rows are not read. */
    anyattn_array kv_indices;
    int64_t num_indices;

    anyattn_poll poll; /* null: the call is never interrupted; see anyattn_poll_python */
    void *poll_user;

    /* Tangents of q, k, v, bias and sink, in their shapes and dtypes (absent: 0), and the derivatives of out
     * and lse in that direction, in their shapes. */
    anyattn_array tq, tk, tv, tbias, tsink, tout, tlse;

    /* Functions of the scores, as a program of score_words 32-bit words (native/src/score_program.h; Python writes it).
     * All passes but append. captured, captured_indices: (n) stride 1, the arrays that it reads, one behind the
     * other, of float32 (float64 for float64) and of int32. dcaptured: as captured; absent: not wanted. */
    const int32_t *score_program;
    int64_t score_words, num_captured, num_captured_indices;
    anyattn_array captured, captured_indices, dcaptured;
    /* (batch, nheads, blocks of queries, blocks of keys), one byte each, stride 0 where shared: 0 where the program's mask
     * is false, 2 where it is true, else 1. Absent: 1. */
    anyattn_array mask_blocks;
    int64_t mask_block_q, mask_block_k; /* queries and keys of a block */
    /* Quantised k and v (forward and append): the keys are k_scale * k, the values v_scale * v. float32, in the shape of
     * k without head_dim, stride[0] to stride[2], 0 where broadcast; stride[3] is the step from one sequence of the call
     * to the next, for scales (batch, nheads_kv). append writes max |x| / 127 (int8) or max |x| / the largest number of
     * a float8 for each new key and value; there every slot has a scale of its own. */
    anyattn_array k_scale, v_scale;
} anyattn_call;

typedef enum anyattn_pass {
    ANYATTN_FORWARD = 0,
    ANYATTN_BACKWARD = 1,
    ANYATTN_APPEND = 2,
    ANYATTN_TANGENT = 3,
    ANYATTN_SECOND = 4,
    ANYATTN_FORWARD_TANGENT = 5
} anyattn_pass;

/* Returns an array with the strides of contiguous (n0, n1, n2, n3), for any n0. lse: n1 heads, n2 rows, n3 1. */
static inline anyattn_array anyattn_contiguous(const void *data, int32_t dtype, int64_t n1, int64_t n2, int64_t n3) {
    /* unsigned, so that sizes may overflow here; the library refuses them */
    const uint64_t row = (uint64_t)n3, plane = (uint64_t)n2 * row, block = (uint64_t)n1 * plane;
    anyattn_array array;
    array.data = (void *)data;
    array.stride[0] = (int64_t)block;
    array.stride[1] = (int64_t)plane;
    array.stride[2] = (int64_t)row;
    array.stride[3] = 1;
    array.dtype = dtype;
    array.reserved = 0;
    return array;
}

/* Returns the ANYATTN_VERSION that this library was built with. */
ANYATTN_API uint32_t anyattn_version(void);
/* Returns the sizeof(anyattn_call) that this library was built with. */
ANYATTN_API uint32_t anyattn_call_size(void);
/* Returns "success", "invalid dimension", ..., never null. anyattn_call.message has the details of an error. */
ANYATTN_API const char *anyattn_error_string(int32_t status);

/* Returns the name of a compiled instruction set, or null past the end. */
ANYATTN_API const char *anyattn_target_name(int32_t index);
/* Returns 1 if this machine and its operating system support that target, else 0. */
ANYATTN_API int32_t anyattn_target_available(int32_t index);
/* Returns the index of the target that computes calls in a dtype (anyattn_dtype) if their `target` is 0: the fastest
 * measured on processors of this vendor. */
ANYATTN_API int32_t anyattn_target_for(int32_t dtype);
/* Returns why target `index` is not chosen for a dtype: what this machine lacks, or which target is faster. Null if it is
 * chosen, and past the end. */
ANYATTN_API const char *anyattn_target_reason(int32_t index, int32_t dtype);

/* Returns the bytes of workspace for one pass (anyattn_pass) of this call, or a negative status. No array is read: the
 * result depends on sizes, on which tables are present, and on the dtypes and strides of dk and dv. */
ANYATTN_API int64_t anyattn_workspace(const anyattn_call *call, int32_t pass);

/* Writes out and lse (lse may be absent). Rows outside every sequence: out 0, lse -inf. */
ANYATTN_API int32_t anyattn_forward(const anyattn_call *call);
/* Reads the inputs of forward, out, lse, dout and, if present, dlse. Writes dq, dk, dv and, if present, dbias and
 * dsink. */
ANYATTN_API int32_t anyattn_backward(const anyattn_call *call);
/* Reads out and lse as forward wrote them, and the tangents. Writes tout and tlse, the derivatives of out and lse:
 *
 *     u_ij = softcap'(t_ij) scale (<tq_i, k_j> + <q_i, tk_j>) + tbias_ij
 *     tlse_i = sum_j P_ij u_ij + P_sink tsink     tout_i = sum_j P_ij D_ij (u_ij v_j + tv_j) - tlse_i o_i
 *
 * P are the probabilities exp(s_ij - lse_i), D the dropout factors. Rows without keys give 0. */
ANYATTN_API int32_t anyattn_tangent(const anyattn_call *call);
/* Writes out and lse, as anyattn_forward does, and tout and tlse, as anyattn_tangent does. Faster than the two, because the
 * probabilities are computed once. */
ANYATTN_API int32_t anyattn_forward_tangent(const anyattn_call *call);
/* Reads what backward reads, and the tangents. Writes tout and tlse, as anyattn_tangent does, and the gradients of
 * <dout, tout> + <dlse, tlse>. The gradients of the inputs are written to dq, dk, dv and, if present, dbias and dsink.
 * The gradients of dout and dlse are tout and tlse. Together they are the derivative of backward along the tangents. */
ANYATTN_API int32_t anyattn_second(const anyattn_call *call);
/* Writes new_k (rotated) and new_v into k and v at cache_seqlens. If q is present, writes the rotated q into out. */
ANYATTN_API int32_t anyattn_append(const anyattn_call *call);

/* A `poll` for calls from CPython that have released the GIL. `python` points to an anyattn_python. Only in Python's main
 * thread, it takes the GIL and runs the handlers of received signals (Ctrl+C). If a handler raises, the call ends with
 * ANYATTN_INTERRUPTED, and the exception is in type, value and traceback, for PyErr_Restore. */
typedef struct anyattn_python {
    int32_t (*gil_ensure)(void); /* PyGILState_Ensure */
    void (*gil_release)(int32_t state); /* PyGILState_Release */
    int32_t (*check_signals)(void); /* PyErr_CheckSignals */
    void (*fetch)(void **, void **, void **); /* PyErr_Fetch */
    unsigned long (*thread_ident)(void); /* PyThread_get_thread_ident */
    unsigned long main_thread; /* its value in the main thread */
    void *type, *value, *traceback;
} anyattn_python;
ANYATTN_API int32_t anyattn_poll_python(void *python);

/* Returns the number of threads that a call with num_threads = 0 would use now. */
ANYATTN_API int32_t anyattn_num_threads(void);
/* Sets the number of threads for later calls with num_threads = 0, in every thread of the process. 0: the number of the
 * runtime, limited by the affinity mask and the quota of the control group. */
ANYATTN_API int32_t anyattn_set_num_threads(int32_t num_threads);
/* Chooses the threads that run the tasks of later calls. OpenMP: the threads of a runtime that the process has loaded, for
 * example PyTorch's, so that two pools never compete. Automatic: OpenMP, or anyattn's pool while other processes keep
 * OpenMP's threads waiting. Results do not depend on the choice. */
typedef enum anyattn_pool { ANYATTN_POOL_AUTOMATIC = 0, ANYATTN_POOL_OPENMP = 1, ANYATTN_POOL_OWN = 2 } anyattn_pool;
ANYATTN_API int32_t anyattn_set_pool(int32_t pool);
/* Returns the name of the runtime that runs calls, or "anyattn" for anyattn's pool. With the automatic choice: the runtime
 * that runs calls on a quiet machine. */
ANYATTN_API const char *anyattn_thread_runtime(void);

/* Measures the peak of a dtype on a target (0: the fastest) in some tens of milliseconds. Returns floating-point
 * operations per second of `num_threads` (0: as above) that use registers only, or 0 if the target is unavailable. */
ANYATTN_API double anyattn_peak_flops(int32_t target, int32_t dtype, int32_t num_threads);

#ifdef __cplusplus
}
#endif
#endif
