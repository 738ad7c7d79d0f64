#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// Combine the partial results of split keys: out = sum w out_s / sum w with w = exp(lse_s - max lse).
// One invocation per vector of out.
#include "include/tables.glsl"
#include "include/storage.glsl"

layout(std430, binding = 5) writeonly buffer Out { STORED out_memory[]; };
layout(std430, binding = 6) writeonly buffer Lse { float lse_memory[]; };
layout(std430, binding = 9) readonly buffer Partial { vec4 partial_memory[]; };
layout(std430, binding = 10) readonly buffer PartialLse { float partial_lse[]; };

#define MINUS_INFINITY uintBitsToFloat(0xff800000u)

void main() {
    Sequence s = read_sequence(unit_batch());
    uint index = launch.first_block * WORKGROUP + gl_GlobalInvocationID.x;
    uint packed = index / DIM_V, x = index % DIM_V, h = unit_head() * t.group + packed % t.group;
    uint i = packed / t.group;
    if (i >= uint(s.n_q)) return;
    uint lse_index = lse_at(s, h) + i;
    float top = MINUS_INFINITY;
    for (uint split = 0; split < launch.parts; ++split) {
        top = max(top, partial_lse[lse_index + split * t.partial_lse_split]);
    }
    uint at = rows_at(s, h, t.out_head, t.out_batch, t.out_row) + i * t.out_row + x;
    float total = 0.0;
    vec4 sum = vec4(0);
    for (uint split = 0; split < launch.parts; ++split) {
        float lse = partial_lse[lse_index + split * t.partial_lse_split];
        if (lse == MINUS_INFINITY) continue;
        float weight = exp(lse - top);
        total += weight;
        sum = fma(vec4(weight), partial_memory[at + split * t.partial_split], sum);
    }
    out_memory[at] = store4(total == 0.0 ? vec4(0) : sum / total);
    if (x == 0) lse_memory[lse_index] = total == 0.0 ? MINUS_INFINITY : top + log(total);
}
