// Nonsense through anyattn.hpp: the right status, words that name what was wrong, and untouched outputs.
#include <cstring>
#include <string>

#include "check.h"
#include "dense.h"

namespace {

using anyattn::Status;

constexpr int64_t kHuge = int64_t(1) << 62;

void check_words(const char *words) {
    if (std::strstr(anyattn::error_message(), words)) return;
    CHECK(!"the words are there");
    std::printf("  %s: %s\n", words, anyattn::error_message());
}

template <class T>
bool untouched(const std::vector<T> &values) {
    for (const T &value : values) {
        if (!std::isnan(float(value))) return false;
    }
    return true;
}

// A complete call of either kind, to be spoiled.
struct Example : Dense<float> {
    Example() {
        make();
        call.q = view(Q), call.k = view(K), call.v = view(V), call.out = view(O), call.dout = view(dO);
        call.dq = view(dQ), call.dk = view(dK), call.dv = view(dV);
        call.lse = anyattn::view(L.data(), {batch, heads, seqlen});
    }

    anyattn::Array view(std::vector<float> &values) {
        return anyattn::view(values.data(), {batch, seqlen, heads, dim});
    }

    anyattn::Call call;
};

template <class Change>
void check_refused(Status status, const char *words, const Change &change) {
    Example example;
    change(example.call);
    CHECK(example.call.forward() == status);
    check_words(words);
    CHECK(untouched(example.O) && untouched(example.L));
    CHECK(example.call.backward() == status);
    CHECK(untouched(example.dQ) && untouched(example.dK) && untouched(example.dV));
    const int64_t bytes = example.call.workspace_bytes(ANYATTN_FORWARD);
    CHECK(bytes >= 0 || bytes == -int64_t(status));
}

template <class Change>
void check_backward_refused(Status status, const char *words, const Change &change) {
    Example example;
    change(example.call);
    CHECK(example.call.backward() == status);
    check_words(words);
    CHECK(untouched(example.dQ) && untouched(example.dK) && untouched(example.dV));
}

using anyattn::Call;

}  // namespace

TEST(arguments_of_flash_attention) {
    float x = 1, y = 5;
    const auto forward = [&](const float *q, float *lse, int64_t batch, int64_t heads, int64_t seqlen, int64_t dim,
                             float scale = 1, void *stream = nullptr) {
        return anyattn::flash_attention_forward(q, &x, &x, &y, lse, batch, heads, seqlen, dim, scale, false, stream);
    };
    for (int64_t bad : {int64_t(0), int64_t(-1), std::numeric_limits<int64_t>::min()}) {
        CHECK(forward(&x, &y, bad, 1, 1, 1) == Status::INVALID_DIMENSION);
        check_words("batch_size is");
        CHECK(forward(&x, &y, 1, bad, 1, 1) == Status::INVALID_DIMENSION);
        check_words("num_heads is");
        CHECK(forward(&x, &y, 1, 1, bad, 1) == Status::INVALID_DIMENSION);
        check_words("seq_len is");
        CHECK(forward(&x, &y, 1, 1, 1, bad) == Status::INVALID_DIMENSION);
        check_words("head_dim is");
    }
    CHECK(forward(&x, &y, kHuge, kHuge, kHuge, kHuge) == Status::INVALID_DIMENSION);
    CHECK(forward(nullptr, &y, 1, 1, 1, 1) == Status::NULL_POINTER);
    check_words("q is null");
    CHECK(forward(&x, nullptr, 1, 1, 1, 1) == Status::NULL_POINTER);
    check_words("L is null");
    CHECK(forward(&x, &y, 1, 1, 1, 1, float(kNan)) == Status::INVALID_VALUE);
    check_words("scale");
    CHECK(forward(&x, &y, 1, 1, 1, 1, 1, &x) == Status::UNSUPPORTED);
    check_words("stream is not null");
    CHECK(y == 5);
    CHECK(forward(&x, &y, 1, 1, 1, 1) == Status::SUCCESS && y == 1);
    CHECK(!anyattn::error_message()[0]);
}

