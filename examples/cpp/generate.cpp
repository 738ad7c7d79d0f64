// Text generation in C++ with a KV cache: a small transformer with random weights, without any other library.
//
// Compile it as attention.cpp says, or by CMake. Each step computes one token and appends its keys and values to the
// cache. A second model, which computes the whole sequence again at each step, must choose the same tokens.
#include <anyattn.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

namespace {

using Floats = std::vector<float>;

constexpr int64_t kVocabulary = 64, kWidth = 64, kLayers = 2, kHeads = 4, kHeadsKv = 2, kDim = 16;
constexpr int64_t kTokens = 40;  // of the prompt and the answer

std::mt19937 generator(0);

void require(anyattn::Status status) {
    if (status == anyattn::Status::SUCCESS) return;
    std::printf("%s: %s\n", anyattn::get_error_string(status), anyattn::error_message());
    std::exit(1);
}

// y = x W, with x (rows, in) and W (in, out).
struct Linear {
    int64_t in, out;
    Floats weights;

    Linear(int64_t in_, int64_t out_) : in(in_), out(out_), weights(size_t(in_ * out_)) {
        std::normal_distribution<float> normal(0, 1 / std::sqrt(float(in)));
        for (float &weight : weights) weight = normal(generator);
    }
    Floats operator()(const Floats &x) const {
        const auto rows = int64_t(x.size()) / in;
        Floats y(size_t(rows * out));
        for (int64_t i = 0; i < rows * in; ++i)
            for (int64_t j = 0; j < out; ++j)
                y[size_t(i / in * out + j)] += x[size_t(i)] * weights[size_t(i % in * out + j)];
        return y;
    }
};

struct Layer {
    Linear q{kWidth, kHeads *kDim}, k{kWidth, kHeadsKv *kDim}, v{kWidth, kHeadsKv *kDim}, out{kHeads * kDim, kWidth};
    Floats k_cache = Floats(kTokens * kHeadsKv * kDim), v_cache = k_cache;
};

struct Model {
    std::vector<Layer> layers = std::vector<Layer>(kLayers);
    Linear embedding{1, kVocabulary *kWidth}, logits{kWidth, kVocabulary};
    int32_t cached = 0;  // tokens whose keys and values are in the cache
    anyattn::Workspace workspace;  // shared by all calls, so that a step allocates no workspace

    // Appends the keys and values of the new rows to the cache, then attends to the whole cache.
    Floats attend(Layer &layer, const Floats &x) {
        const int64_t rows = int64_t(x.size()) / kWidth;
        const Floats q = layer.q(x), k = layer.k(x), v = layer.v(x);
        Floats out(q.size());
        const int32_t before[] = {cached}, after[] = {cached + int32_t(rows)};
        anyattn::Append append;
        append.k = anyattn::view(layer.k_cache.data(), {1, kTokens, kHeadsKv, kDim});
        append.v = anyattn::view(layer.v_cache.data(), {1, kTokens, kHeadsKv, kDim});
        append.new_k = anyattn::view(k.data(), {1, rows, kHeadsKv, kDim});
        append.new_v = anyattn::view(v.data(), {1, rows, kHeadsKv, kDim});
        append.cache_seqlens = before;
        require(append.run());

        anyattn::Call call;
        call.q = anyattn::view(q.data(), {1, rows, kHeads, kDim});
        call.k = append.k;
        call.v = append.v;
        call.out = anyattn::view(out.data(), {1, rows, kHeads, kDim});
        call.seqused_k = after;
        call.causal = true;
        call.workspace = &workspace;
        require(call.forward());
        return layer.out(out);
    }

    // The most likely token after the new tokens, which follow those in the cache.
    int64_t next(const std::vector<int64_t> &tokens) {
        Floats x;
        const float *rows = embedding.weights.data();
        for (int64_t token : tokens) x.insert(x.end(), rows + token * kWidth, rows + (token + 1) * kWidth);
        for (Layer &layer : layers) {
            const Floats y = attend(layer, x);
            std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<float>());
        }
        cached += int32_t(tokens.size());
        const Floats scores = logits(Floats(x.end() - kWidth, x.end()));  // of the last row
        return std::max_element(scores.begin(), scores.end()) - scores.begin();
    }
};

}  // namespace

int main() {
    Model model;
    generator.seed(0);
    Model slow;  // with the same weights
    std::vector<int64_t> tokens = {5, 16, 27, 38, 49, 60, 7}, fresh = tokens;  // fresh: not in the cache yet
    bool equal = true;
    while (int64_t(tokens.size()) < kTokens) {
        fresh = {model.next(fresh)};
        slow.cached = 0;
        equal = equal && slow.next(tokens) == fresh[0];
        tokens.push_back(fresh[0]);
        std::printf("%d ", int(fresh[0]));
    }
    std::puts(equal ? "\nall tokens equal those of the whole sequence" : "\nDIFFERENT from the whole sequence");
    return equal ? 0 : 1;
}
