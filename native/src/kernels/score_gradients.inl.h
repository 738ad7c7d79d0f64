// Gradients of the arrays that a score program reads: sums of dS times derivatives, in double, in a fixed order.
#pragma once
#include <type_traits>

#include "score_tile.inl.h"

namespace anyattn {
namespace {

// Adds what consecutive or other elements get from a vector of terms.
template <class C>
ANYATTN_INLINE void scatter(double *sums, const ElementIndex<C> &index, typename Lanes<C>::V terms) {
    if (index.consecutive()) {
        double *to = sums + index.at[0];
        for (int x = 0; x < lanes<C>; ++x) to[x] += double(terms[x]);
        return;
    }
    for (int x = 0; x < lanes<C>; ++x) sums[index.at[x]] += double(terms[x]);
}

// dS times a derivative, 0 where dS is 0 whatever the derivative. adjoint: null, or the derivative.
template <class V, class C>
ANYATTN_INLINE V term_of(V ds, const C *adjoint) {
    return adjoint ? (ds == V{} ? V{} : ds * load<V>(adjoint)) : ds;
}

// Sums of a tile for elements that are consecutive along the lanes of a key, and whose first moves from key to key (a
// table of distances). Neighbouring keys add to different copies: an addition to what was stored just before, shifted by
// one, would wait for it.
template <class C, int P>
class RowSums {
  public:
    static constexpr int64_t kCopies = 8, kSpan = kTileKeys + P;

    // index, keys: registers of a term. Returns whether all elements of a tile are in a short run inside the array.
    bool start(const C *index, const C *keys, int64_t n, int64_t width, int32_t size) {
        using Integer = std::remove_reference_t<decltype(typename Lanes<C>::I{}[0])>;
        if (!consecutive_lanes<C, P / lanes<C>>(index)) return false;
        const int64_t lane = load<Integer>(index);
        int64_t low = load<Integer>(keys), high = low;
        for (int64_t k = 1; k < n; ++k) {
            const int64_t key = load<Integer>(keys + k);
            low = min64(low, key);
            high = max64(high, key);
        }
        const uint64_t reach = (uint64_t)high - (uint64_t)low;
        if (reach > (uint64_t)kSpan) return false;
        first_ = (int64_t)((uint64_t)lane + (uint64_t)low);
        span_ = (int64_t)reach + width;
        start_ = low;
        if (first_ < 0 || first_ > size - span_ || span_ > kSpan) return false;
        __builtin_memset(sums_, 0, sizeof sums_);
        return true;
    }
    C *at(int64_t k, const C *key) {
        using Integer = std::remove_reference_t<decltype(typename Lanes<C>::I{}[0])>;
        return sums_[k % kCopies] + (load<Integer>(key) - start_);
    }
    void finish(double *sums) const {
        for (int64_t x = 0; x < span_; ++x) {
            double sum = 0;
            for (int64_t copy = 0; copy < kCopies; ++copy) sum += double(sums_[copy][x]);
            sums[first_ + x] += sum;
        }
    }

