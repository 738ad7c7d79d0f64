// The description of one call: the numbers of layout.py's HEADER in its order, then one row per sequence, then the
// block table. Strides count vectors of four elements (strides of bias and mask: elements).

layout(std430, binding = 0) readonly buffer Tables {
    int features;
    int nheads, group;
    int left, right, chunk;
    float scale, softcap;
    uint threshold;
    float keep_scale;
    uint seed_low, seed_high, rng_offset;
    int page_size, max_pages, pages_at;
    int rows_q;  // rows of one head in lse: the batch stride there
    uint q_head, q_batch, q_row;
    uint k_head, k_batch, k_row;
    uint v_head, v_batch, v_row;
    uint out_head, out_batch, out_row;  // out and dout
    uint dq_head, dq_batch, dq_row;
    uint dk_head, dk_batch, dk_row;
    uint dv_head, dv_batch, dv_row;
    uint lse_head, lse_batch;  // lse, delta
    uint bias_head, bias_batch, bias_row, bias_key;
    uint mask_head, mask_batch, mask_row, mask_key;
    uint dbias_head, dbias_batch, dbias_row, dbias_key;
    int row_tiles, key_tiles;  // of dbias.comp, computed in parallel
    uint row_tile, key_tile;   // strides between their sums, if the bias is broadcast over rows or keys
    int seqlen_k;
    uint partial_split, partial_lse_split;  // strides between the partial results of two splits
    int rotary_dim, interleaved;                        // append
    int rest[];
} t;

// ALiBi slope and sink of (batch, query head)
layout(std430, binding = 1) readonly buffer Heads { vec2 heads[]; };

// The part of the grid that one dispatch computes. The buffers are bound from first_head and first_batch on.
layout(push_constant) uniform Launch {
    uint first_block, first_unit;
    uint first_head, nheads;  // KV heads
    uint first_batch;
    int part_size;  // keys, rows or steps of one part: of split keys, or of several dispatches that are added
    uint parts;
    int part;
} launch;

// Features: FEATURES lists those that a module is compiled with, t.features those that the call uses.
const int LEFT = 1, RIGHT = 2, CHUNK = 4, SOFTCAP = 8, ALIBI = 16, SINK = 32, DROPOUT = 64, PAGED = 128, MASK = 256;
const int BIAS_F32 = 512, BIAS_16 = 1024, SPLIT = 2048, DLSE = 4096, BIAS = BIAS_F32 | BIAS_16;

layout(constant_id = 0) const uint WORKGROUP = 32;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint DIM = 16;    // vectors per row of q and k
layout(constant_id = 2) const uint DIM_V = 16;  // and per row of v
layout(constant_id = 3) const uint LANES = 1;   // invocations that share a row
layout(constant_id = 4) const uint ROWS = 1;    // rows per invocation
layout(constant_id = 5) const uint KEYS = 4;    // keys per step
layout(constant_id = 6) const int FEATURES = 0;
layout(constant_id = 7) const bool BFLOAT16 = false;

bool has(int feature) { return (FEATURES & feature) != 0 && (t.features & feature) != 0; }

struct Sequence {
    int index, n_q, n_k, leftpad, offset;
    int batch_q, row_q, batch_k, row_k;
};

Sequence read_sequence(uint b) {
    uint at = 8 * b;
    return Sequence(int(b), t.rest[at], t.rest[at + 1], t.rest[at + 2], t.rest[at + 3], t.rest[at + 4], t.rest[at + 5],
                    t.rest[at + 6], t.rest[at + 7]);
}

// Return the KV head and the batch entry of this workgroup.
uint unit() { return launch.first_unit + gl_WorkGroupID.y; }
uint unit_head() { return launch.first_head + unit() % launch.nheads; }
uint unit_batch() { return launch.first_batch + unit() / launch.nheads; }

// Return the address of row 0 of a query head, and of a KV head without pages.
uint rows_at(Sequence s, uint h, uint head_stride, uint batch_stride, uint row_stride) {
    return (h - launch.first_head * t.group) * head_stride + (s.batch_q - launch.first_batch) * batch_stride +
           s.row_q * row_stride;
}
uint lse_at(Sequence s, uint h) { return rows_at(s, h, t.lse_head, t.lse_batch, 1); }
uint keys_at(Sequence s, uint h_kv, uint head_stride, uint batch_stride, uint row_stride) {
    return (h_kv - launch.first_head) * head_stride + (s.batch_k - launch.first_batch) * batch_stride +
           s.row_k * row_stride;
}

// Return the address of key slot j of the KV head at `at`.
uint key_at(Sequence s, uint at, uint batch_stride, uint row_stride, int j) {
    if (!has(PAGED)) return at + j * row_stride;
    int page = t.rest[t.pages_at + s.index * t.max_pages + j / t.page_size];
    return at + page * batch_stride + (j % t.page_size) * row_stride;
}
