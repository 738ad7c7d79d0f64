#include <atomic>
#include <limits>
#include <memory>

#include "schedule.h"
#include "score_program.h"
#include "tasks.h"

namespace anyattn {
namespace {

// With this many heads in all sequences, each head is a task. Fewer heads are split into about kBackwardTasks tasks, if
// each split has enough work.
constexpr int64_t kEnoughHeads = 8, kBackwardTasks = 16;
constexpr double kSplitFlops = 1e8;
// The least work of a task of accumulate_parts. Starting a block of rows costs as much as kBeginKeys keys.
constexpr double kPartFlops = 2e7, kBeginKeys = 32;
// Sums of the gradients of captured arrays, at most: tasks that add to the same sums run one after the other.
constexpr int64_t kCapturedSums = 64, kCapturedBytes = int64_t(1) << 27;
constexpr int64_t kMostParts = 16, kEveryKey = std::numeric_limits<int64_t>::max();

// Upper bound of the work of one KV head.
double flops_of_head(const anyattn_call &call) {
    const double rows = double(call.seqlen_q) * double(call.nheads / call.nheads_kv);
    return 5.0 * rows * double(most_keys(call)) * double(call.head_dim + call.head_dim_v);
}

int64_t backward_splits(const anyattn_call &call) {
    const int64_t heads = call.batch * call.nheads_kv;
    // The order of sums follows from the splits, which depend on the batch. One split makes it independent.
    if (call.flags & ANYATTN_BATCH_INVARIANT) return 1;
    if (heads == 0 || heads >= kEnoughHeads) return 1;
    const double flops = flops_of_head(call);
    if (flops < 2 * kSplitFlops) return 1;
    const int64_t worth =
        flops < kBackwardTasks * kSplitFlops ? static_cast<int64_t>(flops / kSplitFlops) : kBackwardTasks;
    return max64(1, min64((kBackwardTasks + heads - 1) / heads, worth));
}

// Returns the number of sums of captured gradients, 0 without such gradients. It depends on sizes only, and so does the
// order of sums.
int64_t captured_sums(const anyattn_call &call, int64_t tasks) {
    if (!has_captured_gradients(call)) return 0;
    const int64_t bytes = max64(1, call.num_captured * static_cast<int64_t>(sizeof(double)));
    return max64(1, min64(tasks, min64(kCapturedSums, kCapturedBytes / bytes)));
}

// Offsets in the backward's workspace, in bytes. They depend on sizes only.
struct Layout {
    int64_t splits, rows_k;  // rows_k: of all sequences
    int64_t dk_stride, dv_stride;  // compute values
    int64_t dk, dv, sink, statistics, captured, bytes;  // bytes < 0: more than 63 bits
    int64_t captured_sums;
    bool in_place;  // the first split accumulates in dk and dv

