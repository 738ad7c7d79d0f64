// Tasks of the tangent pass, alone or with the forward pass: sets of blocks of query rows, as in the forward pass. Results do not depend on the number of
// threads, because each row is computed by one task, in the same order of keys whatever the set.
#include "schedule.h"
#include "tasks.h"

namespace anyattn {
namespace {

// Tasks that a thread should have before blocks are put together.
constexpr int64_t kTasksOfThread = 4;

// Heads and blocks of rows that share a task, because they read the same keys.
struct Sharing {
    int64_t group, heads = 1, row_blocks = 1;

    Sharing(const anyattn_call &call, int32_t threads) : group(call.nheads / call.nheads_kv) {
        const int64_t blocks = rows_q(call).blocks() * call.nheads;
        const int64_t most = max64(1, min64(kTangentBlocks, blocks / (kTasksOfThread * threads)));
        heads = min64(group, most);
        // With a window or chunks, blocks of rows begin at other keys.
        if (!(call.flags & ANYATTN_HAS_LEFT) && call.chunk == 0) row_blocks = most / heads;
    }
};

// One sweep over the keys of every row.
struct Sweep {
    const Run &run;
    bool online;  // out and lse are computed too
    Sharing sharing;

    Sweep(const Run &run_, bool online_) : run(run_), online(online_), sharing(run_.call, run_.threads) {}

    void compute(const BlockSet &set, char *scratch) const { run.kernels.tangent(run.call, online, set, scratch); }
};

// Computes the set that begins at a block of rows and a head, if one does.
void run_set(const Sweep &sweep, const Sequence &s, int64_t block, int64_t h, char *scratch) {
    const Sharing &sharing = sweep.sharing;
    const int64_t in_group = h % sharing.group, first = block * kBlockQ;
    if (block % sharing.row_blocks != 0 || in_group % sharing.heads != 0 || first >= s.n_q) return;
    const int64_t heads = min64(sharing.heads, sharing.group - in_group);
    const int64_t rows = min64(sharing.row_blocks * kBlockQ, s.n_q - first);
    sweep.compute({{s.index, h, 1, first, rows}, heads, blocks_of(rows), 1}, scratch);
}

// Computes the rows of a block one by one. The heads that share the keys of a row are one block.
void run_rows(const Sweep &sweep, const Sequence &s, int64_t block, int64_t h, char *scratch) {
    const anyattn_call &call = sweep.run.call;
    const int64_t group = call.nheads / call.nheads_kv, in_group = h % group;
    if (in_group % kBlockQ != 0) return;  // it is in the block of another head
    const int64_t heads = min64(kBlockQ, group - in_group), end = min64((block + 1) * kBlockQ, s.n_q);
    for (int64_t i = block * kBlockQ; i < end && !stopped(call); ++i) {
        sweep.compute({{s.index, h, heads, i, 1}, 1, 1, 1}, scratch);
    }
}

void clear_tangent(const anyattn_call &call, int64_t entry, int64_t row, int64_t head) {
    clear_row(call.tout, entry, row, head, 1, call.head_dim_v);
    std::memset(element(call.tlse, entry, head, row), 0, static_cast<size_t>(dtype_bytes(call.tlse.dtype)));
}

bool run_sweep(const Sweep &sweep) {
    const Run &run = sweep.run;
    const anyattn_call &call = run.call;
    const AllocatedRows rows = rows_q(call);
    const auto clear = [&](int64_t entry, int64_t row, int64_t h) {
        clear_tangent(call, entry, row, h);
        if (sweep.online) clear_out(call, entry, row, h);
    };
    const auto body = [&](int64_t task, int32_t worker) {
        // The last rows, with causal masks those with the most keys, first.
        const int64_t number = rows.blocks() - 1 - task / call.nheads, h = task % call.nheads;
        const Sequence s = sequence(call, rows.sequence_of(number));
        const int64_t block = number - rows.first_block(s.index);
        char *scratch = run.scratch_of(worker);
        const bool by_row = has_key_lists(call) || s.n_q == 1;
        by_row ? run_rows(sweep, s, block, h, scratch) : run_set(sweep, s, block, h, scratch);
    };
    return run_tasks(call, run.threads, rows.blocks() * call.nheads, body) && for_unused_rows(call, run.threads, clear);
}

}  // namespace

bool run_tangent(const Run &run) { return run_sweep({run, false}); }

// The gradients of a row's tangent need that tangent, which is a sum over all its keys: hence two sweeps.
bool run_second(const Run &run) { return run_tangent(run) && run_backward(run); }

// The forward pass of few rows divides the keys among threads, and reads them at the speed of memory.
bool run_forward_tangent(const Run &run) {
    const bool few = has_key_lists(run.call) || run.call.seqlen_q <= kBlockQ;
    return few ? run_forward(run) && run_tangent(run) : run_sweep({run, true});
}

}  // namespace anyattn
