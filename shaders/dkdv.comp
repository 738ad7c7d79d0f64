#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#ifdef SHUFFLE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
// dk_j += scale sum dt_ij q_i and dv_j += sum P_ij D_ij dout_i, over the rows of all query heads of the KV head.
//
// A workgroup computes WORKGROUP / LANES * KEYS keys of one KV head and loops over the packed rows
// [part * part_size, (part + 1) * part_size) that may see them. No other workgroup adds to these keys, so the order of
// additions is fixed.
#include "include/tables.glsl"
#include "include/storage.glsl"
#include "include/mask.glsl"
#include "include/score.glsl"
#include "include/philox.glsl"
#include "include/lanes.glsl"
#include "include/rows.glsl"
#include "include/gradient.glsl"

layout(std430, binding = 2) readonly buffer Q { STORED q_memory[]; };
layout(std430, binding = 3) readonly buffer K { STORED k_memory[]; };
layout(std430, binding = 4) readonly buffer V { STORED v_memory[]; };
layout(std430, binding = 5) readonly buffer Dout { STORED dout_memory[]; };
layout(std430, binding = 10) buffer Dk { vec4 dk_memory[]; };
layout(std430, binding = 11) buffer Dv { vec4 dv_memory[]; };

vec4 k[KEYS][OWN], v[KEYS][OWN_V], dk[KEYS][OWN], dv[KEYS][OWN_V];

// Return the n-th key slot of this invocation; slots past the end become the last one.
int key_slot(Sequence s, int first, uint c) { return min(first + int(c * SLOTS + slot()), s.n_k - 1); }

uint dk_at(Sequence s, uint h_kv, int j) { return keys_at(s, h_kv, t.dk_head, t.dk_batch, t.dk_row) + j * t.dk_row + lane(); }
uint dv_at(Sequence s, uint h_kv, int j) { return keys_at(s, h_kv, t.dv_head, t.dv_batch, t.dv_row) + j * t.dv_row + lane(); }

void load_keys(Sequence s, uint h_kv, int first) {
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        int j = key_slot(s, first, c);
        uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row) + j * t.k_row + lane();
        uint v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row) + j * t.v_row + lane();
        uint k_to = dk_at(s, h_kv, j), v_to = dv_at(s, h_kv, j);
        [[dont_unroll]] for (uint x = 0; x < OWN; ++x) {
            k[c][x] = load4(k_memory[k_at + x * LANES]);
            dk[c][x] = dk_memory[k_to + x * LANES];
        }
        [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) {
            v[c][x] = load4(v_memory[v_at + x * LANES]);
            dv[c][x] = dv_memory[v_to + x * LANES];
        }
    }
}

void products(uint q_at[ROWS], uint dout_at[ROWS], out float x[ROWS][KEYS], out float dp[ROWS][KEYS]) {
    vec4 sum[ROWS][KEYS], dp_sum[ROWS][KEYS];
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[n][c] = dp_sum[n][c] = vec4(0);
    [[dont_unroll]] for (uint i = 0; i < OWN; ++i) {
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(q_memory[q_at[n] + i * LANES]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[n][c] = fma(row, k[c][i], sum[n][c]);
        }
    }
    [[dont_unroll]] for (uint i = 0; i < OWN_V; ++i) {
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(dout_memory[dout_at[n] + i * LANES]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) dp_sum[n][c] = fma(row, v[c][i], dp_sum[n][c]);
        }
    }
    sum_lanes(sum, x);
    sum_lanes(dp_sum, dp);
}

void add_rows(uint q_at[ROWS], uint dout_at[ROWS], float p[ROWS][KEYS], float dt[ROWS][KEYS]) {
    [[dont_unroll]] for (uint i = 0; i < OWN; ++i) {
        vec4 sum[KEYS];
        [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[c] = dk[c][i];
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(q_memory[q_at[n] + i * LANES]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[c] = fma(vec4(dt[n][c]), row, sum[c]);
        }
        [[unroll]] for (uint c = 0; c < KEYS; ++c) dk[c][i] = sum[c];
    }
    [[dont_unroll]] for (uint i = 0; i < OWN_V; ++i) {
        vec4 sum[KEYS];
        [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[c] = dv[c][i];
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(dout_memory[dout_at[n] + i * LANES]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[c] = fma(vec4(p[n][c]), row, sum[c]);
        }
        [[unroll]] for (uint c = 0; c < KEYS; ++c) dv[c][i] = sum[c];
    }
}

void step_rows(Sequence s, uint h_kv, int first, uint packed, uint begin, uint end) {
    uint q_at[ROWS], dout_at[ROWS];
    Row rows[ROWS];
    float x[ROWS][KEYS], dp[ROWS][KEYS];
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        Row row = packed_row(s, h_kv, packed + n, begin, end);
        rows[n] = row;
        q_at[n] = rows_at(s, row.h, t.q_head, t.q_batch, t.q_row) + row.line.i * t.q_row + lane();
        dout_at[n] = rows_at(s, row.h, t.out_head, t.out_batch, t.out_row) + row.line.i * t.out_row + lane();
    }
    if (has(FUNCTION) && ALONE) {
        bool seen = false;
        [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            seen = seen || sees(s, rows[n], key_slot(s, first, c));
        }
        if (!seen) return;
    }
    products(q_at, dout_at, x, dp);
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        vec2 stats = row_stats(s, rows[n]);
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            Gradient g = differentiate(s, rows[n], stats, key_slot(s, first, c), x[n][c], dp[n][c]);
            x[n][c] = g.p;
            dp[n][c] = t.scale * g.dt;
        }
    }
    add_rows(q_at, dout_at, x, dp);
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    int tile = int(SLOTS * KEYS), first = int(launch.first_block + gl_WorkGroupID.x) * tile;
    if (first >= s.n_k) return;
    int size = launch.part_size, start = row_begin(s, first) * t.group;
    int stop = row_end(s, min(first + tile, s.n_k) - 1) * t.group;
    start = max(start, launch.part * size);
    stop = min(stop, (launch.part + 1) * size);
    if (start >= stop) return;
    load_keys(s, h_kv, first);
    for (int packed = start; packed < stop; packed += int(ROWS)) step_rows(s, h_kv, first, packed, start, stop);
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        int j = key_slot(s, first, c);
        if (j != first + int(c * SLOTS + slot())) continue;
        uint k_to = dk_at(s, h_kv, j), v_to = dv_at(s, h_kv, j);
        [[dont_unroll]] for (uint x = 0; x < OWN; ++x) dk_memory[k_to + x * LANES] = dk[c][x];
        [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) dv_memory[v_to + x * LANES] = dv[c][x];
    }
}
