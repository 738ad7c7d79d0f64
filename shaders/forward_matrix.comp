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
// The forward pass of forward.comp with cooperative matrices for both products. The accumulator is rescaled by a matrix
// whose rows hold the rescale factors.
#include "include/tables.glsl"
#include "include/storage.glsl"
#include "include/mask.glsl"
#include "include/score.glsl"
#include "include/philox.glsl"
#include "include/lanes.glsl"
#include "include/rows.glsl"
#include "include/matrix.glsl"

layout(std430, binding = 2) readonly buffer Q { STORED q_memory[]; };
layout(std430, binding = 3) readonly buffer Keys { STORED k_memory[]; };
layout(std430, binding = 4) readonly buffer V { STORED v_memory[]; };
layout(std430, binding = 5) writeonly buffer Out { STORED out_memory[]; };
layout(std430, binding = 6) writeonly buffer Lse { float lse_memory[]; };
layout(std430, binding = 9) writeonly buffer Partial { vec4 partial_memory[]; };  // replaces out with SPLIT

shared STORED tile[STEP * TILE_STRIDE];  // rows of q, then keys and values alternately
shared float scores[OWNED * SCORE_STRIDE];
shared STORED weights[OWNED * WEIGHT_STRIDE];

Row rows[ROWS];
float m[ROWS], l[ROWS];  // l sums this invocation's keys only
uint write_at[ROWS];
float write_scale[ROWS];

void load_rows(Sequence s, uint h_kv, uint first, uint count) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        rows[n] = packed_row(s, h_kv, first + n * SLOTS + slot(), 0, count);
        m[n] = UNSEEN;
        l[n] = 0.0;
        if (has(SINK) && gl_WorkGroupID.z == 0) {
            float sink = heads[s.index * t.nheads + rows[n].h].y;
            if (sink > MINUS_INFINITY) {
                m[n] = sink * LOG2E;
                l[n] = lane() == 0 ? 1.0 : 0.0;
            }
        }
    }
}

// Replace products by weights exp(s - m) and update m and l. The memory of the products then holds the rescale factors.
void softmax_step(Sequence s, uint n, int j, bool edge) {
    uint at = score_at(n);
    int own = j + int(lane() * SHARE);
    float top = m[n], sum = 0.0;
    [[dont_unroll]] for (uint c = 0; c < SHARE; ++c) {
        int key = own + int(c);
        bool seen = !edge || (key >= rows[n].begin && key < rows[n].end);
        float ignored, x = seen ? score(s, rows[n].line, rows[n].h, key, scores[at + c], ignored) : UNSEEN;
        scores[at + c] = x;
        top = max(top, x);
    }
    top = max_lanes(top);
    float rescale = exp2(m[n] - top);
    m[n] = top;
    uvec4 words;
    [[dont_unroll]] for (uint c = 0; c < SHARE; c += 4) {
        if (has(DROPOUT) && c % 8 == 0) words = dropout_words(s, rows[n].line.i, rows[n].h, own + int(c));
        vec4 weight;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            float x = scores[at + c + i];
            weight[i] = x <= SEEN ? 0.0 : exp2(x - top);
            sum += weight[i];
            if (has(DROPOUT) && !kept(words, own + int(c + i))) weight[i] = 0.0;
            scores[at + c + i] = rescale;
        }
        weights[weight_at(n) + c / 4] = store4(weight);
    }
    l[n] = fma(l[n], rescale, sum);
}

void write_lse(Sequence s, uint n) {
    float sum = sum_lanes(l[n]);
    // weights without the factor of dropout, with which they could exceed the 16-bit range
    write_scale[n] = sum == 0.0 ? 0.0 : (has(DROPOUT) ? t.keep_scale : 1.0) / sum;
    int i = rows[n].line.i;
    uint h = rows[n].h, lse = lse_at(s, h) + i;
    write_at[n] = rows_at(s, h, t.out_head, t.out_batch, t.out_row) + i * t.out_row;
    if (has(SPLIT)) {
        write_at[n] += gl_WorkGroupID.z * t.partial_split;
        lse += gl_WorkGroupID.z * t.partial_lse_split;
    }
    if (rows[n].used && lane() == 0) lse_memory[lse] = sum == 0.0 ? MINUS_INFINITY : (m[n] + log2(sum)) * LN2;
}

void write_out(uint n, uint i, vec4 sum) {
    if (!rows[n].used) return;
    if (has(SPLIT)) {
        partial_memory[write_at[n] + i] = sum * write_scale[n];
    } else {
        out_memory[write_at[n] + i] = store4(sum * write_scale[n]);
    }
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    uint count = uint(s.n_q * t.group), first = (launch.first_block + gl_WorkGroupID.x) * OWNED;
    if (first >= count) return;
    LEFT_TILE q[DIM / K_VECTORS];
    SUM_TILE acc[DIM_V / N_VECTORS];
    load_rows(s, h_kv, first, count);
    LOAD_OWN(q, tile, q_memory, DIM, q_at(s, h_kv, min(first + base + r, count - 1)))
    CLEAR(acc, DIM_V)
    KeyRange keys = key_range(s, first, min(first + OWNED, count) - 1);
    uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    for (int j = keys.start; j < keys.stop; j += int(STEP)) {
        STAGE(tile, k_memory, DIM, key_inside(keys, j + int(r)), key_at(s, k_at, t.k_batch, t.k_row, j + int(r)))
        barrier();
        MULTIPLY(scores, q, tile, DIM)
        barrier();
        STAGE(tile, v_memory, DIM_V, key_inside(keys, j + int(r)), key_at(s, v_at, t.v_batch, t.v_row, j + int(r)))
        bool edge = j < keys.full_begin || j + int(STEP) > keys.full_end;
        [[unroll]] for (uint n = 0; n < ROWS; ++n) softmax_step(s, n, j, edge);
        barrier();
        SUM_TILE rescale;
        coopMatLoad(rescale, scores, own_row() * SCORE_STRIDE, SCORE_STRIDE, BY_ROWS);
        [[dont_unroll]] for (uint i = 0; i < DIM_V / N_VECTORS; ++i) acc[i] = acc[i] * rescale;
        ADD_WEIGHTED(acc, weights, tile, DIM_V)
        barrier();
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) write_lse(s, n);
    WRITE_SUMS(acc, DIM_V, write_out)
}
