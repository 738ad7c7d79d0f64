// A tile of scores: the built-in terms of score.inl.h and the functions of a score program.
#pragma once
#include "score.inl.h"
#include "score_program.inl.h"

namespace anyattn {
namespace {

// Returns what the block mask of a mask function does to a tile.
template <class C, int P>
MaskUse function_use(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n) {
    const anyattn_call &call = block.call;
    if (!has_mask_function(call)) return kSeesAll;
    if (!call.mask_blocks.data || block.slots) return kSeesSome;
    bool some = false, all = true;
    const int64_t *stride = call.mask_blocks.stride;
    const int64_t first = block.first_row(p) / call.mask_block_q, last = block.last_row(p) / call.mask_block_q;
    for (int64_t h = block.head(p * P); h <= block.head(p * P + block.panel_rows(p) - 1); ++h) {
        for (int64_t i = first; i <= last; ++i) {
            const auto *kinds = static_cast<const uint8_t *>(call.mask_blocks.data) + block.s.index * stride[0] +
                                h * stride[1] + i * stride[2];
            for (int64_t x = j / call.mask_block_k; x <= (j + n - 1) / call.mask_block_k; ++x) {
                some |= kinds[x] != 0;
                all &= kinds[x] == 2;
            }
        }
    }
    return all ? kSeesAll : some ? kSeesSome : kSeesNone;
}

// Returns what all masks do to a tile, n > 0.
template <class C, int P>
ANYATTN_INLINE MaskUse mask_use(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n) {
    const MaskUse by_function = function_use(block, p, j, n);
    if (by_function == kSeesNone) return kSeesNone;
    const MaskUse use = boolean_mask_use(block, p, j, n);
    return use == kSeesAll ? by_function : use;
}

// Keys of a tile that some row of a panel attends to, and what masks do to them. n is 0 without such keys.
struct VisibleKeys {
    int64_t first, n;
    MaskUse use;
};

// Returns the visible keys among [j0, j1), without those that the block mask excludes at both ends. `first` is j0 plus a
// multiple of `step`.
template <class C, int P>
ANYATTN_NOINLINE VisibleKeys visible_keys(const ScoreBlock<C, P> &block, int p, int64_t j0, int64_t j1, int64_t step) {
    int64_t first = block.panel_begin(p, j0, step), end = block.panel_end(p, j1);
    if (block.call.mask_blocks.data && !block.slots) {
        const int64_t size = block.call.mask_block_k;
        const auto excluded = [&](int64_t a, int64_t b) { return function_use(block, p, a, b - a) == kSeesNone; };
        for (int64_t next = 0; first < end; first = next) {
            next = min64(end, (first / size + 1) * size);
            if (!excluded(first, next)) break;
        }
        for (int64_t last = 0; first < end; end = last) {
            last = max64(first, (end - 1) / size * size);
            if (!excluded(last, end)) break;
        }
        first = j0 + (first - j0) / step * step;
    }
    if (first >= end) return {j0, 0, kSeesNone};
    const MaskUse use = mask_use(block, p, first, end - first);
    return {first, use == kSeesNone ? 0 : end - first, use};
}

// Returns whether the block mask excludes all keys of [j0, j1) for every row of a block.
template <class C, int P>
bool hidden_by_function(const ScoreBlock<C, P> &block, int64_t j0, int64_t j1) {
    if (!block.call.mask_blocks.data) return false;
    for (int p = 0; p < block.panels; ++p) {
        if (function_use(block, p, j0, j1 - j0) != kSeesNone) return false;
    }
    return true;
}

// Returns whether the block mask excludes all keys of [j0, j1) for `count` blocks.
template <class M>
bool all_hidden(const Block<M> *blocks, int64_t count, int64_t j0, int64_t j1) {
    for (int64_t i = 0; i < count; ++i) {
        if (!hidden_by_function(blocks[i], j0, j1)) return false;
    }
    return true;
}

// Returns whether tiles have terms or masks to add, see fill_added.
inline bool has_added(const anyattn_call &call) { return call.bias.data || call.mask.data || has_mask_function(call); }

template <class C>
C *take_registers(const anyattn_call &call, Arena &arena) {
    return call.score_program ? arena.take<C>(ScoreMachine<C>::elements(call)) : nullptr;
}

// Memory of a score program. t: null, or takes the scores before score_mod.
template <class C>
struct ProgramTiles {
    C *registers, *t;
};

// A section of the program on a tile, up to its pairs.
template <class C, int P>
struct TileProgram {
    static constexpr int64_t vectors = P / lanes<C>, keys_at_once = kScoreElements / P;
    const ScoreSection &section;
    int64_t n;
    int32_t h[P], q_idx[P], kv_idx[kScoreElements];
    ScoreInputs<C> inputs;
    ScoreMachine<C> machine;
    const ScoreInstruction *code;

