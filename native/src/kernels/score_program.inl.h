// Runs the instructions of a score program (score_program.h) on registers that stay in L1. A register holds a number for
// every pair of the panel's queries and some keys, in the order of the score tile: neighbouring lanes are queries. Or it
// holds a number for every lane, for every key, or one, see ScoreForm.
#pragma once
#include <type_traits>

#include "load.inl.h"
#include "score_math.inl.h"
#include "score_program.h"

namespace anyattn {
namespace {

// Elements of a register: pairs of a panel and some keys, the lanes of a panel, or the keys of a tile.
constexpr int64_t kScoreElements = 1024;

// Values of a tile that programs read.
template <class C>
struct ScoreInputs {
    const anyattn_call &call;
    int64_t b;  // sequence
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

// An integer of a register as an unsigned number, whose sums wrap around.
template <class C>
using ScoreUnsigned = std::remove_reference_t<decltype(typename Lanes<C>::U{}[0])>;

// Returns whether a register of lanes has consecutive numbers.
template <class C, int W>
bool consecutive_lanes(const C *numbers) {
    using I = typename Lanes<C>::I;
    using U = typename Lanes<C>::U;
    U expected{};
    for (int x = 0; x < lanes<C>; ++x) expected[x] = x;
    expected += load<ScoreUnsigned<C>>(numbers);
    bool all = true;
    for (int c = 0; c < W; ++c, expected += lanes<C>) all &= all_zero((I)(load<U>(numbers + c * lanes<C>) - expected));
    return all;
}

inline int64_t score_register_elements(const anyattn_call &call) {
    int64_t most = 0;
    for (int use = 0; use < kScoreSections; ++use) most = max64(most, score_section(call, use).registers);
    return most * kScoreElements;
}

template <class C>
const C *captured_values(const anyattn_call &call, int32_t array) {
    return static_cast<const C *>(call.captured.data) + score_arrays(call)[array].offset;
}

inline const int32_t *captured_integers(const anyattn_call &call, int32_t array) {
    return static_cast<const int32_t *>(call.captured_indices.data) + score_arrays(call)[array].offset;
}

// Where an instruction finds an operand: the vectors of a key are `vector` numbers apart, those of the next key `key`.
template <class C>
struct ScoreOperand {
    const C *data;
    int64_t key, vector;

    const C *at(int64_t k, int64_t c) const { return data + k * key + c * vector; }
};

// Runs sections on a panel of W vectors.
template <class C, int W>
class ScoreMachine {
  public:
    using V = typename Lanes<C>::V;
    using I = typename Lanes<C>::I;
    using U = typename Lanes<C>::U;

    ScoreMachine(const ScoreInputs<C> &inputs, C *registers) : in_(inputs), registers_(registers) {}

    const C *operator[](int32_t number) const { return registers_ + number * kScoreElements; }

    // The instructions of a stage: W vectors of `keys` keys, the first of which is `key`. t: the scores of pairs, or null.
    void run(const ScoreInstruction *code, int64_t count, int64_t keys, int64_t key, C *t) {
        keys_ = keys;
        key_ = key;
        t_ = t;
        for (int64_t i = 0; i < count; ++i) kSteps[code[i].operation](*this, code[i]);
    }

    ScoreOperand<C> operand(int32_t operand, const C *t) const {
        static constexpr int64_t key[] = {W * lanes<C>, 0, lanes<C>, 0}, vector[] = {lanes<C>, lanes<C>, 0, 0};
        const uint32_t number = (uint32_t)operand % kScoreRegisters, form = (uint32_t)operand / kScoreRegisters;
        return {number ? (*this)[(int32_t)number] : t, key[form], vector[form]};
    }

  private:
    using Integer = std::remove_reference_t<decltype(I{}[0])>;
    static constexpr int width = lanes<C>;
    const ScoreInputs<C> &in_;
    C *registers_;
    int64_t keys_ = 0, key_ = 0;
    C *t_ = nullptr;

