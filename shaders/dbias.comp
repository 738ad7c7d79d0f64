#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// dbias += ds, summed over the axes along which the bias is broadcast.
//
// One invocation computes a tile of ROWS rows and KEYS keys of one head and batch entry of the bias. Where the bias is
// broadcast over heads, batch entries, rows or keys, the invocation loops over them: steps [part * part_size, (part +
// 1) * part_size) of launch.parts. Of broadcast rows and keys it takes every row_tiles-th and key_tiles-th tile;
// sum.comp adds the results.
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
layout(std430, binding = 10) buffer Dbias { float dbias_memory[]; };

float sum[ROWS][KEYS];

// Add the tile of rows [i, i + ROWS) and keys [j, j + KEYS). Row i and key j exist; the others may lie past the end.
void add_tile(Sequence s, uint h, int i, int j) {
    Row rows[ROWS];
    uint q_at[ROWS], dout_at[ROWS], k_at[KEYS], v_at[KEYS];
    vec4 x[ROWS][KEYS], dp[ROWS][KEYS];
    int begin = key_begin(s, i), end = key_end(s, min(i + int(ROWS), s.n_q) - 1);
    if (max(begin, j) >= min(end, j + int(KEYS))) return;
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        int inside = min(i + int(n), s.n_q - 1);
        rows[n] = make_row(s, inside, h, inside == i + int(n));
        q_at[n] = rows_at(s, h, t.q_head, t.q_batch, t.q_row) + inside * t.q_row;
        dout_at[n] = rows_at(s, h, t.out_head, t.out_batch, t.out_row) + inside * t.out_row;
        [[unroll]] for (uint c = 0; c < KEYS; ++c) x[n][c] = dp[n][c] = vec4(0);
    }
    uint h_kv = h / t.group;
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        int inside = clamp(j + int(c), begin, end - 1);
        k_at[c] = keys_at(s, h_kv, t.k_head, t.k_batch, t.k_row) + inside * t.k_row;
        v_at[c] = keys_at(s, h_kv, t.v_head, t.v_batch, t.v_row) + inside * t.v_row;
    }
    [[dont_unroll]] for (uint d = 0; d < DIM; ++d) {
        vec4 key[KEYS];
        [[unroll]] for (uint c = 0; c < KEYS; ++c) key[c] = load4(k_memory[k_at[c] + d]);
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(q_memory[q_at[n] + d]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) x[n][c] = fma(row, key[c], x[n][c]);
        }
    }
    [[dont_unroll]] for (uint d = 0; d < DIM_V; ++d) {
        vec4 value[KEYS];
        [[unroll]] for (uint c = 0; c < KEYS; ++c) value[c] = load4(v_memory[v_at[c] + d]);
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {
            vec4 row = load4(dout_memory[dout_at[n] + d]);
            [[unroll]] for (uint c = 0; c < KEYS; ++c) dp[n][c] = fma(row, value[c], dp[n][c]);
        }
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) {
        vec2 stats = row_stats(s, rows[n]);
        [[unroll]] for (uint c = 0; c < KEYS; ++c) {
            sum[n][c] += differentiate(s, rows[n], stats, j + int(c), sum4(x[n][c]), sum4(dp[n][c])).ds;
        }
    }
}

// Return the number of tiles that one invocation computes along an axis.
int visits(int length, uint tile, int tiles, bool shared_axis) {
    return shared_axis ? (length + int(tile) * tiles - 1) / (int(tile) * tiles) : 1;
}

void write_sums(uint at, int i, int j, bool one_row, bool one_key) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        if (one_row && n > 0) sum[0][c] += sum[n][c];
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        if (one_key && c > 0) sum[n][0] += sum[n][c];
    }
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        bool own_row = one_row ? n == 0 : i + int(n) < t.rows_q, own_key = one_key ? c == 0 : j + int(c) < t.seqlen_k;
        if (own_row && own_key) dbias_memory[at + (i + n) * t.dbias_row + (j + c) * t.dbias_key] += sum[n][c];
    }
}

void main() {
    int tile = int((launch.first_block + gl_WorkGroupID.x) * WORKGROUP + gl_LocalInvocationID.x);
    if (tile >= t.row_tiles * t.key_tiles) return;
    bool one_head = t.dbias_head == 0, one_batch = t.dbias_batch == 0;
    bool one_row = t.dbias_row == 0, one_key = t.dbias_key == 0;
    int row_tile = tile / t.key_tiles, key_tile = tile % t.key_tiles;
    int heads_here = int(launch.nheads) * t.group, own_heads = one_head ? 1 : heads_here;
    int h_own = int(unit()) % own_heads, b_own = int(unit()) / own_heads, shared_heads = one_head ? heads_here : 1;
    int row_visits = visits(t.rows_q, ROWS, t.row_tiles, one_row);
    int key_visits = visits(t.seqlen_k, KEYS, t.key_tiles, one_key);
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) sum[n][c] = 0.0;
    int start = launch.part * launch.part_size, stop = min(start + launch.part_size, int(launch.parts));
    for (int turn = start; turn < stop; ++turn) {
        int key_visit = turn % key_visits, rest = turn / key_visits;
        int row_visit = rest % row_visits, head = rest / row_visits;
        uint h = launch.first_head * t.group + h_own + head % shared_heads;
        Sequence s = read_sequence(launch.first_batch + b_own + head / shared_heads);
        int i = (row_tile + row_visit * t.row_tiles) * int(ROWS), j = (key_tile + key_visit * t.key_tiles) * int(KEYS);
        if (i < s.n_q && j < s.n_k) add_tile(s, h, i, j);
    }
    uint at = h_own * t.dbias_head + b_own * t.dbias_batch + row_tile * t.row_tile + key_tile * t.key_tile;
    write_sums(at, row_tile * int(ROWS), key_tile * int(KEYS), one_row, one_key);
}