    // Splits with sums in the workspace. A head that is not split uses the sums of its task, see HeadSums.
    int64_t copies() const { return splits == 1 ? 0 : splits - in_place; }
};

int64_t compute_bytes(const anyattn_call &call) { return call.q.dtype == ANYATTN_FLOAT64 ? 8 : 4; }

Layout layout(const anyattn_call &call, const Kernels &kernels) {
    Layout l{};
    l.splits = backward_splits(call);
    l.in_place = kernels.partial_in_place(call);
    l.rows_k = call.cu_seqlens_k ? call.total_k : call.batch * call.seqlen_k;
    l.dk_stride = kernels.partial_stride(call, call.head_dim);
    l.dv_stride = kernels.partial_stride(call, call.head_dim_v);
    const double partials =
        double(call.nheads_kv) * double(l.copies()) * double(l.rows_k) * double(compute_bytes(call));
    const double all = partials * double(l.dk_stride + l.dv_stride);
    const int64_t of_row = call.dbias.data ? kernels.statistics_bytes(call) : 0;
    const double statistics = double(call.batch) * double(call.nheads) * double(call.seqlen_q) * double(of_row);
    // Upper bound of the memory that HeadSums and accumulate_parts need in addition to the workspace.
    const double of_q = double(call.nheads) * (double(call.seqlen_q) + kBlockQ) * double(l.dk_stride);
    const double of_k = double(call.nheads_kv) * double(call.seqlen_k) * double(l.dk_stride + l.dv_stride);
    const double shared = double(call.batch) * (of_q + of_k) * double(compute_bytes(call));
    if (all + statistics > 4e18 || shared > 4e18) {
        l.bytes = -1;
        return l;
    }
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t copies = call.nheads_kv * l.copies() * l.rows_k * compute_bytes(call);
    l.dv = aligned(l.dk + copies * l.dk_stride);
    l.sink = aligned(l.dv + copies * l.dv_stride);
    const int64_t sinks = call.dsink.data ? call.nheads * rows_q(call).most_blocks() : 0;
    l.statistics = aligned(l.sink + sinks * static_cast<int64_t>(sizeof(double)));
    l.captured = aligned(l.statistics + call.batch * call.nheads * call.seqlen_q * of_row);
    l.captured_sums = captured_sums(call, call.batch * call.nheads_kv * l.splits);
    l.bytes = aligned(l.captured + l.captured_sums * call.num_captured * static_cast<int64_t>(sizeof(double)));
    return l;
}

Partial partial_of(const Run &run, const Layout &l, const Sequence &s, int64_t h_kv, int64_t split) {
    const anyattn_call &call = run.call;
    if (split < l.in_place) {
        const int64_t entry = call.cu_seqlens_k ? 0 : s.batch_k;
        return {element(call.dk, entry, s.row_k, h_kv), element(call.dv, entry, s.row_k, h_kv), call.dk.stride[1],
                call.dv.stride[1]};
    }
    const int64_t row = call.cu_seqlens_k ? s.row_k : s.index * call.seqlen_k;
    const int64_t rows = ((h_kv * l.copies() + split - l.in_place) * l.rows_k + row) * compute_bytes(call);
    return {run.workspace + l.dk + rows * l.dk_stride, run.workspace + l.dv + rows * l.dv_stride, l.dk_stride,
            l.dv_stride};
}

void clear_partial(const anyattn_call &call, const Partial &partial, int64_t rows, bool whole) {
    const auto clear = [&](void *data, int64_t stride, int64_t dim) {
        const int64_t bytes = compute_bytes(call);
        if (whole) {
            std::memset(data, 0, static_cast<size_t>(rows * stride * bytes));
            return;
        }
        for (int64_t j = 0; j < rows; ++j) {
            std::memset(static_cast<char *>(data) + j * stride * bytes, 0, static_cast<size_t>(dim * bytes));
        }
    };
    clear(partial.dk, partial.dk_stride, call.head_dim);
    clear(partial.dv, partial.dv_stride, call.head_dim_v);
}

int64_t heads_of(const anyattn_call &call) { return call.batch * call.nheads_kv; }

// Sums of dk and dv for the heads that are computed at the same time, if dk and dv cannot hold the sums.
class HeadSums {
  public:
    HeadSums(const Run &run, const Layout &l) : run_(run), l_(l), count_(min64(run.threads, heads_of(run.call))) {
        if (needed(run.call, l)) busy_.reset(new std::atomic<bool>[static_cast<size_t>(count_)]());
    }
    static bool needed(const anyattn_call &call, const Layout &l) {
        return l.splits == 1 && !l.in_place && heads_of(call) > 0;
    }
    // An upper bound of the keys of a sequence.
    static int64_t rows(const anyattn_call &call) {
        return call.cu_seqlens_k ? min64(call.seqlen_k, call.total_k) : call.seqlen_k;
    }
    // Bytes of one head.
    static int64_t bytes(const anyattn_call &call, const Layout &l) {
        return (rows(call) * (l.dk_stride + l.dv_stride) * compute_bytes(call) + 63) / 64 * 64;
    }

