// Tasks of the forward pass. A long sequence is cut into blocks of query rows of one head. A short one, as in decoding,
// puts the heads that share keys into one block and cuts the keys instead: partial results, added up in order
// (Dao et al., "Flash-Decoding", 2023). Where the cuts lie follows from the sequence alone.
#include <limits>
#include <vector>

#include "schedule.h"
#include "tasks.h"

namespace anyattn {
namespace {

// Keys of a cut.
constexpr int64_t kChunkKeys = 512;
// Tasks that a thread should have before heads are put together.
constexpr int64_t kTasksOfThread = 4;
// Limits of sums of sizes, far from overflow.
constexpr double kMostBytes = 4e18;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether chunks are tasks of their own. In a call with long sequences there are tasks enough, and partials of every
// row would take too much memory: there, a task adds up the chunks of its block.
bool chunks_are_tasks(const anyattn_call &call) { return call.seqlen_q <= kBlockQ; }

// How the rows of one sequence become tasks.
struct Cuts {
    Sequence s;
    int64_t group;  // heads that share keys
    int64_t heads;  // of a block
    int64_t groups;  // KV heads of a task
    int64_t blocks;  // tasks for all rows and heads
    int64_t begin, end;  // keys that any row may see; short sequences
    int64_t chunks;
    bool packed;

    Cuts(const Run &run, int64_t b) : s(sequence(run.call, b)), group(run.call.nheads / run.call.nheads_kv) {
        const anyattn_call &call = run.call;
        packed = s.n_q > 0 && s.n_q <= kBlockQ;
        heads = groups = chunks = 1;
        blocks = blocks_of(s.n_q) * call.nheads;
        begin = end = 0;
        if (!packed) return;
        const int64_t blocks_of_group = ceil_div(group, min64(group, kBlockQ / s.n_q));
        heads = ceil_div(group, blocks_of_group);
        begin = key_begin(call, s, 0);
        end = max64(begin, key_end(call, s, s.n_q - 1));
        chunks = max64(1, ceil_div(end - begin, kChunkKeys));
        // Which KV heads a task takes is felt by no result: it may depend on the threads there are.
        const int64_t tasks = call.batch * blocks_of_group * call.nheads_kv * chunks;
        const int64_t spare = chunks_are_tasks(call) ? tasks / (kTasksOfThread * run.threads) : 1;
        groups = max64(1, min64(spare, run.kernels.groups(call, heads * s.n_q)));
        groups = ceil_div(call.nheads_kv, ceil_div(call.nheads_kv, groups));
        blocks = ceil_div(call.nheads_kv, groups) * blocks_of_group;
    }

    // The blocks of one head side by side, the last (with causal masks the longest) first.
    QueryBlock block(int64_t index) const {
        if (!packed) {
            const int64_t width = blocks_of(s.n_q);
            return query_block(s, index / width, width - 1 - index % width);
        }
        const int64_t of_group = ceil_div(group, heads);
        const int64_t first = index % of_group * heads;
        return {s.index, index / of_group * groups * group + first, min64(heads, group - first), 0, s.n_q};
    }
    int64_t groups_of(const QueryBlock &block, const anyattn_call &call) const {
        return min64(groups, call.nheads_kv - block.h / group);
    }
};

// One more chunk of keys for each bound of a window that leaves it open.
int64_t most_chunks(const anyattn_call &call) {
    int64_t keys = call.seqlen_k;
    constexpr int both = ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT;
    if ((call.flags & both) == both) {
        const int64_t window = min64(call.left, keys) + min64(call.right, keys) + call.seqlen_q;
        keys = max64(0, min64(keys, window));
    }
    return max64(1, ceil_div(keys, kChunkKeys));
}

// All tasks: those of sequence b begin at first[b], its partial rows at rows[b].
struct Tasks {
    const anyattn_call &call;
    std::vector<int64_t> first, rows;

    explicit Tasks(const Run &run) : call(run.call) {
        first.reserve(static_cast<size_t>(call.batch) + 1);
        rows.reserve(static_cast<size_t>(call.batch) + 1);
        first.push_back(0);
        rows.push_back(0);
        for (int64_t b = 0; b < call.batch; ++b) {
            const Cuts cuts(run, b);
            const bool split = chunks_are_tasks(call) && cuts.chunks > 1;
            first.push_back(first.back() + cuts.blocks * (chunks_are_tasks(call) ? cuts.chunks : 1));
            rows.push_back(rows.back() + (split ? cuts.chunks * call.nheads * cuts.s.n_q : 0));
        }
    }

    int64_t count() const { return first.back(); }
    bool partial() const { return rows.back() > 0; }

    int64_t sequence_of(int64_t task) const {
        int64_t low = 0, high = call.batch;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first[static_cast<size_t>(middle)] <= task ? low : high) = middle;
        }
        return low;
    }
    int64_t first_of(int64_t b) const { return first[static_cast<size_t>(b)]; }

    // Where the partial of a block's first head begins, in rows.
    int64_t row_of(const QueryBlock &block, int64_t chunk) const {
        return rows[static_cast<size_t>(block.b)] + (chunk * call.nheads + block.h) * block.rows;
    }
};

