// Rows of all query heads that read one KV head are packed: those of one query position lie next to each other.

struct Row {
    ScoreRow line;
    uint h;
    bool used;
    int begin, end;  // keys of its interval
};

Row make_row(Sequence s, int i, uint h, bool used) {
    return Row(score_row(s, i, h), h, used, key_begin(s, i), key_end(s, i));
}

// A packed row of [begin, end); outside, its neighbour inside, not used.
Row packed_row(Sequence s, uint h_kv, uint packed, uint begin, uint end) {
    uint inside = clamp(packed, begin, end - 1);
    return make_row(s, int(inside / t.group), h_kv * t.group + inside % t.group, packed == inside);
}

// Where the keys [j, j + KEYS) lie; those outside [begin, end) are not read: their neighbour inside is.
void find_keys(Sequence s, uint first, uint batch_stride, uint row_stride, int j, int begin, int end, out uint at[KEYS]) {
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        at[c] = key_at(s, first, batch_stride, row_stride, clamp(j + int(c), begin, end - 1)) + lane();
    }
}
