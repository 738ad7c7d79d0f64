// Dropout: Philox4x32 with 7 rounds (Salmon et al., SC 2011), one counter per row and 8 keys; see philox.py.

uvec4 philox(uvec4 counter) {
    uvec2 key = uvec2(t.seed_low, t.seed_high);
    [[unroll]] for (int round = 0; round < 7; ++round) {
        uint high0, low0, high1, low1;
        umulExtended(counter.x, 0xD2511F53u, high0, low0);
        umulExtended(counter.z, 0xCD9E8D57u, high1, low1);
        counter = uvec4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key += uvec2(0x9E3779B9u, 0xBB67AE85u);
    }
    return counter;
}

// Return the random words of row i of head h for the group of eight keys that contains j.
uvec4 dropout_words(Sequence s, int i, uint h, int j) {
    return philox(uvec4(uint(j) / 8u, uint(i), uint(s.index * t.nheads) + h, t.rng_offset));
}

// Return true if dropout keeps key j.
bool kept(uvec4 words, int j) {
    uint word = words[(uint(j) >> 1) & 3u];
    return ((j & 1) != 0 ? word >> 16 : word & 0xffffu) >= t.threshold;
}