TEST(arguments_of_its_backward) {
    for (int missing = 0; missing < 9; ++missing) {
        float x[9] = {1, 1, 1, 1, 1, 1, 5, 5, 5}, *p[9];
        for (int n = 0; n < 9; ++n) p[n] = n == missing ? nullptr : x + n;
        const auto status = anyattn::flash_attention_backward(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], 1,
                                                              1, 1, 1, 1.f, true);
        CHECK(status == Status::NULL_POINTER);
        const char *const words[] = {"q", "k", "v", "out", "L", "dout", "dq", "dk", "dv"};
        check_words((std::string(words[missing]) + " is null").c_str());
        CHECK(x[6] == 5 && x[7] == 5 && x[8] == 5);
    }
    float x = 5;
    CHECK(anyattn::flash_attention_backward(&x, &x, &x, &x, &x, &x, &x, &x, &x, 1, 1, 1, 1, 1.f, true, &x) ==
          Status::UNSUPPORTED);
    CHECK(anyattn::flash_attention_backward(&x, &x, &x, &x, &x, &x, &x, &x, &x, 1, -1, 1, 1, 1.f, true) ==
          Status::INVALID_DIMENSION);
    CHECK(x == 5);
}

// As code written for CuFlash-Attn says it.
TEST(names_of_errors) {
    namespace cuflash = anyattn;
    const cuflash::FlashAttentionError all[] = {
        cuflash::FlashAttentionError::SUCCESS, cuflash::FlashAttentionError::INVALID_DIMENSION,
        cuflash::FlashAttentionError::NULL_POINTER, cuflash::FlashAttentionError::UNSUPPORTED_HEAD_DIM,
        cuflash::FlashAttentionError::CUDA_ERROR};
    const char *const strings[] = {"success", "invalid dimension", "null pointer", "unsupported head_dim",
                                   "CUDA error"};
    for (size_t n = 0; n < 5; ++n) CHECK(!std::strcmp(cuflash::get_error_string(all[n]), strings[n]));
    for (int32_t status = 0; status <= ANYATTN_INTERRUPTED; ++status) {
        CHECK(!std::strcmp(anyattn::get_error_string(Status(status)), anyattn_error_string(status)));
        CHECK(std::strcmp(anyattn_error_string(status), "unknown status"));
    }
}

TEST(missing_arrays) {
    check_refused(Status::NULL_POINTER, "q is missing", [](Call &c) { c.q = {}; });
    check_refused(Status::NULL_POINTER, "k is missing", [](Call &c) { c.k = {}; });
    check_refused(Status::NULL_POINTER, "v is missing", [](Call &c) { c.v = {}; });
    check_refused(Status::NULL_POINTER, "out is null", [](Call &c) { c.out = {}; });
    check_refused(Status::NULL_POINTER, "k is null", [](Call &c) { c.k.data = nullptr; });
    check_backward_refused(Status::NULL_POINTER, "lse is null", [](Call &c) { c.lse = {}; });
    check_backward_refused(Status::NULL_POINTER, "dout is null", [](Call &c) { c.dout = {}; });
    check_backward_refused(Status::NULL_POINTER, "bias is null",
                           [](Call &c) { c.dbias = anyattn::view(static_cast<float *>(c.dq.data), {1, 1, 1, 1}); });
    check_backward_refused(Status::NULL_POINTER, "sink is null",
                           [](Call &c) { c.dsink = anyattn::view(static_cast<float *>(c.dq.data), {3}); });
}

