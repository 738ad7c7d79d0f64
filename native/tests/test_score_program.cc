// Score programs: a function and a mask against the built-in terms, and programs that no kernel could run. Run under the
// sanitizers.
#include "score_program.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "fixture.h"

namespace {

using Code = std::vector<ScoreInstruction>;

// A section without results and terms but those of `head` (registers, score, mask, slope, curvature, reads_score, terms).
void add_section(std::vector<int32_t> &words, const std::vector<int32_t> &head, const std::vector<Code> &stages,
                 const std::vector<int32_t> &terms) {
    words.insert(words.end(), head.begin(), head.end());
    for (const Code &stage : stages) words.push_back(int32_t(stage.size()));
    for (const Code &stage : stages) {
        for (const ScoreInstruction &x : stage) words.insert(words.end(), {x.operation, x.to, x.a, x.b, x.c});
    }
    words.insert(words.end(), terms.begin(), terms.end());
}

// score_mod = 2 score + table[h, q_idx - kv_idx + keys], mask_mod = kv_idx <= q_idx; and the gradient of the table.
std::vector<int32_t> relative(int64_t queries, int64_t keys, int64_t heads) {
    const int32_t width = int32_t(queries + keys), bits_of_2 = 0x40000000;
    std::vector<int32_t> words = {kScoreVersion, 1, 0, 0, int32_t(heads) * width};
    const int32_t lanes_5 = 5 + kFormLanes * kScoreRegisters, keys_9 = 9 + kFormKeys * kScoreRegisters,
                  once_3 = 3 + kFormOnce * kScoreRegisters;
    const Code once = {{kScore_const_i, 1, width, 0, 0},
                       {kScore_const_i, 2, int32_t(keys), 0, 0},
                       {kScore_const_f, 3, 0, bits_of_2, 0}};
    const Code lanes = {{kScore_h, 4, 0, 0, 0},     {kScore_q_idx, 5, 0, 0, 0}, {kScore_spread_once, 6, 1, 0, 0},
                        {kScore_mul_i, 4, 4, 6, 0}, {kScore_add_i, 4, 4, 5, 0}, {kScore_spread_once, 6, 2, 0, 0},
                        {kScore_add_i, 4, 4, 6, 0}};
    const Code of_keys = {{kScore_kv_idx, 7, 0, 0, 0}, {kScore_neg_i, 8, 7, 0, 0}};
    const Code results = {{kScore_spread_keys, 9, 7, 0, 0},
                          {kScore_read_rows_f, 13, 4, 0, 8},
                          {kScore_mul_f, 14, 0, once_3, 0},
                          {kScore_le_i, 15, keys_9, lanes_5, 0},
                          {kScore_add_f, 0, 14, 13, 0}};
    add_section(words, {16, 0, 15, -1, -1, 1, 0}, {once, lanes, of_keys, results}, {});
    add_section(words, {16, 0, 15, once_3, -1, 1, 0}, {once, lanes, of_keys, results}, {});
    add_section(words, {16, -1, -1, -1, -1, 0, 1}, {once, lanes, of_keys, {}}, {0, -1, 4, 8, kOfLanes});
    add_section(words, {16, 0, 15, once_3, -1, 1, 0}, {once, lanes, of_keys, results}, {});
    add_section(words, {1, -1, -1, -1, -1, 0, 0}, {{}, {}, {}, {}}, {});
    return words;
}

// A call whose scores are those of `relative`, by a program or by a bias.
struct Relative {
    Fixture fixture;
    std::vector<int32_t> words;
    int64_t width;

