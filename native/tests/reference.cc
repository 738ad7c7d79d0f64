#include "reference.h"

#include <cmath>
#include <cstdio>

#include "fixture.h"

namespace {

int64_t floor_division(int64_t a, int64_t b) { return static_cast<int64_t>(std::floor(double(a) / double(b))); }

bool keeps(const anyattn_call &call, int64_t b, int64_t h, int64_t i, int64_t j) {
    if (!call.dropout_threshold) return true;
    i += call.query_start;
    j += call.key_start;
    uint32_t c[4] = {uint32_t(j / 8), uint32_t(i), uint32_t(b * call.nheads + h), uint32_t(call.rng_state[1])};
    uint32_t key[2] = {uint32_t(call.rng_state[0]), uint32_t(call.rng_state[0] >> 32)};
    for (int round = 0; round < 7; ++round) {
        const uint64_t x = uint64_t(0xD2511F53) * c[0], y = uint64_t(0xCD9E8D57) * c[2];
        const uint32_t next[4] = {uint32_t(y >> 32) ^ c[1] ^ key[0], uint32_t(y), uint32_t(x >> 32) ^ c[3] ^ key[1],
                                  uint32_t(x)};
        std::memcpy(c, next, sizeof c);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    const uint32_t half = c[j % 8 / 2] >> (j % 2 * 16) & 0xffff;
    return half >= call.dropout_threshold;
}

// One row of scores and what follows from it.
struct Row {
    std::vector<double> t, p;  // capped scores, probabilities (0 where not seen)
    double lse;
};

double dot(const anyattn_array &x, Index i, const anyattn_array &y, Index j, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
        i.d = j.d = d;
        sum += get(x, i) * get(y, j);
    }
    return sum;
}

Row row_of(const Place &place, int64_t h, int64_t i) {
    const anyattn_call &call = place.call;
    const int64_t h_kv = h / (call.nheads / call.nheads_kv), b = place.b;
    const double none = -std::numeric_limits<double>::infinity();
    Row row{std::vector<double>(size_t(place.n_k)), std::vector<double>(size_t(place.n_k), none), none};
    double top = call.sink.data ? get(call.sink, {h, 0, 0, 0}) : none;
    for (int64_t j = 0; j < place.n_k; ++j) {
        if (!place.sees(i, j) || !place.selects(h_kv, i, j) || (call.mask.data && get(call.mask, {b, h, i, j}) == 0))
            continue;
        double t = call.scale * dot(call.q, place.row(i, h), call.k, place.key(j, h_kv), call.head_dim);
        if (call.softcap > 0) t = call.softcap * std::tanh(t / call.softcap);
        double s = t;
        if (call.bias.data) s += get(call.bias, {b, h, i, j});
        const double distance = std::abs(double(i + place.offset - (j - place.leftpad)));
        if (call.alibi_slopes.data) s -= get(call.alibi_slopes, {b, h, 0, 0}) * distance;
        row.t[size_t(j)] = t;
        row.p[size_t(j)] = s;
        top = std::max(top, s);
    }
    double sum = call.sink.data ? std::exp(get(call.sink, {h, 0, 0, 0}) - top) : 0;
    for (double s : row.p) sum += s == none ? 0 : std::exp(s - top);
    if (sum > 0) row.lse = top + std::log(sum);
    for (double &s : row.p) s = s == none ? 0 : std::exp(s - row.lse);
    return row;
}

size_t flat(Index i, Index dims) { return size_t(((i.a * dims.b + i.b) * dims.c + i.c) * dims.d + i.d); }
size_t count(Index dims) { return size_t(dims.a * dims.b * dims.c * dims.d); }

// The element of dbias that holds the sum over the axes that are broadcast.
Index owned(const anyattn_call &call, Index i) {
    const int64_t *s = call.dbias.stride;
    return {s[0] ? i.a : 0, s[1] ? i.b : 0, s[2] ? i.c : 0, s[3] ? i.d : 0};
}

struct Sums {
    const anyattn_call &call;
    Index q, k, out, v, lse, bias;
    Expected result;

