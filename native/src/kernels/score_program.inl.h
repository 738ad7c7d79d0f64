// Runs the instructions of a score program (score_program.h) on registers that stay in L1. A register holds a number for
// every pair of the panel's queries and some keys, in the order of the score tile: neighbouring lanes are queries.
#pragma once
#include "load.inl.h"
#include "score_math.inl.h"
#include "score_program.h"

namespace anyattn {
namespace {

// Elements of a register: pairs of a panel and some keys, the lanes of a panel, or the keys of a tile.
constexpr int64_t kScoreElements = 512;

// Values of a tile that programs read.
template <class C>
struct ScoreInputs {
    const anyattn_call &call;
    int64_t b, n;  // sequence; keys
    int64_t vectors;  // of a panel
    const int32_t *h, *q_idx, *kv_idx;  // of each lane, of each key
};

ANYATTN_INLINE bool all_zero(I32 x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) == 0;
#elif defined(__AVX2__) && ANYATTN_VECTOR_BYTES == 32
    return _mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int32_t any = 0;
    for (int i = 0; i < lanes<float>; ++i) any |= x[i];
    return any == 0;
#endif
}

ANYATTN_INLINE bool all_zero(I64 x) {
    int64_t any = 0;
    for (int i = 0; i < lanes<double>; ++i) any |= x[i];
    return any == 0;
}

// Indices of elements of a captured array, moved inside it.
template <class C>
struct ElementIndex {
    using I = typename Lanes<C>::I;
    I at;

    ElementIndex(I index, int32_t size) {
        const I none{}, last = none + (size - 1);
        const I low = index < none ? none : index;
        at = low > last ? last : low;
    }
    // Returns whether lane x has index at[0] + x.
    bool consecutive() const {
        I expected{};
        for (int x = 0; x < lanes<C>; ++x) expected[x] = x;
        return all_zero(at - expected - (I{} + at[0]));
    }
};

// Elements of `data`: floating-point numbers as C, integers as lanes of I.
template <class C, class T>
ANYATTN_INLINE auto gather(const T *data, const ElementIndex<C> &index) {
    using Result = std::conditional_t<std::is_same<T, C>::value, typename Lanes<C>::V, typename Lanes<C>::I>;
    if constexpr (sizeof(T) == sizeof(C)) {
        if (index.consecutive()) return load<Result>(data + index.at[0]);
    }
    Result found{};
    for (int x = 0; x < lanes<C>; ++x) found[x] = data[index.at[x]];
    return found;
}

template <class C>
const C *captured_values(const anyattn_call &call, int32_t array) {
    return static_cast<const C *>(call.captured.data) + score_arrays(call)[array].offset;
}

inline const int32_t *captured_integers(const anyattn_call &call, int32_t array) {
    return static_cast<const int32_t *>(call.captured_indices.data) + score_arrays(call)[array].offset;
}

template <class C>
class ScoreMachine {
  public:
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    using U = typename Lanes<C>::U;

    ScoreMachine(const ScoreInputs<C> &inputs, C *registers) : in_(inputs), registers_(registers) {}

    static int64_t elements(const anyattn_call &call) {
        int64_t most = 0;
        for (int use = 0; use < kScoreSections; ++use) most = max64(most, score_section(call, use).registers);
        return most * kScoreElements;
    }

    const C *operator[](int32_t number) const { return registers_ + number * kScoreElements; }

    // `vectors` of every register; key: the first of those that pairs have; t: their scores, or null.
    void run(const ScoreInstruction *code, int64_t count, int64_t vectors, int64_t key, const C *t) {
        vectors_ = vectors;
        key_ = key;
        t_ = t;
        for (int64_t i = 0; i < count; ++i) step(code[i]);
    }

  private:
    static constexpr int width = lanes<C>;
    const ScoreInputs<C> &in_;
    C *registers_;
    int64_t vectors_ = 0, key_ = 0;
    const C *t_ = nullptr;

    const C *operand(int32_t number) const { return number ? registers_ + number * kScoreElements : t_; }

    // The result of f for all vectors: f() of nothing, of one, of two or of three operands of type T.
    template <class F>
    ANYATTN_INLINE void fill(const ScoreInstruction &x, const F &f) {
        C *to = registers_ + x.to * kScoreElements;
        for (int64_t v = 0; v < vectors_; ++v) store(to + v * width, f(v));
    }
    template <class T, class F>
    ANYATTN_INLINE void map1(const ScoreInstruction &x, const F &f) {
        const C *a = operand(x.a);
        fill(x, [&](int64_t v) { return f(load<T>(a + v * width)); });
    }
    template <class T, class F>
    ANYATTN_INLINE void map2(const ScoreInstruction &x, const F &f) {
        const C *a = operand(x.a), *b = operand(x.b);
        fill(x, [&](int64_t v) { return f(load<T>(a + v * width), load<T>(b + v * width)); });
    }