// The chunks of a block one after the other: the same sums as those of separate tasks.
void run_chunks(const Run &run, const Cuts &cuts, const QueryBlock &block, int32_t worker) {
    char *scratch = run.scratch_of(worker);
    const int64_t bytes = kBlockQ * run.kernels.partial_row_bytes(run.call);
    char *into = scratch + run.scratch_bytes - 2 * bytes, *from = into + bytes;
    for (int64_t c = 0; c < cuts.chunks; ++c) {
        const int64_t begin = cuts.begin + c * kChunkKeys, end = min64(begin + kChunkKeys, cuts.end);
        char *partial = c == 0 ? into : from;
        run.kernels.forward(run.call, block, 1, begin, end, partial, scratch);
        if (c > 0) run.kernels.merge(run.call, block, into, from);
    }
    run.kernels.finish(run.call, block, into);
}

void run_task(const Run &run, const Tasks &tasks, int64_t task, int32_t worker) {
    const int64_t b = tasks.sequence_of(task);
    const Cuts cuts(run, b);
    const int64_t index = task - tasks.first_of(b);
    const QueryBlock block = cuts.block(index % cuts.blocks);
    if (cuts.chunks > 1 && !chunks_are_tasks(run.call)) return run_chunks(run, cuts, block, worker);
    char *partial = nullptr;
    int64_t begin = cuts.begin, end = cuts.end;
    if (!cuts.packed) {
        begin = key_begin(run.call, cuts.s, block.i0);
        end = key_end(run.call, cuts.s, block.i0 + block.rows - 1);
    } else if (cuts.chunks > 1) {
        const int64_t chunk = index / cuts.blocks;
        begin += chunk * kChunkKeys;
        end = min64(end, begin + kChunkKeys);
        partial = run.workspace + tasks.row_of(block, chunk) * run.kernels.partial_row_bytes(run.call);
    }
    const int64_t groups = cuts.groups_of(block, run.call);
    run.kernels.forward(run.call, block, groups, begin, end, partial, run.scratch_of(worker));
}

// One task for every head of every sequence with partials: its rows are a block here.
bool merge_chunks(const Run &run, const Tasks &tasks) {
    const anyattn_call &call = run.call;
    if (!tasks.partial()) return true;
    const int64_t bytes = run.kernels.partial_row_bytes(call);
    return run_tasks(call, run.threads, call.batch * call.nheads, [&](int64_t task, int32_t) {
        const Cuts cuts(run, task / call.nheads);
        if (cuts.chunks == 1) return;
        const QueryBlock block = query_block(cuts.s, task % call.nheads, 0);
        const auto partial = [&](int64_t chunk) { return run.workspace + tasks.row_of(block, chunk) * bytes; };
        for (int64_t c = 1; c < cuts.chunks; ++c) run.kernels.merge(call, block, partial(0), partial(c));
        run.kernels.finish(call, block, partial(0));
    });
}

// Rows that lie in a sequence's allocation and not in the sequence: out 0, lse -inf.
void clear_out(const anyattn_call &call, int64_t entry, int64_t row, int64_t head) {
    clear_row(call.out, entry, row, head, 1, call.head_dim_v);
    if (!call.lse.data) return;
    char *lse = element(call.lse, entry, head, row);
    if (call.lse.dtype == ANYATTN_FLOAT64) {
        const double empty = -std::numeric_limits<double>::infinity();
        std::memcpy(lse, &empty, sizeof empty);
    } else {
        const float empty = -std::numeric_limits<float>::infinity();
        std::memcpy(lse, &empty, sizeof empty);
    }
}

}  // namespace

int64_t forward_workspace(const anyattn_call &call, const Kernels &kernels) {
    const int64_t chunks = most_chunks(call);
    if (!chunks_are_tasks(call) || chunks == 1) return 0;
    const int64_t rows = call.cu_seqlens_q ? call.total_q : call.batch * call.seqlen_q;
    const int64_t bytes = kernels.partial_row_bytes(call);
    if (double(rows) * double(call.nheads) * double(chunks) * double(bytes) > kMostBytes) return -1;
    return rows * call.nheads * chunks * bytes;
}

int64_t forward_scratch(const anyattn_call &call, const Kernels &kernels) {
    const int64_t bytes = (kernels.scratch(call, ANYATTN_FORWARD) + 63) / 64 * 64;
    if (chunks_are_tasks(call) || most_chunks(call) == 1) return bytes;
    return bytes + 2 * kBlockQ * kernels.partial_row_bytes(call);
}

bool run_forward(const Run &run) {
    const anyattn_call &call = run.call;
    const Tasks tasks(run);
    const auto clear = [&](int64_t entry, int64_t row, int64_t h) { clear_out(call, entry, row, h); };
    return run_tasks(call, run.threads, tasks.count(),
                     [&](int64_t task, int32_t worker) { run_task(run, tasks, task, worker); }) &&
           merge_chunks(run, tasks) && for_unused_rows(call, run.threads, clear);
}

}  // namespace anyattn
