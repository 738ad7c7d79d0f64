// The interface between the kernels of one instruction set and the rest of the engine: one table per instruction set.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Query rows of one forward or backward block, equal on every target because tasks must not depend on the instruction set.
constexpr int64_t kBlockQ = 64;

// Most blocks that a task of the tangent pass computes together. Copies of four arrays take longer than the states of many
// blocks, which no longer fit in L1 anyway.
constexpr int64_t kTangentBlocks = 16;

// Query rows [i0, i0 + rows) of heads [h, h + heads) of sequence b: heads of one KV head, at most kBlockQ rows in all.
struct QueryBlock {
    int64_t b, h, heads, i0, rows;
};

// Blocks that one task computes together, one tile of keys after another: `first`, the next heads and row blocks (which
// read the same keys), and the same for the next KV heads (which are adjacent in memory).
struct BlockSet {
    QueryBlock first;  // rows: of all row blocks
    int64_t heads, row_blocks, groups;

    int64_t shared() const { return heads * row_blocks; }
    int64_t count() const { return groups * shared(); }
};

// Sums of dK and dV of one (sequence, KV head, split): rows of `stride` values in the compute type.
struct Partial {
    void *dk, *dv;
    int64_t dk_stride, dv_stride;
};

// Work of one task of the backward pass: query blocks first, first + step, ... below `end`, with their keys in
// [key_begin, key_end). Blocks count through the heads of a KV head, all blocks of one head first. In a call with key
// lists, a block stands for its queries in all these heads, with all keys.
struct BackwardPart {
    int64_t b, h_kv;
    int64_t first, end, step;
    int64_t key_begin, key_end;
    // Sums of dq that parts with other keys continue, kBlockQ * partial_stride(head_dim) values per block. Null: the
    // part has all keys.
    void *dq;
    double *captured = nullptr;  // sums of the gradients of captured arrays
};

// Calls are validated before they reach a kernel. forward.cc and backward.cc choose the sequences, heads and blocks.
struct Kernels {
    const char *name;
    const Kernels *base;  // computes the calls that `computes` rejects; null: none
    bool (*computes)(const anyattn_call &, int32_t pass);
    // Returns the bytes of scratch memory that one worker needs, 64-byte aligned.
    int64_t (*scratch)(const anyattn_call &, int32_t pass);
    // Returns the row length of a dK or dV partial for this head size, in compute values, rounded up to whole vectors.
    int64_t (*partial_stride)(const anyattn_call &, int64_t dim);
    // Returns whether dk and dv can serve as the partial: compute type, whole vectors, no accumulation.
    bool (*partial_in_place)(const anyattn_call &);
    // Computes out and lse of a set of blocks whose visible keys are all in [begin, end). With a partial, writes the
    // contribution of these keys instead, row by row, one head after another.
    void (*forward)(const anyattn_call &, const BlockSet &, int64_t begin, int64_t end, void *partial, void *scratch);
    // Return the largest number of blocks (of `rows` rows) and of KV heads that are faster in one task than in separate
    // tasks.
    int64_t (*most_blocks)(const anyattn_call &, int64_t rows);
    int64_t (*most_groups)(const anyattn_call &, int64_t rows);
    // merge adds a partial result of the same block, in place. finish writes out and lse from the sum of all partials.
    void (*merge)(const anyattn_call &, const QueryBlock &, void *into, const void *from);
    void (*finish)(const anyattn_call &, const QueryBlock &, const void *partial);
    int64_t (*partial_row_bytes)(const anyattn_call &);  // bytes of one row of a partial
    // Writes dq, adds dk and dv to the partial, which was set to 0, and adds each block's contribution to dsink to
    // sink_partial[h * blocks + block] (may be null). statistics: null, or receives the row statistics for dbias.
    // In the second pass: computes the gradients of <dout, tout> + <dlse, tlse> from tout and tlse.
    void (*backward)(const anyattn_call &, int32_t pass, const BackwardPart &, const Partial &, double *sink_partial,
                     void *statistics, void *scratch);
    // Adds the partials of all splits in order and writes rows [row0, row1) of dk and dv of sequence b.
    void (*reduce)(const anyattn_call &, int64_t b, int64_t h_kv, int64_t row0, int64_t row1, const Partial *,
                   int64_t splits);
    // Writes one tile of dbias (kBlockQ rows by a block of keys), summed over its broadcast axes.
    void (*dbias)(const anyattn_call &, int32_t pass, int64_t bias_b, int64_t bias_h, int64_t block_q, int64_t block_k,
                  void *statistics, void *scratch);
    int64_t (*tile_keys)(const anyattn_call &, int32_t pass);  // keys of a score tile
    int64_t (*statistics_bytes)(const anyattn_call &);  // bytes of one row; a head has seqlen_q rows
    // Computes tout and tlse of at most kTangentBlocks blocks, which begin at the same key and share a KV head. online: out
    // and lse too, in the same sweep over the keys; otherwise they are given.
    void (*tangent)(const anyattn_call &, bool online, const BlockSet &, void *scratch);
    // Runs n rounds of the register-only loop for this dtype; returns their floating-point operations.
    double (*peak)(int32_t dtype, int64_t n, volatile double *sink);
};

// Returns the table that computes a pass of a call on a target.
inline const Kernels &kernels_for(const Kernels &target, const anyattn_call &call, int32_t pass) {
    const Kernels *kernels = &target;
    while (!kernels->computes(call, pass)) kernels = kernels->base;
    return *kernels;
}

#define ANYATTN_TARGET(name, ...) extern const Kernels kernels_##name;
#include "targets.def"
#undef ANYATTN_TARGET

}  // namespace anyattn
