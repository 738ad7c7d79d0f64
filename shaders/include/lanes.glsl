// LANES adjacent invocations share a row or a key: each holds every LANES-th vector of it.

const uint OWN = DIM / LANES, OWN_V = DIM_V / LANES;  // vectors of one invocation
const uint SLOTS = WORKGROUP / LANES;                 // rows or keys that are computed side by side

uint lane() { return gl_LocalInvocationID.x % LANES; }
uint slot() { return gl_LocalInvocationID.x / LANES; }

float sum4(vec4 x) { return (x.x + x.y) + (x.z + x.w); }

#ifdef SHUFFLE
const bool ALONE = true;  // the lanes of a row or a key may skip work without the rest of the workgroup
float sum_lanes(float x) {
    [[unroll]] for (uint step = 1; step < LANES; step *= 2) x += subgroupShuffleXor(x, step);
    return x;
}
#else
const bool ALONE = LANES == 1;
shared float sums[LANES == 1 ? 1 : WORKGROUP * ROWS * KEYS];
#endif

// Sum over the lanes; every lane gets the result. All invocations of a workgroup must call it together.
void sum_lanes(vec4 x[ROWS][KEYS], out float total[ROWS][KEYS]) {
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) total[n][c] = sum4(x[n][c]);
    if (LANES == 1) return;
#ifdef SHUFFLE
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) total[n][c] = sum_lanes(total[n][c]);
#else
    uint own = gl_LocalInvocationID.x, first = own - lane();
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        sums[(n * KEYS + c) * WORKGROUP + own] = total[n][c];
    }
    barrier();
    [[unroll]] for (uint n = 0; n < ROWS; ++n) [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        float sum = 0.0;
        [[unroll]] for (uint other = 0; other < LANES; ++other) sum += sums[(n * KEYS + c) * WORKGROUP + first + other];
        total[n][c] = sum;
    }
    barrier();
#endif
}
