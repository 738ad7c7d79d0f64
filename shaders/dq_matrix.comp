#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_cooperative_matrix : require
#ifdef BFLOAT
#extension GL_EXT_bfloat16 : require
#else
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#endif
// dq.comp with cooperative matrices: dq_i += scale sum_j dt_ij k_j.
#include "include/tables.glsl"
#include "include/storage.glsl"
#include "include/mask.glsl"
#include "include/score.glsl"
#include "include/philox.glsl"
#include "include/lanes.glsl"
#include "include/rows.glsl"
#include "include/matrix.glsl"
#include "include/gradient.glsl"

layout(std430, binding = 2) readonly buffer Q { STORED q_memory[]; };
layout(std430, binding = 3) readonly buffer Keys { STORED k_memory[]; };
layout(std430, binding = 4) readonly buffer V { STORED v_memory[]; };
layout(std430, binding = 5) readonly buffer Dout { STORED dout_memory[]; };
layout(std430, binding = 10) buffer Dq { vec4 dq_memory[]; };

shared STORED tile[STEP * TILE_STRIDE];  // rows of q and of dout, then values and keys alternately
shared float scores[OWNED * SCORE_STRIDE], dp[OWNED * SCORE_STRIDE];
shared STORED weights[OWNED * WEIGHT_STRIDE];

Row rows[ROWS];
vec2 stats[ROWS];
uint write_at[ROWS];

void load_rows(Sequence s, uint h_kv, uint first, uint count) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        rows[n] = packed_row(s, h_kv, first + n * SLOTS + slot(), 0, count);
        stats[n] = row_stats(s, rows[n]);
        write_at[n] = rows_at(s, rows[n].h, t.dq_head, t.dq_batch, t.dq_row) + rows[n].line.i * t.dq_row;
    }
}

void weigh(Sequence s, uint n, int j, int stop) {
    [[dont_unroll]] for (uint c = 0; c < SHARE; c += 4) {
        vec4 dt;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            uint at = score_at(n) + c + i;
            int key = j + int(lane() * SHARE + c + i);
            dt[i] = key < stop ? differentiate(s, rows[n], stats[n], key, scores[at], dp[at]).dt : 0.0;
        }
        weights[weight_at(n) + c / 4] = store4(dt);
    }
}

void write_dq(uint n, uint i, vec4 sum) {
    if (rows[n].used) dq_memory[write_at[n] + i] += t.scale * sum;
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    uint count = uint(s.n_q * t.group), first = (launch.first_block + gl_WorkGroupID.x) * OWNED;
    if (first >= count) return;
    KeyRange keys = key_range(s, first, min(first + OWNED, count) - 1);
    int start = max(keys.begin, launch.part * launch.part_size);
    int stop = min(keys.end, (launch.part + 1) * launch.part_size);
    if (start >= stop) return;
    LEFT_TILE q[DIM / K_VECTORS], dout[DIM_V / K_VECTORS];
    SUM_TILE dq[DIM / N_VECTORS];
    load_rows(s, h_kv, first, count);
    LOAD_OWN(q, tile, q_memory, DIM, q_at(s, h_kv, min(first + base + r, count - 1)))
    LOAD_OWN(dout, tile, dout_memory, DIM_V, out_at(s, h_kv, min(first + base + r, count - 1)))
    CLEAR(dq, DIM)
    uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    for (int j = start; j < stop; j += int(STEP)) {
        STAGE(tile, v_memory, DIM_V, j + int(r) < stop, key_at(s, v_at, t.v_batch, t.v_row, j + int(r)))
        barrier();
        MULTIPLY(dp, dout, tile, DIM_V)
        barrier();
        STAGE(tile, k_memory, DIM, j + int(r) < stop, key_at(s, k_at, t.k_batch, t.k_row, j + int(r)))
        barrier();
        MULTIPLY(scores, q, tile, DIM)
        barrier();
        [[unroll]] for (uint n = 0; n < ROWS; ++n) weigh(s, n, j, stop);
        barrier();
        ADD_WEIGHTED(dq, weights, tile, DIM)
        barrier();
    }
    WRITE_SUMS(dq, DIM, write_dq)
}
