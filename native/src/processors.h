// How many threads this process may keep busy.
#pragma once
#include <cstdint>

namespace anyattn {

// Processors that the affinity mask leaves, and of those no more than the control group's share of time; at least 1.
int32_t processors();

// The first number of OMP_NUM_THREADS ("4,2": 4 threads at the outermost level), or 0 where it is unset or nonsense.
int32_t omp_num_threads(const char *text);

// Whole processors that the control groups of this process grant, or 0 for no limit. Files are found under `root`.
int32_t quota(const char *root);

}  // namespace anyattn
