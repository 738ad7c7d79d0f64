// The instruction sets compiled into this library, and their availability on this machine.
#pragma once
#include "kernels.h"

namespace anyattn {

// Returns null past the end.
const Kernels *target(int32_t index);
bool target_available(int32_t index);
// Returns the index of the target that computes a dtype on this machine.
int32_t target_for(int32_t dtype);
// Returns why this target is not target_for(dtype), or null if it is, and past the end.
const char *target_reason(int32_t index, int32_t dtype);

}  // namespace anyattn