    explicit Sums(const anyattn_call &c)
        : call(c),
          q(dims_q(c, c.head_dim)),
          k(dims_k(c, c.head_dim)),
          out(dims_q(c, c.head_dim_v)),
          v(dims_k(c, c.head_dim_v)),
          lse{out.a, out.c, out.b, 1},
          bias{c.batch, c.nheads, c.seqlen_q, c.seqlen_k} {
        const double start = c.flags & ANYATTN_ACCUMULATE ? 1 : 0;
        result.out.resize(count(out));
        result.lse.assign(count(lse), -std::numeric_limits<double>::infinity());
        result.dq.assign(count(q), start);
        result.dk.assign(count(k), start);
        result.dv.assign(count(v), start);
        result.dbias.resize(c.bias.data ? count(bias) : 0);
        result.dsink.resize(size_t(c.nheads));
        result.tout.resize(count(out));
        result.tlse.resize(count(lse));
    }

    void add_forward(const Place &place, int64_t h, int64_t i, const Row &row) {
        const double kept = 1 / (1 - call.dropout_threshold / 65536.0);
        const int64_t h_kv = h / (call.nheads / call.nheads_kv);
        Index at = place.row(i, h);
        result.lse[flat({at.a, h, at.b, 0}, lse)] = row.lse;
        for (int64_t j = 0; j < place.n_k; ++j) {
            const double p = row.p[size_t(j)];
            if (p == 0 || !keeps(call, place.b, h, i, j)) continue;
            for (int64_t d = 0; d < call.head_dim_v; ++d) {
                Index key = place.key(j, h_kv);
                at.d = key.d = d;
                result.out[flat(at, out)] += p * kept * get(call.v, key);
            }
        }
    }

    void add_backward(const Place &place, int64_t h, int64_t i, const Row &row) {
        const double kept = 1 / (1 - call.dropout_threshold / 65536.0);
        const int64_t h_kv = h / (call.nheads / call.nheads_kv);
        const Index at = place.row(i, h);
        double delta = call.dlse.data ? -get(call.dlse, {at.a, h, at.b, 0}) : 0;
        for (int64_t d = 0; d < call.head_dim_v; ++d) {
            const Index e = {at.a, at.b, at.c, d};
            delta += get(call.dout, e) * result.out[flat(e, out)];
        }
        if (call.sink.data) result.dsink[size_t(h)] -= std::exp(get(call.sink, {h, 0, 0, 0}) - row.lse) * delta;
        for (int64_t j = 0; j < place.n_k; ++j) {
            const double p = row.p[size_t(j)], t = row.t[size_t(j)];
            if (p == 0) continue;
            const double keep = keeps(call, place.b, h, i, j) ? kept : 0;
            const Index key = place.key(j, h_kv);
            const double dp = keep * dot(call.dout, at, call.v, key, call.head_dim_v), ds = p * (dp - delta);
            if (call.bias.data) result.dbias[flat(owned(call, {place.b, h, i, j}), bias)] += ds;
            const double dt = call.softcap > 0 ? ds * (1 - (t / call.softcap) * (t / call.softcap)) : ds;
            add_products(at, key, dt * call.scale, p * keep);
        }
    }

    double tangent_of_score(const Place &place, int64_t h, int64_t i, int64_t j, double t) const {
        const Index at = place.row(i, h), key = place.key(j, h / (call.nheads / call.nheads_kv));
        double u = 0;
        if (call.tq.data) u += call.scale * dot(call.tq, at, call.k, key, call.head_dim);
        if (call.tk.data) u += call.scale * dot(call.q, at, call.tk, key, call.head_dim);
        if (call.softcap > 0) u *= 1 - (t / call.softcap) * (t / call.softcap);
        return call.tbias.data ? u + get(call.tbias, {place.b, h, i, j}) : u;
    }

