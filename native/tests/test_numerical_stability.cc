#include <algorithm>
#include <numeric>

#include "check.h"
#include "dense.h"

namespace {

template <class T>
bool all_finite(const std::vector<T> &values) {
    return std::all_of(values.begin(), values.end(), [](const T &value) { return std::isfinite(float(value)); });
}

}  // namespace

TEST(scores_of_ordinary_and_tiny_size) {
    for (float size : {0.f, 1e-20f, 1e-4f, 30.f}) {
        Dense<float> dense;
        dense.make();
        for (float &x : dense.Q) x *= size;
        CHECK(dense.matches());
    }
}

// exp of these scores is inf or 0; their rounding alone moves weights, but means stay between the values.
TEST(scores_of_absurd_size) {
    for (float size : {1e3f, 1e8f, 1e18f}) {
        Dense<float> dense;
        dense.make();
        for (std::vector<float> *input : {&dense.Q, &dense.K}) {
            for (float &x : *input) x *= size;
        }
        CHECK(dense.forward() == anyattn::Status::SUCCESS);
        CHECK(all_finite(dense.O) && all_finite(dense.L));
        const auto [low, high] = std::minmax_element(dense.V.begin(), dense.V.end());
        CHECK(*std::min_element(dense.O.begin(), dense.O.end()) >= *low * 1.00001f);
        CHECK(*std::max_element(dense.O.begin(), dense.O.end()) <= *high * 1.00001f);
    }
}

// All keys are equal: the result is the mean of the values, and every dV the mean of dO, whatever the scores are.
template <class T>
bool equal_keys_share_evenly(float size, bool causal) {
    Dense<T> dense;
    dense.causal = causal;
    dense.seqlen = 130;
    dense.make();
    std::fill(dense.Q.begin(), dense.Q.end(), T(0.f));
    std::fill(dense.K.begin(), dense.K.end(), T(0.f));
    for (size_t i = 0; i < dense.Q.size(); i += size_t(dense.dim)) {
        dense.Q[i] = T(3 * size);
        dense.K[i] = T(-5 * size);
    }
    std::fill(dense.V.begin(), dense.V.end(), T(1.f));
    std::fill(dense.dO.begin(), dense.dO.end(), T(1.f));
    if (dense.forward() != anyattn::Status::SUCCESS || dense.backward() != anyattn::Status::SUCCESS) return false;
    const double eps = sizeof(T) == 2 ? 1.0 / 128 : 1e-6;
    double expected = causal ? 0 : 1;
    for (int64_t j = dense.seqlen - 1; j >= 0; --j) {
        if (causal) expected += 1.0 / double(j + 1);  // of the row that sees j + 1 keys
        const double value = double(float(dense.dV[dense.at(1, 2, j, 5)]));
        if (!(std::abs(value - expected) <= eps * expected)) return false;
        if (!(std::abs(double(float(dense.O[dense.at(1, 2, j, 5)])) - 1) <= eps)) return false;
    }
    return all_finite(dense.dQ) && all_finite(dense.dK);
}

TEST(equal_keys_share_evenly_at_any_size) {
    for (bool causal : {false, true}) {
        for (float size : {30.f, 1000.f, 10000.f}) {
            CHECK(equal_keys_share_evenly<anyattn::float16>(size, causal));
        }
        for (float size : {30.f, 1e3f, 1e5f, 1e9f, 1e18f}) CHECK(equal_keys_share_evenly<float>(size, causal));
    }
}

// exp(-20000) is 0 for all of them: only differences to the largest may be taken.
TEST(scores_far_below_zero) {
    Dense<float> dense;
    dense.batch = dense.heads = 1;
    dense.make();
    std::fill(dense.Q.begin(), dense.Q.end(), 50.f);
    std::fill(dense.K.begin(), dense.K.end(), -50.f);
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    // the budget of lse: a score is rounded, and so is the sum
    const double budget = 2 * double(std::numeric_limits<float>::epsilon()) * 20000;
    for (float lse : dense.L) CHECK(std::abs(lse - (-20000 + std::log(70.))) <= budget);
    for (int64_t d = 0; d < dense.dim; ++d) {
        double mean = 0;
        for (int64_t j = 0; j < dense.seqlen; ++j) mean += dense.V[dense.at(0, 0, j, d)] / double(dense.seqlen);
        CHECK(std::abs(dense.O[dense.at(0, 0, 9, d)] - mean) < 1e-6);
    }
}

// One key far above the others: its value, and nothing of theirs.
TEST(one_key_takes_all) {
    Dense<float> dense;
    dense.heads = dense.batch = 1;
    dense.make();
    std::fill(dense.Q.begin(), dense.Q.end(), 1.f);
    const int64_t winner = 66;
    for (int64_t d = 0; d < dense.dim; ++d) dense.K[dense.at(0, 0, winner, d)] = 1e3f;
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (int64_t i = 0; i < dense.seqlen; ++i) {
        for (int64_t d = 0; d < dense.dim; ++d) {
            CHECK(dense.O[dense.at(0, 0, i, d)] == dense.V[dense.at(0, 0, winner, d)]);
        }
    }
}

TEST(equal_scores_give_the_mean) {
    Dense<float> dense;
    dense.batch = dense.heads = 1;
    dense.seqlen = 2000;
    dense.dim = 8;
    dense.make();
    std::fill(dense.Q.begin(), dense.Q.end(), 0.f);
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (int64_t d = 0; d < dense.dim; ++d) {
        double mean = 0;
        for (int64_t j = 0; j < dense.seqlen; ++j) mean += dense.V[dense.at(0, 0, j, d)] / double(dense.seqlen);
        for (int64_t i : {0, 777, 1999}) CHECK(std::abs(dense.O[dense.at(0, 0, i, d)] - mean) < 1e-6);
    }
    for (float lse : dense.L) CHECK(std::abs(lse - std::log(2000.)) < 1e-5);
}

// Scores beyond float16's range are none beyond float32's, and values at the end of the range stay there.
TEST(float16_has_room) {
    Dense<anyattn::float16> dense;
    dense.make();
    for (auto &x : dense.Q) x = anyattn::float16(100 * x);
    for (auto &x : dense.K) x = anyattn::float16(100 * x);
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    CHECK(forward_matches(dense.described()));
    std::fill(dense.V.begin(), dense.V.end(), anyattn::float16(65504.f));
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (const auto &value : dense.O) CHECK(value == 65504.f);
}

TEST(nan_stays_in_its_row) {
    Dense<float> dense;
    dense.make();
    const size_t n = dense.at(1, 2, 33, 4);
    dense.Q[n] = float(kNan);
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (size_t i = 0; i < dense.O.size(); ++i) {
        const size_t dim = size_t(dense.dim);
        CHECK(std::isnan(dense.O[i]) == (i / dim == n / dim));
    }
}