  private:
    int64_t first_ = 0, span_ = 0, start_ = 0;
    alignas(64) C sums_[kCopies][kSpan + lanes<C>];
};

// What the terms of one read add to.
template <class C, int P>
struct TermSums {
    using V = typename Lanes<C>::V;
    double *sums;
    V of_lanes[P / lanes<C>] = {};  // of what has one element for all keys
    bool in_rows = false;
    RowSums<C, P> rows;
};

// Adds the terms of one read for keys [r, r + count) of a tile; `ds` begins at key r.
template <class C, int P>
ANYATTN_INLINE void add_terms(const TileProgram<C, P> &program, const ScoreTerm &term, const ScoreArray &array,
                              const C *t, const C *ds, int64_t r, int64_t count, int64_t vectors, TermSums<C, P> &to) {
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    using U = typename Lanes<C>::U;
    using Integer = std::remove_reference_t<decltype(I{}[0])>;
    const auto &machine = program.machine;
    const auto adjoint = machine.operand(term.adjoint < 0 ? 0 : term.adjoint, t);
    const C *index = machine[term.index], *keys = machine[term.keys < 0 ? 0 : term.keys] + r;
    for (int64_t k = 0; k < count; ++k) {
        V of_key{};
        C *row = to.in_rows ? to.rows.at(k, keys + k) : nullptr;
        for (int64_t c = 0; c < vectors; ++c) {
            const V x = term_of(load<V>(ds + k * P + c * lanes<C>), term.adjoint < 0 ? nullptr : adjoint.at(k, c));
            if (row) {
                store(row + c * lanes<C>, load<V>(row + c * lanes<C>) + x);
            } else if (term.keys >= 0) {
                const I at = (I)(load<U>(index + c * lanes<C>) + load<ScoreUnsigned<C>>(keys + k));
                scatter<C>(to.sums, ElementIndex<C>(at, array.size), x);
            } else if (term.stage == kOfPairs) {
                scatter<C>(to.sums, ElementIndex<C>(load<I>(index + k * P + c * lanes<C>), array.size), x);
            } else if (term.stage == kOfKeys) {
                of_key += x;
            } else {
                to.of_lanes[c] += x;
            }
        }
        if (term.stage != kOfKeys) continue;
        const auto at = load<Integer>(index + r + k);
        to.sums[min64(max64(at, 0), array.size - 1)] += double(sum_lanes<C>(of_key));
    }
}

// Adds what is left after the pairs of a tile.
template <class C, int P>
ANYATTN_INLINE void finish_terms(const TileProgram<C, P> &program, const ScoreTerm &term, const ScoreArray &array,
                                 int64_t vectors, const TermSums<C, P> &to) {
    using I = typename Lanes<C>::I;
    if (to.in_rows) return to.rows.finish(to.sums);
    if (term.keys >= 0 || (term.stage != kOnce && term.stage != kOfLanes)) return;
    for (int64_t c = 0; c < vectors; ++c) {
        const C *index = program.machine[term.index] + c * lanes<C>;
        scatter<C>(to.sums, ElementIndex<C>(load<I>(index), array.size), to.of_lanes[c]);
    }
}

// Adds the gradients of captured arrays, which a section computes, from dS of panel p and keys [j, j + n). t: scores before
// score_mod.
template <class C, int P>
ANYATTN_NOINLINE void capture_pass(const ScoreBlock<C, P> &block, int use, int p, int64_t j, int64_t n, C *t,
                                   const C *ds, C *registers, double *captured) {
    const int64_t vectors = block.panel_vectors(p);  // dS has no others
    TileProgram<C, P> program(block, use, p, j, n, registers);
    constexpr int32_t at_once = 2;  // terms
    const ScoreTerm *terms = program.section.term();
    for (int32_t begin = 0; begin < program.section.terms; begin += at_once) {
        const int32_t end = begin + at_once < program.section.terms ? begin + at_once : program.section.terms;
        TermSums<C, P> sums[at_once];
        const auto for_terms = [&](const auto &body) {
            for (int32_t i = begin; i < end; ++i) {
                body(terms[i], score_arrays(block.call)[terms[i].array], sums[i - begin]);
            }
        };
        for_terms([&](const ScoreTerm &term, const ScoreArray &array, TermSums<C, P> &to) {
            to.sums = captured + array.offset;
            to.in_rows = term.keys >= 0 && to.rows.start(program.machine[term.index], program.machine[term.keys], n,
                                                         vectors * lanes<C>, array.size);
        });
        const auto none = [](int64_t, int64_t) {};
        program.for_pairs(t, none, [&](int64_t r, int64_t count) {
            for_terms([&](const ScoreTerm &term, const ScoreArray &array, TermSums<C, P> &to) {
                add_terms(program, term, array, t + r * P, ds + r * P, r, count, vectors, to);
            });
        });
        for_terms([&](const ScoreTerm &term, const ScoreArray &array, TermSums<C, P> &to) {
            finish_terms(program, term, array, vectors, to);
        });
    }
}

}  // namespace
}  // namespace anyattn
