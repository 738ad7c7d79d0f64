"""Forward pass on Hopper: a program owns 128 queries of a head.

One warp loads tiles with the copy engine (TMA). Two
warpgroups of 64 queries each compute and alternate on the tensor cores: while one multiplies, the other exponentiates.

    producer      Q      K0 V0      K1 V1      K2 V2 ...             waits until both groups have released a buffer
    consumer   S0 = QK0', P0 | S1 = QK1' and O += P0 V0 start together, P1 is computed from S1 while P0 V0 runs | ...

The arithmetic is that of the portable kernel (../forward.py). Tiles of keys are visited from last to first, so that the
tiles that an edge of the mask crosses come first. Meaning of the barriers:

    k_full, v_full      a tile has arrived              (the copy engine counts its bytes)
    k_empty, v_empty    both groups have read the tile  (two arrivals)
    turn[group]         the other group has issued its products, so this group may issue its own
    q_full              both groups' queries have arrived

Barriers alternate between two phases; the n-th use of a buffer is in phase n % 2. Source: Shah et al.,
"FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024), algorithms 1 and 2, and
docs/how-it-works/hopper.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..forward import place
from ..tiles import LN2, LOG2E
from .dialect import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # queries of a warpgroup
GROUPS = gl.constexpr(2)
GROUP_WARPS = gl.constexpr(4)
# Registers per thread after the split: two groups of 240 and the producer's 24 use the 64 Ki of a processor.
GROUP_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


class Barriers(NamedTuple):
    """Barriers, described above."""

    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turn: Any


class Buffers(NamedTuple):
    """Tiles in shared memory: q by group, k and v by stage. A group's q buffer is reused for its out."""

    q: Any
    k: Any
    v: Any


