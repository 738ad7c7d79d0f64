// From the products of a tile to scores: softcap, bias, mask, ALiBi and the interval that each row may see.
#pragma once
#include "mma.inl.h"
#include "philox.inl.h"
#include "score_program.h"

namespace anyattn {
namespace {

// The units of what a score tile holds. Products stay as they are unless something but a mask acts on scores: only
// differences of scores are scaled, so equal scores have equal weights whatever their size.
template <class C>
struct ScoreUnits {
    bool scored;    // a softcap, slopes or a bias turn products into scores in natural units
    double unit;    // natural units of an entry
    C product;      // what score_pass multiplies a product by
    C factor;       // of differences of entries, for exponents of 2; positive, so that hidden keys stay at -inf

    // factor_left: what products must be multiplied by, see Plain::score_factor.
    ScoreUnits(const anyattn_call &call, double factor_left) {
        scored = call.softcap > 0 || call.alibi_slopes.data || call.bias.data || has_score_function(call);
        const double smallest = sizeof(C) == 4 ? double(__FLT_MIN__) : __DBL_MIN__;
        const double largest = sizeof(C) == 4 ? double(__FLT_MAX__) : __DBL_MAX__;
        // A smaller scale gives every score the value 0 anyway. lse and P must have one unit, see RowStatistics.
        unit = scored ? 1.0 : factor_left < smallest ? smallest : factor_left;
        product = C(scored ? factor_left : 1.0);
        const double log2_unit = unit * kLog2e;
        factor = C(log2_unit > largest ? largest : log2_unit);
    }
};

// Query rows of one sequence that are computed together, and what turns products into scores there. Row r of the block
// is row i0 + r % per_head of head h + r / per_head; several heads share their keys.
// Panels of P rows are computed at once: a score tile has P lanes for each key.
template <class Compute, int P>
struct ScoreBlock {
    using C = Compute;
    const anyattn_call &call;
    Sequence s;
    int64_t h, h_kv, i0;
    int per_head, rows, panels;
    const int32_t *slots = nullptr;  // of the keys that the one row selects, in ascending order; null: key j is slot j
    int64_t begin, end;  // keys that any of the rows may see
    ScoreUnits<C> units;
    C cap;  // 0: off
    bool sloped;
    alignas(64) C slope[kBlockQ], place[kBlockQ];  // of each row; place: r % per_head

    ScoreBlock(const anyattn_call &a, const QueryBlock &q, double factor_left)
        : call(a), s(sequence(a, q.b)), h(q.h), h_kv(q.h / (a.nheads / a.nheads_kv)), i0(q.i0), units(a, factor_left) {
        per_head = (int)q.rows;
        rows = (int)(q.heads * q.rows);
        panels = (rows + P - 1) / P;
        begin = key_begin(call, s, i0);
        end = key_end(call, s, i0 + per_head - 1);
        if (has_key_lists(call)) {
            const int32_t *list = key_list(call, s, h_kv, i0);
            begin = 0;
            end = list[0];
            slots = list + 1;
        }
        // Limits that leave tanh's argument and its product finite in float.
        const double limited = call.softcap < 1e-30 ? 1e-30 : call.softcap > 1e30 ? 1e30 : call.softcap;
        cap = call.softcap > 0 ? C(limited) : 0;
        sloped = call.alibi_slopes.data;
        if (sloped) set_slopes();
    }

    void set_slopes() {
        for (int r = 0; r < kBlockQ; ++r) {
            const bool first = r % per_head == 0, used = r < rows;
            place[r] = C(r % per_head);
            slope[r] = !used ? C(0) : !first ? slope[r - 1] : head_value(call.alibi_slopes, s.index, head(r));
        }
    }