    // Lane numbers of a table, those beyond its n entries 0.
    void fill_from(const ScoreInstruction &x, const int32_t *table, int64_t n) {
        fill(x, [&](int64_t v) {
            I found{};
            for (int64_t i = 0; i < min64(width, n - v * width); ++i) found[i] = table[v * width + i];
            return found;
        });
    }

    // Runs one instruction. First, values that come from outside, and copies of registers in another form.
    ANYATTN_NOINLINE void step(const ScoreInstruction &x) {
        switch (x.operation) {
            case kScore_const_f: {
                const uint64_t bits = (uint64_t)(uint32_t)x.b << 32 | (uint32_t)x.a;
                return fill(x, [value = splat(C(load<double>(&bits)))](int64_t) { return value; });
            }
            case kScore_const_i:
                return fill(x, [value = I{} + x.a](int64_t) { return value; });
            case kScore_b:
                return fill(x, [value = I{} + (int32_t)in_.b](int64_t) { return value; });
            case kScore_h:
                return fill_from(x, in_.h, in_.vectors * width);
            case kScore_q_idx:
                return fill_from(x, in_.q_idx, in_.vectors * width);
            case kScore_kv_idx:
                return fill_from(x, in_.kv_idx, in_.n);
            case kScore_spread_once:
                return fill(x, [value = load<I>(operand(x.a))](int64_t) { return value; });
            case kScore_spread_lanes: {
                const C *a = operand(x.a);
                for (int64_t c = 0; c < in_.vectors; ++c) {
                    const I value = load<I>(a + c * width);
                    C *to = registers_ + x.to * kScoreElements + c * width;
                    for (int64_t v = c; v < vectors_; v += in_.vectors, to += in_.vectors * width) store(to, value);
                }
                return;
            }
            case kScore_spread_keys: {
                const C *a = operand(x.a) + key_;
                C *to = registers_ + x.to * kScoreElements;
                for (int64_t v = 0; v < vectors_; v += in_.vectors, ++a) {
                    const I value = I{} + load<std::remove_reference_t<decltype(I{}[0])>>(a);
                    for (int64_t c = 0; c < in_.vectors; ++c, to += width) store(to, value);
                }
                return;
            }
            default:
                return reads(x);
        }
    }

    ANYATTN_INLINE void reads(const ScoreInstruction &x) {
        if (x.operation > kScore_read_b) return logic(x);
        const int32_t size = score_arrays(in_.call)[x.b].size;
        if (x.operation == kScore_read_f) {
            const C *data = captured_values<C>(in_.call, x.b);
            return map1<I>(x, [&](I index) { return gather(data, ElementIndex<C>(index, size)); });
        }
        const int32_t *data = captured_integers(in_.call, x.b);
        const bool truth = x.operation == kScore_read_b;
        map1<I>(x, [&](I index) {
            const I found = gather(data, ElementIndex<C>(index, size));
            return truth ? (I)(found != I{}) : found;
        });
    }

    ANYATTN_INLINE void logic(const ScoreInstruction &x) {
        switch (x.operation) {
            case kScore_where: {
                const C *c = operand(x.a), *a = operand(x.b), *b = operand(x.c);
                return fill(x, [&](int64_t v) {
                    return select(load<I>(c + v * width), load<I>(a + v * width), load<I>(b + v * width));
                });
            }
            case kScore_and:
                return map2<I>(x, [](I a, I b) { return a & b; });
            case kScore_or:
                return map2<I>(x, [](I a, I b) { return a | b; });
            case kScore_xor:
                return map2<I>(x, [](I a, I b) { return a ^ b; });
            case kScore_not:
                return map1<I>(x, [](I a) { return ~a; });
            case kScore_i_to_f:
                return map1<I>(x, [](I a) { return __builtin_convertvector(a, V); });
            case kScore_b_to_f:
                return map1<I>(x, [](I a) { return a ? splat(C(1)) : V{}; });
            case kScore_f_to_i:
                return map1<V>(x, [](V a) { return truncate<I>(a); });
            case kScore_b_to_i:
                return map1<I>(x, [](I a) { return -a; });
            case kScore_f_to_b:
                return map1<V>(x, [](V a) { return (I)(a != V{}); });
            case kScore_i_to_b:
                return map1<I>(x, [](I a) { return (I)(a != I{}); });
            default:
                return x.operation < kScore_neg_i ? floats(x) : integers(x);
        }
    }