TEST(shapes) {
    const Status bad = Status::INVALID_DIMENSION;
    check_refused(bad, "q has 3 axes; accepted here: 4", [](Call &c) { c.q.rank = 3; });
    check_refused(bad, "v has 77 axes", [](Call &c) { c.v.rank = 77; });
    check_refused(bad, "out has shape (2, 70, 3, 31); expected (2, 70, 3, 32)", [](Call &c) { c.out.shape[3] = 31; });
    check_refused(bad, "k has shape (2, 70, 3, 16); expected (2, 70, 3, 32)", [](Call &c) { c.k.shape[3] = 16; });
    check_refused(bad, "v has shape (2, 9, 3, 32); expected (2, 70, 3, 32)", [](Call &c) { c.v.shape[1] = 9; });
    check_refused(bad, "lse has shape (2, 70, 3); expected (2, 3, 70)",
                  [](Call &c) { std::swap(c.lse.shape[1], c.lse.shape[2]); });
    check_refused(bad, "nheads (3) must be a multiple of nheads_kv (2)",
                  [](Call &c) { c.k.shape[2] = c.v.shape[2] = 2; });
    check_refused(bad, "batch is -1", [](Call &c) {
        for (anyattn::ConstArray *array : {&c.q, &c.k, &c.v, static_cast<anyattn::ConstArray *>(&c.out)}) {
            array->shape[0] = -1;
        }
        c.lse.shape[0] = -1;
        c.dout = c.q, c.dq = c.dk = c.dv = c.out;
    });
    check_refused(bad, "bias has shape (2, 3, 70, 9); expected (2, 3, 70, 70)",
                  [](Call &c) { c.bias = anyattn::view(static_cast<const float *>(c.q.data), {2, 3, 70, 9}); });
    check_refused(bad, "mask has shape (70, 70)",
                  [](Call &c) { c.mask = anyattn::view(static_cast<const bool *>(c.q.data), {70, 70}); });
    check_refused(bad, "sink has shape (4); expected (3)",
                  [](Call &c) { c.sink = anyattn::view(static_cast<const float *>(c.q.data), {4}); });
    check_refused(bad, "alibi_slopes has shape (3, 2); expected (2, 3)",
                  [](Call &c) { c.alibi_slopes = anyattn::view(static_cast<const float *>(c.q.data), {3, 2}); });
    check_backward_refused(bad, "dk has shape", [](Call &c) { c.dk.shape[1] = 71; });
    check_backward_refused(bad, "dlse has shape", [](Call &c) { c.dlse = c.q; });
}

TEST(sizes_without_end) {
    for (int axis = 0; axis < 4; ++axis) {
        Example example;
        int64_t shape[4] = {2, 70, 3, 32};
        shape[axis] = kHuge;
        float *const data = example.Q.data();
        anyattn::Call call;
        call.q = call.k = call.v = call.out = anyattn::view(data, {shape[0], shape[1], shape[2], shape[3]});
        CHECK(call.forward() == Status::INVALID_DIMENSION);
        CHECK(call.workspace_bytes(ANYATTN_FORWARD) == -int64_t(Status::INVALID_DIMENSION));
    }
}

TEST(dtypes_and_strides) {
    check_refused(Status::INVALID_DTYPE, "q has dtype none", [](Call &c) { c.q.dtype = ANYATTN_NONE; });
    check_refused(Status::INVALID_DTYPE, "k has dtype float16", [](Call &c) { c.k.dtype = ANYATTN_FLOAT16; });
    check_refused(Status::INVALID_DTYPE, "lse has dtype float64", [](Call &c) { c.lse.dtype = ANYATTN_FLOAT64; });
    check_refused(Status::INVALID_DIMENSION, "the last stride of v is 2", [](Call &c) { c.v.stride[3] = 2; });
    check_backward_refused(Status::INVALID_DIMENSION, "stride 0 of dq is 0", [](Call &c) { c.dq.stride[0] = 0; });
    check_refused(Status::INVALID_DIMENSION, "stride 1 of q is", [](Call &c) { c.q.stride[1] = kHuge; });
    check_refused(Status::INVALID_VALUE, "q is at", [](Call &c) { c.q.data = static_cast<char *>(c.q.data) + 1; });
}

