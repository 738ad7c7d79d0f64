#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// Compute the row statistics that the backward pass reads: lse in log2 units and delta = <dout, out> - dlse; with SINK
// also the row's term of the sink's gradient, -exp(sink - lse) delta. One invocation per packed row.
#include "include/tables.glsl"
#include "include/storage.glsl"
#include "include/lanes.glsl"
#include "include/mask.glsl"
#include "include/score.glsl"
#include "include/rows.glsl"

layout(std430, binding = 2) readonly buffer Out { STORED out_memory[]; };
layout(std430, binding = 5) readonly buffer Dout { STORED dout_memory[]; };
layout(std430, binding = 6) readonly buffer Lse { float lse_memory[]; };
layout(std430, binding = 9) readonly buffer Dlse { float dlse_memory[]; };
layout(std430, binding = 10) writeonly buffer Stats { vec2 stats_memory[]; };
layout(std430, binding = 11) writeonly buffer SinkTerms { float sink_terms[]; };

void main() {
    Sequence s = read_sequence(unit_batch());
    uint packed = (launch.first_block + gl_WorkGroupID.x) * WORKGROUP + gl_LocalInvocationID.x;
    uint count = uint(s.n_q * t.group);
    if (packed >= count) return;
    Row row = packed_row(s, unit_head(), packed, 0, count);
    uint at = rows_at(s, row.h, t.out_head, t.out_batch, t.out_row) + row.line.i * t.out_row;
    vec4 sum = vec4(0);
    [[dont_unroll]] for (uint x = 0; x < DIM_V; ++x) {
        sum = fma(load4(dout_memory[at + x]), load4(out_memory[at + x]), sum);
    }
    float delta = sum4(sum);
    uint to = lse_at(s, row.h) + row.line.i;
    if (has(DLSE)) delta -= dlse_memory[to];
    float lse = lse_memory[to];
    stats_memory[to] = vec2(lse * LOG2E, delta);
    if (has(SINK)) {
        float sink = heads[s.index * t.nheads + row.h].y;
        sink_terms[to] = sink > MINUS_INFINITY ? -exp2(min(sink - lse, 0.0) * LOG2E) * delta : 0.0;
    }
}
