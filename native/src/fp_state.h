// The floating-point control state of a thread: rounding, flush-to-zero, exceptions that trap.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace anyattn {

#if defined(__x86_64__) || defined(_M_X64)
using FpState = uint32_t;
constexpr FpState kFpControl = 0xffc0;  // without the flags of exceptions that have happened
inline FpState fp_state() { return _mm_getcsr() & kFpControl; }
inline void set_fp_state(FpState state) { _mm_setcsr(state); }
#elif defined(__aarch64__)
using FpState = uint64_t;
inline FpState fp_state() {
    FpState state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
}
inline void set_fp_state(FpState state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
#else
using FpState = uint32_t;
inline FpState fp_state() { return 0; }
inline void set_fp_state(FpState) {}
#endif

// Computes with the state of another thread, so that equal calls give equal bits on every thread.
class WithFpState {
  public:
    explicit WithFpState(FpState state) : old_(fp_state()), changed_(state != old_) {
        if (changed_) set_fp_state(state);
    }
    ~WithFpState() {
        if (changed_) set_fp_state(old_);
    }
    WithFpState(const WithFpState &) = delete;
    WithFpState &operator=(const WithFpState &) = delete;

  private:
    FpState old_;
    bool changed_;
};

}  // namespace anyattn
