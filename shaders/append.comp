#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// Append new keys or values to a KV cache, after the rotary embedding of their positions; one invocation per vector. A
// row of the sequence table holds: number of rows, first slot, position of row 0, whether the position grows with the
// row.
#include "include/tables.glsl"
#include "include/storage.glsl"

layout(std430, binding = 2) readonly buffer Source { STORED source_memory[]; };
layout(std430, binding = 3) buffer Target { STORED target_memory[]; };
layout(std430, binding = 4) readonly buffer Cos { float cosines[]; };
layout(std430, binding = 5) readonly buffer Sin { float sines[]; };

float element(uint at, uint x) { return load4(source_memory[at + x / 4])[x % 4]; }

// Return element x of the row at `at` after the rotary embedding.
float rotated(uint at, uint x, uint angles) {
    uint size = uint(t.rotary_dim) / 2;
    bool interleaved = t.interleaved != 0;
    uint pair = interleaved ? x / 2 : x % size;
    bool second = interleaved ? x % 2 == 1 : x >= size;
    float a = element(at, interleaved ? 2 * pair : pair), b = element(at, interleaved ? 2 * pair + 1 : pair + size);
    float c = cosines[angles + pair], s = sines[angles + pair];
    return second ? a * s + b * c : a * c - b * s;
}

void main() {
    uint h = unit_head(), b = unit_batch(), index = launch.first_block * WORKGROUP + gl_GlobalInvocationID.x;
    Sequence s = read_sequence(b);
    uint row = index / DIM, vector = index % DIM;
    if (row >= uint(s.n_q)) return;
    uint source = rows_at(s, h, t.q_head, t.q_batch, t.q_row) + row * t.q_row;
    uint target = key_at(s, keys_at(s, h, t.k_head, t.k_batch, t.k_row), t.k_batch, t.k_row, s.n_k + int(row)) + vector;
    if (4 * vector >= uint(t.rotary_dim)) {  // not rotated: copied bit by bit
        target_memory[target] = source_memory[source + vector];
        return;
    }
    uint angles = uint(s.leftpad + s.offset * int(row)) * (uint(t.rotary_dim) / 2);
    vec4 values;
    for (uint x = 0; x < 4; ++x) {
        uint column = 4 * vector + x;
        values[x] = column < uint(t.rotary_dim) ? rotated(source, column, angles) : element(source, column);
    }
    target_memory[target] = store4(values);
}
