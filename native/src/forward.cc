// Tasks of the forward pass. A long sequence is divided into blocks of query rows of one head. For a short sequence, as in
// decoding, the heads that share keys form one block, and the keys are divided into chunks. Partial results of the chunks
// are added in order (Dao et al., "Flash-Decoding", 2023). The chunks depend on the sequence alone.
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "key_lists.h"
#include "schedule.h"
#include "tasks.h"

namespace anyattn {
namespace {

// Fewest keys of a chunk that is not the last, and most chunks of a sequence. Starting and adding a chunk takes as long as
// some tens of keys.
constexpr int64_t kChunkKeys = 512, kMostChunks = 64;
// Tasks per thread below which blocks do not share a task.
constexpr int64_t kTasksOfThread = 4;
// Limit of a sum of sizes, far from overflow.
constexpr double kMostBytes = 4e18;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether each chunk is a separate task. A call with long sequences has enough tasks, and partial results of every row
// would take too much memory. There, one task computes all chunks of its block.
bool chunks_are_tasks(const anyattn_call &call) { return call.seqlen_q <= kBlockQ; }

// Returns the keys of each chunk of a sequence.
constexpr int64_t chunk_keys(int64_t keys) { return kChunkKeys * max64(1, ceil_div(keys, kChunkKeys * kMostChunks)); }

// Returns the size of each part if n is divided evenly into the fewest parts of at most `limit`.
int64_t even_part(int64_t n, int64_t limit) { return ceil_div(n, ceil_div(n, min64(n, limit))); }

// Division of the rows of one sequence into tasks. Results do not depend on which blocks share a task, so that this may
// depend on the number of threads.
struct Cuts {
    const Run &run;
    Sequence s;
    int64_t group;  // heads that share keys
    int64_t packed = 0;  // heads of a block; 0: the sequence is long
    int64_t together = 1, row_blocks = 1, groups = 1;  // in a task: heads or packed heads, blocks of rows, KV heads
    int64_t tasks = 0;  // for all rows and heads
    int64_t begin = 0, end = 0, chunk = 0, chunks = 1;  // keys visible to any row, in a chunk; short sequences

    Cuts(const Run &r, int64_t b) : run(r), s(sequence(r.call, b)), group(r.call.nheads / r.call.nheads_kv) {
        if (s.n_q > kBlockQ) {
            cut_rows();
        } else if (s.n_q > 0) {
            cut_keys();
        }
    }

    // Number of blocks in a task, if the sequence has `blocks`.
    int64_t spare(int64_t blocks) const { return max64(1, run.call.batch * blocks / (kTasksOfThread * run.threads)); }

    void cut_rows() {
        const anyattn_call &call = run.call;
        const int64_t blocks = blocks_of(s.n_q);
        const int64_t limit = run.kernels.most_blocks(call, kBlockQ);
        const int64_t share = min64(limit, spare(call.nheads * blocks));
        together = even_part(group, share);
        row_blocks = even_part(blocks, max64(1, share / together));
        tasks = call.nheads_kv * ceil_div(group, together) * ceil_div(blocks, row_blocks);
    }

    void cut_keys() {
        const anyattn_call &call = run.call;
        packed = even_part(group, kBlockQ / s.n_q);
        begin = key_begin(call, s, 0);
        end = max64(begin, key_end(call, s, s.n_q - 1));
        chunk = chunk_keys(end - begin);
        chunks = max64(1, ceil_div(end - begin, chunk));
        const int64_t blocks = ceil_div(group, packed) * call.nheads_kv;
        const int64_t limit = chunks_are_tasks(call) ? run.kernels.most_groups(call, packed * s.n_q) : 1;
        groups = even_part(call.nheads_kv, min64(limit, spare(blocks * chunks)));
        tasks = ceil_div(call.nheads_kv, groups) * ceil_div(group, packed);
    }

