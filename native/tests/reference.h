// Attention as SEMANTICS defines it: every score of every row, in double, in loops.
#pragma once
#include <map>

#include "array.h"

// Where the rows and keys of sequence b are.
struct Place {
    Place(const anyattn_call &call, int64_t b);

    Index row(int64_t i, int64_t h) const { return {packed_q ? 0 : b, row0 + i, h, 0}; }
    Index key(int64_t j, int64_t h) const;
    bool sees(int64_t i, int64_t j) const;  // intervals alone, without lists, mask and bias
    bool selects(int64_t h_kv, int64_t i, int64_t j) const;  // true in a call without lists
    bool selects(int64_t j) const;                           // any row for any head

    const anyattn_call &call;
    int64_t b, n_q, n_k, leftpad, offset, row0, key0;
    bool packed_q;
};

// Expected contents of the result arrays, one entry per element, in the order of their dims; unused ones are 0.
struct Expected {
    std::vector<double> out, lse, dq, dk, dv, dbias, dsink, tout, tlse;
};

// Results of a pass (anyattn_pass), and out and lse.
Expected reference(const anyattn_call &call, int32_t pass);

// Compares what a pass wrote with the reference; prints the first difference. True if everything is near enough.
bool forward_matches(const anyattn_call &call);
bool backward_matches(const anyattn_call &call);
bool tangent_matches(const anyattn_call &call);