    C *target(const ScoreInstruction &x) const { return x.to ? registers_ + x.to * kScoreElements : t_; }
    ScoreOperand<C> operand(int32_t number) const { return operand(number, t_); }

    // The result of f for all vectors: f(key, vector of the panel), or f of one, two or three operands of type T.
    template <class F>
    ANYATTN_INLINE void fill(const ScoreInstruction &x, const F &f) {
        C *to = target(x);
        const int64_t keys = keys_;
        for (int64_t k = 0; k < keys; ++k, to += W * width) {
            ANYATTN_UNROLL
            for (int c = 0; c < W; ++c) store(to + c * width, f(k, c));
        }
    }
    template <class T, class F>
    ANYATTN_INLINE void map1(const ScoreInstruction &x, const F &f) {
        ScoreOperand<C> a = operand(x.a);
        C *to = target(x);
        const int64_t keys = keys_;
        for (int64_t k = 0; k < keys; ++k, to += W * width, a.data += a.key) {
            ANYATTN_UNROLL
            for (int c = 0; c < W; ++c) store(to + c * width, f(load<T>(a.data + c * a.vector)));
        }
    }
    template <class T, class F>
    ANYATTN_INLINE void map2(const ScoreInstruction &x, const F &f) {
        ScoreOperand<C> a = operand(x.a), b = operand(x.b);
        C *to = target(x);
        const int64_t keys = keys_;
        for (int64_t k = 0; k < keys; ++k, to += W * width, a.data += a.key, b.data += b.key) {
            ANYATTN_UNROLL
            for (int c = 0; c < W; ++c) {
                store(to + c * width, f(load<T>(a.data + c * a.vector), load<T>(b.data + c * b.vector)));
            }
        }
    }

    // f(a, b, c) with a and b of type T, and c of type T3.
    template <class T, class T3 = T, class F>
    ANYATTN_INLINE void map3(const ScoreInstruction &x, const F &f) {
        ScoreOperand<C> a = operand(x.a), b = operand(x.b), z = operand(x.c);
        C *to = target(x);
        const int64_t keys = keys_;
        for (int64_t k = 0; k < keys; ++k, to += W * width, a.data += a.key, b.data += b.key, z.data += z.key) {
            ANYATTN_UNROLL
            for (int c = 0; c < W; ++c) {
                store(to + c * width, f(load<T>(a.data + c * a.vector), load<T>(b.data + c * b.vector),
                                        load<T3>(z.data + c * z.vector)));
            }
        }
    }

    // Lane numbers of a table.
    void fill_from(const ScoreInstruction &x, const int32_t *table) {
        fill(x, [&](int64_t k, int c) {
            const int32_t *from = table + (k * W + c) * width;
            if constexpr (sizeof(C) == sizeof(int32_t)) return load<I>(from);
            I found{};
            for (int i = 0; i < width; ++i) found[i] = from[i];
            return found;
        });
    }

    // Elements of an array whose indices differ by 1 from lane to lane are read from memory at once.
    void read_rows(const ScoreInstruction &x) {
        const int32_t size = score_arrays(in_.call)[x.b].size;
        const C *data = captured_values<C>(in_.call, x.b), *a = (*this)[x.a], *keys = (*this)[x.c] + key_;
        const ScoreUnsigned<C> lane = load<ScoreUnsigned<C>>(a);
        const bool in_row = consecutive_lanes<C, W>(a);
        C *to = target(x);
        for (int64_t k = 0; k < keys_; ++k, to += W * width) {
            const ScoreUnsigned<C> key = load<ScoreUnsigned<C>>(keys + k);
            const Integer first = (Integer)(lane + key);
            if (in_row && first >= 0 && first <= size - W * width) {
                ANYATTN_UNROLL
                for (int c = 0; c < W; ++c) store(to + c * width, load<V>(data + first + c * width));
                continue;
            }
            for (int c = 0; c < W; ++c) {
                store(to + c * width, gather(data, ElementIndex<C>((I)(load<U>(a + c * width) + key), size)));
            }
        }
    }

