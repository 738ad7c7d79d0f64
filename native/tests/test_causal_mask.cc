#include <algorithm>

#include "check.h"
#include "dense.h"

TEST(lengths) {
    for (int64_t seqlen : {1, 2, 63, 64, 65, 129}) {
        for (bool causal : {false, true}) {
            Dense<float> dense;
            dense.seqlen = seqlen;
            dense.causal = causal;
            dense.make();
            CHECK(dense.matches());
        }
    }
}

TEST(the_first_row_sees_the_first_key_alone) {
    Dense<float> dense;
    dense.causal = true;
    dense.make();
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (int64_t h = 0; h < dense.heads; ++h) {
        double score = 0;
        for (int64_t d = 0; d < dense.dim; ++d) {
            score += double(dense.Q[dense.at(0, h, 0, d)]) * dense.K[dense.at(0, h, 0, d)];
            CHECK(dense.O[dense.at(0, h, 0, d)] == dense.V[dense.at(0, h, 0, d)]);
        }
        CHECK(std::abs(dense.L[dense.row(0, h, 0)] - dense.scale * score) < 1e-5);
    }
}

TEST(later_keys_change_nothing) {
    Dense<float> dense;
    dense.causal = true;
    dense.make();
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    const std::vector<float> before = dense.O;
    const int64_t first = 41;
    for (int64_t h = 0; h < dense.heads; ++h) {
        for (int64_t i = first; i < dense.seqlen; ++i) {
            for (int64_t d = 0; d < dense.dim; ++d) {
                dense.K[dense.at(1, h, i, d)] = 1e3f;
                dense.V[dense.at(1, h, i, d)] = -1e3f;
            }
        }
    }
    CHECK(dense.forward() == anyattn::Status::SUCCESS);
    for (int64_t h = 0; h < dense.heads; ++h) {
        const auto *from = before.data() + dense.at(1, h, 0, 0), *now = dense.O.data() + dense.at(1, h, 0, 0);
        CHECK(std::equal(from, from + first * dense.dim, now));
        CHECK(!std::equal(from + first * dense.dim, from + (first + 1) * dense.dim, now + first * dense.dim));
    }
}

// A key's gradient comes from its own row and later ones.
TEST(gradients_of_later_keys_are_zero) {
    Dense<float> dense;
    dense.causal = true;
    dense.make();
    const int64_t last = 37;
    for (int64_t i = last + 1; i < dense.seqlen; ++i) {
        for (int64_t d = 0; d < dense.dim; ++d) dense.dO[dense.at(0, 0, i, d)] = 0;
    }
    CHECK(dense.matches());
    for (int64_t i = 0; i < dense.seqlen; ++i) {
        for (int64_t d = 0; d < dense.dim; ++d) {
            const size_t n = dense.at(0, 0, i, d);
            CHECK((dense.dV[n] == 0) == (i > last));
            CHECK(dense.dK[n] == 0 || i <= last);
        }
    }
}

// The last row sees the last key; with top_left, row i sees the keys up to i.
TEST(alignment_of_unequal_lengths) {
    const std::vector<float> zeros(8 * 4, 0.f);
    std::vector<float> values(8 * 4), out(3 * 4);
    for (size_t n = 0; n < values.size(); ++n) values[n] = float(n / 4);
    anyattn::Call call;
    call.q = anyattn::view(zeros.data(), {1, 3, 1, 4});
    call.k = anyattn::view(zeros.data(), {1, 8, 1, 4});
    call.v = anyattn::view(values.data(), {1, 8, 1, 4});
    call.out = anyattn::view(out.data(), {1, 3, 1, 4});
    call.causal = true;
    for (bool top_left : {false, true}) {
        call.top_left = top_left;
        CHECK(call.forward() == anyattn::Status::SUCCESS);
        for (int64_t i = 0; i < 3; ++i) {
            const int64_t last = top_left ? i : i + 5;  // equal scores: the mean of 0 ... last
            CHECK(std::abs(out[size_t(4 * i)] - double(last) / 2) < 1e-6);
        }
    }
}