    int64_t head(int r) const { return h + r / per_head; }
    int64_t row(int r) const { return i0 + r % per_head; }
    int64_t slot(int64_t j) const { return slots ? slots[j] : j; }
    // First key at or behind a slot. No std::lower_bound: it would be shared with other instruction sets.
    int64_t key_at(int64_t slot) const {
        if (!slots) return min64(max64(slot, begin), end);
        int64_t low = 0, high = end;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (slots[middle] < slot) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
    // The keys or values that the rows see, by their numbers here.
    KeyRows keys(const anyattn_array &array) const {
        KeyRows rows = key_rows(array, call, s, h_kv);
        rows.slots = slots;
        return rows;
    }
    // body(i, slot, count) for runs of neighbouring slots among keys [j, j + n): the first of a run is key j + i.
    template <class Body>
    ANYATTN_INLINE void for_runs(int64_t j, int64_t n, const Body &body) const {
        if (!slots) return body(0, j, n);
        for (int64_t i = 0, next = 0; i < n; i = next) {
            for (next = i + 1; next < n && slots[j + next] == slots[j + next - 1] + 1;) ++next;
            body(i, slot(j + i), next - i);
        }
    }

    static C head_value(const anyattn_array &array, int64_t i, int64_t j) {
        const int64_t at = i * array.stride[0] + j * array.stride[1];
        return load_scalar<C>(static_cast<char *>(array.data) + at * dtype_size(array.dtype), array.dtype);
    }
    // The entry of row r and a key slot in a bias or mask.
    const char *element(const anyattn_array &array, int r, int64_t slot) const {
        const int64_t at =
            s.index * array.stride[0] + head(r) * array.stride[1] + row(r) * array.stride[2] + slot * array.stride[3];
        return static_cast<const char *>(array.data) + at * dtype_size(array.dtype);
    }
    // Sink logit of row r, natural units; -inf: none.
    C sink(int r) const { return call.sink.data ? head_value(call.sink, head(r), 0) : -infinity(C()); }

    // The rows of a block of one head, or of one row.
    StridedRows strided(const anyattn_array &array) const {
        StridedRows result = query_rows(array, call, s, h, i0);
        if (per_head != rows) result.stride = array.stride[2] * dtype_size(array.dtype);
        return result;
    }

    // Their values in lse or dlse.
    StridedRows strided_values(const anyattn_array &array) const {
        StridedRows result = row_values(array, call, s, h, i0);
        if (per_head != rows) result.stride = array.stride[1] * dtype_size(array.dtype);
        return result;
    }

    // The block's rows of q, out, dout or dq.
    RowTable table(const anyattn_array &array) const {
        RowTable result;
        result.dtype = array.dtype;
        for (int r = 0; r < rows; r += per_head) {
            const StridedRows of_head = query_rows(array, call, s, head(r), i0);
            for (int i = 0; i < per_head; ++i) result.row[r + i] = of_head.row(i);
        }
        return result;
    }

    int panel_rows(int p) const { return (int)min64(P, rows - p * P); }
    int panel_vectors(int p) const { return vectors_of<C>(panel_rows(p)); }
    // The first and last row of their sequence among those of a panel.
    int64_t first_row(int p) const { return rows == per_head ? i0 + p * P : i0; }
    int64_t last_row(int p) const { return rows == per_head ? first_row(p) + panel_rows(p) - 1 : i0 + per_head - 1; }
    // Keys of a panel's rows inside [j0, j1), from a distance to j0 on that is a multiple of `step`.
    int64_t panel_begin(int p, int64_t j0, int64_t step) const {
        if (slots) return j0;
        const int64_t first = key_begin(call, s, first_row(p));
        return first <= j0 ? j0 : j0 + (first - j0) / step * step;
    }
    int64_t panel_end(int p, int64_t j1) const { return min64(j1, slots ? end : key_end(call, s, last_row(p))); }
    // Whether some row of the panel may not see some key of [j0, j1).
    bool edge(int p, int64_t j0, int64_t j1) const {
        if (slots) return false;
        return j0 < key_begin(call, s, last_row(p)) || j1 > key_end(call, s, first_row(p));
    }
};

// The blocks of the products M.
template <class M>
using Block = ScoreBlock<typename M::C, M::panel>;

// The tile of keys [j, end) of `heads` heads.
inline TileAhead next_tile(const anyattn_call &call, const KeyRows *k, const KeyRows *v, int64_t heads, int64_t j,
                           int64_t end) {
    return {{k, heads, j, end, call.head_dim * dtype_size(k->rows.dtype)},
            {v, heads, j, end, call.head_dim_v * dtype_size(v->rows.dtype)}};
}

// The rows of panel p in a bias and a mask. The products of the keys [j, j + n) fetch their elements: the processor's own
// prefetcher does not follow many short rows. Elements of a mask are fetched for the next n keys, because what the mask
// does to a tile is known before its products.
struct AddedAhead {
    KeyRows bias{}, mask{};

