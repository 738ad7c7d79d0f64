#define ANYATTN_VECTOR_BYTES 32
#define ANYATTN_PANEL_VECTORS 2
#include "kernels/table.inl.h"

namespace anyattn {

const Kernels kernels_avx2 = table("avx2");

}  // namespace anyattn
