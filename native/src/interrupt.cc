#include "interrupt.h"

namespace anyattn {
namespace {

constexpr std::chrono::milliseconds kInterval{20};

// An address that differs between running threads.
const void *this_thread() {
    static thread_local char address;
    return &address;
}

}  // namespace

Interrupt::Interrupt(anyattn_call *call, bool is_long)
    : poll_(call->poll), user_(call->poll_user), caller_(this_thread()) {
    call->poll = nullptr;
    if (!poll_ || !is_long) return;
    next_ = std::chrono::steady_clock::now() + kInterval;
    call->poll = check;
    call->poll_user = this;
}

// Only the caller's thread calls the caller's poll, because Python, for example, handles signals only in its main thread.
int32_t Interrupt::check(void *interrupt) {
    Interrupt &self = *static_cast<Interrupt *>(interrupt);
    if (self.stopped()) return 1;
    if (this_thread() != self.caller_ || std::chrono::steady_clock::now() < self.next_) return 0;
    const bool stop = self.poll_(self.user_) != 0;
    if (stop) self.stopped_.store(true, std::memory_order_relaxed);
    self.next_ = std::chrono::steady_clock::now() + kInterval;
    return stop;
}

}  // namespace anyattn

// Fetch the exception from the thread state, because Python reports a different error if it finds an exception when the
// call returns.
extern "C" int32_t anyattn_poll_python(void *pointer) {
    anyattn_python &python = *static_cast<anyattn_python *>(pointer);
    if (python.thread_ident() != python.main_thread) return 0;
    const int32_t gil = python.gil_ensure();
    const bool raised = python.check_signals() != 0;
    if (raised) python.fetch(&python.type, &python.value, &python.traceback);
    python.gil_release(gil);
    return raised;
}
