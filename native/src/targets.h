// The instruction sets compiled into this library, best first, and which of them this machine supports.
#pragma once
#include "kernels.h"

namespace anyattn {

// Null past the end.
const Kernels *target(int32_t index);
bool target_available(int32_t index);
// The first that is available: the baseline always is.
const Kernels *best_target();

}  // namespace anyattn
