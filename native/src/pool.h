// Threads that wait for numbered tasks. One parallel region at a time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "anyattn.h"
#include "fp_state.h"

namespace anyattn {

// The tasks of one parallel_for. Every thread takes the next task until none is left.
struct Region {
    anyattn_body body;
    void *context;
    int64_t tasks;
    int32_t workers;
    FpState fp = fp_state();  // of the thread that calls
    std::atomic<int64_t> next{0};

    Region(const anyattn_call &call, anyattn_body body_, void *context_, int64_t tasks_, int32_t workers_)
        : body(body_), context(context_), tasks(tasks_), workers(workers_), call_(call) {}

    // Returns false if no task was left.
    bool work(int32_t worker) {
        const WithFpState state(fp);
        for (bool worked = false;; worked = true) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= tasks) return worked;
            body(context, task, worker);
            if (call_.poll) end_task();
        }
    }

    // Called by the calling thread after its own tasks. In a long call that may be interrupted, it polls until the last tasks
    // of the other threads have ended.
    void wait_for_others();

  private:
    void end_task();
    bool ended() const { return ended_.load(std::memory_order_acquire) >= tasks; }

    const anyattn_call &call_;
    std::atomic<int64_t> ended_{0};
    std::mutex mutex_;
    std::condition_variable all_ended_;
};

// Returns whether so many more threads can be started. They are started and end again. The C library keeps their stacks
// for the next threads.
bool threads_can_start(int32_t count);

// Never destroyed, because its threads sleep in it until the process ends.
class Pool {
  public:
    // The calling thread is worker 0. Returns false if another region uses the pool.
    bool run(Region &region);

  private:
    void grow(int32_t threads);
    void thread_main(int32_t worker, uint64_t seen);
    void wait_for_region(uint64_t seen);
    bool join();
    void leave();

    std::atomic<bool> busy_{false};
    std::atomic<uint64_t> generation_{0};  // regions so far
    std::atomic<uint32_t> state_{0};  // kOpen while tasks may be taken, plus the threads inside
    std::atomic<int32_t> sleepers_{0};
    Region *region_ = nullptr;
    int32_t size_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
};

}  // namespace anyattn