    template <class C, int P>
    AddedAhead(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, TileAhead &ahead) {
        const anyattn_call &call = block.call;
        if (block.slots || block.rows != block.per_head) return;
        ahead.bias = fetch(bias, block, p, call.bias, j, n);
        ahead.mask = fetch(mask, block, p, call.mask, j + n, min64(n, block.end - j - n));
    }

  private:
    template <class C, int P>
    static Ahead fetch(KeyRows &rows, const ScoreBlock<C, P> &block, int p, const anyattn_array &array, int64_t j,
                       int64_t n) {
        if (!array.data || !array.stride[2] || !array.stride[3] || n <= 0) return {};
        const int64_t size = dtype_size(array.dtype);
        rows.rows = {const_cast<char *>(block.element(array, p * P, j)), array.stride[2] * size, array.dtype};
        return {&rows, 1, 0, block.panel_rows(p), n * size};
    }
};

// Stores added[key][lane] from an array of (row, slot) for slots [j, j + n) of panel p. Stores merge(new, old).
template <class C, int P, class Merge>
ANYATTN_INLINE void spread(C *added, const ScoreBlock<C, P> &block, int p, const anyattn_array &array, int64_t j,
                           int64_t n, const Merge &merge) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int64_t size = dtype_size(array.dtype);
    const int count = block.panel_rows(p);
    const char *rows[P];
    for (int x = 0; x < count; ++x) {
        rows[x] = block.element(array, p * P + x, j);
    }
    for (int c = 0; c < count; c += width) {
        const int64_t used = min64(width, count - c);
        for (int64_t k = 0; k < n; k += width) {
            V r[width] = {};
            if (!array.stride[3]) {
                for (int64_t x = 0; x < used; ++x) r[x] = splat(load_scalar<C>(rows[c + x], array.dtype));
            } else if (array.dtype == dtype_of<C> && used == width && k + width <= n) {
                ANYATTN_UNROLL
                for (int x = 0; x < width; ++x) r[x] = load<V>(rows[c + x] + k * size);
            } else {
                load_tile<C>(r, rows + c, k * size, array.dtype, used, n - k);
            }
            transpose<C>(r);
            const auto put = [&](int64_t x) {
                C *to = added + c + (k + x) * P;
                store(to, merge(r[x], load<V>(to)));
            };
            if (k + width <= n) {
                ANYATTN_UNROLL
                for (int x = 0; x < width; ++x) put(x);
            } else {
                for (int64_t x = 0; x < n - k; ++x) put(x);
            }
        }
    }
}

// The same for an array whose rows are equal.
template <class C, int P, class Merge>
ANYATTN_INLINE void spread_one_row(C *added, const ScoreBlock<C, P> &block, int p, const anyattn_array &array,
                                   int64_t j, int64_t n, const Merge &merge) {
    using V = typename Lanes<C>::V;
    const char *row = block.element(array, p * P, j);
    const int64_t step = array.stride[3] ? dtype_size(array.dtype) : 0;
    for (int64_t k = 0; k < n; k += lanes<C>) {
        const int64_t count = min64(lanes<C>, n - k);
        const V values =
            step ? load_part<C>(row + k * step, array.dtype, count) : splat(load_scalar<C>(row, array.dtype));
        for (int64_t x = 0; x < count; ++x) {
            for (int c = 0; c < block.panel_vectors(p); ++c) {
                C *to = added + (k + x) * P + c * lanes<C>;
                store(to, merge(splat(values[x]), load<V>(to)));
            }
        }
    }
}

// What a mask does to a tile.
enum MaskUse { kSeesNone, kSeesSome, kSeesAll };

// Whether some, or all, of the bytes seen so far are not 0.
class MaskBytes {
  public:
    ANYATTN_INLINE void see(const char *p, int64_t n) {
        int64_t i = 0;
        for (; i + kVectorBytes <= n; i += kVectorBytes) see(load<Vector>(p + i));
        if (i < n && i > 0) return see(load<Vector>(p + n - kVectorBytes));  // sees some bytes again
        for (; i < n; ++i) {
            some_byte_ |= p[i] != 0;
            zero_byte_ |= p[i] == 0;
        }
    }
    MaskUse use() const {
        return !(zero_byte_ || any(zero_)) ? kSeesAll : some_byte_ || any(some_) ? kSeesSome : kSeesNone;
    }

