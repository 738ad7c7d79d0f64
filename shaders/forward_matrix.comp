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
// The forward pass of forward.comp with cooperative matrices for both products.
//
// A subgroup multiplies M of the workgroup's rows with KEYS keys that the workgroup has staged in shared memory; scores
// go through shared memory to the invocations that compute the softmax, LANES of them for a row, and come back as
// weights in 16 bits. Nobody knows which invocation holds which entry of a matrix: the sum so far is rescaled by a
// matrix whose rows are the rescale factors.
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
layout(std430, binding = 9) writeonly buffer Partial { vec4 partial_memory[]; };  // with SPLIT, instead of out

const uint SHARE = KEYS / LANES;  // keys of an invocation
const uint TILE_ROWS = SLOTS * ROWS;
// 16 bytes more than a row: its neighbours then lie in other banks
const uint TILE_STRIDE = (DIM > DIM_V ? DIM : DIM_V) + 2, SCORE_STRIDE = KEYS + 4, WEIGHT_STRIDE = KEYS / 4 + 2;
shared STORED tile[KEYS * TILE_STRIDE];  // rows of q, then keys and values in turn
shared float scores[TILE_ROWS * SCORE_STRIDE];
shared STORED weights[TILE_ROWS * WEIGHT_STRIDE];

Row rows[ROWS];
float m[ROWS], l[ROWS];  // l: of this invocation's keys
LEFT_TILE q[DIM / K_VECTORS];
SUM_TILE acc[DIM_V / N_VECTORS];

uint own_row() { return gl_SubgroupID * M; }

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
    [[dont_unroll]] for (uint base = 0; base < TILE_ROWS; base += KEYS) {
        [[dont_unroll]] for (uint x = gl_LocalInvocationID.x; x < KEYS * DIM; x += WORKGROUP) {
            uint packed = min(first + base + x / DIM, count - 1), h = h_kv * t.group + packed % t.group;
            uint at = rows_at(s, h, t.q_head, t.q_batch, t.q_row) + packed / t.group * t.q_row;
            tile[x / DIM * TILE_STRIDE + x % DIM] = q_memory[at + x % DIM];
        }
        barrier();
        if (own_row() >= base && own_row() < base + KEYS) {
            [[dont_unroll]] for (uint i = 0; i < DIM / K_VECTORS; ++i) {
                coopMatLoad(q[i], tile, (own_row() - base) * TILE_STRIDE + i * K_VECTORS, TILE_STRIDE, BY_ROWS);
            }
        }
        barrier();
    }
    [[dont_unroll]] for (uint i = 0; i < DIM_V / N_VECTORS; ++i) acc[i] = SUM_TILE(0.0);
}

// Keys outside [begin, end) are not read: zeros stand for them.
void stage_keys(Sequence s, uint first, int j, int begin, int end) {
    [[dont_unroll]] for (uint x = gl_LocalInvocationID.x; x < KEYS * DIM; x += WORKGROUP) {
        int key = j + int(x / DIM), inside = clamp(key, begin, end - 1);
        STORED values = k_memory[key_at(s, first, t.k_batch, t.k_row, inside) + x % DIM];
        tile[x / DIM * TILE_STRIDE + x % DIM] = key == inside ? values : STORED(0);
    }
}

void stage_values(Sequence s, uint first, int j, int begin, int end) {
    [[dont_unroll]] for (uint x = gl_LocalInvocationID.x; x < KEYS * DIM_V; x += WORKGROUP) {
        int key = j + int(x / DIM_V), inside = clamp(key, begin, end - 1);
        STORED values = v_memory[key_at(s, first, t.v_batch, t.v_row, inside) + x % DIM_V];
        tile[x / DIM_V * TILE_STRIDE + x % DIM_V] = key == inside ? values : STORED(0);
    }
}

void products() {
    [[dont_unroll]] for (uint c = 0; c < KEYS; c += N) {
        SUM_TILE sum = SUM_TILE(0.0);
        [[dont_unroll]] for (uint i = 0; i < DIM / K_VECTORS; ++i) {
            RIGHT_TILE keys;
            coopMatLoad(keys, tile, c * TILE_STRIDE + i * K_VECTORS, TILE_STRIDE, BY_COLUMNS);
            sum = coopMatMulAdd(q[i], keys, sum);
        }
        coopMatStore(sum, scores, own_row() * SCORE_STRIDE + c, SCORE_STRIDE, BY_ROWS);
    }
}

