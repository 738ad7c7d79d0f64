// Cuts a pass into tasks. In which order partial results are added follows from sizes alone: every result is the same to
// the last bit for any number of threads.
#pragma once
#include "kernels.h"

namespace anyattn {

// A validated call and what it runs on.
struct Run {
    const anyattn_call &call;
    int32_t pass;
    const Kernels &kernels;
    int32_t threads;
    char *workspace;
    char *scratch;  // scratch_bytes for each thread
    int64_t scratch_bytes;
    char *shared;  // by the workers

    char *scratch_of(int32_t worker) const { return scratch + worker * scratch_bytes; }
};

// -1: more than 63 bits.
int64_t forward_workspace(const anyattn_call &call, const Kernels &kernels);
int64_t backward_workspace(const anyattn_call &call, const Kernels &kernels);

// Memory that the workers of a backward pass share: more with more threads, up to the number of heads.
int64_t backward_shared(const anyattn_call &call, const Kernels &kernels, int32_t threads);

// What one worker needs.
int64_t forward_scratch(const anyattn_call &call, const Kernels &kernels);

// False if the caller's parallel_for did not run every task.
bool run_forward(const Run &run);
bool run_backward(const Run &run);
bool run_tangent(const Run &run);
bool run_second(const Run &run);

}  // namespace anyattn
