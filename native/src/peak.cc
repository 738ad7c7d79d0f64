// Times the kernels' register-only loop on every thread.
#include <chrono>

#include "targets.h"
#include "threads.h"

namespace anyattn {
namespace {

constexpr int64_t kRounds = 100000;  // about a millisecond, so that a late start of a thread has little effect
constexpr int64_t kTasks = 32;       // per thread

struct Work {
    const Kernels &kernels;
    int32_t dtype;
};

void run_loop(void *context, int64_t, int32_t) {
    const Work &work = *static_cast<const Work *>(context);
    volatile double sink = 0;
    work.kernels.peak(work.dtype, kRounds, &sink);
}

}  // namespace
}  // namespace anyattn

extern "C" double anyattn_peak_flops(int32_t index, int32_t dtype, int32_t num_threads) {
    using namespace anyattn;
    const Kernels *kernels = target(index == 0 ? target_for(dtype) : index - 1);
    if (!kernels || index < 0 || num_threads < 0 || num_threads > kMaxThreads) return 0;
    if (index > 0 && !target_available(index - 1)) return 0;
    anyattn_call call{};
    call.q.dtype = dtype;
    const int32_t threads = num_threads ? num_threads : default_threads();
    Work work{kernels_for(*kernels, call, ANYATTN_FORWARD), dtype};
    volatile double sink = 0;
    const double flops = work.kernels.peak(dtype, kRounds, &sink) * double(kTasks * threads);
    const auto start = std::chrono::steady_clock::now();
    parallel_for(call, kTasks * threads, threads, run_loop, &work);
    return flops / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