    void add_tangent(const Place &place, int64_t h, int64_t i, const Row &row) {
        const double kept = 1 / (1 - call.dropout_threshold / 65536.0);
        const Index at = place.row(i, h);
        double sum = 0;
        if (call.tsink.data) {
            sum = std::exp(get(call.sink, {h, 0, 0, 0}) - row.lse) * get(call.tsink, {h, 0, 0, 0});
        }
        for (int64_t j = 0; j < place.n_k; ++j) {
            const double p = row.p[size_t(j)];
            if (p == 0) continue;
            const double u = tangent_of_score(place, h, i, j, row.t[size_t(j)]);
            sum += p * u;
            if (!keeps(call, place.b, h, i, j)) continue;
            Index to = at, key = place.key(j, h / (call.nheads / call.nheads_kv));
            for (int64_t d = 0; d < call.head_dim_v; ++d) {
                to.d = key.d = d;
                const double v = u * get(call.v, key) + (call.tv.data ? get(call.tv, key) : 0);
                result.tout[flat(to, out)] += p * kept * v;
            }
        }
        result.tlse[flat({at.a, h, at.b, 0}, lse)] = sum;
        for (int64_t d = 0; d < call.head_dim_v; ++d) {
            const size_t n = flat({at.a, at.b, at.c, d}, out);
            result.tout[n] -= sum * result.out[n];
        }
    }

    void add_products(Index at, Index key, double dt, double p) {
        for (int64_t d = 0; d < call.head_dim; ++d) {
            at.d = key.d = d;
            result.dq[flat(at, q)] += dt * get(call.k, key);
            result.dk[flat(key, k)] += dt * get(call.q, at);
        }
        for (int64_t d = 0; d < call.head_dim_v; ++d) {
            at.d = key.d = d;
            result.dv[flat(key, v)] += p * get(call.dout, at);
        }
    }
};

double tolerance(int32_t dtype, bool backward) {
    const double eps = dtype == ANYATTN_FLOAT64   ? 1e-12
                       : dtype == ANYATTN_FLOAT32 ? 1e-5
                       : dtype == ANYATTN_FLOAT16 ? 2e-3
                                                  : 1.6e-2;
    return backward ? 4 * eps : eps;
}

bool compare(const char *name, const anyattn_array &array, Index dims, const std::vector<double> &want, double tol) {
    double scale = 1;
    for (double x : want) scale = std::isfinite(x) ? std::max(scale, std::abs(x)) : scale;
    for (int64_t a = 0; a < dims.a; ++a)
        for (int64_t b = 0; b < dims.b; ++b)
            for (int64_t c = 0; c < dims.c; ++c)
                for (int64_t d = 0; d < dims.d; ++d) {
                    const double x = get(array, {a, b, c, d}), y = want[flat({a, b, c, d}, dims)];
                    if (x == y || std::abs(x - y) <= tol * scale) continue;
                    std::printf("  %s[%lld, %lld, %lld, %lld] is %.9g, expected %.9g\n", name, (long long)a,
                                (long long)b, (long long)c, (long long)d, x, y);
                    return false;
                }
    return true;
}

}  // namespace

Place::Place(const anyattn_call &c, int64_t index)
    : call(c),
      b(index),
      n_q(c.seqlen_q),
      n_k(c.seqlen_k),
      leftpad(0),
      offset(0),
      row0(0),
      key0(0),
      packed_q(c.cu_seqlens_q != nullptr) {
    if (call.cu_seqlens_q) {
        row0 = call.cu_seqlens_q[b];
        n_q = call.cu_seqlens_q[b + 1] - row0;
    }
    if (call.cu_seqlens_k) {
        key0 = call.cu_seqlens_k[b];
        n_k = call.cu_seqlens_k[b + 1] - key0;
    }
    if (call.seqused_q) n_q = call.seqused_q[b];
    if (call.seqused_k) n_k = call.seqused_k[b];
    if (call.leftpad_k) leftpad = call.leftpad_k[b];
    if (!(call.flags & ANYATTN_TOP_LEFT)) offset = n_k - leftpad - n_q;
    if (call.offset) offset = call.offset[b];
}

Index Place::key(int64_t j, int64_t h) const {
    if (call.block_table) {
        return {call.block_table[b * call.max_pages + j / call.page_size], j % call.page_size, h, 0};
    }
    if (call.cu_seqlens_k) return {0, key0 + j, h, 0};
    return {call.cache_batch_idx ? call.cache_batch_idx[b] : b, j, h, 0};
}

