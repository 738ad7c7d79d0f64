#include "pool.h"

#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace anyattn {
namespace {

constexpr uint32_t kOpen = uint32_t(1) << 31;
// Long enough to cover the time between two passes of a call, short enough not to slow down other threads.
constexpr std::chrono::microseconds kSpin{20};
// Time between two polls of a caller that waits for the last tasks of other threads.
constexpr std::chrono::milliseconds kAsk{20};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Condition>
bool spin(Condition condition) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    return false;
}

// Block signals, because they belong to the threads of the program. Signals of a fault must reach a debugger or handler.
class BlockedSignals {
  public:
#if defined(_WIN32)
    BlockedSignals() {}
#else
    BlockedSignals() {
        sigset_t all;
        sigfillset(&all);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &old_);
    }
    ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &old_, nullptr); }

  private:
    sigset_t old_;
#endif
};

}  // namespace

bool threads_can_start(int32_t count) {
    const BlockedSignals blocked;
    std::mutex all_started;
    std::vector<std::thread> threads;
    bool started = true;
    {
        const std::lock_guard<std::mutex> lock(all_started);
        try {
            threads.reserve(static_cast<size_t>(count));
            while (static_cast<int32_t>(threads.size()) < count) {
                threads.emplace_back([&all_started] { const std::lock_guard<std::mutex> wait(all_started); });
            }
        } catch (const std::exception &) {
            started = false;
        }
    }
    for (std::thread &thread : threads) thread.join();
    return started;
}

void Region::end_task() {
    if (ended_.fetch_add(1, std::memory_order_acq_rel) + 1 < tasks) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    all_ended_.notify_one();
}

void Region::wait_for_others() {
    if (!call_.poll || spin([this] { return ended(); })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!all_ended_.wait_for(lock, kAsk, [this] { return ended(); })) {
        lock.unlock();
        call_.poll(call_.poll_user);
        lock.lock();
    }
}

bool Pool::run(Region &region) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    grow(region.workers - 1);
    region_ = &region;
    state_.store(kOpen, std::memory_order_release);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_all();
    }
    region.work(0);
    region.wait_for_others();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto empty = [this] { return state_.load(std::memory_order_acquire) == 0; };
    if (!spin(empty)) {
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, empty);
    }
    busy_.store(false, std::memory_order_release);
    return true;
}

// If the system cannot start more threads, the existing ones do the work.
void Pool::grow(int32_t threads) {
    if (size_ >= threads) return;
    const BlockedSignals blocked;
    try {
        while (size_ < threads) {
            const int32_t worker = size_ + 1;
            std::thread(&Pool::thread_main, this, worker, generation_.load()).detach();
            size_ = worker;
        }
    } catch (const std::exception &) {
    }
}

void Pool::thread_main(int32_t worker, uint64_t seen) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "anyattn");  // name in lists of a process's threads
#endif
    for (;;) {
        wait_for_region(seen);
        seen = generation_.load();
        if (!join()) continue;
        if (worker < region_->workers) region_->work(worker);
        leave();
    }
}

void Pool::wait_for_region(uint64_t seen) {
    const auto changed = [this, seen] { return generation_.load() != seen; };
    if (spin(changed)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, changed);
    sleepers_.fetch_sub(1);
}

// A thread that wakes late finds the region closed, or joins the next one. region_ never changes while a thread is inside.
bool Pool::join() {
    uint32_t state = state_.load(std::memory_order_relaxed);
    do {
        if (!(state & kOpen)) return false;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed));
    return true;
}

void Pool::leave() {
    if (state_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
    }
    done_.notify_one();
}

}  // namespace anyattn
