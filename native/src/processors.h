// Number of threads that this process may keep busy.
#pragma once
#include <cstdint>

namespace anyattn {

// Returns the processors of the affinity mask, limited by the quota of the control group; at least 1.
int32_t processors();

// Returns the first number of OMP_NUM_THREADS ("4,2": 4 threads at the outermost level), or 0 if it is unset or invalid.
int32_t omp_num_threads(const char *text);

// Returns the whole processors that the control groups of this process grant, or 0 for no limit. Reads files in `root`.
int32_t quota(const char *root);

}  // namespace anyattn
