// Vectors of four elements as stored: float32, or float16 and bfloat16 in pairs in 32-bit words.

#ifdef STORAGE_16
#define STORED uvec2

vec4 load4(uvec2 x) {
    if (BFLOAT16) return uintBitsToFloat(uvec4(x.x << 16, x.x & 0xffff0000u, x.y << 16, x.y & 0xffff0000u));
    return vec4(unpackHalf2x16(x.x), unpackHalf2x16(x.y));
}

// Round to nearest, ties to even; NaN stays NaN.
uint to_bfloat16(float x) {
    uint bits = floatBitsToUint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

uvec2 store4(vec4 x) {
    if (BFLOAT16) {
        return uvec2(to_bfloat16(x.x) | to_bfloat16(x.y) << 16, to_bfloat16(x.z) | to_bfloat16(x.w) << 16);
    }
    return uvec2(packHalf2x16(x.xy), packHalf2x16(x.zw));
}

float load_half(uint word, uint index) {
    uint bits = (index & 1u) != 0u ? word >> 16 : word & 0xffffu;
    return BFLOAT16 ? uintBitsToFloat(bits << 16) : unpackHalf2x16(bits).x;
}
#else
#define STORED vec4

vec4 load4(vec4 x) { return x; }
vec4 store4(vec4 x) { return x; }
float load_half(uint word, uint index) { return 0.0; }
#endif
