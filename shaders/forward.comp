#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#ifdef SHUFFLE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
// Forward pass: online softmax over the keys that a block of rows may see (Dao, FlashAttention-2, algorithm 1).
//
// A workgroup computes WORKGROUP / LANES * ROWS packed rows of one KV head: rows of all its query heads, with the rows
// of one query position next to each other, so that decoding fills a workgroup too. LANES invocations share a row: each
// holds every LANES-th vector of q and of the accumulator. With SPLIT a workgroup reads part_size keys, and
// combine.comp combines the partial results.
#include "include/tables.glsl"
#include "include/storage.glsl"
#include "include/mask.glsl"
#include "include/score.glsl"
#include "include/philox.glsl"
#include "include/lanes.glsl"
#include "include/rows.glsl"

layout(std430, binding = 2) readonly buffer Q { STORED q_memory[]; };
layout(std430, binding = 3) readonly buffer K { STORED k_memory[]; };
layout(std430, binding = 4) readonly buffer V { STORED v_memory[]; };
layout(std430, binding = 5) writeonly buffer Out { STORED out_memory[]; };
layout(std430, binding = 6) writeonly buffer Lse { float lse_memory[]; };
layout(std430, binding = 9) writeonly buffer Partial { vec4 partial_memory[]; };  // replaces out with SPLIT

Row rows[ROWS];
vec4 q[ROWS][OWN], acc[ROWS][OWN_V];
float m[ROWS], l[ROWS];

void load_rows(Sequence s, uint h_kv, uint first, uint count) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        rows[n] = packed_row(s, h_kv, first + n * SLOTS + slot(), 0, count);
        int i = rows[n].line.i;
        uint h = rows[n].h;
        uint at = rows_at(s, h, t.q_head, t.q_batch, t.q_row) + i * t.q_row + lane();
        [[dont_unroll]] for (uint x = 0; x < OWN; ++x) q[n][x] = load4(q_memory[at + x * LANES]);
        [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) acc[n][x] = vec4(0);
        m[n] = UNSEEN;
        l[n] = 0.0;
        if (has(SINK) && gl_WorkGroupID.z == 0) {
            float sink = heads[s.index * t.nheads + h].y;
            if (sink > MINUS_INFINITY) {
                m[n] = sink * LOG2E;
                l[n] = 1.0;
            }
        }
    }
}

// Compute the products of the rows with KEYS keys.
void products(uint at[KEYS], out float x[ROWS][KEYS]) {
    vec4 sum[ROWS][KEYS];
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[n][c] = vec4(0);
    [[dont_unroll]] for (uint i = 0; i < OWN; ++i) {
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            vec4 key = load4(k_memory[at[c] + i * LANES]);
            [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n][c] = fma(q[n][i], key, sum[n][c]);
        }
    }
    sum_lanes(sum, x);
}

// Replace products by weights exp(s - m) and update m and l. Return the rescale factors of the accumulator.
float softmax_step(Sequence s, uint n, int j, bool edge, inout float x[ROWS][KEYS]) {
    float top = m[n];
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        int key = j + int(c);
        float ignored;
        bool seen = !edge || (key >= rows[n].begin && key < rows[n].end);
        x[n][c] = seen ? score(s, rows[n].line, rows[n].h, key, x[n][c], ignored) : UNSEEN;
        top = max(top, x[n][c]);
    }
    float rescale = exp2(m[n] - top);
    m[n] = top;
    float sum = 0.0;
    uvec4 words;
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        x[n][c] = x[n][c] <= SEEN ? 0.0 : exp2(x[n][c] - top);
        sum += x[n][c];
        if (has(DROPOUT)) {
            if (c % 8 == 0) words = dropout_words(s, rows[n].line.i, rows[n].h, j + int(c));
            x[n][c] = kept(words, j + int(c)) ? x[n][c] * t.keep_scale : 0.0;
        }
    }
    l[n] = fma(l[n], rescale, sum);
    return rescale;
}

// Each step sums its values first, then adds them to the accumulator: fewer rounding errors.
void add_values(uint at[KEYS], float rescale[ROWS], float x[ROWS][KEYS]) {
    [[dont_unroll]] for (uint i = 0; i < OWN_V; ++i) {
        vec4 sum[ROWS];
        [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n] = vec4(0);
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            vec4 value = load4(v_memory[at[c] + i * LANES]);
            [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n] = fma(vec4(x[n][c]), value, sum[n]);
        }
        [[unroll]] for (uint n = 0; n < ROWS; ++n) acc[n][i] = fma(acc[n][i], vec4(rescale[n]), sum[n]);
    }
}

void write_rows(Sequence s) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        if (!rows[n].used) continue;
        float scale = l[n] == 0.0 ? 0.0 : 1.0 / l[n];
        int i = rows[n].line.i;
        uint h = rows[n].h, at = rows_at(s, h, t.out_head, t.out_batch, t.out_row) + i * t.out_row + lane();
        uint lse = lse_at(s, h) + i;
        if (has(SPLIT)) {
            at += gl_WorkGroupID.z * t.partial_split;
            lse += gl_WorkGroupID.z * t.partial_lse_split;
            [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) partial_memory[at + x * LANES] = acc[n][x] * scale;
        } else {
            [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) out_memory[at + x * LANES] = store4(acc[n][x] * scale);
        }
        if (lane() == 0) lse_memory[lse] = l[n] == 0.0 ? MINUS_INFINITY : (m[n] + log2(l[n])) * LN2;
    }
}

// Return whether a row of this invocation may attend to one of KEYS keys.
bool sees_step(Sequence s, int j) {
    bool seen = false;
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        seen = seen || sees(s, rows[n], j + int(c));
    }
    return seen;
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    uint count = uint(s.n_q * t.group), first = (launch.first_block + gl_WorkGroupID.x) * (SLOTS * ROWS);
    if (first >= count) return;
    load_rows(s, h_kv, first, count);
    KeyRange keys = key_range(s, first, min(first + SLOTS * ROWS, count) - 1);
    uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    for (int j = keys.start; j < keys.stop; j += int(KEYS)) {
        if (has(FUNCTION) && ALONE && !sees_step(s, j)) continue;
        uint at[KEYS];
        float x[ROWS][KEYS], rescale[ROWS];
        find_keys(s, k_at, t.k_batch, t.k_row, j, keys.begin, keys.end, at);
        products(at, x);
        bool edge = j < keys.full_begin || j + int(KEYS) > keys.full_end;
        [[unroll]] for (uint n = 0; n < ROWS; ++n) rescale[n] = softmax_step(s, n, j, edge, x);
        find_keys(s, v_at, t.v_batch, t.v_row, j, keys.begin, keys.end, at);
        add_values(at, rescale, x);
    }
    write_rows(s);
}
