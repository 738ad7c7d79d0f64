// The C boundary: copies the call, checks it, provides memory and threads, and catches every exception.
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>

#include "append.h"
#include "check.h"
#include "geometry.h"
#include "interrupt.h"
#include "key_lists.h"
#include "memory.h"
#include "schedule.h"
#include "targets.h"
#include "threads.h"

namespace anyattn {
namespace {

// No version of anyattn has a larger struct.
constexpr uint32_t kMaxCallBytes = 16384;
// Below this number of floating-point operations or moved values, waking another thread takes longer than the work.
constexpr double kSmallFlops = 1e6, kSmallMoves = 1e5;
// Below this number a call ends too soon to be interrupted.
constexpr double kLongFlops = 5e8, kLongMoves = 1e7;

// Fields that the caller does not know are zero. Fields that the library does not know must be zero.
int32_t copy_call(const anyattn_call *from, anyattn_call *to) {
    std::memset(to, 0, sizeof *to);
    if (!from) return ANYATTN_NULL_POINTER;
    uint32_t size;
    std::memcpy(&size, from, sizeof size);
    if (size < 8 || size % 8 != 0) return ANYATTN_INVALID_VALUE;
    std::memcpy(to, from, size < sizeof *to ? size : sizeof *to);
    if (to->message && to->message_bytes > 0) to->message[0] = 0;
    if (size > kMaxCallBytes) {
        return refuse(*to, ANYATTN_UNSUPPORTED, "size is %u; accepted: at most %u", size, kMaxCallBytes);
    }
    const char *bytes = reinterpret_cast<const char *>(from);
    for (uint32_t i = sizeof *to; i < size; ++i) {
        if (bytes[i]) return refuse(*to, ANYATTN_UNSUPPORTED, "byte %u of the call is a field of a later version", i);
    }
    if (to->batch_k == 0) to->batch_k = to->batch;
    return ANYATTN_SUCCESS;
}

// An absent array has no strides: adding them to a null pointer would make it look present.
void clear_absent(anyattn_call *call) {
    for (anyattn_array *array : {&call->q,          &call->k,
                                 &call->v,          &call->out,
                                 &call->lse,        &call->bias,
                                 &call->mask,       &call->alibi_slopes,
                                 &call->sink,       &call->dout,
                                 &call->dlse,       &call->dq,
                                 &call->dk,         &call->dv,
                                 &call->dbias,      &call->dsink,
                                 &call->new_k,      &call->new_v,
                                 &call->rotary_cos, &call->rotary_sin,
                                 &call->kv_indices, &call->tq,
                                 &call->tk,         &call->tv,
                                 &call->tbias,      &call->tsink,
                                 &call->tout,       &call->tlse,
                                 &call->captured,   &call->captured_indices,
                                 &call->dcaptured,  &call->mask_blocks,
                                 &call->k_scale,    &call->v_scale}) {
        if (!array->data) std::memset(array->stride, 0, sizeof array->stride);
    }
}

int32_t choose_target(const anyattn_call &call, int32_t pass, const Kernels **kernels) {
    const int32_t named = call.target > 0 ? call.target - 1 : -1;
    *kernels = target(call.target == 0 ? target_for(call.q.dtype) : named);
    if (!*kernels) {
        return refuse(call, ANYATTN_UNSUPPORTED, "target is %d; accepted: 0, or 1 + an index of anyattn_target_name",
                      call.target);
    }
    if (call.target != 0 && !target_available(named)) {
        return refuse(call, ANYATTN_UNSUPPORTED, "target %d (%s) does not run on this machine", call.target,
                      (*kernels)->name);
    }
    if (pass != ANYATTN_APPEND) *kernels = &kernels_for(**kernels, call, pass);
    return ANYATTN_SUCCESS;
}

int32_t out_of_memory(const anyattn_call &call, const char *what, int64_t bytes) {
    return refuse(call, ANYATTN_OUT_OF_MEMORY, "no memory for %lld bytes of %s", (long long)bytes, what);
}

int32_t check_workspace(const anyattn_call &call, int64_t needed) {
    if (call.workspace_bytes < needed) {
        return refuse(call, ANYATTN_INVALID_VALUE, "workspace_bytes is %lld; needed: %lld",
                      (long long)call.workspace_bytes, (long long)needed);
    }
    if (reinterpret_cast<uintptr_t>(call.workspace) % kAlignment == 0) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_VALUE, "workspace is at %p; accepted: a multiple of 64", call.workspace);
}

// Floating-point operations of the forward pass.
double flops_of(const anyattn_call &call) {
    const double rows = double(call.cu_seqlens_q ? call.total_q : call.batch * call.seqlen_q);
    return 2.0 * rows * double(call.nheads) * double(most_keys(call)) * double(call.head_dim + call.head_dim_v);
}

// Number of values that an append moves.
double moves_of(const anyattn_call &call) {
    const double keys = double(call.seqlen_new) * double(call.nheads_kv) * double(call.head_dim + call.head_dim_v);
    const double queries = double(call.seqlen_q) * double(call.nheads) * double(call.head_dim);
    return double(call.batch) * (keys + queries);
}

bool is_long(const anyattn_call &call, int32_t pass) {
    return pass == ANYATTN_APPEND ? moves_of(call) >= kLongMoves : flops_of(call) >= kLongFlops;
}

bool is_small(const anyattn_call &call, int32_t pass) {
    return pass == ANYATTN_APPEND ? moves_of(call) < kSmallMoves : flops_of(call) < kSmallFlops;
}

int32_t threads_of(const anyattn_call &call, int32_t pass) {
    if (is_small(call, pass)) return 1;
    return call.num_threads > 0 ? call.num_threads : default_threads();
}

int32_t finish(const anyattn_call &call, bool all_tasks) {
    if (all_tasks) return ANYATTN_SUCCESS;
    return refuse(call, ANYATTN_INVALID_VALUE,
                  "parallel_for left a task out, or passed a worker outside [0, num_threads)");
}

int64_t workspace_bytes(const anyattn_call &call, const Kernels &kernels, int32_t pass) {
    if (pass == ANYATTN_APPEND) return 0;
    int64_t bytes = 0;
    if (pass == ANYATTN_FORWARD || pass == ANYATTN_FORWARD_TANGENT) bytes = forward_workspace(call, kernels);
    if (has_gradients(pass)) bytes = backward_workspace(call, kernels);
    return bytes < 0 ? bytes : bytes + key_lists_bytes(call);
}

bool run_tasks_of(const Run &run) {
    switch (run.pass) {
        case ANYATTN_FORWARD:
            return run_forward(run);
        case ANYATTN_TANGENT:
            return run_tangent(run);
        case ANYATTN_SECOND:
            return run_second(run);
        case ANYATTN_FORWARD_TANGENT:
            return run_forward_tangent(run);
        default:
            return run_backward(run);
    }
}

int64_t scratch_of(const anyattn_call &call, const Kernels &kernels, int32_t pass) {
    if (pass == ANYATTN_FORWARD) return forward_scratch(call, kernels);
    int64_t other = 0;  // of a pass that runs before
    if (pass == ANYATTN_SECOND) other = kernels.scratch(call, ANYATTN_TANGENT);
    if (pass == ANYATTN_FORWARD_TANGENT) other = forward_scratch(call, kernels);
    return (max64(other, kernels.scratch(call, pass)) + 63) / 64 * 64;
}

int32_t run_kernels(const anyattn_call &call, int32_t pass) {
    const Kernels *kernels;
    if (const int32_t status = choose_target(call, pass, &kernels)) return status;
    const int64_t needed = workspace_bytes(call, *kernels, pass);
    if (needed < 0) return refuse(call, ANYATTN_OUT_OF_MEMORY, "the workspace would have more than 2^63 bytes");
    if (call.workspace) {
        if (const int32_t status = check_workspace(call, needed)) return status;
    }
    const Buffer workspace(call.workspace ? 0 : needed);
    if (needed > 0 && !call.workspace && !workspace.data()) return out_of_memory(call, "workspace", needed);

    const int32_t threads = threads_of(call, pass);
    const int64_t scratch_bytes = scratch_of(call, *kernels, pass);
    const int64_t shared = has_gradients(pass) ? backward_shared(call, *kernels, threads) : 0;
    const int64_t all_scratch = scratch_bytes * threads + shared;
    const Scratch scratch(all_scratch);
    if (all_scratch > 0 && !scratch.data()) return out_of_memory(call, "scratch", all_scratch);

    char *memory = call.workspace ? static_cast<char *>(call.workspace) : workspace.data();
    anyattn_call sorted;
    const bool lists = has_key_lists(call);
    if (lists && !sort_key_lists(call, threads, memory, &sorted)) return finish(call, false);
    const Run run{
        lists ? sorted : call,          pass,           *kernels,      threads,
        memory + key_lists_bytes(call), scratch.data(), scratch_bytes, scratch.data() + scratch_bytes * threads};
    return finish(call, run_tasks_of(run));
}

int32_t run_pass(const anyattn_call *from, int32_t pass) {
    anyattn_call call;
    int32_t status;
    if ((status = copy_call(from, &call)) || (status = check_sizes(call, pass)) ||
        (status = check_arrays(call, pass)) || (status = check_tables(call, pass)) ||
        (status = check_score_program(call, pass))) {
        return status;
    }
    clear_absent(&call);
    const Interrupt interrupt(&call, is_long(call, pass));
    status = pass == ANYATTN_APPEND ? finish(call, run_append(call, threads_of(call, pass))) : run_kernels(call, pass);
    return interrupt.stopped() ? refuse(call, ANYATTN_INTERRUPTED, "poll ended the call") : status;
}

// A pass uses std::vector and std::thread. Their exceptions are caught here.
template <class Body>
int32_t guarded(const anyattn_call *call, const Body &body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        anyattn_call copy;
        if (const int32_t status = copy_call(call, &copy)) return status;
        return out_of_memory(copy, "tables", copy.batch * static_cast<int64_t>(sizeof(int32_t)));
    } catch (const std::exception &) {
        return ANYATTN_OUT_OF_MEMORY;
    }
}

