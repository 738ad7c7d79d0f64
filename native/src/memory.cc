#include "memory.h"

namespace anyattn {
namespace {

constexpr int64_t kKeepBytes = int64_t(8) << 20;

// One per calling thread, released when the thread ends.
struct Kept {
    Buffer buffer{0};
    int64_t bytes = 0;
    bool busy = false;
};

thread_local Kept kept;

}  // namespace

// A caller's parallel_for may run another call inside this one on the same thread. The inner call gets separate memory.
Scratch::Scratch(int64_t bytes) : data_(nullptr), from_thread_(!kept.busy) {
    if (bytes <= 0) {
        from_thread_ = false;
        return;
    }
    if (!from_thread_) {
        own_ = Buffer(bytes);
        data_ = own_.data();
        return;
    }
    if (kept.bytes < bytes) {
        kept.buffer = Buffer(0);
        kept.buffer = Buffer(bytes);
        kept.bytes = kept.buffer.data() ? bytes : 0;
    }
    kept.busy = true;
    data_ = kept.buffer.data();
}

Scratch::~Scratch() {
    if (!from_thread_) return;
    kept.busy = false;
    if (kept.bytes > kKeepBytes) {
        kept.buffer = Buffer(0);
        kept.bytes = 0;
    }
}

}  // namespace anyattn