@gluon.jit
def attention_forward_hopper(
    lse, tables, sizes, reach, scale, schedule, q, k, v, out,
    HEAD_DIM: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, LAST_FIRST: gl.constexpr,
):  # fmt: skip
    """Compute out and lse. reach: query i attends to keys below min(i + reach, seqlen_k); None: to all keys.

    q, k, v, out are descriptors (batch, head, row, dim). Their rows end with the sequence: beyond it, loads give 0 and
    stores do nothing.
    """
    tile, b, head, _, _ = place(gl.program_id(0), tables, sizes, schedule, False, GROUPS * ROWS, LAST_FIRST)
    first = tile * GROUPS * ROWS
    tiles = count_tiles(first, sizes, reach, TILE_K)
    barriers = make_barriers(STAGES)
    buffers = Buffers(
        gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, HEAD_DIM], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], v.layout),
    )
    rows = (out, lse, sizes, reach, scale, b, head, first, tiles)
    gl.warp_specialize(
        [
            (consume, (rows, barriers, buffers, HEAD_DIM, TILE_K, STAGES, 0)),
            (consume, (rows, barriers, buffers, HEAD_DIM, TILE_K, STAGES, 1)),
            (produce, (q, k, v, barriers, buffers, b, head, head // sizes.group, first, tiles, TILE_K, STAGES)),
        ],
        [GROUP_WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turn.index(group), count=1)
    fence_async_shared()  # makes the barriers visible to the copy engine
    mbarrier.arrive(turn.index(0), count=1)  # group 0 begins
    return Barriers(q_full, k_full, k_empty, v_full, v_empty, turn)


@gluon.jit
def count_tiles(first, sizes, reach, TILE_K: gl.constexpr):
    """Return the tiles of keys that 128 queries visit:

    at least one, so that queries without visible keys are written.
    """
    end = sizes.seqlen_k
    if reach is not None:
        last = gl.minimum(first + GROUPS * ROWS, sizes.seqlen_q) - 1
        end = gl.minimum(end, gl.maximum(last + reach, 0))
    return gl.maximum(gl.cdiv(end, TILE_K), 1)


@gluon.jit
def count_full(first, sizes, reach, TILE_K: gl.constexpr):
    """Return the tiles of keys that need no mask, for a group's queries from `first` on."""
    end = sizes.seqlen_k
    if reach is not None:
        end = gl.minimum(end, gl.maximum(first + reach, 0))
    return end // TILE_K


@gluon.jit
def produce(
    q, k, v, barriers, buffers, b, head, kv_head, first, tiles, TILE_K: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Load q once, then k and v tile by tile as buffers are released."""
    mbarrier.expect(barriers.q_full, GROUPS * q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma_load(q, [b, head, first + group * ROWS, 0], barriers.q_full, buffers.q.index(group))
    for n in range(tiles):
        stage, phase = n % STAGES, (n // STAGES) & 1
        start = (tiles - 1 - n) * TILE_K
        mbarrier.wait(barriers.k_empty.index(stage), phase ^ 1)  # immediately in a buffer's first use
        mbarrier.expect(barriers.k_full.index(stage), k.block_type.nbytes)
        tma_load(k, [b, kv_head, start, 0], barriers.k_full.index(stage), buffers.k.index(stage))
        mbarrier.wait(barriers.v_empty.index(stage), phase ^ 1)
        mbarrier.expect(barriers.v_full.index(stage), v.block_type.nbytes)
        tma_load(v, [b, kv_head, start, 0], barriers.v_full.index(stage), buffers.v.index(stage))


@gluon.jit
def consume(
    rows, barriers, buffers, HEAD_DIM: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):
    """Compute one warpgroup's queries, from the first product to out and lse."""
    out, lse, sizes, reach, scale, b, head, first, tiles = rows
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP_WARPS, 1], instr_shape=[16, TILE_K, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP_WARPS, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    DTYPE: gl.constexpr = out.dtype
    first = first + GROUP * ROWS
    i = first + gl.arange(0, ROWS, layout=S_ROW)
    limit = i * 0 + sizes.seqlen_k  # first masked key of a query
    if reach is not None:
        limit = gl.minimum(limit, i + reach)
    # Edge tiles come first; the first tile is always treated as one.
    edges = tiles - count_full(first, sizes, reach, TILE_K)
    factor = scale * LOG2E
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=S_ROW)
    l = gl.full([ROWS], 0.0, gl.float32, layout=S_ROW)
    zero = gl.zeros([ROWS, TILE_K], gl.float32, layout=S_LAYOUT)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=O_LAYOUT)
    q_tile = buffers.q.index(GROUP)
    q_rows = q_tile.reshape([ROWS, HEAD_DIM])
    my_turn = barriers.turn.index(GROUP)
    other_turn = barriers.turn.index(1 - GROUP)

    mbarrier.wait(barriers.q_full, 0)
    mbarrier.wait(barriers.k_full.index(0), 0)
    s = warpgroup_mma(q_rows, transposed(buffers.k, 0, TILE_K, HEAD_DIM), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(barriers.k_empty.index(0), count=1)
    s = mask_edge(s, limit, (tiles - 1) * TILE_K, S_LAYOUT, TILE_K)
    p, m, l, _ = softmax(s, m, l, factor)
    p = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    mbarrier.wait(barriers.k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=tiles > 1)
    for n in range(1, tiles):
        k_stage = n % STAGES
        v_stage, v_phase = (n - 1) % STAGES, ((n - 1) // STAGES) & 1
        mbarrier.wait(my_turn, (n - 1) & 1)
        s = warpgroup_mma(q_rows, transposed(buffers.k, k_stage, TILE_K, HEAD_DIM), zero, use_acc=False, is_async=True)
        mbarrier.wait(barriers.v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(p, flat(buffers.v, v_stage, TILE_K, HEAD_DIM), acc, is_async=True)
        mbarrier.arrive(other_turn, count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(barriers.k_empty.index(k_stage), count=1)
        if reach is not None:  # noqa: SIM102 (decided by the compiler)
            if n < edges:
                s = mask_edge(s, limit, (tiles - 1 - n) * TILE_K, S_LAYOUT, TILE_K)
        p_next, m, l, rescale = softmax(s, m, l, factor)
        p_next = gl.convert_layout(p_next.to(DTYPE), P_LAYOUT)
        # The next K is awaited here instead of at its use. A loop between the exponentials and the wait for the product
        # prevents ptxas from moving that wait up, which would idle the tensor cores.
        mbarrier.wait(barriers.k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n + 1 < tiles)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p_next))
        mbarrier.arrive(barriers.v_empty.index(v_stage), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(rescale, O_ROW), 1)
    v_stage, v_phase = (tiles - 1) % STAGES, ((tiles - 1) // STAGES) & 1
    mbarrier.wait(barriers.v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(p, flat(buffers.v, v_stage, TILE_K, HEAD_DIM), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    some = l != 0  # NaN stays NaN
    inverse = gl.convert_layout(gl.where(some, 1.0 / gl.where(some, l, 1.0), 0.0), O_ROW)
    acc = gl.where(gl.expand_dims(inverse != 0, 1), acc * gl.expand_dims(inverse, 1), 0.0)
    q_rows.store(acc.to(DTYPE))
    fence_async_shared()
    tma_store(out, [b, head, first, 0], q_tile)
    lse_rows = lse.pointer + b.to(gl.int64) * lse.batch + head.to(gl.int64) * lse.head + i.to(gl.int64) * lse.row
    gl.store(lse_rows, (m * factor + gl.log2(l)) * LN2, mask=i < sizes.seqlen_q)
    tma_store_wait(0)


@gluon.jit
def flat(buffer, stage, TILE_K: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Return the tile of a stage: (tile_k, head_dim)."""
    return buffer.index(stage).reshape([TILE_K, HEAD_DIM])


@gluon.jit
def transposed(buffer, stage, TILE_K: gl.constexpr, HEAD_DIM: gl.constexpr):
    return flat(buffer, stage, TILE_K, HEAD_DIM).permute((1, 0))


@gluon.jit
def mask_edge(s, limit, start, LAYOUT: gl.constexpr, TILE_K: gl.constexpr):
    """Set masked keys of the tile from `start` on to -inf."""
    j = start + gl.arange(0, TILE_K, layout=gl.SliceLayout(0, LAYOUT))
    return gl.where(gl.expand_dims(j, 0) < gl.expand_dims(limit, 1), s, float("-inf"))


@gluon.jit
def softmax(s, m, l, factor):
    """Return (p, m, l, factor of the accumulator) after the tile of products s. m is not yet scaled."""
    m_new = gl.maximum(m, gl.max(s, 1))
    finite = gl.where(m_new == float("-inf"), 0.0, m_new)  # a query without a visible key so far
    rescale = gl.exp2((m - finite) * factor)
    p = gl.exp2(s * factor - gl.expand_dims(finite * factor, 1))
    return p, m_new, l * rescale + gl.sum(p, 1), rescale
