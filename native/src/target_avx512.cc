#define ANYATTN_VECTOR_BYTES 64
#define ANYATTN_PANEL_VECTORS 4
#include "kernels/table.inl.h"

namespace anyattn {

const Kernels kernels_avx512 = table("avx512");

}  // namespace anyattn
