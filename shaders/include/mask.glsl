// Which keys a row may see: one interval per row. See docs of Mask; floor_div rounds down for negative positions.

int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// First key slot that row i may see.
int key_begin(Sequence s, int i) {
    int p = i + s.offset, c = 0;
    if (has(LEFT)) c = max(c, p - t.left);
    if (has(CHUNK)) c = max(c, t.chunk * floor_div(p, t.chunk));
    return s.leftpad + c;
}

// One past the last; at or before key_begin where the row sees none.
int key_end(Sequence s, int i) {
    int p = i + s.offset, end = s.n_k;
    if (has(RIGHT)) end = min(end, s.leftpad + p + t.right + 1);
    if (has(CHUNK)) end = min(end, s.leftpad + t.chunk * (floor_div(p, t.chunk) + 1));
    return end;
}

// First row that may see key slot j, and one past the last.
int row_begin(Sequence s, int j) {
    int c = j - s.leftpad, begin = 0;
    if (has(RIGHT)) begin = max(begin, c - t.right - s.offset);
    if (has(CHUNK)) begin = max(begin, t.chunk * floor_div(c, t.chunk) - s.offset);
    return begin;
}
int row_end(Sequence s, int j) {
    int c = j - s.leftpad, end = s.n_q;
    if (has(LEFT)) end = min(end, c + t.left + 1 - s.offset);
    if (has(CHUNK)) end = min(end, t.chunk * (floor_div(c, t.chunk) + 1) - s.offset);
    return end;
}