bool Place::sees(int64_t i, int64_t j) const {
    const int64_t p = i + offset, c = j - leftpad;
    if (c < 0 || j >= n_k) return false;
    if ((call.flags & ANYATTN_HAS_LEFT) && c < p - call.left) return false;
    if ((call.flags & ANYATTN_HAS_RIGHT) && c > p + call.right) return false;
    return call.chunk == 0 || floor_division(p, call.chunk) == floor_division(c, call.chunk);
}

bool Place::selects(int64_t h_kv, int64_t i, int64_t j) const {
    const Index at = row(i, 0);
    for (int64_t entry = 0; entry < call.num_indices; ++entry) {
        if (get(call.kv_indices, {at.a, h_kv, at.b, entry}) == double(j)) return true;
    }
    return !(call.flags & ANYATTN_HAS_KV_INDICES);
}

bool Place::selects(int64_t j) const {
    for (int64_t h = 0; h < call.nheads_kv; ++h) {
        for (int64_t i = 0; i < n_q; ++i) {
            if (selects(h, i, j)) return true;
        }
    }
    return !(call.flags & ANYATTN_HAS_KV_INDICES);
}

Expected reference(const anyattn_call &call, int32_t pass) {
    Sums sums(call);
    for (int64_t b = 0; b < call.batch; ++b) {
        const Place place(call, b);
        for (int64_t h = 0; h < call.nheads; ++h) {
            for (int64_t i = 0; i < place.n_q; ++i) {
                const Row row = row_of(place, h, i);
                sums.add_forward(place, h, i, row);
                if (pass == ANYATTN_BACKWARD) sums.add_backward(place, h, i, row);
                if (pass == ANYATTN_TANGENT) sums.add_tangent(place, h, i, row);
            }
        }
    }
    return sums.result;
}

bool forward_matches(const anyattn_call &call) {
    const Expected want = reference(call, ANYATTN_FORWARD);
    const Index out = dims_q(call, call.head_dim_v);
    const double tol = tolerance(call.q.dtype, false);
    // Statistics are float32 even where the arrays are not.
    const double tol_lse = call.q.dtype == ANYATTN_FLOAT64 ? tol : 1e-5;
    return compare("out", call.out, out, want.out, tol) &&
           (!call.lse.data || compare("lse", call.lse, {out.a, out.c, out.b, 1}, want.lse, tol_lse));
}

bool backward_matches(const anyattn_call &call) {
    const Expected want = reference(call, ANYATTN_BACKWARD);
    const double tol = tolerance(call.q.dtype, true);
    Index bias = {call.batch, call.nheads, call.seqlen_q, call.seqlen_k};
    std::vector<double> dbias = want.dbias;
    // What was summed into the first entry of an axis is the value of all its entries.
    for (size_t n = 0; call.dbias.data && n < dbias.size(); ++n) {
        const int64_t i = int64_t(n);
        const Index at = {i / bias.d / bias.c / bias.b, i / bias.d / bias.c % bias.b, i / bias.d % bias.c, i % bias.d};
        dbias[n] = want.dbias[flat(owned(call, at), bias)];
    }
    return compare("dq", call.dq, dims_q(call, call.head_dim), want.dq, tol) &&
           compare("dk", call.dk, dims_k(call, call.head_dim), want.dk, tol) &&
           compare("dv", call.dv, dims_k(call, call.head_dim_v), want.dv, tol) &&
           (!call.dbias.data || compare("dbias", call.dbias, bias, dbias, tol)) &&
           (!call.dsink.data || compare("dsink", call.dsink, {call.nheads, 1, 1, 1}, want.dsink, tol));
}

bool tangent_matches(const anyattn_call &call) {
    const Expected want = reference(call, ANYATTN_TANGENT);
    const Index out = dims_q(call, call.head_dim_v);
    const double tol = tolerance(call.q.dtype, true), tol_lse = call.q.dtype == ANYATTN_FLOAT64 ? tol : 4e-5;
    return compare("tout", call.tout, out, want.tout, tol) &&
           compare("tlse", call.tlse, {out.a, out.c, out.b, 1}, want.tlse, tol_lse);
}
