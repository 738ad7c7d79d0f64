// Rows are computed tile by tile: whatever the order in which scores come, the result is softmax over all of them.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "dense.h"

namespace {

Dense<float> long_row() {
    Dense<float> dense;
    dense.batch = dense.heads = 1;
    dense.seqlen = 600;
    dense.dim = 16;
    dense.make();
    return dense;
}

double difference(const std::vector<float> &a, const std::vector<float> &b) {
    double largest = 0;
    for (size_t n = 0; n < a.size(); ++n) largest = std::max(largest, std::abs(double(a[n]) - b[n]));
    return largest;
}

void reorder(std::vector<float> *rows, int64_t dim, const std::vector<size_t> &order) {
    const std::vector<float> old = *rows;
    for (size_t i = 0; i < order.size(); ++i) {
        std::copy_n(old.data() + order[i] * size_t(dim), dim, rows->data() + i * size_t(dim));
    }
}

}  // namespace

// In rising order every tile has a new maximum, in falling order none but the first.
TEST(order_of_keys_does_not_matter) {
    Dense<float> drawn = long_row();
    for (int64_t d = 0; d < drawn.dim; ++d) drawn.Q[size_t(d)] = d == 0 ? 40.f : 0.f;
    CHECK(drawn.matches());
    std::vector<size_t> order(static_cast<size_t>(drawn.seqlen));
    std::iota(order.begin(), order.end(), size_t(0));
    const std::vector<float> &keys = drawn.K;
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a * 16] < keys[b * 16]; });
    for (int direction = 0; direction < 2; ++direction) {
        Dense<float> sorted = drawn;
        reorder(&sorted.K, 16, order);
        reorder(&sorted.V, 16, order);
        CHECK(sorted.matches());
        CHECK(difference(sorted.O, drawn.O) < 2e-6);
        CHECK(difference(sorted.L, drawn.L) < 1e-5);
        std::reverse(order.begin(), order.end());
    }
}

TEST(weights_sum_to_one) {
    Dense<float> dense = long_row();
    std::fill(dense.V.begin(), dense.V.end(), 1.f);
    for (bool causal : {false, true}) {
        dense.causal = causal;
        CHECK(dense.forward() == anyattn::Status::SUCCESS);
        for (float value : dense.O) CHECK(std::abs(value - 1) < 2e-6);
    }
}

TEST(lse_is_the_logarithm_of_the_sum) {
    Dense<float> dense = long_row();
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (int64_t i : {0, 63, 64, 599}) {
        double sum = 0;
        for (int64_t j = 0; j < dense.seqlen; ++j) {
            double score = 0;
            for (int64_t d = 0; d < dense.dim; ++d) {
                score += double(dense.Q[dense.at(0, 0, i, d)]) * dense.K[dense.at(0, 0, j, d)];
            }
            sum += std::exp(dense.scale * score);
        }
        CHECK(std::abs(dense.L[size_t(i)] - std::log(sum)) < 1e-5);
    }
}

// One vector added to all keys adds the same to all scores of a row: lse moves by it and the weights stay.
TEST(a_shift_of_all_scores_moves_lse_alone) {
    Dense<float> dense = long_row();
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    Dense<float> shifted = dense;
    for (size_t n = 0; n < shifted.K.size(); n += size_t(dense.dim)) shifted.K[n] += 8;
    CHECK(shifted.forward() == anyattn::Status::SUCCESS);
    CHECK(difference(shifted.O, dense.O) < 1e-5);
    for (int64_t i = 0; i < dense.seqlen; ++i) {
        const double shift = 8 * dense.scale * dense.Q[dense.at(0, 0, i, 0)];
        CHECK(std::abs(shifted.L[size_t(i)] - dense.L[size_t(i)] - shift) < 2e-5);
    }
}

// The two halves of the keys, weighted by their share of the sum.
TEST(parts_merge_by_their_lse) {
    const Dense<float> parts = long_row();
    const int64_t half = parts.seqlen / 2, rows = parts.seqlen;
    std::vector<float> out[2], lse[2];
    for (int part = 0; part < 2; ++part) {
        out[part].resize(parts.O.size());
        lse[part].resize(parts.L.size());
        anyattn::Call call;
        call.q = anyattn::view(parts.Q.data(), {1, rows, 1, parts.dim});
        call.k = anyattn::view(parts.K.data() + part * half * parts.dim, {1, half, 1, parts.dim});
        call.v = anyattn::view(parts.V.data() + part * half * parts.dim, {1, half, 1, parts.dim});
        call.out = anyattn::view(out[part].data(), {1, rows, 1, parts.dim});
        call.lse = anyattn::view(lse[part].data(), {1, 1, rows});
        call.scale = parts.scale;
        CHECK(call.forward() == anyattn::Status::SUCCESS);
    }
    Dense<float> whole = parts;
    CHECK(whole.forward() == anyattn::Status::SUCCESS);
    for (size_t n = 0; n < whole.O.size(); ++n) {
        const size_t i = n / size_t(parts.dim);
        const double a = std::exp(lse[0][i] - whole.L[i]), b = std::exp(lse[1][i] - whole.L[i]);
        CHECK(std::abs(a * out[0][n] + b * out[1][n] - whole.O[n]) < 2e-6);
    }
}