    explicit Relative(const Config &config)
        : fixture(config), words(relative(config.seqlen_q, config.seqlen_k, config.nheads)) {
        anyattn_call &call = fixture.call;
        width = config.seqlen_q + config.seqlen_k;
        call.num_captured = config.nheads * width;
        const int32_t dtype = config.dtype == ANYATTN_FLOAT64 ? ANYATTN_FLOAT64 : ANYATTN_FLOAT32;
        call.captured = flat(fixture.memory.normal(dtype, {1, 1, 1, call.num_captured}));
        call.dcaptured = flat(fixture.memory.array(dtype, {1, 1, 1, call.num_captured}));
    }
    // Elements behind stride 0.
    static anyattn_array flat(anyattn_array array) {
        array.stride[0] = 1;
        return array;
    }
    static double at(const anyattn_array &array, int64_t i) { return get(array, {i, 0, 0, 0}); }

    void use_program() {
        fixture.call.score_program = words.data();
        fixture.call.score_words = int64_t(words.size());
    }
};

Config medium(int32_t dtype) {
    Config config;
    config.batch = 2;
    config.seqlen_q = 70;
    config.seqlen_k = 101;
    config.nheads = 4;
    config.nheads_kv = 2;
    config.dtype = dtype;
    config.seed = 3;
    return config;
}

std::vector<double> outputs(const anyattn_call &call) {
    std::vector<double> found;
    for (int64_t b = 0; b < call.batch; ++b)
        for (int64_t i = 0; i < call.seqlen_q; ++i)
            for (int64_t h = 0; h < call.nheads; ++h)
                for (int64_t d = 0; d < call.head_dim; ++d) {
                    found.push_back(get(call.out, {b, i, h, d}));
                    found.push_back(get(call.dq, {b, i, h, d}));
                    found.push_back(get(call.tout, {b, i, h, d}));
                }
    return found;
}

// Compares the results of a program with those of the same terms as a bias, whose gradient has the terms of the table's.
void check_equal(const Relative &program, const Relative &builtin, double tolerance) {
    const anyattn_call &call = builtin.fixture.call;
    const std::vector<double> found = outputs(program.fixture.call), expected = outputs(call);
    for (size_t i = 0; i < found.size(); ++i) CHECK(std::fabs(found[i] - expected[i]) < tolerance);
    std::vector<double> sums(size_t(call.nheads * builtin.width));
    for (int64_t h = 0; h < call.nheads; ++h)
        for (int64_t i = 0; i < call.seqlen_q; ++i)
            for (int64_t j = 0; j < call.seqlen_k; ++j)
                sums[size_t(h * builtin.width + i - j + call.seqlen_k)] += get(call.dbias, {0, h, i, j});
    for (size_t i = 0; i < sums.size(); ++i) {
        CHECK(std::fabs(sums[i] - Relative::at(program.fixture.call.dcaptured, int64_t(i))) < 20 * tolerance);
    }
}

}  // namespace

TEST(a_table_of_distances_is_a_bias) {
    for (int32_t target : targets()) {
        for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_FLOAT64}) {
            Config config = medium(dtype);
            config.target = target;
            Relative program(config);
            program.use_program();
            config.bias = 1;  // shared by the batch
            config.scale *= 2;
            config.flags = ANYATTN_HAS_RIGHT | ANYATTN_TOP_LEFT;
            Relative builtin(config);
            anyattn_call &call = builtin.fixture.call;
            call.q = program.fixture.call.q, call.k = program.fixture.call.k, call.v = program.fixture.call.v;
            call.dout = program.fixture.call.dout;
            call.tq = program.fixture.call.tq, call.tk = program.fixture.call.tk, call.tv = program.fixture.call.tv;
            call.dcaptured.data = call.tbias.data = nullptr;
            for (int64_t h = 0; h < call.nheads; ++h)
                for (int64_t i = 0; i < call.seqlen_q; ++i)
                    for (int64_t j = 0; j < call.seqlen_k; ++j) {
                        const int64_t index = h * builtin.width + i - j + call.seqlen_k;
                        set(call.bias, {0, h, i, j}, Relative::at(program.fixture.call.captured, index));
                    }
            const double tolerance = dtype == ANYATTN_FLOAT64 ? 1e-12 : 2e-5;
            for (Fixture *one : {&program.fixture, &builtin.fixture}) {
                CHECK(one->forward_tangent() == ANYATTN_SUCCESS && one->backward() == ANYATTN_SUCCESS);
            }
            check_equal(program, builtin, tolerance);
            for (Fixture *one : {&program.fixture, &builtin.fixture}) CHECK(one->second() == ANYATTN_SUCCESS);
            check_equal(program, builtin, 10 * tolerance);
        }
    }
}

