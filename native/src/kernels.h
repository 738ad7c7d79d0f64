// The interface between the kernels of one instruction set and the rest of the engine: one table per instruction set.
#pragma once
#include "anyattn.h"

namespace anyattn {

// Query rows of one forward or backward block, equal on every target because tasks must not depend on the instruction set.
constexpr int64_t kBlockQ = 64;

// Most blocks that a task of the tangent pass computes together.
constexpr int64_t kTangentBlocks = 4;

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

// Where the backward of one (sequence, KV head, split) accumulates: rows of `stride` values in the compute type.
struct Partial {
    void *dk, *dv;
    int64_t dk_stride, dv_stride;
};

// What one task of the backward pass computes: query blocks {first, first + step, ...} below `end` of the heads of a KV
// head, counted h-major, and the keys of each in [key_begin, key_end). Of a call with key lists: these blocks of queries,
// with all heads and keys.
struct BackwardPart {
    int64_t b, h_kv;
    int64_t first, end, step;
    int64_t key_begin, key_end;
    void *dq;  // sums that parts with other keys continue, kBlockQ partial_stride(head_dim) per block; null: all keys
    double *captured = nullptr;  // sums of the gradients of captured arrays
};

// Calls are validated before they reach a kernel. forward.cc and backward.cc choose the sequences, heads and blocks.
struct Kernels {
    const char *name;
    const Kernels *base;  // computes the calls that `computes` rejects; null: none
    bool (*computes)(const anyattn_call &, int32_t pass);
    // Bytes of scratch that one worker needs, 64-byte aligned.
    int64_t (*scratch)(const anyattn_call &, int32_t pass);
    // Row length (in compute values) of a dK or dV partial for this head size: padded to whole vectors.
    int64_t (*partial_stride)(const anyattn_call &, int64_t dim);
    // True if dk and dv themselves can be the partial (compute type, whole vectors, no accumulate).
    bool (*partial_in_place)(const anyattn_call &);
    // Computes out and lse of a set of blocks whose visible keys are all in [begin, end). With a partial: writes the
    // contribution of these keys instead, row by row, one head after another.
    void (*forward)(const anyattn_call &, const BlockSet &, int64_t begin, int64_t end, void *partial, void *scratch);
    // Most blocks, of so many rows each, and most KV heads that are faster in one task than in separate tasks.
    int64_t (*most_blocks)(const anyattn_call &, int64_t rows);
    int64_t (*most_groups)(const anyattn_call &, int64_t rows);
    // Adds a partial result of the same block, in place. Writes out and lse from the sum of all.
    void (*merge)(const anyattn_call &, const QueryBlock &, void *into, const void *from);
    void (*finish)(const anyattn_call &, const QueryBlock &, const void *partial);
    int64_t (*partial_row_bytes)(const anyattn_call &);  // of a partial
    // dq written, dk and dv accumulated into the zeroed partial, sink_partial[h * blocks + block] += its part of dsink
    // (may be null). statistics: null, or takes what dbias needs of every row.
    // In the second pass: the gradients of <dout, tout> + <dlse, tlse>, given tout and tlse.
    void (*backward)(const anyattn_call &, int32_t pass, const BackwardPart &, const Partial &, double *sink_partial,
                     void *statistics, void *scratch);
    // Adds the partials of all splits in order and writes rows [row0, row1) of dk and dv of sequence b.
    void (*reduce)(const anyattn_call &, int64_t b, int64_t h_kv, int64_t row0, int64_t row1, const Partial *,
                   int64_t splits);
    // One (kBlockQ x key block) tile of dbias, summed over its broadcast axes.
    void (*dbias)(const anyattn_call &, int32_t pass, int64_t bias_b, int64_t bias_h, int64_t block_q, int64_t block_k,
                  void *statistics, void *scratch);
    int64_t (*dbias_block_k)(const anyattn_call &, int32_t pass);
    int64_t (*statistics_bytes)(const anyattn_call &);  // of a row; a head has seqlen_q rows
    // Computes tout and tlse of at most kTangentBlocks blocks, which begin at the same key and share a KV head.
    void (*tangent)(const anyattn_call &, const BlockSet &, void *scratch);
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
