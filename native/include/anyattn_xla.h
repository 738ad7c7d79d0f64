/* anyattn as a custom call of XLA on the host processor, through XLA's typed foreign function interface. C99.
 *
 * Register `anyattn_xla` as the execute handler of a target for the platform "cpu" with API version 1; JAX does it with
 * jax.ffi.register_ffi_target. The handler is written against version 0.1 of the interface, which later versions of XLA
 * accept. It runs on the threads of XLA, several at once, and computes on anyattn's.
 *
 * Attributes, all of them arrays of int64 but for the first:
 *     pass   int32, an anyattn_pass
 *     call   the bytes of an anyattn_call, without addresses
 *     words  for each operand, then for each result: the position of its address in the call, in units of 8 bytes. An
 *            operand and a result with one position are the same array, which the call changes in place.
 *     bytes  for each operand, then for each result: its size
 *
 * Operands and results are contiguous, which is XLA's default. If the number of arrays, a size or an attribute differs
 * from this description, the call fails with INVALID_ARGUMENT and computes nothing.
 */
#ifndef ANYATTN_XLA_H
#define ANYATTN_XLA_H

#include "anyattn.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Takes an XLA_FFI_CallFrame, returns an XLA_FFI_Error; null: success. */
ANYATTN_API void *anyattn_xla(void *call_frame);

#ifdef __cplusplus
}
#endif
#endif