    template <class F>
    ANYATTN_INLINE void read_integers(const ScoreInstruction &x, const F &f) {
        const int32_t size = score_arrays(in_.call)[x.b].size, *data = captured_integers(in_.call, x.b);
        map1<I>(x, [&](I index) { return f(gather(data, ElementIndex<C>(index, size))); });
    }

    // One function for each operation, which runs an instruction on all vectors. Sums and products of integers wrap
    // around, because lanes without a pair may hold anything.
    using Machine = ScoreMachine;
    using Step = void (*)(Machine &, const ScoreInstruction &);
    static void op_const_f(Machine &m, const ScoreInstruction &x) {
        const uint64_t bits = (uint64_t)(uint32_t)x.b << 32 | (uint32_t)x.a;
        m.fill(x, [value = splat(C(load<double>(&bits)))](int64_t, int) { return value; });
    }
    static void op_const_i(Machine &m, const ScoreInstruction &x) {
        m.fill(x, [value = I{} + x.a](int64_t, int) { return value; });
    }
    static void op_b(Machine &m, const ScoreInstruction &x) {
        m.fill(x, [value = I{} + (int32_t)m.in_.b](int64_t, int) { return value; });
    }
    static void op_h(Machine &m, const ScoreInstruction &x) { m.fill_from(x, m.in_.h); }
    static void op_q_idx(Machine &m, const ScoreInstruction &x) { m.fill_from(x, m.in_.q_idx); }
    static void op_kv_idx(Machine &m, const ScoreInstruction &x) { m.fill_from(x, m.in_.kv_idx); }
    static void op_spread_once(Machine &m, const ScoreInstruction &x) {
        m.fill(x, [value = load<I>(m[x.a])](int64_t, int) { return value; });
    }
    static void op_spread_keys(Machine &m, const ScoreInstruction &x) {
        const C *a = m[x.a] + m.key_;
        C *to = m.target(x);
        const int64_t keys = m.keys_;
        for (int64_t k = 0; k < keys; ++k) store(to + k * width, I{} + load<Integer>(a + k));
    }
    static void op_read_f(Machine &m, const ScoreInstruction &x) {
        const int32_t size = score_arrays(m.in_.call)[x.b].size;
        const C *data = captured_values<C>(m.in_.call, x.b);
        m.template map1<I>(x, [&](I index) { return gather(data, ElementIndex<C>(index, size)); });
    }
    static void op_read_rows_f(Machine &m, const ScoreInstruction &x) { m.read_rows(x); }
    static void op_read_i(Machine &m, const ScoreInstruction &x) {
        m.read_integers(x, [](I found) { return found; });
    }
    static void op_read_b(Machine &m, const ScoreInstruction &x) {
        m.read_integers(x, [](I found) { return (I)(found != I{}); });
    }
    static void op_where(Machine &m, const ScoreInstruction &x) {
        m.template map3<I>(x, [](I t, I a, I b) { return select(t, a, b); });
    }
    static void op_and(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a & b; });
    }
    static void op_or(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a | b; });
    }
    static void op_xor(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a ^ b; });
    }
    static void op_not(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return ~a; });
    }
    static void op_i_to_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return __builtin_convertvector(a, V); });
    }
    static void op_b_to_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return a ? splat(C(1)) : V{}; });
    }
    static void op_f_to_i(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return truncate<I>(a); });
    }
    static void op_b_to_i(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return -a; });
    }
    static void op_f_to_b(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return (I)(a != V{}); });
    }
    static void op_i_to_b(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return (I)(a != I{}); });
    }
    static void op_neg_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return -a; });
    }
    static void op_abs_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return magnitude(a); });
    }
    static void op_sign_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return sign(a); });
    }
    static void op_floor_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return round_down(a); });
    }
    static void op_round_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return nearest(a); });
    }
    static void op_exp_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return exponential(a); });
    }
    static void op_log_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return logarithm(a); });
    }
    static void op_sqrt_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return square_root(a); });
    }
    static void op_tanh_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return tanh(a); });
    }
    static void op_sigmoid_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return sigmoid(a); });
    }
    static void op_sin_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return wave<false>(a); });
    }
    static void op_cos_f(Machine &m, const ScoreInstruction &x) {
        m.template map1<V>(x, [](V a) { return wave<true>(a); });
    }
    static void op_add_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return a + b; });
    }
    static void op_sub_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return a - b; });
    }
    static void op_mul_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return a * b; });
    }
    static void op_mul_add_f(Machine &m, const ScoreInstruction &x) {
        m.template map3<V>(x, [](V a, V b, V c) { return a * b + c; });
    }
    static void op_sum_mul_f(Machine &m, const ScoreInstruction &x) {
        m.template map3<U, V>(x, [](U a, U b, V c) { return __builtin_convertvector((I)(a + b), V) * c; });
    }
    static void op_mul_sub_f(Machine &m, const ScoreInstruction &x) {
        m.template map3<V>(x, [](V a, V b, V c) { return a * b - c; });
    }
    static void op_sub_mul_f(Machine &m, const ScoreInstruction &x) {
        m.template map3<V>(x, [](V a, V b, V c) { return c - a * b; });
    }
    static void op_div_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return a / b; });
    }
    static void op_pow_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return raise_to(a, b); });
    }
    static void op_floordiv_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return each(a, b, floor_quotient<C>); });
    }
    static void op_mod_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return each(a, b, modulo<C>); });
    }
    static void op_min_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return minimum(a, b); });
    }
    static void op_max_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return maximum(a, b); });
    }
    static void op_lt_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return (I)(a < b); });
    }
    static void op_le_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return (I)(a <= b); });
    }
    static void op_eq_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return (I)(a == b); });
    }
    static void op_ne_f(Machine &m, const ScoreInstruction &x) {
        m.template map2<V>(x, [](V a, V b) { return (I)(a != b); });
    }
    static void op_neg_i(Machine &m, const ScoreInstruction &x) {
        m.template map1<U>(x, [](U a) { return U{} - a; });
    }
    static void op_abs_i(Machine &m, const ScoreInstruction &x) {
        m.template map1<U>(x, [](U a) { return (I)a < I{} ? U{} - a : a; });
    }
    static void op_sign_i(Machine &m, const ScoreInstruction &x) {
        m.template map1<I>(x, [](I a) { return (I)(a < I{}) - (I)(a > I{}); });
    }
    static void op_add_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<U>(x, [](U a, U b) { return a + b; });
    }
    static void op_sub_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<U>(x, [](U a, U b) { return a - b; });
    }
    static void op_mul_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<U>(x, [](U a, U b) { return a * b; });
    }
    static void op_floordiv_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return divide_down(a, b); });
    }
    static void op_mod_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) {
            const I r = (I)((U)a - (U)divide_down(a, b) * (U)b);
            return b == I{} ? I{} : r;
        });
    }
    static void op_min_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a < b ? a : b; });
    }
    static void op_max_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a > b ? a : b; });
    }
    static void op_lt_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return (I)(a < b); });
    }
    static void op_le_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return (I)(a <= b); });
    }
    static void op_eq_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return (I)(a == b); });
    }
    static void op_ne_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return (I)(a != b); });
    }
    static void op_shl_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return (I)((U)a << (U)shift_count(b)); });
    }
    static void op_shr_i(Machine &m, const ScoreInstruction &x) {
        m.template map2<I>(x, [](I a, I b) { return a >> shift_count(b); });
    }
    static constexpr Step kSteps[] = {
#define ANYATTN_SCORE_OPERATION(name, operands) &ScoreMachine::op_##name,
#include "../score_operations.def"
#undef ANYATTN_SCORE_OPERATION
    };
};

}  // namespace
}  // namespace anyattn
