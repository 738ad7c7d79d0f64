// The gradient of one score, from the row statistics of the forward pass.

layout(std430, binding = 6) readonly buffer Stats { vec2 stats_memory[]; };  // lse in log2 units, delta

// The factors of one pair: of dout_i in dv_j, of 1 in dbias, and of scale k_j in dq_i and scale q_i in dk_j.
struct Gradient {
    float p, ds, dt;
};

vec2 row_stats(Sequence s, Row row) { return stats_memory[lse_at(s, row.h) + row.line.i]; }

// Return the gradient of row and key j from <q_i, k_j> and <dout_i, v_j>: 0 for a masked pair, even if these are NaN.
Gradient differentiate(Sequence s, Row row, vec2 stats, int j, float product, float dp) {
    const Gradient none = Gradient(0.0, 0.0, 0.0);
    if (!row.used || j < row.begin || j >= row.end) return none;
    float tanh_value;
    float x = score(s, row.line, row.h, j, product, tanh_value);
    if (x <= SEEN) return none;
    float p = exp2(x - stats.x), keep = 1.0;
    if (has(DROPOUT)) keep = kept(dropout_words(s, row.line.i, row.h, j), j) ? t.keep_scale : 0.0;
    float ds = p * (keep * dp - stats.y);
    float dt = has(SOFTCAP) ? ds * (1.0 - tanh_value * tanh_value) : ds;
    if (has(FUNCTION) && dt != 0.0) {  // a derivative may be infinite or NaN where dt is 0
        precise float before = has(SOFTCAP) ? t.softcap * tanh_value : product * t.scale;
        dt *= score_slope(before, s.index, int(row.h), row.line.i, j);
    }
    return Gradient(p * keep, ds, dt);
}