    TileProgram(const ScoreBlock<C, P> &block, int use, int p, int64_t j, int64_t keys, C *registers)
        : section(score_section(block.call, use)),
          n(keys),
          inputs{block.call, block.s.index, keys, vectors, h, q_idx, kv_idx},
          machine(inputs, registers),
          code(section.code()) {
        for (int x = 0; x < P; ++x) {
            h[x] = (int32_t)block.head(p * P + min64(x, block.panel_rows(p) - 1));
            q_idx[x] = (int32_t)block.row(p * P + x);
        }
        for (int64_t i = 0; i < n; ++i) kv_idx[i] = (int32_t)block.slot(j + i);
        const int64_t width[] = {1, vectors, round_up(n, lanes<C>) / lanes<C>, keys_at_once * vectors};
        for (int stage = 0; stage < kOfPairs; ++stage) {
            machine.run(code, section.instructions[stage], width[stage], 0, nullptr);
            code += section.instructions[stage];
        }
    }

    // body(r, count) for some keys [r, r + count) at a time; t: the scores of the tile.
    template <class Body>
    ANYATTN_INLINE void for_pairs(const C *t, const Body &body) {
        for (int64_t r = 0; r < n; r += keys_at_once) {
            const int64_t count = min64(keys_at_once, n - r);
            machine.run(code, section.instructions[kOfPairs], count * vectors, r, t + r * P);
            body(r, count);
        }
    }
    // A register of pairs after that.
    const C *pairs(int32_t number, const C *t, int64_t r) const { return number ? machine[number] : t + r * P; }
};

// Puts score_mod(S) in place of S; -inf into `added`, if there is one, where mask_mod is false; and the derivative of
// score_mod, times that of the softcap, into `slopes`, which may be null and holds the tanh of the softcap if there is one.
template <class C, int P>
ANYATTN_NOINLINE void function_pass(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, C *added, C *slopes,
                                    const ProgramTiles<C> &tiles, C *S) {
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    TileProgram<C, P> program(block, slopes ? kScoreBackward : kScoreForward, p, j, n, tiles.registers);
    const ScoreSection &section = program.section;
    if (tiles.t) __builtin_memcpy(tiles.t, S, sizeof(C) * (size_t)(n * P));
    const bool capped = block.cap != 0;
    program.for_pairs(S, [&](int64_t r, int64_t count) {
        const int64_t end = count * P;
        if (added && section.mask >= 0) {
            const C *seen = program.pairs(section.mask, S, r);
            C *to = added + r * P;
            for (int64_t x = 0; x < end; x += lanes<C>) {
                store(to + x, select(load<I>(seen + x), load<V>(to + x), splat(-infinity(C()))));
            }
        }
        if (slopes) {
            const C *slope = section.slope < 0 ? nullptr : program.pairs(section.slope, S, r);
            C *to = slopes + r * P;
            for (int64_t x = 0; x < end; x += lanes<C>) {
                const V t = capped ? load<V>(to + x) : V{}, by_cap = splat(C(1)) - t * t;
                store(to + x, slope ? by_cap * load<V>(slope + x) : by_cap);
            }
        }
        if (section.score > 0) __builtin_memcpy(S + r * P, program.machine[section.score], sizeof(C) * (size_t)end);
    });
}

// Replaces products by the scores that score_mod gets.
template <class C, int P>
ANYATTN_NOINLINE void cap_pass(const Capped<C> &first, int64_t n, C *S) {
    using V = typename Lanes<C>::V;
    if (first.product == 1 && first.cap == 0) return;
    const V cap = splat(first.cap), per_cap = splat(first.cap != 0 ? 1 / first.cap : 0);
    for (int64_t at = 0; at < n * P; at += lanes<C>) {
        V s = load<V>(S + at) * splat(first.product);
        if (first.cap != 0) {
            const V t = tanh(s * per_cap);
            if (first.tanhs) store(first.tanhs + at, t);
            s = t * cap;
        }
        store(S + at, s);
    }
}

// The derivative of the softcap, from a tile of tanhs.
template <class C>
ANYATTN_INLINE typename Lanes<C>::V softcap_slope(const C *tanhs) {
    const auto t = load<typename Lanes<C>::V>(tanhs);
    return splat(C(1)) - t * t;
}

// Returns whether score_tile changes products.
template <class C, int P>
ANYATTN_INLINE bool changes_scores(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, MaskUse use) {
    return block.edge(p, j, j + n) || block.units.scored || use == kSeesSome;
}

// Runs what this tile needs of the above. tanhs: null, or takes the tanh of the softcap; with a score function, the
// derivative by the product.
template <class C, int P>
ANYATTN_INLINE void score_tile(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, MaskUse use, C *added,
                               C *tanhs, const ProgramTiles<C> &tiles, C *S, typename Lanes<C>::V *top) {
    if (!changes_scores(block, p, j, n, use)) return;
    const bool edge = block.edge(p, j, j + n), masked = use == kSeesSome;
    Bounds<C, P> bounds;
    if (edge) lane_bounds(block, p, j, n, bounds.low, bounds.high);
    if (!block.call.bias.data && !masked) added = nullptr;
    if (added) fill_added(added, block, p, j, n, use);
    Capped<C> first{block.units.product, block.cap, tanhs};
    const bool scored = has_score_function(block.call);
    if (scored) {
        cap_pass<C, P>(first, n, S);
        first = {C(1), C(0), nullptr};
    }
    if (scored || (masked && has_mask_function(block.call))) {
        function_pass(block, p, j, n, masked ? added : nullptr, scored ? tanhs : nullptr, tiles, S);
    }
    score_pass(block, p, j, n, added, first, edge ? &bounds : nullptr, S, top);
}

// Adds what n consecutive or other elements get from a vector of terms.
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

// Adds the terms of one read for keys [r, r + count) of a tile; `ds` and `adjoint` begin at key r. `of_lanes` sums what
// has one index for all keys.
template <class C, int P>
ANYATTN_INLINE void add_terms(const ScoreTerm &term, const ScoreArray &array, const C *index, const C *ds,
                              const C *adjoint, int64_t r, int64_t count, int64_t vectors, double *sums,
                              typename Lanes<C>::V *of_lanes) {
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    for (int64_t k = 0; k < count; ++k) {
        V of_key{};
        for (int64_t c = 0; c < vectors; ++c) {
            const int64_t at = k * P + c * lanes<C>;
            const V x = term_of(load<V>(ds + at), adjoint ? adjoint + at : nullptr);
            if (term.stage == kOfPairs) {
                scatter<C>(sums, ElementIndex<C>(load<I>(index + at), array.size), x);
            } else if (term.stage == kOfKeys) {
                of_key += x;
            } else {
                of_lanes[c] += x;
            }
        }
        if (term.stage != kOfKeys) continue;
        const auto at = load<std::remove_reference_t<decltype(I{}[0])>>(index + r + k);
        sums[min64(max64(at, 0), array.size - 1)] += double(sum_lanes<C>(of_key));
    }
}

// Adds the gradients of captured arrays from dS of panel p and keys [j, j + n). t: scores before score_mod.
template <class C, int P>
ANYATTN_NOINLINE void capture_pass(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, const C *t, const C *ds,
                                   C *registers, double *captured) {
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    const int64_t vectors = block.panel_vectors(p);  // dS has no others
    TileProgram<C, P> program(block, kScoreCapture, p, j, n, registers);
    constexpr int32_t at_once = 4;  // terms
    const int32_t terms = program.section.terms;
    for (int32_t begin = 0; begin < terms; begin += at_once) {
        const int32_t end = begin + at_once < terms ? begin + at_once : terms;
        V of_lanes[at_once][P / lanes<C>] = {};
        const auto for_terms = [&](const auto &body) {
            for (int32_t i = begin; i < end; ++i) {
                const ScoreTerm &term = program.section.term()[i];
                const ScoreArray &array = score_arrays(block.call)[term.array];
                body(term, array, captured + array.offset, of_lanes[i - begin]);
            }
        };
        program.for_pairs(t, [&](int64_t r, int64_t count) {
            for_terms([&](const ScoreTerm &term, const ScoreArray &array, double *sums, V *lane_sums) {
                const C *adjoint = term.adjoint < 0 ? nullptr : program.pairs(term.adjoint, t, r);
                const C *index = program.machine[term.index];
                add_terms<C, P>(term, array, index, ds + r * P, adjoint, r, count, vectors, sums, lane_sums);
            });
        });
        for_terms([&](const ScoreTerm &term, const ScoreArray &array, double *sums, const V *lane_sums) {
            if (term.stage != kOnce && term.stage != kOfLanes) return;
            for (int64_t c = 0; c < vectors; ++c) {
                const C *index = program.machine[term.index] + (term.stage == kOnce ? 0 : c * lanes<C>);
                scatter<C>(sums, ElementIndex<C>(load<I>(index), array.size), lane_sums[c]);
            }
        });
    }
}

}  // namespace
}  // namespace anyattn
