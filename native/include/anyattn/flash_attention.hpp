// The functions of CuFlash-Attn, in host memory. Arrays are contiguous (batch, nheads, seqlen, head_dim). L is the
// logsumexp (batch, nheads, seqlen), which is float32 also for float16 arrays. `stream` must be null.
#pragma once
#include <cstdint>
#include <utility>

#include "call.hpp"

namespace anyattn {

namespace detail {

template <class T>
ArrayOf<T> heads_first(T *data, int64_t batch, int64_t heads, int64_t seqlen, int64_t head_dim) {
    return swap_axes<1, 2>(view(data, {batch, heads, seqlen, head_dim}));
}

inline Status check_arguments(int64_t batch, int64_t heads, int64_t seqlen, int64_t head_dim, const float *L,
                              void *stream) {
    const std::pair<const char *, int64_t> sizes[] = {
        {"batch_size", batch}, {"num_heads", heads}, {"seq_len", seqlen}, {"head_dim", head_dim}};
    for (const auto &size : sizes) {
        if (size.second >= 1) continue;
        return refuse(Status::INVALID_DIMENSION, "%s is %lld; accepted: 1 or more", size.first, Integer(size.second));
    }
    if (!L) return refuse(Status::NULL_POINTER, "L is null");
    if (!stream) return Status::SUCCESS;
    return refuse(Status::UNSUPPORTED, "stream is not null: this library computes in host memory, and has no streams");
}

template <class T>
Status forward(const T *Q, const T *K, const T *V, T *O, float *L, int64_t batch, int64_t heads, int64_t seqlen,
               int64_t head_dim, float scale, bool causal, void *stream) {
    const Status status = check_arguments(batch, heads, seqlen, head_dim, L, stream);
    if (status != Status::SUCCESS) return status;
    const auto array = [&](auto *data) { return heads_first(data, batch, heads, seqlen, head_dim); };
    Call call;
    call.q = array(Q);
    call.k = array(K);
    call.v = array(V);
    call.out = array(O);
    call.lse = view(L, {batch, heads, seqlen});
    call.scale = scale;
    call.causal = causal;
    return call.forward();
}

template <class T>
Status backward(const T *Q, const T *K, const T *V, const T *O, const float *L, const T *dO, T *dQ, T *dK, T *dV,
                int64_t batch, int64_t heads, int64_t seqlen, int64_t head_dim, float scale, bool causal,
                void *stream) {
    const Status status = check_arguments(batch, heads, seqlen, head_dim, L, stream);
    if (status != Status::SUCCESS) return status;
    const auto array = [&](auto *data) { return heads_first(data, batch, heads, seqlen, head_dim); };
    Call call;
    call.q = array(Q);
    call.k = array(K);
    call.v = array(V);
    call.out = array(const_cast<T *>(O));
    call.lse = view(const_cast<float *>(L), {batch, heads, seqlen});
    call.dout = array(dO);
    call.dq = array(dQ);
    call.dk = array(dK);
    call.dv = array(dV);
    call.scale = scale;
    call.causal = causal;
    return call.backward();
}

}  // namespace detail

inline Status flash_attention_forward(const float *Q, const float *K, const float *V, float *O, float *L,
                                      int64_t batch_size, int64_t num_heads, int64_t seq_len, int64_t head_dim,
                                      float scale, bool causal, void *stream = nullptr) {
    return detail::forward(Q, K, V, O, L, batch_size, num_heads, seq_len, head_dim, scale, causal, stream);
}

inline Status flash_attention_forward(const float16 *Q, const float16 *K, const float16 *V, float16 *O, float *L,
                                      int64_t batch_size, int64_t num_heads, int64_t seq_len, int64_t head_dim,
                                      float scale, bool causal, void *stream = nullptr) {
    return detail::forward(Q, K, V, O, L, batch_size, num_heads, seq_len, head_dim, scale, causal, stream);
}

inline Status flash_attention_backward(const float *Q, const float *K, const float *V, const float *O, const float *L,
                                       const float *dO, float *dQ, float *dK, float *dV, int64_t batch_size,
                                       int64_t num_heads, int64_t seq_len, int64_t head_dim, float scale, bool causal,
                                       void *stream = nullptr) {
    return detail::backward(Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads, seq_len, head_dim, scale, causal,
                            stream);
}

inline Status flash_attention_backward(const float16 *Q, const float16 *K, const float16 *V, const float16 *O,
                                       const float *L, const float16 *dO, float16 *dQ, float16 *dK, float16 *dV,
                                       int64_t batch_size, int64_t num_heads, int64_t seq_len, int64_t head_dim,
                                       float scale, bool causal, void *stream = nullptr) {
    return detail::backward(Q, K, V, O, L, dO, dQ, dK, dV, batch_size, num_heads, seq_len, head_dim, scale, causal,
                            stream);
}

}  // namespace anyattn
