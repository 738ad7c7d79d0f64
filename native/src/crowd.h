// Notices when other processes keep the threads of an OpenMP runtime waiting.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace anyattn {

// A parallel region of OpenMP ends when every thread of the team has come to its end, and a thread without any task may
// be waiting for a processor that another process has. An own pool waits for nobody who has no task. So after a region
// that waited, calls stay away from OpenMP for a while, and then try again. Results do not depend on it.
class Crowd {
  public:
    bool crowded() const { return now() < until_.load(std::memory_order_relaxed); }

    // Of a region of OpenMP: when its last task ended, by now().
    void region_ended(int64_t last_task) {
        const int64_t end = now(), pause = pause_.load(std::memory_order_relaxed);
        if (end - last_task < kLate) {
            if (pause > kShortest) pause_.store(pause / 2, std::memory_order_relaxed);
            return;
        }
        until_.store(end + pause, std::memory_order_relaxed);
        if (pause < kLongest) pause_.store(2 * pause, std::memory_order_relaxed);
    }

    static int64_t now() {
        const auto time = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
    }

  private:
    // In nanoseconds. Where nobody else runs, a region ends within microseconds of its last task.
    static constexpr int64_t kMillisecond = 1000000;
    static constexpr int64_t kLate = kMillisecond, kShortest = 100 * kMillisecond, kLongest = 3200 * kMillisecond;

    std::atomic<int64_t> until_{0}, pause_{kShortest};
};

}  // namespace anyattn
