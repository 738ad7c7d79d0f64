#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "crowd.h"
#include "openmp.h"
#include "pool.h"
#include "processors.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace anyattn {
namespace {

std::atomic<Pool *> own_pool{nullptr};

// A forked child does not have the threads of its parent, but its OpenMP runtimes assume them and would hang.
#if !defined(_WIN32)
void before_fork() { hold_openmp(); }
void in_parent() { release_openmp(false); }
void in_child() {
    own_pool.store(nullptr);
    release_openmp(true);
}
const int fork_handlers = pthread_atfork(before_fork, in_parent, in_child);
#endif

const OpenMp *usable_openmp() {
    const OpenMp *runtime = find_openmp();
    return runtime && !runtime->inherited ? runtime : nullptr;
}

Pool *pool() {
    Pool *current = own_pool.load(std::memory_order_acquire);
    if (current) return current;
    Pool *fresh = new (std::nothrow) Pool;
    if (!fresh || own_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
    return current;
}

// Without an OpenMP runtime, OMP_NUM_THREADS is used. It is read when the library is loaded, as a runtime does.
const int32_t wanted_threads = omp_num_threads(std::getenv("OMP_NUM_THREADS"));

std::atomic<int32_t> chosen_threads{0};  // 0: not chosen

int32_t own_threads() { return wanted_threads > 0 ? wanted_threads : processors(); }

std::atomic<int32_t> chosen_pool{ANYATTN_POOL_AUTOMATIC};
Crowd crowd;

// Returns whether a loaded OpenMP runtime runs the next region.
bool prefers_openmp() {
    const int32_t choice = chosen_pool.load(std::memory_order_relaxed);
    return choice == ANYATTN_POOL_OPENMP || (choice == ANYATTN_POOL_AUTOMATIC && !crowd.crowded());
}

struct OpenMpRegion {
    Region region;
    const OpenMp &runtime;
    std::atomic<int64_t> last_task{0};  // time at which the last task ended
};

void openmp_body(void *context) {
    OpenMpRegion &team = *static_cast<OpenMpRegion *>(context);
    const int32_t worker = team.runtime.thread_num();
    const bool worked = team.region.work(worker);
    if (worker == 0) team.region.wait_for_others();
    if (!worked) return;
    const int64_t now = Crowd::now();
    int64_t last = team.last_task.load(std::memory_order_relaxed);
    while (last < now && !team.last_task.compare_exchange_weak(last, now, std::memory_order_relaxed)) {
    }
}

bool run_on_pool(Region &region) {
    Pool *own = pool();
    return own && own->run(region);
}

// Use the whole team, because a team that changes its size ends and starts threads. If the caller wants more threads than
// the runtime has, use at most one per task.
int32_t team_size(const OpenMp &runtime, int64_t tasks, int32_t threads) {
    const bool usual = threads <= runtime.max_threads() || tasks >= threads;
    return usual ? threads : static_cast<int32_t>(tasks);
}

// A runtime that cannot start a thread ends the process. So check before a team may grow: for the first region of a
// thread, after a smaller region, and if regions of other code are smaller.
bool team_can_start(const OpenMp &runtime, int32_t size) {
    static thread_local int32_t last = 1;
    const bool is_there = size <= last && size <= runtime.max_threads();
    if (!is_there && !threads_can_start(size - 1)) return false;
    last = size;
    return true;
}

bool run_on_openmp(const OpenMp &runtime, const anyattn_call &call, int64_t tasks, int32_t threads, anyattn_body body,
                   void *context) {
    const int32_t size = team_size(runtime, tasks, threads);
    if (!team_can_start(runtime, size)) return false;
    OpenMpRegion team{{call, body, context, tasks, size}, runtime};
    run_openmp(runtime, openmp_body, &team, size);
    crowd.region_ended(team.last_task.load(std::memory_order_relaxed));
    return true;
}

// The body that the caller's parallel_for receives. It counts the tasks and checks that workers are in range.
struct Guarded {
    Region region;
    std::atomic<int64_t> ran{0};
    std::atomic<bool> wrong_worker{false};
};

void guarded_body(void *context, int64_t task, int32_t worker) {
    Guarded &guarded = *static_cast<Guarded *>(context);
    if (worker < 0 || worker >= guarded.region.workers || task < 0 || task >= guarded.region.tasks) {
        guarded.wrong_worker.store(true);
        return;
    }
    const WithFpState state(guarded.region.fp);
    guarded.region.body(guarded.region.context, task, worker);
    guarded.ran.fetch_add(1);
}

bool run_caller(const anyattn_call &call, int64_t tasks, int32_t threads, anyattn_body body, void *context) {
    Guarded guarded{{call, body, context, tasks, threads}};
    call.parallel_for(call.parallel_for_user, tasks, threads, guarded_body, &guarded);
    return guarded.ran.load() == tasks && !guarded.wrong_worker.load();
}

}  // namespace

int32_t default_threads() {
    const int32_t chosen = chosen_threads.load(std::memory_order_relaxed);
    if (chosen > 0) return chosen;
    const OpenMp *runtime = find_openmp();
    const int32_t wanted = runtime ? runtime->max_threads() : own_threads();
    const int32_t count = std::min(wanted, processors());  // a runtime may not know of the quota of a container
    return count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count;
}

void choose_threads(int32_t count) { chosen_threads.store(count, std::memory_order_relaxed); }

void choose_pool(int32_t pool) { chosen_pool.store(pool, std::memory_order_relaxed); }

const char *runtime_name() {
    const OpenMp *runtime = chosen_pool.load(std::memory_order_relaxed) == ANYATTN_POOL_OWN ? nullptr : usable_openmp();
    return runtime ? runtime->name : "anyattn";
}

bool parallel_for(const anyattn_call &call, int64_t tasks, int32_t threads, anyattn_body body, void *context) {
    if (tasks <= 0) return true;
    if (threads > 1 && tasks > 1) {
        if (call.parallel_for) return run_caller(call, tasks, threads, body, context);
        const OpenMp *runtime = usable_openmp();
        const bool inside = runtime && runtime->in_parallel();  // the processors are busy already
        if (runtime && !inside && prefers_openmp() && run_on_openmp(*runtime, call, tasks, threads, body, context)) {
            return true;
        }
        Region region(call, body, context, tasks, tasks < threads ? static_cast<int32_t>(tasks) : threads);
        if (!inside && run_on_pool(region)) return true;
    }
    Region(call, body, context, tasks, 1).work(0);
    return true;
}

}  // namespace anyattn
