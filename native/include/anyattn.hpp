// anyattn for C++17: header-only, over anyattn.h. Link the library that anyattn.h describes.
//
//     anyattn::Call call;
//     call.q = anyattn::view(q.data(), {batch, seqlen, nheads, head_dim});   // k, v, out likewise
//     call.causal = true;
//     if (call.forward() != anyattn::Status::SUCCESS) std::puts(anyattn::error_message());
//
// Sizes come from the shapes of the arrays and must agree. Features that are not set are off. A refused call writes
// nothing. No function throws. All pointers must point to host memory, because the library cannot recognize a pointer
// to device memory.
//
// flash_attention_forward and flash_attention_backward take the arguments of CuFlash-Attn in its order. Code written for
// CuFlash-Attn compiles with `namespace cuflash = anyattn;` if its arrays are in host memory.
#pragma once
#include "anyattn/arrays.hpp"
#include "anyattn/call.hpp"
#include "anyattn/flash_attention.hpp"
