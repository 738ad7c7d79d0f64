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
// dkdv.comp with cooperative matrices: dk_j += scale sum dt_ij q_i and dv_j += sum P_ij D_ij dout_i.
// A workgroup owns keys, so scores are stored in shared memory as (key, row).
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
layout(std430, binding = 10) buffer Dk { vec4 dk_memory[]; };
layout(std430, binding = 11) buffer Dv { vec4 dv_memory[]; };

shared STORED q_tile[STEP * TILE_STRIDE], dout_tile[STEP * TILE_STRIDE];
shared float scores[OWNED * SCORE_STRIDE], dp[OWNED * SCORE_STRIDE];
shared STORED p_weights[OWNED * WEIGHT_STRIDE], dt_weights[OWNED * WEIGHT_STRIDE];
shared Row rows[STEP];
shared vec2 stats[STEP];

uint dk_at[ROWS], dv_at[ROWS];
bool used[ROWS];

void find_rows(Sequence s, uint h_kv, uint packed, uint begin, uint end) {
    [[dont_unroll]] for (uint r = gl_LocalInvocationID.x; r < STEP; r += WORKGROUP) {
        rows[r] = packed_row(s, h_kv, packed + r, begin, end);
        stats[r] = row_stats(s, rows[r]);
    }
}

void weigh(Sequence s, uint n, int j) {
    [[dont_unroll]] for (uint c = 0; c < SHARE; c += 4) {
        vec4 p, dt;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            uint at = score_at(n) + c + i, r = lane() * SHARE + c + i;
            Gradient g = differentiate(s, rows[r], stats[r], j, scores[at], dp[at]);
            // without the factor of dropout, with which a weight could exceed the 16-bit range
            p[i] = has(DROPOUT) ? g.p / t.keep_scale : g.p;
            dt[i] = g.dt;
        }
        p_weights[weight_at(n) + c / 4] = store4(p);
        dt_weights[weight_at(n) + c / 4] = store4(dt);
    }
}

void write_dk(uint n, uint i, vec4 sum) {
    if (used[n]) dk_memory[dk_at[n] + i] += t.scale * sum;
}

void write_dv(uint n, uint i, vec4 sum) {
    if (used[n]) dv_memory[dv_at[n] + i] += has(DROPOUT) ? t.keep_scale * sum : sum;
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    int first = int((launch.first_block + gl_WorkGroupID.x) * OWNED), last = min(first + int(OWNED), s.n_k) - 1;
    if (first > last) return;
    int start = max(row_begin(s, first) * t.group, launch.part * launch.part_size);
    int stop = min(row_end(s, last) * t.group, (launch.part + 1) * launch.part_size);
    if (start >= stop) return;
    LEFT_TILE k[DIM / K_VECTORS], v[DIM_V / K_VECTORS];
    SUM_TILE dk[DIM / N_VECTORS], dv[DIM_V / N_VECTORS];
    uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    LOAD_OWN(k, q_tile, k_memory, DIM, k_at + min(uint(first) + base + r, uint(last)) * t.k_row)
    LOAD_OWN(v, q_tile, v_memory, DIM_V, v_at + min(uint(first) + base + r, uint(last)) * t.v_row)
    CLEAR(dk, DIM)
    CLEAR(dv, DIM_V)
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        int j = first + int(n * SLOTS + slot());
        used[n] = j <= last;
        dk_at[n] = keys_at(s, h_kv, t.dk_head, t.dk_batch, t.dk_row) + j * t.dk_row;
        dv_at[n] = keys_at(s, h_kv, t.dv_head, t.dv_batch, t.dv_row) + j * t.dv_row;
    }
    for (int packed = start; packed < stop; packed += int(STEP)) {
        STAGE(q_tile, q_memory, DIM, packed + int(r) < stop, q_at(s, h_kv, uint(packed) + r))
        STAGE(dout_tile, dout_memory, DIM_V, packed + int(r) < stop, out_at(s, h_kv, uint(packed) + r))
        find_rows(s, h_kv, packed, start, stop);
        barrier();
        MULTIPLY(scores, k, q_tile, DIM)
        MULTIPLY(dp, v, dout_tile, DIM_V)
        barrier();
        [[unroll]] for (uint n = 0; n < ROWS; ++n) weigh(s, n, min(first + int(n * SLOTS + slot()), last));
        barrier();
        ADD_WEIGHTED(dk, dt_weights, q_tile, DIM)
        ADD_WEIGHTED(dv, p_weights, dout_tile, DIM_V)
        barrier();
    }
    WRITE_SUMS(dk, DIM, write_dk)
    WRITE_SUMS(dv, DIM_V, write_dv)
}