  private:
    typedef int8_t Vector __attribute__((vector_size(kVectorBytes)));
    Vector some_{}, zero_{};
    bool some_byte_ = false, zero_byte_ = false;

    ANYATTN_INLINE void see(Vector bytes) {
        some_ |= bytes;
        zero_ |= bytes == 0;
    }
    static bool any(Vector bytes) {
        uint64_t words[kVectorBytes / 8], all = 0;
        __builtin_memcpy(words, &bytes, sizeof words);
        for (const uint64_t word : words) all |= word;
        return all != 0;
    }
};

template <class C, int P>
ANYATTN_NOINLINE MaskUse boolean_mask_use(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n) {
    const anyattn_array &mask = block.call.mask;
    if (!mask.data) return kSeesAll;
    MaskBytes seen;
    const int rows = mask.stride[1] || mask.stride[2] ? block.panel_rows(p) : 1;  // 1: every row is the same
    for (int x = 0; x < rows; ++x) {
        block.for_runs(j, n, [&](int64_t, int64_t slot, int64_t count) {
            seen.see(block.element(mask, p * P + x, slot), mask.stride[3] ? count : 1);
        });
        if (x % 8 == 0 && seen.use() == kSeesSome) return kSeesSome;
    }
    return seen.use();
}

// Bias in natural units, -inf where the boolean mask hides a key. `added` has n rows.
template <class C, int P>
ANYATTN_NOINLINE void fill_added(C *added, const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, MaskUse use) {
    using V = typename Lanes<C>::V;
    const anyattn_call &call = block.call;
    const auto spread_runs = [&](const anyattn_array &array, const auto &merge) {
        const bool one_row = !array.stride[2] && (!array.stride[1] || block.rows == block.per_head);
        block.for_runs(j, n, [&](int64_t i, int64_t slot, int64_t count) {
            if (one_row) return spread_one_row(added + i * P, block, p, array, slot, count, merge);
            spread(added + i * P, block, p, array, slot, count, merge);
        });
    };
    const V hidden = splat(-infinity(C()));
    const bool masked = use == kSeesSome && call.mask.data;
    if (call.bias.data) {
        spread_runs(call.bias, [](V bias, V) { return bias; });
        if (masked) spread_runs(call.mask, [=](V seen, V bias) { return seen == V{} ? hidden : bias; });
    } else if (masked) {
        spread_runs(call.mask, [=](V seen, V) { return seen == V{} ? hidden : V{}; });
    } else {
        __builtin_memset(added, 0, (size_t)(n * P * (int64_t)sizeof(C)));
    }
}

// Per lane, the rows of the tile [j, j + n) that its query may see; none in lanes without a query.
template <class C, int P>
ANYATTN_NOINLINE void lane_bounds(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, C *low, C *high) {
    const int rows = block.panel_rows(p);
    for (int x = 0; x < P; ++x) {
        const int64_t i = block.row(p * P + (x < rows ? x : 0));
        low[x] = C(min64(n, max64(0, key_begin(block.call, block.s, i) - j)));
        high[x] = x < rows ? C(min64(n, max64(0, key_end(block.call, block.s, i) - j))) : C(0);
    }
}

// Whether float holds |first + place| exactly for all keys of a tile.
inline bool near_diagonal(int64_t first) { return first > -(INT64_C(1) << 22) && first < INT64_C(1) << 22; }

// |first + place| of each lane, rounded once where it does not fit C.
template <class C>
ANYATTN_INLINE typename Lanes<C>::V far_distance(typename Lanes<C>::V place, int64_t first) {
    for (int i = 0; i < lanes<C>; ++i) {
        const int64_t distance = first + (int64_t)place[i];
        place[i] = C(distance < 0 ? -distance : distance);
    }
    return place;
}

template <class C, int P>
struct Bounds {
    alignas(64) C low[P], high[P];
};

// How score_pass begins: products times `product`, then the softcap (0: off). tanhs: null, or takes its tanh.
template <class C>
struct Capped {
    C product, cap, *tanhs;
};

// Scores of the tile S of panel p and keys [j, j + n), in place of products; raises `top` anew if given. added: null or from
// fill_added; bounds: null or the edge.
template <class C, int P>
ANYATTN_NOINLINE void score_pass(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, const C *added,
                                 const Capped<C> &first, const Bounds<C, P> *bounds, C *S, typename Lanes<C>::V *top) {
    using V = typename Lanes<C>::V;
    const V hidden = splat(-infinity(C()));
    const V cap = splat(first.cap), per_cap = splat(first.cap != 0 ? 1 / first.cap : 0);
    const bool capped = first.cap != 0, sloped = block.sloped;
    C *tanhs = first.tanhs;
    // From the position of a key to that of row i0.
    const auto apart_from = [&](int64_t key) {
        return block.i0 + block.s.offset - (block.slot(key) - block.s.leftpad);
    };
    const int64_t apart = n > 0 ? apart_from(j) : 0;
    const bool near = !block.slots && near_diagonal(apart);
    for (int c = 0; c < block.panel_vectors(p); ++c) {
        const int64_t lane = p * P + c * lanes<C>;
        const V slope = sloped ? load<V>(block.slope + lane) : V{}, place = sloped ? load<V>(block.place + lane) : V{};
        const V low = bounds ? load<V>(bounds->low + c * lanes<C>) : V{};
        const V high = bounds ? load<V>(bounds->high + c * lanes<C>) : V{};
        const V from = place + splat(C(apart));
        V highest = hidden, row{};
        for (int64_t r = 0, at = c * lanes<C>; r < n; ++r, at += P, row += splat(C(1))) {
            V s = load<V>(S + at) * splat(first.product);
            if (capped) {
                const V t = tanh(s * per_cap);
                if (tanhs) store(tanhs + at, t);
                s = t * cap;
            }
            if (added) {
                const V bias = load<V>(added + at);
                s = bias == hidden ? hidden : s + bias;
            }
            if (sloped) s -= (near ? absolute(from - row) : far_distance<C>(place, apart_from(j + r))) * slope;
            if (bounds) {
                s = row >= low ? s : hidden;
                s = row < high ? s : hidden;
            }
            store(S + at, s);
            highest = larger(highest, s);
        }
        if (top) top[c] = highest;
    }
}

// Dropout factors of a tile, 0 or 1 / (1 - p).
template <class C, int P>
ANYATTN_INLINE void keep_tile(C *keep, const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n) {
    const anyattn_call &call = block.call;
    DropoutCounter counter{call.rng_state[0],
                           (uint32_t)call.rng_state[1],
                           call.dropout_threshold,
                           0,
                           round_up(block.panel_rows(p), lanes<float>),
                           {},
                           {}};
    for (int x = 0; x < counter.width; ++x) {
        const int r = p * P + x;
        counter.query[x] = (uint32_t)(block.row(r) + call.query_start);
        counter.head[x] = (uint32_t)(block.s.index * call.nheads + block.head(r));
    }
    block.for_runs(j, n, [&](int64_t i, int64_t slot, int64_t count) {
        counter.key = slot + call.key_start;
        fill_keep<C, P>(keep + i * P, counter, count, C(1 / (1 - call.dropout_threshold / 65536.0)));
    });
}

}  // namespace
}  // namespace anyattn
