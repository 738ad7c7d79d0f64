// An OpenMP runtime that the process has loaded, used without linking to it. Sharing the threads of PyTorch (or of any
// other OpenMP program) avoids two pools that compete for the cores, and follows torch.set_num_threads.
#pragma once
#include <cstdint>

namespace anyattn {

struct OpenMp {
    char name[16];   // "libgomp", "libomp", "libiomp5", "libiomp5md", "vcomp140"
    bool inherited;  // loaded before this process was forked: its settings remain, its threads do not
    int (*thread_num)();
    int (*max_threads)();
    int (*in_parallel)();
    void (*gomp_parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags);
    // Variadic, because Apple's arm64 passes the arguments after `body` in another way.
    void (*kmpc_fork_call)(void *location, int32_t argc, void (*body)(int32_t *, int32_t *, void *), ...);
    void (*kmpc_push_num_threads)(void *location, int32_t thread, int32_t threads);
    int32_t (*kmpc_global_thread_num)(void *location);
    void (*vcomp_fork)(int parallel, int32_t argc, void (*body)(void *), ...);  // Microsoft's
    void (*vcomp_set_num_threads)(int32_t threads);
};

// Returns the current runtime of this process, or null. The search runs again only after a library was loaded.
const OpenMp *find_openmp();

// Called around a fork. They block searches during the fork, and mark the runtimes that the child inherits.
void hold_openmp();
void release_openmp(bool child);

// Calls body(context) once on each thread of a team of at most `threads`.
void run_openmp(const OpenMp &runtime, void (*body)(void *), void *context, int32_t threads);

}  // namespace anyattn