    // Computes the rows of some heads together. The last block is first, because with causal masks it has the most keys.
    BlockSet set(int64_t index) const {
        const int64_t step = packed ? packed : together, sets = ceil_div(group, step);
        if (packed) {
            const int64_t h_kv = index / sets * groups, first = index % sets * step;
            const QueryBlock block{s.index, h_kv * group + first, min64(step, group - first), 0, s.n_q};
            return {block, 1, 1, min64(groups, run.call.nheads_kv - h_kv)};
        }
        const int64_t blocks = blocks_of(s.n_q), width = ceil_div(blocks, row_blocks), column = index / width;
        const int64_t first = column % sets * step, block = (width - 1 - index % width) * row_blocks;
        const int64_t rows = min64(row_blocks * kBlockQ, s.n_q - block * kBlockQ);
        const QueryBlock at{s.index, column / sets * group + first, 1, block * kBlockQ, rows};
        return {at, min64(step, group - first), min64(row_blocks, blocks - block), 1};
    }
};

// Each open bound of a window adds one chunk of keys.
int64_t most_chunks(const anyattn_call &call) {
    int64_t keys = call.seqlen_k;
    constexpr int both = ANYATTN_HAS_LEFT | ANYATTN_HAS_RIGHT;
    if ((call.flags & both) == both) {
        const int64_t window = min64(call.left, keys) + min64(call.right, keys) + call.seqlen_q;
        keys = max64(0, min64(keys, window));
    }
    return min64(kMostChunks, max64(1, ceil_div(keys, kChunkKeys)));
}

// All tasks. Tasks of sequence b begin at first[b], its partial rows at rows[b]. If chunks are separate tasks, ended[]
// counts the finished chunks of each block. Blocks of sequence b begin at first_block[b].
struct Tasks {
    const anyattn_call &call;
    std::vector<int64_t> first, rows, first_block;
    std::unique_ptr<std::atomic<int64_t>[]> ended;

    explicit Tasks(const Run &run) : call(run.call) {
        for (std::vector<int64_t> *starts : {&first, &rows, &first_block}) {
            starts->reserve(static_cast<size_t>(call.batch) + 1);
            starts->push_back(0);
        }
        for (int64_t b = 0; b < call.batch; ++b) {
            const Cuts cuts(run, b);
            const bool split = chunks_are_tasks(call) && cuts.chunks > 1;
            first.push_back(first.back() + cuts.tasks * (chunks_are_tasks(call) ? cuts.chunks : 1));
            rows.push_back(rows.back() + (split ? cuts.chunks * call.nheads * cuts.s.n_q : 0));
            first_block.push_back(first_block.back() + (split ? cuts.tasks : 0));
        }
        const size_t blocks = static_cast<size_t>(first_block.back());
        if (blocks > 0) ended.reset(new std::atomic<int64_t>[blocks]());
    }

    int64_t count() const { return first.back(); }

    // Counts a finished chunk of a block. Returns true for the last chunk, which then reads the results of the others.
    bool end_chunk(const Cuts &cuts, int64_t block) const {
        const size_t at = static_cast<size_t>(first_block[static_cast<size_t>(cuts.s.index)] + block);
        return ended[at].fetch_add(1, std::memory_order_acq_rel) + 1 == cuts.chunks;
    }

    int64_t sequence_of(int64_t task) const {
        int64_t low = 0, high = call.batch;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first[static_cast<size_t>(middle)] <= task ? low : high) = middle;
        }
        return low;
    }
    int64_t first_of(int64_t b) const { return first[static_cast<size_t>(b)]; }

    // Returns the first row of the partial result of a block's first head.
    int64_t row_of(const QueryBlock &block, int64_t chunk) const {
        return rows[static_cast<size_t>(block.b)] + (chunk * call.nheads + block.h) * block.rows;
    }
};

// Computes the chunks of a block in order, with the same sums as separate tasks.
void run_chunks(const Cuts &cuts, const BlockSet &set, int32_t worker) {
    const Run &run = cuts.run;
    char *scratch = run.scratch_of(worker);
    const int64_t bytes = kBlockQ * run.kernels.partial_row_bytes(run.call);
    char *into = scratch + run.scratch_bytes - 2 * bytes, *from = into + bytes;
    for (int64_t c = 0; c < cuts.chunks; ++c) {
        const int64_t begin = cuts.begin + c * cuts.chunk, end = min64(begin + cuts.chunk, cuts.end);
        run.kernels.forward(run.call, set, begin, end, c == 0 ? into : from, scratch);
        if (c > 0) run.kernels.merge(run.call, set.first, into, from);
    }
    run.kernels.finish(run.call, set.first, into);
}

// Adds the partial results of a block's heads, chunk by chunk in order.
void merge_chunks(const Run &run, const Tasks &tasks, const Cuts &cuts, const BlockSet &set) {
    const anyattn_call &call = run.call;
    const int64_t bytes = run.kernels.partial_row_bytes(call);
    for (int64_t i = 0; i < set.groups * set.first.heads; ++i) {
        const int64_t h = set.first.h + i / set.first.heads * cuts.group + i % set.first.heads;
        const QueryBlock head = query_block(cuts.s, h, 0);
        const auto partial = [&](int64_t chunk) { return run.workspace + tasks.row_of(head, chunk) * bytes; };
        for (int64_t c = 1; c < cuts.chunks; ++c) run.kernels.merge(call, head, partial(0), partial(c));
        run.kernels.finish(call, head, partial(0));
    }
}

