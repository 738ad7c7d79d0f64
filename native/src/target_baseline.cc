// Runs on every processor of its architecture: 16-byte vectors, of which arm64 has twice as many registers.
#define ANYATTN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define ANYATTN_PANEL_VECTORS 4
#else
#define ANYATTN_PANEL_VECTORS 2
#endif
#include "kernels/table.inl.h"

namespace anyattn {

const Kernels kernels_baseline = table("baseline");

}  // namespace anyattn
