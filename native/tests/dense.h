// Self-attention as flash_attention_forward and flash_attention_backward take it: contiguous arrays, heads before rows.
#pragma once
#include <random>
#include <vector>

#include "anyattn.hpp"
#include "reference.h"

template <class T>
struct Dense {
    int64_t batch = 2, heads = 3, seqlen = 70, dim = 32;
    float scale = 0.25f;
    bool causal = false;
    std::vector<T> Q, K, V, O, dO, dQ, dK, dV;
    std::vector<float> L;

    // Draws the inputs for the sizes above; results are NaN.
    void make(uint32_t seed = 1) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const size_t size = static_cast<size_t>(batch * heads * seqlen * dim);
        for (std::vector<T> *input : {&Q, &K, &V, &dO}) {
            input->clear();
            while (input->size() < size) input->push_back(T(normal(random)));
        }
        for (std::vector<T> *result : {&O, &dQ, &dK, &dV}) result->assign(size, T(float(kNan)));
        L.assign(static_cast<size_t>(batch * heads * seqlen), float(kNan));
    }

    anyattn::Status forward() {
        return anyattn::flash_attention_forward(Q.data(), K.data(), V.data(), O.data(), L.data(), batch, heads, seqlen,
                                                dim, scale, causal);
    }

    anyattn::Status backward() {
        return anyattn::flash_attention_backward(Q.data(), K.data(), V.data(), O.data(), L.data(), dO.data(), dQ.data(),
                                                 dK.data(), dV.data(), batch, heads, seqlen, dim, scale, causal);
    }

    // Element d of row i.
    size_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
        return static_cast<size_t>(((b * heads + h) * seqlen + i) * dim + d);
    }
    size_t row(int64_t b, int64_t h, int64_t i) const { return static_cast<size_t>((b * heads + h) * seqlen + i); }

    // Both passes succeed, and give what the reference gives.
    bool matches() {
        if (forward() != anyattn::Status::SUCCESS || backward() != anyattn::Status::SUCCESS) {
            std::printf("  %s\n", anyattn::error_message());
            return false;
        }
        const anyattn_call call = described();
        return forward_matches(call) && backward_matches(call);
    }

    // The same arrays, as the reference reads them.
    anyattn_call described() {
        anyattn_call call{};
        call.size = sizeof call;
        call.batch = call.batch_k = batch;
        call.nheads = call.nheads_kv = heads;
        call.seqlen_q = call.seqlen_k = seqlen;
        call.head_dim = call.head_dim_v = dim;
        call.scale = scale;
        call.flags = causal ? ANYATTN_HAS_RIGHT : 0;
        call.q = array(Q), call.k = array(K), call.v = array(V), call.out = array(O);
        call.dout = array(dO), call.dq = array(dQ), call.dk = array(dK), call.dv = array(dV);
        call.lse = anyattn_contiguous(L.data(), ANYATTN_FLOAT32, heads, seqlen, 1);
        return call;
    }

  private:
    anyattn_array array(const std::vector<T> &values) const {
        anyattn_array result = anyattn_contiguous(values.data(), anyattn::Dtype<T>::value, heads, seqlen, dim);
        std::swap(result.stride[1], result.stride[2]);
        return result;
    }
};
