// Attention from C++: a forward pass, its gradients against finite differences, and decoding with a KV cache.
//
//     g++ -std=c++17 attention.cpp -I"$(python -c 'import anyattn; print(anyattn.get_include())')" $LIBRARY -Wl,-rpath,$(dirname $LIBRARY)
//
// with LIBRARY="$(python -c 'import anyattn; print(anyattn.get_library())')"; or by CMake, see CMakeLists.txt.
#include <anyattn.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using Floats = std::vector<float>;

Floats normal(int64_t size, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> distribution;
    Floats values(static_cast<size_t>(size));
    for (float &value : values) value = distribution(random);
    return values;
}

// Ends the program with the words of a refusal.
void require(anyattn::Status status) {
    if (status == anyattn::Status::SUCCESS) return;
    std::printf("%s: %s\n", anyattn::get_error_string(status), anyattn::error_message());
    std::exit(1);
}

bool report(const char *what, double error, double accepted) {
    const bool good = error <= accepted;
    std::printf("  %-52s %.1e  %s\n", what, error, good ? "ok" : "WRONG");
    return good;
}

double largest_difference(const Floats &a, const Floats &b) {
    double largest = 0;
    for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(double(a[i]) - b[i]));
    return largest;
}

// Two heads of causal self-attention, (batch, nheads, seqlen, head_dim), as softmax(QK^T)V says.
constexpr int64_t kBatch = 1, kHeads = 2, kLength = 48, kDim = 32;
const float kScale = 1 / std::sqrt(float(kDim));

Floats plain(const Floats &q, const Floats &k, const Floats &v) {
    Floats out(q.size());
    for (int64_t head = 0; head < kBatch * kHeads; ++head) {
        const float *rows = q.data() + head * kLength * kDim, *keys = k.data() + head * kLength * kDim;
        const float *values = v.data() + head * kLength * kDim;
        for (int64_t i = 0; i < kLength; ++i) {
            double sum = 0, weighted[kDim] = {};
            for (int64_t j = 0; j <= i; ++j) {
                double score = 0;
                for (int64_t d = 0; d < kDim; ++d) score += double(rows[i * kDim + d]) * keys[j * kDim + d];
                const double weight = std::exp(score * kScale);
                sum += weight;
                for (int64_t d = 0; d < kDim; ++d) weighted[d] += weight * values[j * kDim + d];
            }
            for (int64_t d = 0; d < kDim; ++d) {
                out[size_t((head * kLength + i) * kDim + d)] = float(weighted[d] / sum);
            }
        }
    }
    return out;
}

struct Forward {
    Floats out, lse;
};

Forward forward(const Floats &q, const Floats &k, const Floats &v) {
    Forward result{Floats(q.size()), Floats(size_t(kBatch * kHeads * kLength))};
    require(anyattn::flash_attention_forward(q.data(), k.data(), v.data(), result.out.data(), result.lse.data(), kBatch,
                                             kHeads, kLength, kDim, kScale, true));
    return result;
}

double dot(const Floats &a, const Floats &b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * b[i];
    return sum;
}

// The slope of <out, dout> along a direction of one input, by central differences and by its gradient.
double slope_error(const Floats *inputs, int which, const Floats &dout, const Floats &gradient) {
    const Floats direction = normal(int64_t(gradient.size()), 9);
    const float step = 2e-3f;
    double ends[2];
    for (int end = 0; end < 2; ++end) {
        Floats moved[3] = {inputs[0], inputs[1], inputs[2]};
        for (size_t i = 0; i < direction.size(); ++i) moved[which][i] += (end ? step : -step) * direction[i];
        ends[end] = dot(forward(moved[0], moved[1], moved[2]).out, dout);
    }
    const double numeric = (ends[1] - ends[0]) / (2 * double(step)), exact = dot(gradient, direction);
    return std::abs(numeric - exact) / (1 + std::abs(exact));
}

bool passes() {
    const int64_t size = kBatch * kHeads * kLength * kDim;
    const Floats inputs[3] = {normal(size, 1), normal(size, 2), normal(size, 3)}, dout = normal(size, 4);
    const Forward result = forward(inputs[0], inputs[1], inputs[2]);
    Floats gradients[3] = {Floats(dout.size()), Floats(dout.size()), Floats(dout.size())};
    require(anyattn::flash_attention_backward(inputs[0].data(), inputs[1].data(), inputs[2].data(), result.out.data(),
                                              result.lse.data(), dout.data(), gradients[0].data(), gradients[1].data(),
                                              gradients[2].data(), kBatch, kHeads, kLength, kDim, kScale, true));

    bool good = report("forward, against softmax(QK^T)V",
                       largest_difference(result.out, plain(inputs[0], inputs[1], inputs[2])), 1e-5);
    const char *const names[3] = {"dq, against finite differences", "dk, against finite differences",
                                  "dv, against finite differences"};
    for (int which = 0; which < 3; ++which) {
        good = report(names[which], slope_error(inputs, which, dout, gradients[which]), 1e-2) && good;
    }
    return good;
}

