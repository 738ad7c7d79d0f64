// Asks the caller of a long call regularly whether to continue.
#pragma once
#include <atomic>
#include <chrono>

#include "anyattn.h"

namespace anyattn {

// Replaces the caller's `poll` by one that any thread may call at any rate, see stopped() in geometry.h. Short calls
// never poll.
class Interrupt {
  public:
    Interrupt(anyattn_call *call, bool is_long);
    Interrupt(const Interrupt &) = delete;
    Interrupt &operator=(const Interrupt &) = delete;

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  private:
    static int32_t check(void *interrupt);

    anyattn_poll poll_;
    void *user_;
    const void *caller_;  // the thread
    std::chrono::steady_clock::time_point next_;  // of the caller's thread alone
    std::atomic<bool> stopped_{false};
};

}  // namespace anyattn
