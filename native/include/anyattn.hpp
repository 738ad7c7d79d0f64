// anyattn for C++17: header-only, over anyattn.h. Link the library that anyattn.h describes.
//
//     anyattn::Call call;
//     call.q = anyattn::view(q.data(), {batch, seqlen, nheads, head_dim});   // k, v, out likewise
//     call.causal = true;
//     if (call.forward() != anyattn::Status::SUCCESS) std::puts(anyattn::error_message());
//
// Sizes are taken from the arrays' shapes and compared with one another; what is not set is off. A call that is refused
// has written nothing. No function throws. All memory is the host's: a pointer into a device's memory cannot be told
// from one that points nowhere, and must not be passed.
//
// flash_attention_forward and flash_attention_backward, at the end, take the arguments of CuFlash-Attn in its order;
// with `namespace cuflash = anyattn;` code written for it compiles once its arrays lie in host memory.
#pragma once
#include "anyattn/arrays.hpp"
#include "anyattn/call.hpp"
#include "anyattn/flash_attention.hpp"
