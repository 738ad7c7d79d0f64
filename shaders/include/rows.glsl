// Packed rows: the rows of all query heads of one KV head, with the rows of one query position next to each other.

struct Row {
    ScoreRow line;
    uint h;
    bool used;
    int begin, end;  // interval of visible keys
};

Row make_row(Sequence s, int i, uint h, bool used) {
    return Row(score_row(s, i, h), h, used, key_begin(s, i), key_end(s, i));
}

// Return a packed row of [begin, end). Rows outside become the nearest row inside, marked as not used.
Row packed_row(Sequence s, uint h_kv, uint packed, uint begin, uint end) {
    uint inside = clamp(packed, begin, end - 1);
    return make_row(s, int(inside / t.group), h_kv * t.group + inside % t.group, packed == inside);
}

// Return the address of a packed row in q, and in out and dout.
uint q_at(Sequence s, uint h_kv, uint packed) {
    uint h = h_kv * t.group + packed % t.group;
    return rows_at(s, h, t.q_head, t.q_batch, t.q_row) + packed / t.group * t.q_row;
}
uint out_at(Sequence s, uint h_kv, uint packed) {
    uint h = h_kv * t.group + packed % t.group;
    return rows_at(s, h, t.out_head, t.out_batch, t.out_row) + packed / t.group * t.out_row;
}

// Return whether a row may attend to key j.
bool sees(Sequence s, Row row, int j) {
    return row.used && j >= row.begin && j < row.end && mask_mod(s.index, int(row.h), row.line.i, j);
}

// The keys that packed rows see: at least one row [begin, end), every row [full_begin, full_end), and where steps start
// and stop. Steps begin at multiples of KEYS, as do the groups of dropout and the parts of split keys.
struct KeyRange {
    int begin, end, full_begin, full_end, start, stop;
};

KeyRange key_range(Sequence s, uint first, uint last) {
    int first_row = int(first / t.group), last_row = int(last / t.group);
    KeyRange r;
    r.begin = key_begin(s, first_row);
    r.end = key_end(s, last_row);
    r.full_begin = key_begin(s, last_row);
    r.full_end = key_end(s, first_row);
    r.start = r.begin / int(KEYS) * int(KEYS);
    r.stop = r.begin < r.end ? r.end : 0;
    if (has(SPLIT)) {
        int split = int(gl_WorkGroupID.z) * launch.part_size;
        r.start = max(r.start, split);
        r.stop = min(r.stop, split + launch.part_size);
    }
    return r;
}

bool key_inside(KeyRange r, int j) { return j >= r.begin && j < r.end; }

// Return the addresses of keys [j, j + KEYS). For keys outside [begin, end) it is the address of the nearest key
// inside.
void find_keys(Sequence s, uint first, uint batch_stride, uint row_stride, int j, int begin, int end, out uint at[KEYS]) {
    [[unroll]] for (uint c = 0; c < KEYS; ++c) {
        at[c] = key_at(s, first, batch_stride, row_stride, clamp(j + int(c), begin, end - 1)) + lane();
    }
}
