// Complete calls, made from a short description.
#pragma once
#include <string>

#include "array.h"

// What is not mentioned is off. Lengths per sequence are drawn from the seed where a table is asked for.
struct Config {
    int64_t batch = 1, seqlen_q = 5, seqlen_k = 7;
    int64_t nheads = 2, nheads_kv = 1, head_dim = 8, head_dim_v = 8;
    int32_t dtype = ANYATTN_FLOAT32;
    int32_t result = 0;  // dtype of out and the gradients; 0: dtype
    bool packed_q = false, packed_k = false, paged = false, cache_batch_idx = false;
    bool seqused_q = false, seqused_k = false, leftpad = false, offset = false;
    bool sink = false, alibi = false, dlse = false, strided = false, lse = true;
    int64_t kv_indices = -1;  // entries of each query's list; -1: no lists
    bool lists_of_heads = false;
    int bias = -1, mask = -1;  // bits of the axes that are broadcast; -1: absent
    uint32_t flags = 0;
    int64_t left = 0, right = 0, chunk = 0;
    double scale = 0.5, softcap = 0;
    uint32_t dropout = 0;
    uint32_t seed = 1;
    int32_t target = 0, threads = 0;
};

inline constexpr int32_t kDtypes[] = {ANYATTN_FLOAT32, ANYATTN_FLOAT16, ANYATTN_BFLOAT16, ANYATTN_FLOAT64};

// Lengths and head sizes on both sides of a tile's; 0 queries, and 0 keys.
std::vector<Config> edge_sizes();

class Fixture {
  public:
    explicit Fixture(const Config &config);
    Fixture(const Fixture &) = delete;
    Fixture &operator=(const Fixture &) = delete;

    anyattn_call call{};
    Memory memory;
    // Status of a pass; its message is printed where it is not the one that was expected.
    int32_t forward() { return expect(anyattn_forward(&call)); }
    int32_t backward() { return expect(anyattn_backward(&call)); }
    int32_t tangent() { return expect(anyattn_tangent(&call)); }
    int32_t second() { return expect(anyattn_second(&call)); }
    int32_t forward_tangent() { return expect(anyattn_forward_tangent(&call)); }
    const char *message() const { return message_; }

    std::vector<int32_t> cu_q, cu_k, used_q, used_k, leftpad, offsets, pages, entries;
    uint64_t rng_state[2] = {0x123456789abcdefull, 42};

  private:
    void make_tables(const Config &config);
    void make_inputs(const Config &config);
    void make_lists(const Config &config);
    void make_gradients(const Config &config);
    void make_tangents(const Config &config);
    void hide_unused();
    int32_t expect(int32_t status) const;

    char message_[256] = "";
};

// Every instruction set of this machine, as a value of anyattn_call.target.
std::vector<int32_t> targets();

// Shapes of arrays as the call says.
Index dims_q(const anyattn_call &call, int64_t dim);
Index dims_k(const anyattn_call &call, int64_t dim);
