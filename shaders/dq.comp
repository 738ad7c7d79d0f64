#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#ifdef SHUFFLE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
// dq_i += scale sum_j dt_ij k_j. Rows are assigned to workgroups and lanes as in forward.comp; a workgroup loops over
// the keys [part * part_size, (part + 1) * part_size) that its rows may see.
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
layout(std430, binding = 10) buffer Dq { vec4 dq_memory[]; };

Row rows[ROWS];
vec2 stats[ROWS];
vec4 q[ROWS][OWN], dout[ROWS][OWN_V], dq[ROWS][OWN];

uint dq_at(Sequence s, Row row) {
    return rows_at(s, row.h, t.dq_head, t.dq_batch, t.dq_row) + row.line.i * t.dq_row + lane();
}

void load_rows(Sequence s, uint h_kv, uint first, uint count) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        Row row = packed_row(s, h_kv, first + n * SLOTS + slot(), 0, count);
        rows[n] = row;
        stats[n] = row_stats(s, row);
        uint at = rows_at(s, row.h, t.q_head, t.q_batch, t.q_row) + row.line.i * t.q_row + lane();
        uint dout_at = rows_at(s, row.h, t.out_head, t.out_batch, t.out_row) + row.line.i * t.out_row + lane();
        uint to = dq_at(s, row);
        [[dont_unroll]] for (uint x = 0; x < OWN; ++x) {
            q[n][x] = load4(q_memory[at + x * LANES]);
            dq[n][x] = dq_memory[to + x * LANES];
        }
        [[dont_unroll]] for (uint x = 0; x < OWN_V; ++x) dout[n][x] = load4(dout_memory[dout_at + x * LANES]);
    }
}

void products(uint k_at[KEYS], uint v_at[KEYS], out float x[ROWS][KEYS], out float dp[ROWS][KEYS]) {
    vec4 sum[ROWS][KEYS], dp_sum[ROWS][KEYS];
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[n][c] = dp_sum[n][c] = vec4(0);
    [[dont_unroll]] for (uint i = 0; i < OWN; ++i) {
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            vec4 key = load4(k_memory[k_at[c] + i * LANES]);
            [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n][c] = fma(q[n][i], key, sum[n][c]);
        }
    }
    [[dont_unroll]] for (uint i = 0; i < OWN_V; ++i) {
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            vec4 value = load4(v_memory[v_at[c] + i * LANES]);
            [[unroll]] for (uint n = 0; n < ROWS; ++n) dp_sum[n][c] = fma(dout[n][i], value, dp_sum[n][c]);
        }
    }
    sum_lanes(sum, x);
    sum_lanes(dp_sum, dp);
}

void add_keys(uint at[KEYS], float dt[ROWS][KEYS]) {
    [[dont_unroll]] for (uint i = 0; i < OWN; ++i) {
        vec4 sum[ROWS];
        [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n] = dq[n][i];
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            vec4 key = load4(k_memory[at[c] + i * LANES]);
            [[unroll]] for (uint n = 0; n < ROWS; ++n) sum[n] = fma(vec4(dt[n][c]), key, sum[n]);
        }
        [[unroll]] for (uint n = 0; n < ROWS; ++n) dq[n][i] = sum[n];
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
    int first_row = int(first / t.group), last_row = int((min(first + SLOTS * ROWS, count) - 1) / t.group);
    int begin = key_begin(s, first_row), end = key_end(s, last_row), size = launch.part_size;
    int start = max(begin, launch.part * size), stop = min(end, (launch.part + 1) * size);
    if (start >= stop) return;
    load_rows(s, h_kv, first, count);
    uint k_first = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_first = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    for (int j = start; j < stop; j += int(KEYS)) {
        if (has(FUNCTION) && ALONE && !sees_step(s, j)) continue;
        uint k_at[KEYS], v_at[KEYS];
        float x[ROWS][KEYS], dt[ROWS][KEYS];
        find_keys(s, k_first, t.k_batch, t.k_row, j, start, stop, k_at);
        find_keys(s, v_first, t.v_batch, t.v_row, j, start, stop, v_at);
        products(k_at, v_at, x, dt);
        [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            int key = j + int(c);
            dt[n][c] = key < stop ? t.scale * differentiate(s, rows[n], stats[n], key, x[n][c], dt[n][c]).dt : 0.0;
        }
        add_keys(k_at, dt);
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        if (!rows[n].used) continue;
        uint to = dq_at(s, rows[n]);
        [[dont_unroll]] for (uint x = 0; x < OWN; ++x) dq_memory[to + x * LANES] = dq[n][x];
    }
}
