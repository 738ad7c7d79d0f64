// Nonsense around valid arrays: whatever the fields say, a status comes back. Run under the sanitizers.
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <functional>

#include "check.h"
#include "fixture.h"

namespace {

class Fuzz {
  public:
    explicit Fuzz(uint32_t seed) : memory_(seed) {}

    // A call of random features, some fields of which are then made wrong; how many succeed is returned.
    int round() {
        Fixture fixture(draw_config());
        call_ = &fixture.call;
        const int64_t pass = memory_.below(6);
        if (pass == ANYATTN_APPEND) make_append(fixture);
        const int64_t changes = memory_.below(4);
        for (int64_t i = 0; i < changes; ++i) change(fixture);
        const int64_t workspace = anyattn_workspace(call_, int32_t(pass));
        CHECK(workspace >= 0 || -workspace <= ANYATTN_OUT_OF_MEMORY);
        const int32_t status = pass == 0   ? anyattn_forward(call_)
                               : pass == 1 ? anyattn_backward(call_)
                               : pass == 2 ? anyattn_append(call_)
                               : pass == 3 ? anyattn_tangent(call_)
                               : pass == 4 ? anyattn_second(call_)
                                           : anyattn_forward_tangent(call_);
        CHECK(status >= 0 && status <= ANYATTN_OUT_OF_MEMORY);
        const bool heard = call_->size == sizeof *call_ && call_->message && call_->message_bytes > 1;
        CHECK(status == 0 || !heard || fixture.message()[0]);
        return status == 0;
    }

  private:
    bool coin(int64_t odds = 2) { return memory_.below(odds) == 0; }

    Config draw_config() {
        Config c;
        c.seed = uint32_t(memory_.below(1 << 30));
        c.batch = memory_.below(4);
        c.seqlen_q = memory_.below(70);
        c.seqlen_k = memory_.below(80);
        c.nheads_kv = 1 + memory_.below(3);
        c.nheads = c.nheads_kv * (1 + memory_.below(3));
        c.head_dim = 1 + memory_.below(20);
        c.head_dim_v = 1 + memory_.below(20);
        c.dtype = int32_t(1 + memory_.below(4));
        c.result = c.dtype != ANYATTN_FLOAT64 && coin() ? ANYATTN_FLOAT32 : 0;
        c.packed_q = coin(3);
        c.packed_k = coin(3);
        c.paged = !c.packed_k && coin(3);
        c.cache_batch_idx = !c.packed_k && !c.paged && coin(3);
        c.seqused_q = coin(3);
        c.seqused_k = coin(3);
        c.leftpad = coin(3);
        c.offset = coin(3);
        c.kv_indices = coin(3) ? memory_.below(20) : -1;
        c.lists_of_heads = coin();
        c.sink = coin(3);
        c.alibi = coin(3);
        c.dlse = coin(3);
        c.strided = coin();
        c.bias = int(memory_.below(32)) - 16;
        c.mask = int(memory_.below(32)) - 16;
        c.flags = uint32_t(memory_.below(32));
        c.left = memory_.below(40) - 10;
        c.right = memory_.below(40) - 10;
        c.chunk = coin(3) ? memory_.below(30) : 0;
        c.softcap = coin(3) ? 2 : 0;
        c.dropout = coin(3) ? uint32_t(memory_.below(65536)) : 0;
        c.threads = int32_t(memory_.below(4));
        const std::vector<int32_t> all = targets();
        c.target = all[size_t(memory_.below(int64_t(all.size())))];
        return c;
    }

    void make_append(Fixture &f) {
        anyattn_call &c = f.call;
        c.out = f.memory.array(c.q.dtype, dims_q(c, c.head_dim));
        c.seqlen_new = c.seqlen_k ? memory_.below(min(c.seqlen_k, 6)) : 0;
        c.new_k = f.memory.normal(c.q.dtype, {c.batch, c.seqlen_new, c.nheads_kv, c.head_dim});
        c.new_v = f.memory.normal(c.q.dtype, {c.batch, c.seqlen_new, c.nheads_kv, c.head_dim_v});
        c.rotary_dim = int32_t(memory_.below(c.head_dim / 2 + 1) * 2);
        c.rotary_positions = 100;
        for (anyattn_array *table : {&c.rotary_cos, &c.rotary_sin}) {
            *table = f.memory.normal(ANYATTN_FLOAT32, {1, 1, 100, c.rotary_dim / 2});
            table->stride[0] = c.rotary_dim / 2;
            table->stride[1] = 1;
        }
        lengths_.assign(size_t(c.batch), int32_t(memory_.below(c.seqlen_k + 1)));
        c.cache_seqlens = lengths_.data();
    }

    static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

    int64_t wild() {
        static const int64_t values[] = {0,
                                         1,
                                         -1,
                                         2,
                                         7,
                                         -64,
                                         63,
                                         INT32_MAX,
                                         INT32_MIN,
                                         int64_t(1) << 33,
                                         -(int64_t(1) << 40),
                                         int64_t(1) << 60,
                                         INT64_MAX,
                                         INT64_MIN};
        return values[memory_.below(sizeof values / sizeof *values)];
    }

    double wild_double() {
        static const double values[] = {0, -0.0, 1, -3, 1e300, -1e-300, 1e-45, HUGE_VAL, -HUGE_VAL, kNan};
        return values[memory_.below(sizeof values / sizeof *values)];
    }

    // An extent may become smaller, negative or absurd, but not a little larger: nobody can know that memory ends.
    void shrink(int64_t &size) {
        const int64_t value = wild();
        if (size < 0 || size > 1 << 20) return;  // absurd already
        size = coin() && size > 0 ? memory_.below(size) : value < size || value > int64_t(1) << 59 ? value : size;
    }

