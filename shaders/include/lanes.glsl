// Sums over the LANES neighbouring invocations that share a row; each of them gets the sum.

#ifdef SHUFFLE
float sum_lanes(float x) {
    [[unroll]] for (uint step = 1; step < LANES; step *= 2) x += subgroupShuffleXor(x, step);
    return x;
}
#endif