TEST(options) {
    const Status bad = Status::INVALID_VALUE;
    for (double p : {-0.1, 1.0, 0.999999, kNan}) {
        check_refused(bad, "dropout_p is", [p](Call &c) { c.dropout_p = p; });
    }
    check_refused(bad, "scale is", [](Call &c) { c.scale = kNan; });
    check_refused(bad, "softcap is", [](Call &c) { c.softcap = -1; });
    check_refused(bad, "chunk is", [](Call &c) { c.chunk = -1; });
    check_refused(bad, "left is", [](Call &c) { c.left = std::numeric_limits<int64_t>::min(); });
    check_refused(bad, "num_threads is", [](Call &c) { c.num_threads = -3; });
    check_refused(Status::UNSUPPORTED, "target is 99", [](Call &c) { c.target = 99; });
}

TEST(tables) {
    static const int32_t starts[] = {0, 50, 140}, wrong[] = {0, 150, 140}, used[] = {70, 71}, three[] = {1, 1, 1};
    const auto packed = [](Call &c, const anyattn::Table &table) {
        c.cu_seqlens_q = c.cu_seqlens_k = table;
        c.q = c.k = c.v = anyattn::view(static_cast<const float *>(c.q.data), {140, 3, 32});
        c.dout = c.q;
        for (anyattn::Array *array : {&c.out, &c.dq, &c.dk, &c.dv}) {
            *array = anyattn::view(static_cast<float *>(array->data), {140, 3, 32});
        }
        c.lse = anyattn::view(static_cast<float *>(c.lse.data), {3, 140});
    };
    check_refused(Status::OUT_OF_RANGE, "cu_seqlens_q[1]", [&](Call &c) { packed(c, wrong); });
    check_refused(Status::OUT_OF_RANGE, "cu_seqlens_q[2]", [&](Call &c) {
        packed(c, starts);
        c.max_seqlen_q = 60;
    });
    check_refused(Status::INVALID_DIMENSION, "cu_seqlens_q has no entries",
                  [&](Call &c) { packed(c, anyattn::Table(nullptr, 0)); });
    check_refused(Status::NULL_POINTER, "cu_seqlens_q is null",
                  [&](Call &c) { packed(c, anyattn::Table(nullptr, 3)); });
    check_refused(Status::INVALID_DIMENSION, "cu_seqlens_k has 2 entries; expected batch + 1 = 3", [&](Call &c) {
        packed(c, starts);
        c.cu_seqlens_k = anyattn::Table(starts, 2);
    });
    check_refused(Status::OUT_OF_RANGE, "seqused_k[1] is 71", [&](Call &c) { c.seqused_k = used; });
    check_refused(Status::INVALID_DIMENSION, "leftpad_k has 3 entries", [&](Call &c) { c.leftpad_k = three; });
    check_refused(Status::INVALID_DIMENSION, "seqused_q has 0 entries",
                  [](Call &c) { c.seqused_q = anyattn::Table(nullptr, 0); });
    check_refused(Status::INVALID_DIMENSION, "block_table has 3 entries", [&](Call &c) { c.block_table = three; });
    check_refused(Status::INVALID_DIMENSION, "cache_batch_idx has 3 entries",
                  [&](Call &c) { c.cache_batch_idx = three; });
}

// More than there is: refused before anything is written. The sums of so many keys' gradients are the workspace.
TEST(memory) {
    std::vector<float> few(64);
    float *const data = few.data();
    const int64_t keys = int64_t(1) << 38;
    anyattn::Workspace workspace;
    anyattn::Call call;
    call.q = call.dout = anyattn::view(data, {1, 1, 1, 9});
    call.out = call.dq = anyattn::view(data, {1, 1, 1, 9});
    call.k = call.v = anyattn::view(static_cast<const float *>(data), {1, keys, 1, 9});
    call.dk = call.dv = anyattn::view(data, {1, keys, 1, 9});
    call.lse = anyattn::view(data, {1, 1, 1});
    for (bool own : {false, true}) {
        call.workspace = own ? &workspace : nullptr;
        CHECK(call.backward() == Status::OUT_OF_MEMORY);
        check_words("bytes of workspace");
    }
    for (float value : few) CHECK(value == 0);
}