// Products become weights exp(s - m); m and l follow. What held the products then holds the rescale factor.
void softmax_step(Sequence s, uint n, int j, bool edge) {
    uint r = n * SLOTS + slot(), at = r * SCORE_STRIDE + lane() * SHARE;
    int own = j + int(lane() * SHARE);
    float top = m[n], sum = 0.0;
    [[dont_unroll]] for (uint c = 0; c < SHARE; ++c) {
        int key = own + int(c);
        float ignored, x = UNSEEN;
        if (!edge || (key >= rows[n].begin && key < rows[n].end)) x = score(s, rows[n].line, key, scores[at + c], ignored);
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
        weights[r * WEIGHT_STRIDE + (lane() * SHARE + c) / 4] = store4(weight);
    }
    l[n] = fma(l[n], rescale, sum);
}

void add_values() {
    SUM_TILE rescale;
    coopMatLoad(rescale, scores, own_row() * SCORE_STRIDE, SCORE_STRIDE, BY_ROWS);
    [[dont_unroll]] for (uint i = 0; i < DIM_V / N_VECTORS; ++i) acc[i] = acc[i] * rescale;
    [[dont_unroll]] for (uint c = 0; c < KEYS; c += K) {
        LEFT_TILE weight;
        coopMatLoad(weight, weights, own_row() * WEIGHT_STRIDE + c / 4, WEIGHT_STRIDE, BY_ROWS);
        [[dont_unroll]] for (uint i = 0; i < DIM_V / N_VECTORS; ++i) {
            RIGHT_TILE values;
            coopMatLoad(values, tile, c * TILE_STRIDE + i * N_VECTORS, TILE_STRIDE, BY_ROWS);
            acc[i] = coopMatMulAdd(weight, values, acc[i]);
        }
    }
}

// KEYS columns of the sums at a time go through what held the scores.
void write_rows(Sequence s) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) l[n] = sum_lanes(l[n]);
    [[dont_unroll]] for (uint first = 0; first < DIM_V * 4; first += KEYS) {
        barrier();
        [[dont_unroll]] for (uint c = 0; c < KEYS && first + c < DIM_V * 4; c += N) {
            coopMatStore(acc[(first + c) / N], scores, own_row() * SCORE_STRIDE + c, SCORE_STRIDE, BY_ROWS);
        }
        barrier();
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            if (!rows[n].used) continue;
            // the scale of dropout is left out of the weights, which it could lift out of the range of 16 bits
            float scale = l[n] == 0.0 ? 0.0 : (has(DROPOUT) ? t.keep_scale : 1.0) / l[n];
            uint at = rows_at(s, rows[n].h, t.out_head, t.out_batch, t.out_row) + rows[n].line.i * t.out_row + first / 4;
            if (has(SPLIT)) at += gl_WorkGroupID.z * t.partial_split;
            uint from = (n * SLOTS + slot()) * SCORE_STRIDE;
            [[dont_unroll]] for (uint x = lane(); x < KEYS / 4 && first / 4 + x < DIM_V; x += LANES) {
                vec4 values;
                [[unroll]] for (uint i = 0; i < 4; ++i) values[i] = scores[from + 4 * x + i] * scale;
                if (has(SPLIT)) {
                    partial_memory[at + x] = values;
                } else {
                    out_memory[at + x] = store4(values);
                }
            }
        }
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        if (!rows[n].used || lane() != 0) continue;
        uint lse = lse_at(s, rows[n].h) + rows[n].line.i;
        if (has(SPLIT)) lse += gl_WorkGroupID.z * t.partial_lse_split;
        lse_memory[lse] = l[n] == 0.0 ? MINUS_INFINITY : (m[n] + log2(l[n])) * LN2;
    }
}

void main() {
    uint h_kv = unit_head();
    Sequence s = read_sequence(unit_batch());
    uint count = uint(s.n_q * t.group), first = (launch.first_block + gl_WorkGroupID.x) * TILE_ROWS;
    if (first >= count) return;
    load_rows(s, h_kv, first, count);
    KeyRange keys = key_range(s, first, min(first + TILE_ROWS, count) - 1);
    uint k_at = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row), v_at = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row);
    for (int j = keys.start; j < keys.stop; j += int(KEYS)) {
        stage_keys(s, k_at, j, keys.begin, keys.end);
        barrier();
        products();
        barrier();
        stage_values(s, v_at, j, keys.begin, keys.end);
        bool edge = j < keys.full_begin || j + int(KEYS) > keys.full_end;
        [[unroll]] for (uint n = 0; n < ROWS; ++n) softmax_step(s, n, j, edge);
        barrier();
        add_values();
        barrier();
    }
    write_rows(s);
}
