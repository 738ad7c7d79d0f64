#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// sums[o] += its terms [part * part_size, (part + 1) * part_size) of launch.parts, in float32 and in a fixed order.
// One workgroup per sum, starting at launch.first_head.
#include "include/tables.glsl"

layout(std430, binding = 10) readonly buffer Terms { float terms[]; };
layout(std430, binding = 11) buffer Sums { float sums[]; };

shared float own[WORKGROUP];

void main() {
    uint index = launch.first_block + gl_WorkGroupID.x, id = gl_LocalInvocationID.x;
    uint start = uint(launch.part * launch.part_size), stop = min(start + uint(launch.part_size), launch.parts);
    float sum = 0.0;
    for (uint x = start + id; x < stop; x += WORKGROUP) sum += terms[index * launch.parts + x];
    own[id] = sum;
    barrier();
    [[unroll]] for (uint half_size = WORKGROUP / 2; half_size > 0; half_size /= 2) {
        if (id < half_size) own[id] += own[id + half_size];
        barrier();
    }
    if (id == 0) sums[launch.first_head + index] += own[0];
}