    anyattn_array &any_array() {
        anyattn_call &c = *call_;
        anyattn_array *arrays[] = {
            &c.q,     &c.k,     &c.v,          &c.out,        &c.lse,        &c.bias, &c.mask,  &c.alibi_slopes,
            &c.sink,  &c.dout,  &c.dlse,       &c.dq,         &c.dk,         &c.dv,   &c.dbias, &c.dsink,
            &c.new_k, &c.new_v, &c.rotary_cos, &c.rotary_sin, &c.kv_indices, &c.tq,   &c.tk,    &c.tv,
            &c.tbias, &c.tsink, &c.tout,       &c.tlse};
        return *arrays[memory_.below(sizeof arrays / sizeof *arrays)];
    }

    void change_array() {
        anyattn_array &array = any_array();
        const int64_t axis = memory_.below(4), value = wild();
        switch (memory_.below(4)) {
            case 0:
                array.data = nullptr;
                break;
            case 1:
                array.stride[axis] = value >= INT64_MAX / 2 || value <= INT64_MIN / 2 ? value : 0;
                // An axis of dbias that is broadcast has an element even where it sums over nothing: not in this memory.
                if (array.data == call_->dbias.data && (!call_->batch || !call_->seqlen_q || !call_->seqlen_k)) {
                    array.data = nullptr;
                }
                break;
            case 2:
                array.reserved = int32_t(value);
                break;
            default:
                // Elements may only become smaller, for the same reason.
                const int32_t dtype = int32_t(memory_.below(12)) - 3;
                if (dtype <= 0 || dtype > ANYATTN_INT32 || size_of(dtype) <= size_of(array.dtype)) array.dtype = dtype;
        }
    }

    void change_size() {
        anyattn_call &c = *call_;
        int64_t *sizes[] = {&c.batch,     &c.seqlen_q,   &c.seqlen_k,         &c.nheads,     &c.nheads_kv,
                            &c.head_dim,  &c.head_dim_v, &c.total_q,          &c.total_k,    &c.batch_k,
                            &c.num_pages, &c.seqlen_new, &c.rotary_positions, &c.num_indices};
        int64_t &size = *sizes[memory_.below(sizeof sizes / sizeof *sizes)];
        if (&size != &c.batch_k || c.batch_k > 0) shrink(size);
        if (c.batch_k == 0) c.batch_k = c.batch;
    }

    void change_scalar() {
        anyattn_call &c = *call_;
        switch (memory_.below(13)) {
            case 0:
                c.flags = uint32_t(wild());
                break;
            case 1:
                c.num_threads = coin() ? int32_t(memory_.below(5)) : -int32_t(memory_.below(9));
                break;
            case 2:
                c.target = int32_t(wild());
                break;
            case 3:
                c.scale = wild_double();
                break;
            case 4:
                c.softcap = wild_double();
                break;
            case 5:
                c.left = wild();
                break;
            case 6:
                c.right = wild();
                break;
            case 7:
                c.chunk = wild();
                break;
            case 8:
                c.query_start = wild();
                break;
            case 9:
                c.key_start = wild();
                break;
            case 10:
                c.dropout_threshold = uint32_t(wild());
                break;
            case 11:
                c.rotary_dim = int32_t(wild());
                break;
            default:
                cut();
        }
    }

    // A caller of an older version: without the tables, other arrays would be larger than they are here.
    void cut() {
        const int64_t tables = offsetof(anyattn_call, workspace), arrays = offsetof(anyattn_call, q);
        const int64_t size = coin() ? tables + memory_.below(int64_t(sizeof *call_) - tables) : memory_.below(arrays);
        call_->size = uint32_t(size) & (coin(4) ? ~0u : ~7u);
    }

    // Tables hold anything at all: every entry is checked before it is used.
    void change_table(Fixture &f) {
        std::vector<int32_t> *tables[] = {&f.cu_q,    &f.cu_k,  &f.used_q,  &f.used_k, &f.leftpad,
                                          &f.offsets, &f.pages, &f.entries, &lengths_};
        std::vector<int32_t> &table = *tables[memory_.below(sizeof tables / sizeof *tables)];
        if (!table.empty()) table[size_t(memory_.below(int64_t(table.size())))] = int32_t(wild());
    }

    void change_memory() {
        anyattn_call &c = *call_;
        switch (memory_.below(4)) {
            case 0:
                c.workspace = c.q.data;
                c.workspace_bytes = memory_.below(2) - 1;
                break;
            case 1:
                c.message_bytes = wild() < 0 ? -1 : memory_.below(5);
                break;
            case 2:
                c.rng_state = nullptr;
                break;
            default:
                c.message = nullptr;
        }
    }

    void change(Fixture &f) {
        switch (memory_.below(5)) {
            case 0:
                return change_array();
            case 1:
                return change_size();
            case 2:
                return change_scalar();
            case 3:
                return change_table(f);
            default:
                return change_memory();
        }
    }

    Memory memory_;
    anyattn_call *call_ = nullptr;
    std::vector<int32_t> lengths_;
};

}  // namespace

TEST(nonsense_gets_a_status) {
    const char *rounds = std::getenv("ANYATTN_FUZZ_ROUNDS");
    const int count = rounds ? std::atoi(rounds) : 3000;
    Fuzz fuzz(20261121);
    int succeeded = 0;
    for (int i = 0; i < count; ++i) succeeded += fuzz.round();
    std::printf("%d of %d calls were valid\n", succeeded, count);
    CHECK(count < 1000 || (succeeded > count / 10 && succeeded < count));
}
