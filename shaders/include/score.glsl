// Compute the score in log2 units from the product <q_i, k_j>; UNSEEN for a masked pair.
#include "include/numbers.glsl"
#include "include/function.glsl"

layout(std430, binding = 7) readonly buffer Bias { uint bias_words[]; };
layout(std430, binding = 8) readonly buffer Mask { uint mask_words[]; };

const float UNSEEN = -3.0e38, SEEN = -1.0e38;  // a value above SEEN is a score
#define MINUS_INFINITY uintBitsToFloat(0xff800000u)

// The row of a score: query row, query head, ALiBi slope in log2 units, and the addresses of its rows in bias and mask.
struct ScoreRow {
    int i;
    float slope;
    uint bias, mask;
};

ScoreRow score_row(Sequence s, int i, uint h) {
    uint h0 = h - launch.first_head * t.group, b = s.index - launch.first_batch;
    float slope = has(ALIBI) ? heads[s.index * t.nheads + h].x * LOG2E : 0.0;
    return ScoreRow(i, slope, b * t.bias_batch + h0 * t.bias_head + i * t.bias_row,
                    b * t.mask_batch + h0 * t.mask_head + i * t.mask_row);
}

float bias_value(uint at) {
    return has(BIAS_16) ? load_half(bias_words[at >> 1], at) : uintBitsToFloat(bias_words[at]);
}

bool mask_value(uint at) { return (mask_words[at >> 2] >> (8u * (at & 3u)) & 0xffu) != 0u; }

// Return the score of a pair inside the row's interval. `tanh_value` becomes score / softcap.
float score(Sequence s, ScoreRow row, uint h, int j, float product, out float tanh_value) {
    precise float x = product * t.scale;  // `precise`: the same bits with every set of features
    tanh_value = 0.0;
    if (has(FUNCTION) && !mask_mod(s.index, int(h), row.i, j)) return UNSEEN;
    if (has(SOFTCAP)) {
        tanh_value = accurate_tanh(x / t.softcap);
        x = t.softcap * tanh_value;
    }
    if (has(FUNCTION)) x = score_mod(x, s.index, int(h), row.i, j);
    x *= LOG2E;
    if (has(BIAS)) {
        float bias = bias_value(row.bias + j * t.bias_key);
        x = bias == MINUS_INFINITY ? UNSEEN : x + bias * LOG2E;
    }
    if (has(ALIBI)) x -= row.slope * float(abs(row.i + s.offset - (j - s.leftpad)));
    if (has(MASK)) x = mask_value(row.mask + j * t.mask_key) ? x : UNSEEN;
    return x;
}
