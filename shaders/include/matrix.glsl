// Cooperative matrices: tiles that a subgroup multiplies together, in shapes that the driver offers.

#ifdef BFLOAT
#define ELEMENT bfloat16_t
#else
#define ELEMENT float16_t
#endif

layout(constant_id = 8) const uint M = 16;
layout(constant_id = 9) const uint N = 16;
layout(constant_id = 10) const uint K = 16;
layout(constant_id = 11) const uint SUBGROUP = 32;

#define LEFT_TILE coopmat<ELEMENT, gl_ScopeSubgroup, M, K, gl_MatrixUseA>
#define RIGHT_TILE coopmat<ELEMENT, gl_ScopeSubgroup, K, N, gl_MatrixUseB>
#define SUM_TILE coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>
#define BY_ROWS gl_CooperativeMatrixLayoutRowMajor
#define BY_COLUMNS gl_CooperativeMatrixLayoutColumnMajor

const uint K_VECTORS = K / 4, N_VECTORS = N / 4;  // STORED lies in memory as vectors of four

float max_lanes(float x) {
    [[unroll]] for (uint step = 1; step < LANES; step *= 2) x = max(x, subgroupShuffleXor(x, step));
    return x;
}
