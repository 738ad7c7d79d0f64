#version 450
#extension GL_GOOGLE_include_directive : require
// Round launch.parts vectors of float32 to the stored dtype.
#include "include/tables.glsl"
#include "include/storage.glsl"

layout(std430, binding = 10) readonly buffer From { vec4 from[]; };
layout(std430, binding = 11) writeonly buffer To { STORED to[]; };

void main() {
    uint index = (launch.first_block + gl_WorkGroupID.x) * WORKGROUP + gl_LocalInvocationID.x;
    if (index < launch.parts) to[index] = store4(from[index]);
}
