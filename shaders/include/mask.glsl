// The keys that a row may see form one interval. See the class Mask; floor_div rounds down for negative positions.

int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Return the first key slot that row i may see.
int key_begin(Sequence s, int i) {
    int p = i + s.offset, c = 0;
    if (has(LEFT)) c = max(c, p - t.left);
    if (has(CHUNK)) c = max(c, t.chunk * floor_div(p, t.chunk));
    return s.leftpad + c;
}

// Return one past the last such slot; not above key_begin if the row sees no key.
int key_end(Sequence s, int i) {
    int p = i + s.offset, end = s.n_k;
    if (has(RIGHT)) end = min(end, s.leftpad + p + t.right + 1);
    if (has(CHUNK)) end = min(end, s.leftpad + t.chunk * (floor_div(p, t.chunk) + 1));
    return end;
}

// Return the first row that may see key slot j, and one past the last.
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
