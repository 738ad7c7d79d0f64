// Tile registers (Intel AMX): 8 registers of 16 rows of 64 bytes, the only shape used here. If ANYATTN_EMULATED_TILES is
// defined, an emulation gives the same bits without the hardware.
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