    static Partial sums(const Run &run, const Layout &l, int64_t index) {
        char *dk = run.shared + index * bytes(run.call, l);
        char *dv = dk + rows(run.call) * l.dk_stride * compute_bytes(run.call);
        return {dk, dv, l.dk_stride, l.dv_stride};
    }

    // Calls body(partial). No other task uses these sums during the call.
    template <class Body>
    void with_sums(const Body &body) {
        int64_t free = 0;
        while (busy_[static_cast<size_t>(free)].exchange(true, std::memory_order_acquire)) free = (free + 1) % count_;
        body(sums(run_, l_, free));
        busy_[static_cast<size_t>(free)].store(false, std::memory_order_release);
    }

  private:
    const Run &run_;
    const Layout &l_;
    int64_t count_;
    std::unique_ptr<std::atomic<bool>[]> busy_;
};

double *sink_partial(const Run &run, const Layout &l, int64_t b) {
    if (!run.call.dsink.data) return nullptr;
    return reinterpret_cast<double *>(run.workspace + l.sink) + rows_q(run.call).first_block(b) * run.call.nheads;
}

double *captured_of(const Run &run, const Layout &l, int64_t index) {
    return reinterpret_cast<double *>(run.workspace + l.captured) + index * run.call.num_captured;
}

// Returns the row statistics that the backward pass stores for dbias, or null.
void *statistics(const Run &run, const Layout &l) {
    return run.call.dbias.data ? run.workspace + l.statistics : nullptr;
}

bool accumulate_splits(const Run &run, const Layout &l) {
    const anyattn_call &call = run.call;
    const int64_t group = call.nheads / call.nheads_kv;
    if (l.statistics > l.sink) std::memset(run.workspace + l.sink, 0, static_cast<size_t>(l.statistics - l.sink));
    const int64_t tasks = call.batch * call.nheads_kv * l.splits;
    HeadSums sums(run, l);
    const auto body = [&](int64_t task, int32_t worker, double *captured) {
        const int64_t split = task % l.splits, h_kv = task / l.splits % call.nheads_kv;
        const Sequence s = sequence(call, task / l.splits / call.nheads_kv);
        const auto accumulate = [&](const Partial &partial, bool whole) {
            if (s.n_k > 0) clear_partial(call, partial, s.n_k, whole);
            if (s.n_q == 0) return;
            double *sink = sink_partial(run, l, s.index);
            if (sink) sink += h_kv * group * blocks_of(s.n_q);
            const int64_t rows = (has_key_lists(call) ? 1 : group) * blocks_of(s.n_q);
            const BackwardPart part{s.index, h_kv, split, rows, l.splits, 0, kEveryKey, nullptr, captured};
            run.kernels.backward(call, run.pass, part, partial, sink, statistics(run, l), run.scratch_of(worker));
        };
        if (s.n_k == 0) return accumulate({}, true);
        if (!HeadSums::needed(call, l)) return accumulate(partial_of(run, l, s, h_kv, split), split >= l.in_place);
        sums.with_sums([&](const Partial &partial) {
            accumulate(partial, true);
            run.kernels.reduce(call, s.index, h_kv, 0, s.n_k, &partial, 1);
        });
    };
    if (!has_captured_gradients(call)) {
        return run_tasks(call, run.threads, tasks, [&](int64_t task, int32_t worker) { body(task, worker, nullptr); });
    }
    return run_tasks(call, run.threads, l.captured_sums, [&](int64_t first, int32_t worker) {
        double *captured = captured_of(run, l, first);
        std::memset(captured, 0, static_cast<size_t>(call.num_captured) * sizeof(double));
        for (int64_t task = first; task < tasks; task += l.captured_sums) body(task, worker, captured);
    });
}

// Returns the number of parts, along rows and along keys, into which accumulate_parts divides every head. 1 if whole heads
// keep the threads equally busy. Sums do not depend on it.
int64_t parts_of_heads(const anyattn_call &call, const Layout &l, int32_t threads) {
    const int64_t heads = heads_of(call);
    // With these options blocks begin at different keys, and so have different tiles.
    if (l.splits > 1 || (call.flags & ANYATTN_HAS_LEFT) || call.chunk > 0 || has_key_lists(call)) return 1;
    if (has_captured_gradients(call)) return 1;  // parts of a head would add to one sum
    const auto rounds = [&](int64_t tasks) { return double((tasks + threads - 1) / threads); };
    int64_t best = 1;
    double least = rounds(heads);
    for (int64_t parts = 2; parts <= kMostParts; parts *= 2) {
        const double cells = double(parts * parts);
        if (flops_of_head(call) < cells * kPartFlops) break;
        double time = rounds(heads * parts);
        for (int64_t n = 1; n < parts; ++n) time += 2 * rounds(heads * n);
        time *= (1 + kBeginKeys * double(parts) / double(call.seqlen_k)) / cells;
        if (time > 0.95 * least) continue;
        best = parts;
        least = time;
    }
    return best;
}

// Bytes of dq that the parts of a head pass on.
int64_t dq_bytes(const anyattn_call &call, const Kernels &kernels) {
    const int64_t rows = call.nheads / call.nheads_kv * blocks_of(call.seqlen_q) * kBlockQ;
    return rows * kernels.partial_stride(call, call.head_dim) * compute_bytes(call);
}

// Computes row part r and key part c of a head. The sums of dq, dk and dv continue those of (r, c - 1) and (r - 1, c).
void accumulate_part(const Run &run, const Layout &l, int64_t parts, int64_t head, int64_t r, int64_t c,
                     int32_t worker) {
    const anyattn_call &call = run.call;
    const int64_t group = call.nheads / call.nheads_kv, h_kv = head % call.nheads_kv;
    const Sequence s = sequence(call, head / call.nheads_kv);
    const int64_t block_k = run.kernels.tile_keys(call, run.pass);  // keys of a tile
    const int64_t blocks = group * blocks_of(s.n_q), tiles = (s.n_k - s.leftpad + block_k - 1) / block_k;
    const int64_t mine = max64(1, min64(parts, tiles));  // none without keys
    if (r >= mine || c >= mine) return;
    const auto key = [&](int64_t at) { return at == 0 ? 0 : s.leftpad + tiles * at / mine * block_k; };
    const int64_t begin = key(c), end = c + 1 < mine ? key(c + 1) : kEveryKey;
    Partial partial{};
    if (s.n_k > 0) partial = l.in_place ? partial_of(run, l, s, h_kv, 0) : HeadSums::sums(run, l, head);
    if (r == 0 && s.n_k > 0) {
        Partial rows = partial;
        rows.dk = static_cast<char *>(partial.dk) + begin * partial.dk_stride * compute_bytes(call);
        rows.dv = static_cast<char *>(partial.dv) + begin * partial.dv_stride * compute_bytes(call);
        clear_partial(call, rows, min64(end, s.n_k) - begin, !l.in_place);
    }
    if (s.n_q == 0) return;
    double *sink = sink_partial(run, l, s.index);
    if (sink) sink += h_kv * blocks;
    char *dq = run.shared + (l.in_place ? 0 : heads_of(call) * HeadSums::bytes(call, l));
    const BackwardPart part{s.index,
                            h_kv,
                            blocks * r / mine,
                            blocks * (r + 1) / mine,
                            1,
                            begin,
                            end,
                            dq + head * dq_bytes(call, run.kernels)};
    run.kernels.backward(call, run.pass, part, partial, sink, statistics(run, l), run.scratch_of(worker));
}

// Tasks for more threads than heads. One diagonal of parts is computed after the other, because parts that are computed at
// the same time must share neither rows nor keys. Every sum has the same order as in one task for the whole head.
bool accumulate_parts(const Run &run, const Layout &l, int64_t parts) {
    const anyattn_call &call = run.call;
    const int64_t heads = heads_of(call);
    if (l.statistics > l.sink) std::memset(run.workspace + l.sink, 0, static_cast<size_t>(l.statistics - l.sink));
    for (int64_t diagonal = 0; diagonal < 2 * parts - 1; ++diagonal) {
        const int64_t first = max64(0, diagonal - parts + 1), count = min64(diagonal, parts - 1) - first + 1;
        const auto body = [&](int64_t task, int32_t worker) {
            const int64_t r = first + task / heads;
            accumulate_part(run, l, parts, task % heads, r, diagonal - r, worker);
        };
        if (!run_tasks(call, run.threads, heads * count, body)) return false;
    }
    if (l.in_place) return true;
    return run_tasks(call, run.threads, heads, [&](int64_t head, int32_t) {
        const Partial partial = HeadSums::sums(run, l, head);
        const Sequence s = sequence(call, head / call.nheads_kv);
        if (s.n_k > 0) run.kernels.reduce(call, s.index, head % call.nheads_kv, 0, s.n_k, &partial, 1);
    });
}

// Clears dq of unused rows.
bool clear_dq(const Run &run) {
    const anyattn_call &call = run.call;
    if (call.flags & ANYATTN_ACCUMULATE) return true;
    return for_unused_rows(call, run.threads, [&](int64_t entry, int64_t row, int64_t h) {
        clear_row(call.dq, entry, row, h, 1, call.head_dim);
    });
}

void clear_keys(const anyattn_call &call, int64_t entry, int64_t begin, int64_t end, int64_t h0, int64_t heads) {
    if (call.flags & ANYATTN_ACCUMULATE) return;
    for (int64_t j = begin; j < end; ++j) {
        clear_row(call.dk, entry, j, h0, heads, call.head_dim);
        clear_row(call.dv, entry, j, h0, heads, call.head_dim_v);
    }
}

// Adds the splits and writes dk and dv for one block of allocated rows of one KV head.
void reduce_block(const Run &run, const Layout &l, int64_t block, int64_t h_kv) {
    const anyattn_call &call = run.call;
    const AllocatedRows rows = rows_k(call);
    const Sequence s = sequence(call, rows.sequence_of(block));
    const int64_t begin = (block - rows.first_block(s.index)) * kBlockQ;
    const int64_t end = min64(begin + kBlockQ, rows.allocated(s.index));
    const int64_t used = min64(end, s.n_k);
    if (begin < used && l.splits > 1) {
        Partial partials[kBackwardTasks];
        for (int64_t split = 0; split < l.splits; ++split) partials[split] = partial_of(run, l, s, h_kv, split);
        run.kernels.reduce(call, s.index, h_kv, begin, used, partials, l.splits);
    }
    clear_keys(call, call.cu_seqlens_k ? 0 : s.batch_k, s.row_k + max64(begin, used), s.row_k + end, h_kv, 1);
}

bool reduce_splits(const Run &run, const Layout &l) {
    const anyattn_call &call = run.call;
    const AllocatedRows rows = rows_k(call);
    const int64_t inside = rows.blocks() * call.nheads_kv;
    const bool all_used = l.splits == 1 && !call.cu_seqlens_k && !call.seqused_k;
    if (all_used) return true;
    return run_tasks(call, run.threads, inside + blocks_of(rows.outside()), [&](int64_t task, int32_t) {
        if (task < inside) return reduce_block(run, l, task / call.nheads_kv, task % call.nheads_kv);
        const int64_t index = (task - inside) * kBlockQ;
        for (int64_t i = index; i < min64(index + kBlockQ, rows.outside()); ++i) {
            clear_keys(call, 0, rows.outside_row(i), rows.outside_row(i) + 1, 0, call.nheads_kv);
        }
    });
}

// Clears the dense entries of dk and dv that belong to no sequence of this call.
bool clear_unused_entries(const Run &run) {
    const anyattn_call &call = run.call;
    if (call.cu_seqlens_k || (!call.cache_batch_idx && call.batch_k == call.batch)) return true;
    return run_tasks(call, run.threads, call.batch_k, [&](int64_t entry, int32_t) {
        for (int64_t b = 0; b < call.batch; ++b) {
            if (sequence(call, b).batch_k == entry) return;
        }
        clear_keys(call, entry, 0, call.seqlen_k, 0, call.nheads_kv);
    });
}

bool write_dbias(const Run &run, const Layout &l) {
    const anyattn_call &call = run.call;
    if (!call.dbias.data) return true;
    // An axis of stride 0 has one element in memory. Its sum is computed inside the tile.
    const auto owned = [&](int axis, int64_t size) { return call.dbias.stride[axis] == 0 ? int64_t(1) : size; };
    const int64_t block_k = run.kernels.tile_keys(call, run.pass);
    const int64_t heads = owned(1, call.nheads), blocks_q = owned(2, blocks_of(call.seqlen_q));
    const int64_t blocks_k = owned(3, (call.seqlen_k + block_k - 1) / block_k);
    const int64_t tasks = owned(0, call.batch) * heads * blocks_q * blocks_k;
    return run_tasks(call, run.threads, tasks, [&](int64_t task, int32_t worker) {
        const int64_t j = task % blocks_k, i = task / blocks_k % blocks_q;
        const int64_t bh = task / blocks_k / blocks_q;
        run.kernels.dbias(call, run.pass, bh / heads, bh % heads, i, j, statistics(run, l), run.scratch_of(worker));
    });
}

// Adds the blocks in a fixed order, in double.
bool write_dsink(const Run &run, const Layout &l) {
    const anyattn_call &call = run.call;
    if (!call.dsink.data) return true;
    return run_tasks(call, run.threads, call.nheads, [&](int64_t h, int32_t) {
        double sum = 0;
        for (int64_t b = 0; b < call.batch; ++b) {
            const int64_t blocks = blocks_of(sequence(call, b).n_q);
            const double *partial = sink_partial(run, l, b) + h * blocks;
            for (int64_t block = 0; block < blocks; ++block) sum += partial[block];
        }
        char *target = element(call.dsink, h, 0, 0);
        const float narrow = static_cast<float>(sum);
        if (call.dsink.dtype == ANYATTN_FLOAT64) {
            std::memcpy(target, &sum, sizeof sum);
        } else {
            std::memcpy(target, &narrow, sizeof narrow);
        }
    });
}

// The sums in order, in double.
bool write_captured(const Run &run, const Layout &l) {
    const anyattn_call &call = run.call;
    if (!call.dcaptured.data) return true;
    constexpr int64_t step = 4096;
    return run_tasks(call, run.threads, (call.num_captured + step - 1) / step, [&](int64_t task, int32_t) {
        for (int64_t i = task * step; i < min64((task + 1) * step, call.num_captured); ++i) {
            double sum = 0;
            for (int64_t x = 0; x < l.captured_sums; ++x) sum += captured_of(run, l, x)[i];
            if (call.dcaptured.dtype == ANYATTN_FLOAT64) {
                static_cast<double *>(call.dcaptured.data)[i] = sum;
            } else {
                static_cast<float *>(call.dcaptured.data)[i] = static_cast<float>(sum);
            }
        }
    });
}

}  // namespace

int64_t backward_workspace(const anyattn_call &call, const Kernels &kernels) { return layout(call, kernels).bytes; }

int64_t backward_shared(const anyattn_call &call, const Kernels &kernels, int32_t threads) {
    const Layout l = layout(call, kernels);
    const int64_t parts = parts_of_heads(call, l, threads), heads = heads_of(call);
    const int64_t sums = HeadSums::needed(call, l) ? HeadSums::bytes(call, l) : 0;
    return parts > 1 ? heads * (sums + dq_bytes(call, kernels)) : min64(threads, heads) * sums;
}

bool run_backward(const Run &run) {
    const Layout l = layout(run.call, run.kernels);
    const int64_t parts = parts_of_heads(run.call, l, run.threads);
    return (parts > 1 ? accumulate_parts(run, l, parts) : accumulate_splits(run, l)) && clear_dq(run) &&
           reduce_splits(run, l) && clear_unused_entries(run) && write_dbias(run, l) && write_dsink(run, l) &&
           write_captured(run, l);
}

}  // namespace anyattn
