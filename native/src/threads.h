// Runs numbered tasks on the threads of the caller, of an OpenMP runtime, or of an own pool.
#pragma once
#include "anyattn.h"

namespace anyattn {

constexpr int32_t kMaxThreads = 4096;

// Threads of a call that does not say how many.
int32_t default_threads();
// From now on; 0: what the runtime, the affinity mask and the quota give.
void choose_threads(int32_t count);
// anyattn_pool.
void choose_pool(int32_t pool);
// What runs regions: with the automatic choice, while nobody else keeps the processors busy.
const char *runtime_name();

// body(context, task, worker) for each task in [0, tasks), worker < threads, each once, in any order. False if the
// caller's own parallel_for left a task out or named a worker that does not exist.
bool parallel_for(const anyattn_call &call, int64_t tasks, int32_t threads, anyattn_body body, void *context);

}  // namespace anyattn
