// Divides a pass into tasks. The order in which partial results are added depends on sizes alone, so that results have
// the same bits for any number of threads.
#pragma once
#include "kernels.h"

namespace anyattn {

// A validated call, its kernels, threads and memory.
struct Run {
    const anyattn_call &call;
    int32_t pass;
    const Kernels &kernels;
    int32_t threads;
    char *workspace;
    char *scratch;  // scratch_bytes for each thread
    int64_t scratch_bytes;
    char *shared;  // used by all workers

    char *scratch_of(int32_t worker) const { return scratch + worker * scratch_bytes; }
};

// Returns -1 if the size exceeds 63 bits.
int64_t forward_workspace(const anyattn_call &call, const Kernels &kernels);
int64_t backward_workspace(const anyattn_call &call, const Kernels &kernels);

// Returns the memory that the workers of a backward pass share. It grows with threads, up to the number of heads.
int64_t backward_shared(const anyattn_call &call, const Kernels &kernels, int32_t threads);

// Returns the scratch memory of one worker.
int64_t forward_scratch(const anyattn_call &call, const Kernels &kernels);

// Writes out 0 and lse -inf for a row that is allocated to a sequence but not in use. Packed arrays: entry 0.
void clear_out(const anyattn_call &call, int64_t entry, int64_t row, int64_t head);

// Returns false if the caller's parallel_for did not run every task.
bool run_forward(const Run &run);
bool run_backward(const Run &run);
bool run_tangent(const Run &run);
bool run_second(const Run &run);
bool run_forward_tangent(const Run &run);

}  // namespace anyattn