    ANYATTN_INLINE void floats(const ScoreInstruction &x) {
        switch (x.operation) {
            case kScore_neg_f:
                return map1<V>(x, [](V a) { return -a; });
            case kScore_abs_f:
                return map1<V>(x, [](V a) { return magnitude(a); });
            case kScore_sign_f:
                return map1<V>(x, [](V a) { return sign(a); });
            case kScore_floor_f:
                return map1<V>(x, [](V a) { return round_down(a); });
            case kScore_round_f:
                return map1<V>(x, [](V a) { return nearest(a); });
            case kScore_exp_f:
                return map1<V>(x, [](V a) { return exponential(a); });
            case kScore_log_f:
                return map1<V>(x, [](V a) { return logarithm(a); });
            case kScore_sqrt_f:
                return map1<V>(x, [](V a) { return square_root(a); });
            case kScore_tanh_f:
                return map1<V>(x, [](V a) { return tanh(a); });
            case kScore_sigmoid_f:
                return map1<V>(x, [](V a) { return sigmoid(a); });
            case kScore_sin_f:
                return map1<V>(x, [](V a) { return wave<false>(a); });
            case kScore_cos_f:
                return map1<V>(x, [](V a) { return wave<true>(a); });
            case kScore_add_f:
                return map2<V>(x, [](V a, V b) { return a + b; });
            case kScore_sub_f:
                return map2<V>(x, [](V a, V b) { return a - b; });
            case kScore_mul_f:
                return map2<V>(x, [](V a, V b) { return a * b; });
            case kScore_div_f:
                return map2<V>(x, [](V a, V b) { return a / b; });
            case kScore_pow_f:
                return map2<V>(x, [](V a, V b) { return raise_to(a, b); });
            case kScore_floordiv_f:
                return map2<V>(x, [](V a, V b) { return each(a, b, floor_quotient<C>); });
            case kScore_mod_f:
                return map2<V>(x, [](V a, V b) { return each(a, b, modulo<C>); });
            case kScore_min_f:
                return map2<V>(x, [](V a, V b) { return minimum(a, b); });
            case kScore_max_f:
                return map2<V>(x, [](V a, V b) { return maximum(a, b); });
            case kScore_lt_f:
                return map2<V>(x, [](V a, V b) { return (I)(a < b); });
            case kScore_le_f:
                return map2<V>(x, [](V a, V b) { return (I)(a <= b); });
            case kScore_eq_f:
                return map2<V>(x, [](V a, V b) { return (I)(a == b); });
            default:
                return map2<V>(x, [](V a, V b) { return (I)(a != b); });
        }
    }

    // Sums and products wrap around, because lanes without a pair may hold anything.
    ANYATTN_INLINE void integers(const ScoreInstruction &x) {
        switch (x.operation) {
            case kScore_neg_i:
                return map1<U>(x, [](U a) { return U{} - a; });
            case kScore_abs_i:
                return map1<U>(x, [](U a) { return (I)a < I{} ? U{} - a : a; });
            case kScore_sign_i:
                return map1<I>(x, [](I a) { return (I)(a < I{}) - (I)(a > I{}); });
            case kScore_add_i:
                return map2<U>(x, [](U a, U b) { return a + b; });
            case kScore_sub_i:
                return map2<U>(x, [](U a, U b) { return a - b; });
            case kScore_mul_i:
                return map2<U>(x, [](U a, U b) { return a * b; });
            case kScore_floordiv_i:
                return map2<I>(x, [](I a, I b) { return divide_down(a, b); });
            case kScore_mod_i:
                return map2<I>(x, [](I a, I b) {
                    const I r = (I)((U)a - (U)divide_down(a, b) * (U)b);
                    return b == I{} ? I{} : r;
                });
            case kScore_min_i:
                return map2<I>(x, [](I a, I b) { return a < b ? a : b; });
            case kScore_max_i:
                return map2<I>(x, [](I a, I b) { return a > b ? a : b; });
            case kScore_lt_i:
                return map2<I>(x, [](I a, I b) { return (I)(a < b); });
            case kScore_le_i:
                return map2<I>(x, [](I a, I b) { return (I)(a <= b); });
            case kScore_eq_i:
                return map2<I>(x, [](I a, I b) { return (I)(a == b); });
            case kScore_ne_i:
                return map2<I>(x, [](I a, I b) { return (I)(a != b); });
            case kScore_shl_i:
                return map2<I>(x, [](I a, I b) { return (I)((U)a << (U)shift_count(b)); });
            default:
                return map2<I>(x, [](I a, I b) { return a >> shift_count(b); });
        }
    }
};

}  // namespace
}  // namespace anyattn
