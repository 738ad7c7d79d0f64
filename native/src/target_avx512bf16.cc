#define ANYATTN_VECTOR_BYTES 64
#define ANYATTN_PANEL_VECTORS 4
#include "kernels/table.inl.h"

namespace anyattn {

const Kernels kernels_avx512bf16 = table("avx512bf16");

}  // namespace anyattn
