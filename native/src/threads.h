// Runs numbered tasks on the threads of the caller, of an OpenMP runtime, or of anyattn's pool.
#pragma once
#include "anyattn.h"

namespace anyattn {

constexpr int32_t kMaxThreads = 4096;

// Returns the number of threads of a call that does not specify it.
int32_t default_threads();
// Sets that number. 0: the number of the runtime, limited by the affinity mask and the quota.
void choose_threads(int32_t count);
// Sets the pool, an anyattn_pool.
void choose_pool(int32_t pool);
// Returns the name of the runtime that runs regions; with the automatic choice, on a quiet machine.
const char *runtime_name();

// Calls body(context, task, worker) once for each task in [0, tasks), in any order, with worker < threads. Returns false
// if the caller's parallel_for left a task out or named a worker that does not exist.
bool parallel_for(const anyattn_call &call, int64_t tasks, int32_t threads, anyattn_body body, void *context);

}  // namespace anyattn
