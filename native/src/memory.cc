#include "memory.h"

namespace anyattn {
namespace {

constexpr int64_t kKeepBytes = int64_t(8) << 20;

// One per thread that calls; released when the thread ends.
struct Kept {
    Block block{0};
    int64_t bytes = 0;
    bool busy = false;
};

thread_local Kept kept;

}  // namespace

// A caller's parallel_for may run another call inside ours on this thread: that one gets memory of its own.
Scratch::Scratch(int64_t bytes) : data_(nullptr), from_thread_(!kept.busy) {
    if (bytes <= 0) {
        from_thread_ = false;
        return;
    }
    if (!from_thread_) {
        own_ = Block(bytes);
        data_ = own_.data();
        return;
    }
    if (kept.bytes < bytes) {
        kept.block = Block(0);
        kept.block = Block(bytes);
        kept.bytes = kept.block.data() ? bytes : 0;
    }
    kept.busy = true;
    data_ = kept.block.data();
}

Scratch::~Scratch() {
    if (!from_thread_) return;
    kept.busy = false;
    if (kept.bytes > kKeepBytes) {
        kept.block = Block(0);
        kept.bytes = 0;
    }
}

}  // namespace anyattn
