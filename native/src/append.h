// Writes new keys and values after those stored in a cache.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Returns false if the caller's parallel_for did not run every task.
bool run_append(const anyattn_call &call, int32_t threads);

}  // namespace anyattn
