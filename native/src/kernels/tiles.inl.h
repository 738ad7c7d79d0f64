// Tile registers (Intel AMX): 8 registers of 16 rows of 64 bytes, the only shape that is used here. The hardware's or, where
// ANYATTN_EMULATED_TILES is defined, the same results bit by bit without them.
#pragma once
#include "tiles_emulated.inl.h"
#include "tiles_hardware.inl.h"

namespace anyattn {
namespace {

#if defined(ANYATTN_EMULATED_TILES)
namespace tile = emulated;
#else
namespace tile = hardware;
#endif

}  // namespace
}  // namespace anyattn