int32_t run_guarded(const anyattn_call *call, int32_t pass) {
    return guarded(call, [&] { return run_pass(call, pass); });
}

int64_t workspace_of(const anyattn_call *from, int32_t pass) {
    anyattn_call call;
    const Kernels *kernels;
    int32_t status;
    if ((status = copy_call(from, &call)) || (status = check_sizes(call, pass)) ||
        (status = check_score_program(call, pass)) || (status = choose_target(call, pass, &kernels))) {
        return -status;
    }
    const int64_t bytes = workspace_bytes(call, *kernels, pass);
    return bytes < 0 ? -int64_t(ANYATTN_OUT_OF_MEMORY) : bytes;
}

}  // namespace
}  // namespace anyattn

extern "C" {

uint32_t anyattn_version(void) { return ANYATTN_VERSION; }

uint32_t anyattn_call_size(void) { return sizeof(anyattn_call); }

const char *anyattn_error_string(int32_t status) {
    switch (status) {
        case ANYATTN_SUCCESS:
            return "success";
        case ANYATTN_INVALID_DIMENSION:
            return "invalid dimension";
        case ANYATTN_NULL_POINTER:
            return "null pointer";
        case ANYATTN_INVALID_DTYPE:
            return "invalid dtype";
        case ANYATTN_INVALID_VALUE:
            return "invalid value";
        case ANYATTN_OUT_OF_RANGE:
            return "out of range";
        case ANYATTN_UNSUPPORTED:
            return "unsupported";
        case ANYATTN_OUT_OF_MEMORY:
            return "out of memory";
        case ANYATTN_INTERRUPTED:
            return "interrupted";
        default:
            return "unknown status";
    }
}

const char *anyattn_target_name(int32_t index) {
    const anyattn::Kernels *kernels = anyattn::target(index);
    return kernels ? kernels->name : nullptr;
}

int32_t anyattn_target_available(int32_t index) { return anyattn::target_available(index) ? 1 : 0; }

int32_t anyattn_target_for(int32_t dtype) { return anyattn::target_for(dtype); }

const char *anyattn_target_reason(int32_t index, int32_t dtype) { return anyattn::target_reason(index, dtype); }

int64_t anyattn_workspace(const anyattn_call *call, int32_t pass) { return anyattn::workspace_of(call, pass); }

int32_t anyattn_forward(const anyattn_call *call) { return anyattn::run_guarded(call, ANYATTN_FORWARD); }

int32_t anyattn_backward(const anyattn_call *call) { return anyattn::run_guarded(call, ANYATTN_BACKWARD); }

int32_t anyattn_tangent(const anyattn_call *call) { return anyattn::run_guarded(call, ANYATTN_TANGENT); }

int32_t anyattn_second(const anyattn_call *call) { return anyattn::run_guarded(call, ANYATTN_SECOND); }

int32_t anyattn_forward_tangent(const anyattn_call *call) {
    return anyattn::run_guarded(call, ANYATTN_FORWARD_TANGENT);
}

int32_t anyattn_append(const anyattn_call *call) { return anyattn::run_guarded(call, ANYATTN_APPEND); }

int32_t anyattn_num_threads(void) { return anyattn::default_threads(); }
int32_t anyattn_set_num_threads(int32_t num_threads) {
    if (num_threads < 0 || num_threads > anyattn::kMaxThreads) return ANYATTN_INVALID_VALUE;
    anyattn::choose_threads(num_threads);
    return ANYATTN_SUCCESS;
}

int32_t anyattn_set_pool(int32_t pool) {
    if (pool < ANYATTN_POOL_AUTOMATIC || pool > ANYATTN_POOL_OWN) return ANYATTN_INVALID_VALUE;
    anyattn::choose_pool(pool);
    return ANYATTN_SUCCESS;
}

const char *anyattn_thread_runtime(void) { return anyattn::runtime_name(); }
}