void run_task(const Run &run, const Tasks &tasks, int64_t task, int32_t worker) {
    const int64_t b = tasks.sequence_of(task);
    const Cuts cuts(run, b);
    const int64_t index = task - tasks.first_of(b);
    const BlockSet set = cuts.set(index % cuts.tasks);
    if (cuts.chunks > 1 && !chunks_are_tasks(run.call)) return run_chunks(cuts, set, worker);
    char *partial = nullptr;
    int64_t begin = cuts.begin, end = cuts.end;
    if (!cuts.packed) {
        // Tiles begin at the same keys for all blocks, so that the sums do not depend on the blocks of a task.
        const int64_t tile = run.kernels.tile_keys(run.call, run.pass), leftpad = cuts.s.leftpad;
        begin = leftpad + (key_begin(run.call, cuts.s, set.first.i0) - leftpad) / tile * tile;
        end = key_end(run.call, cuts.s, set.first.i0 + set.first.rows - 1);
    } else if (cuts.chunks > 1) {
        const int64_t chunk = index / cuts.tasks;
        begin += chunk * cuts.chunk;
        end = min64(end, begin + cuts.chunk);
        partial = run.workspace + tasks.row_of(set.first, chunk) * run.kernels.partial_row_bytes(run.call);
    }
    run.kernels.forward(run.call, set, begin, end, partial, run.scratch_of(worker));
    if (partial && tasks.end_chunk(cuts, index % cuts.tasks)) merge_chunks(run, tasks, cuts, set);
}

// One task for each query and the heads that share its keys, because no other query has the same keys.
bool run_key_lists(const Run &run) {
    const anyattn_call &call = run.call;
    const int64_t group = call.nheads / call.nheads_kv, packed = even_part(group, kBlockQ);
    const int64_t blocks = ceil_div(group, packed) * call.nheads_kv;
    return run_tasks(call, run.threads, query_rows_of(call) * blocks, [&](int64_t task, int32_t worker) {
        const QueryRow row = query_row(call, task / blocks);
        const Sequence s = sequence(call, row.b);
        if (row.i >= s.n_q) return;
        const int64_t h_kv = task % blocks / ceil_div(group, packed), first = task % ceil_div(group, packed) * packed;
        const QueryBlock block{row.b, h_kv * group + first, min64(packed, group - first), row.i, 1};
        const int64_t keys = key_list(call, s, h_kv, row.i)[0];
        run.kernels.forward(call, {block, 1, 1, 1}, 0, keys, nullptr, run.scratch_of(worker));
    });
}

}  // namespace

int64_t forward_workspace(const anyattn_call &call, const Kernels &kernels) {
    const int64_t chunks = most_chunks(call);
    if (has_key_lists(call) || !chunks_are_tasks(call) || chunks == 1) return 0;
    const int64_t rows = call.cu_seqlens_q ? call.total_q : call.batch * call.seqlen_q;
    const int64_t bytes = kernels.partial_row_bytes(call);
    if (double(rows) * double(call.nheads) * double(chunks) * double(bytes) > kMostBytes) return -1;
    return rows * call.nheads * chunks * bytes;
}

int64_t forward_scratch(const anyattn_call &call, const Kernels &kernels) {
    const int64_t bytes = (kernels.scratch(call, ANYATTN_FORWARD) + 63) / 64 * 64;
    if (has_key_lists(call) || chunks_are_tasks(call) || most_chunks(call) == 1) return bytes;
    return bytes + 2 * kBlockQ * kernels.partial_row_bytes(call);
}

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

bool run_forward(const Run &run) {
    const anyattn_call &call = run.call;
    const auto clear = [&](int64_t entry, int64_t row, int64_t h) { clear_out(call, entry, row, h); };
    if (has_key_lists(call)) return run_key_lists(run) && for_unused_rows(call, run.threads, clear);
    const Tasks tasks(run);
    return run_tasks(call, run.threads, tasks.count(),
                     [&](int64_t task, int32_t worker) { run_task(run, tasks, task, worker); }) &&
           for_unused_rows(call, run.threads, clear);
}

}  // namespace anyattn