// Eight query heads share two key heads. Rows come one at a time; each step appends its key and value to the cache and
// attends to all that are there. Together they are the rows of one causal call.
bool decoding() {
    constexpr int64_t steps = 40, heads = 8, heads_kv = 2, dim = 64;
    const Floats q = normal(steps * heads * dim, 5), k = normal(steps * heads_kv * dim, 6);
    const Floats v = normal(steps * heads_kv * dim, 7);
    Floats whole(q.size()), stepwise(q.size()), k_cache(k.size()), v_cache(v.size());

    anyattn::Workspace workspace;
    anyattn::Call prefill;
    prefill.q = anyattn::view(q.data(), {1, steps, heads, dim});
    prefill.k = anyattn::view(k.data(), {1, steps, heads_kv, dim});
    prefill.v = anyattn::view(v.data(), {1, steps, heads_kv, dim});
    prefill.out = anyattn::view(whole.data(), {1, steps, heads, dim});
    prefill.causal = true;
    prefill.workspace = &workspace;
    require(prefill.forward());

    anyattn::Append append;
    append.k = anyattn::view(k_cache.data(), {1, steps, heads_kv, dim});
    append.v = anyattn::view(v_cache.data(), {1, steps, heads_kv, dim});
    anyattn::Call step;
    step.k = append.k;
    step.v = append.v;
    step.workspace = &workspace;
    for (int32_t t = 0; t < steps; ++t) {
        const int32_t before[1] = {t}, now[1] = {t + 1};
        append.new_k = anyattn::view(k.data() + t * heads_kv * dim, {1, 1, heads_kv, dim});
        append.new_v = anyattn::view(v.data() + t * heads_kv * dim, {1, 1, heads_kv, dim});
        append.cache_seqlens = before;
        require(append.run());
        step.q = anyattn::view(q.data() + t * heads * dim, {1, 1, heads, dim});
        step.out = anyattn::view(stepwise.data() + t * heads * dim, {1, 1, heads, dim});
        step.seqused_k = now;
        require(step.forward());
    }
    return report("40 decoding steps, against one causal call", largest_difference(whole, stepwise), 1e-5);
}

// Half precision, and what a refusal says.
bool half_precision() {
    const int64_t size = kBatch * kHeads * kLength * kDim;
    Floats inputs[3] = {normal(size, 1), normal(size, 2), normal(size, 3)};
    std::vector<anyattn::float16> halves[4];
    for (int which = 0; which < 3; ++which) {
        for (float &value : inputs[which]) {
            halves[which].emplace_back(value);
            value = halves[which].back();
        }
    }
    halves[3].resize(size_t(size));
    Floats lse(size_t(kBatch * kHeads * kLength));
    require(anyattn::flash_attention_forward(halves[0].data(), halves[1].data(), halves[2].data(), halves[3].data(),
                                             lse.data(), kBatch, kHeads, kLength, kDim, kScale, true));
    const Floats out(halves[3].begin(), halves[3].end());
    return report("float16 forward", largest_difference(out, plain(inputs[0], inputs[1], inputs[2])), 4e-3);
}

bool refusals() {
    float x = 0;
    const auto status = anyattn::flash_attention_forward(&x, &x, nullptr, &x, &x, 1, 1, 1, 1, 1.0f, false);
    std::printf("  a missing array: %s: %s\n", anyattn::get_error_string(status), anyattn::error_message());
    return status == anyattn::FlashAttentionError::NULL_POINTER;
}

}  // namespace

int main() {
    const uint32_t version = anyattn_version();
    std::printf("anyattn %u.%u.%u, %d threads\n", version >> 16, version >> 8 & 255, version & 255,
                anyattn_num_threads());
    bool good = passes();
    good = decoding() && good;
    good = half_precision() && good;
    good = refusals() && good;
    std::puts(good ? "all as it should be" : "SOMETHING IS WRONG");
    return good ? 0 : 1;
}