TEST(a_block_mask_skips_and_spares_the_mask) {
    for (int32_t dtype : {ANYATTN_FLOAT32, ANYATTN_BFLOAT16}) {
        Config config = medium(dtype);
        Relative one(config);
        one.use_program();
        CHECK(one.fixture.forward() == ANYATTN_SUCCESS && one.fixture.second() == ANYATTN_SUCCESS);
        const std::vector<double> expected = outputs(one.fixture.call);
        anyattn_call &call = one.fixture.call;
        call.mask_block_q = call.mask_block_k = 16;
        const int64_t rows = (call.seqlen_q + 15) / 16, keys = (call.seqlen_k + 15) / 16;
        call.mask_blocks = one.fixture.memory.array(ANYATTN_BOOL, {1, 1, rows, keys});
        call.mask_blocks.stride[0] = call.mask_blocks.stride[1] = 0;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < keys; ++j) set(call.mask_blocks, {0, 0, i, j}, j < i ? 2 : j == i ? 1 : 0);
        CHECK(one.fixture.forward() == ANYATTN_SUCCESS && one.fixture.second() == ANYATTN_SUCCESS);
        const std::vector<double> found = outputs(call);
        const double tolerance = dtype == ANYATTN_BFLOAT16 ? 4e-2 : 2e-5;
        for (size_t i = 0; i < found.size(); ++i) CHECK(std::fabs(found[i] - expected[i]) < tolerance);
    }
}

TEST(a_program_that_ends_too_soon_is_refused) {
    Relative one(medium(ANYATTN_FLOAT32));
    one.use_program();
    for (int64_t words = 0; words < int64_t(one.words.size()); ++words) {
        // A copy without slack, so that a sanitizer sees a read behind its end.
        std::vector<int32_t> part(one.words.begin(), one.words.begin() + words);
        one.fixture.call.score_program = words ? part.data() : one.words.data();
        one.fixture.call.score_words = words;
        CHECK(anyattn_forward(&one.fixture.call) == ANYATTN_INVALID_VALUE);
        CHECK(one.fixture.message()[0]);
        CHECK(anyattn_workspace(&one.fixture.call, ANYATTN_BACKWARD) == -ANYATTN_INVALID_VALUE);
    }
}

TEST(no_program_leaves_its_registers_and_arrays) {
    Config config = medium(ANYATTN_FLOAT32);
    config.seqlen_q = 9, config.seqlen_k = 13;
    const int32_t values[] = {-1, 0, 1, 2, 3, 15, 16, 63, 64, 255, 256, 257, 600, 1 << 20, INT32_MAX, INT32_MIN};
    for (int32_t target : targets()) {
        config.target = target;
        Relative one(config);
        const std::vector<int32_t> good = one.words;
        one.use_program();
        for (size_t word = 0; word < good.size(); ++word) {
            for (int32_t value : values) {
                one.words = good;
                one.words[word] = value;
                one.use_program();
                const int32_t forward = anyattn_forward(&one.fixture.call);
                CHECK(forward == ANYATTN_SUCCESS || forward == ANYATTN_INVALID_VALUE);
                CHECK(forward == anyattn_backward(&one.fixture.call));
                CHECK(forward == anyattn_second(&one.fixture.call));
            }
        }
    }
}

TEST(gradients_of_captured_arrays_need_a_program) {
    Relative one(medium(ANYATTN_FLOAT32));
    CHECK(anyattn_backward(&one.fixture.call) == ANYATTN_NULL_POINTER);
    CHECK(anyattn_second(&one.fixture.call) == ANYATTN_NULL_POINTER);
}
