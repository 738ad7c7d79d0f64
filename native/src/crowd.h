// Notices when other processes keep the threads of an OpenMP runtime waiting.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace anyattn {

// A parallel region of OpenMP ends when every thread of the team has reached its end. A thread without tasks may still
// wait for a processor that another process uses. anyattn's pool does not wait for threads without tasks. So after a
// region that waited, calls avoid OpenMP for a while and then try again. Results do not depend on this choice.
class Crowd {
  public:
    bool crowded() const { return now() < until_.load(std::memory_order_relaxed); }

    // Records when the last task of an OpenMP region ended, by now().
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
    // In nanoseconds. On an idle machine a region ends within microseconds of its last task.
    static constexpr int64_t kMillisecond = 1000000;
    static constexpr int64_t kLate = kMillisecond, kShortest = 100 * kMillisecond, kLongest = 3200 * kMillisecond;

    std::atomic<int64_t> until_{0}, pause_{kShortest};
};

}  // namespace anyattn
