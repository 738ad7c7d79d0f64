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
    return call.score_program ? arena.take<C>(score_register_elements(call)) : nullptr;
}

// Memory of a score program. t: null, or takes the scores before score_mod. curvatures: null, or takes the second derivative
// by the product, if function_pass takes the first too.
template <class C>
struct ProgramTiles {
    C *registers, *t, *curvatures = nullptr;
};

// A section of the program on a tile, up to its pairs.
template <class C, int P>
struct TileProgram {
    static constexpr int64_t vectors = P / lanes<C>, keys_at_once = kScoreElements / P;
    using Operand = ScoreOperand<C>;
    const ScoreSection &section;
    int64_t n;
    int32_t h[P], q_idx[P], kv_idx[kScoreElements];
    ScoreInputs<C> inputs;
    ScoreMachine<C, vectors> machine;
    const ScoreInstruction *code;

    TileProgram(const ScoreBlock<C, P> &block, int use, int p, int64_t j, int64_t keys, C *registers)
        : section(score_section(block.call, use)),
          n(keys),
          inputs{block.call, block.s.index, h, q_idx, kv_idx},
          machine(inputs, registers),
          code(section.code()) {
        const bool one_head = block.rows == block.per_head;
        for (int x = 0; x < P; ++x) {  // lanes without a row may hold anything
            h[x] = (int32_t)(one_head ? block.h : block.head(p * P + min64(x, block.panel_rows(p) - 1)));
            q_idx[x] = (int32_t)(one_head ? block.i0 + p * P + x : block.row(p * P + x));
        }
        for (int64_t i = 0; i < n; ++i) kv_idx[i] = (int32_t)block.slot(j + i);
        for (int64_t i = n; i < round_up(n, P); ++i) kv_idx[i] = 0;
        const int64_t panels[] = {1, 1, (n + P - 1) / P};  // of the numbers of a stage
        for (int stage = 0; stage < kOfPairs; ++stage) {
            machine.run(code, section.instructions[stage], panels[stage], 0, nullptr);
            code += section.instructions[stage];
        }
    }

    // before(r, count) and after(r, count) for some keys [r, r + count) at a time; t: the scores of the tile.
    template <class Before, class After>
    ANYATTN_INLINE void for_pairs(C *t, const Before &before, const After &after) {
        for (int64_t r = 0; r < n; r += keys_at_once) {
            const int64_t count = min64(keys_at_once, n - r);
            before(r, count);
            machine.run(code, section.instructions[kOfPairs], count, r, t + r * P);
            after(r, count);
        }
    }
    // An operand of pairs after that.
    Operand pairs(int32_t operand, C *t, int64_t r) const { return machine.operand(operand, t + r * P); }
};

// f(key, vector, place in the tile) for the vectors of keys [r, r + count).
template <class C, int P, class F>
ANYATTN_INLINE void for_vectors(int64_t r, int64_t count, const F &f) {
    for (int64_t k = 0; k < count; ++k) {
        ANYATTN_UNROLL
        for (int c = 0; c < P / lanes<C>; ++c) f(k, c, (r + k) * P + c * lanes<C>);
    }
}

// Replaces products by the scores that score_mod gets, for keys [r, r + count).
template <class C, int P>
ANYATTN_INLINE void cap_keys(const Capped<C> &first, int64_t r, int64_t count, C *S) {
    using V = typename Lanes<C>::V;
    if (first.product == 1 && first.cap == 0) return;
    const V cap = splat(first.cap), per_cap = splat(first.cap != 0 ? 1 / first.cap : 0);
    for_vectors<C, P>(r, count, [&](int64_t, int, int64_t at) {
        V s = load<V>(S + at) * splat(first.product);
        if (first.cap != 0) {
            const V t = tanh(s * per_cap);
            if (first.tanhs) store(first.tanhs + at, t);
            s = t * cap;
        }
        store(S + at, s);
    });
}

// Puts score_mod of the products in place of S; -inf into `added`, if there is one, where mask_mod is false; and the
// derivative of score_mod, times that of the softcap, into `slopes`, which may be null and is `first.tanhs` if there is a
// softcap. top: null, or takes the largest scores.
template <class C, int P>
ANYATTN_NOINLINE void function_pass(const ScoreBlock<C, P> &block, int p, int64_t j, int64_t n, C *added, C *slopes,
                                    const Capped<C> &first, const ProgramTiles<C> &tiles, C *S,
                                    typename Lanes<C>::V *top) {
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    C *const curvatures = slopes ? tiles.curvatures : nullptr;
    const int use = curvatures ? kScoreSecond : slopes ? kScoreBackward : kScoreForward;
    TileProgram<C, P> program(block, use, p, j, n, tiles.registers);
    const ScoreSection &section = program.section;
    const auto before = [&](int64_t r, int64_t count) {
        cap_keys<C, P>(first, r, count, S);
        if (tiles.t) __builtin_memcpy(tiles.t + r * P, S + r * P, sizeof(C) * (size_t)(count * P));
    };
    const C two_per_cap = first.cap != 0 ? 2 / first.cap : 0;
    V highest[P / lanes<C>];
    for (V &x : highest) x = splat(-infinity(C()));
    program.for_pairs(S, before, [&](int64_t r, int64_t count) {
        if (added && section.mask >= 0) {
            const auto seen = program.pairs(section.mask, S, r);
            for_vectors<C, P>(r, count, [&](int64_t k, int c, int64_t at) {
                store(added + at, select(load<I>(seen.at(k, c)), load<V>(added + at), splat(-infinity(C()))));
            });
        }
        if (slopes) {
            const auto slope = program.pairs(section.slope < 0 ? 0 : section.slope, S, r);
            const auto curvature = program.pairs(section.curvature < 0 ? 0 : section.curvature, S, r);
            for_vectors<C, P>(r, count, [&](int64_t k, int c, int64_t at) {
                const V t = first.cap != 0 ? load<V>(slopes + at) : V{}, by_cap = splat(C(1)) - t * t;
                const V by_product = section.slope < 0 ? by_cap : by_cap * load<V>(slope.at(k, c));
                store(slopes + at, by_product);
                if (!curvatures) return;
                const V by_score = section.curvature < 0 ? V{} : load<V>(curvature.at(k, c));
                store(curvatures + at, by_score * by_cap * by_cap - by_product * t * splat(two_per_cap));
            });
        }
        if (section.score > 0) {
            const auto score = program.pairs(section.score, S, r);
            for_vectors<C, P>(r, count, [&](int64_t k, int c, int64_t at) { store(S + at, load<V>(score.at(k, c))); });
        }
        if (top) {
            for_vectors<C, P>(r, count,
                              [&](int64_t, int c, int64_t at) { highest[c] = larger(highest[c], load<V>(S + at)); });
        }
    });
    for (int c = 0; top && c < P / lanes<C>; ++c) top[c] = highest[c];
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
// derivative by the product. top: null, or takes the largest scores.
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
    const bool scored = has_score_function(block.call), last = scored && !edge && !added && !block.sloped;
    if (scored || (masked && has_mask_function(block.call))) {
        function_pass(block, p, j, n, masked ? added : nullptr, scored ? tanhs : nullptr,
                      scored ? first : Capped<C>{C(1), C(0), nullptr}, tiles, S, last ? top : nullptr);
    }
    if (last) return;
    if (scored) first = {C(1), C(0), nullptr};
    score_pass(block, p, j, n, added, first, edge ? &bounds : nullptr, S, top);
}

}  // namespace
}  // namespace anyattn
