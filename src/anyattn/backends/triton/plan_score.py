"""Plans of mask_mod: lists of the tiles that it does not exclude, which a kernel writes before the others run."""

from __future__ import annotations

from ...definition.problem import Problem
from . import tuning
from .arguments import sizes
from .launch import Address, Kernel, Template, i32
from .score_arguments import Lists, Tiles, scalars
from .tile_lists import attention_mask_tiles

MOST_BYTES = 2**28  # of lists; without lists, kernels evaluate mask_mod on every tile
ALIGNMENT = 16  # bytes, of addresses in the workspace


def plan_lists(problem: Problem, tiles: Tiles, used: int) -> Lists | None:
    """Return the lists of a kernel, or None if it has to visit every tile. used: bytes of workspace before them.

    Lists change the order of sums, so calls with batch_invariant have none, because other sequences affect this choice.
    """
    graph = problem.functions
    if graph.mask is None or problem.batch_invariant:
        return None
    if problem.seqlen_q <= tuning.DECODE_ROWS or _is_sparse(problem):
        return None
    names = {graph.nodes[number].operation for number in graph.reachable((graph.mask,))}
    packed = problem.group if tiles.pack else 1
    counts = (-(-problem.seqlen_q * packed // tiles.tile_q), -(-problem.seqlen_k // tiles.tile_k))
    own, other = reversed(counts) if tiles.by_key else counts
    batch = problem.batch if "b" in names else 1
    heads = problem.nheads // packed if "h" in names else 1
    found = Lists(tiles, Address("workspace", "int32", align(used)), own, other, batch, heads)
    return found if 0 < found.bytes <= MOST_BYTES else None


def _is_sparse(problem: Problem) -> bool:
    """Return whether sequences are packed and no bound on their lengths is known, so that lists would cost too much."""
    return any(
        packed and problem.batch * length > 4 * array.shape[0]
        for packed, length, array in (
            (problem.packed_q, problem.seqlen_q, problem.q),
            (problem.packed_k, problem.seqlen_k, problem.k),
        )
    )


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def list_kernels(problem: Problem, lists: Lists | None) -> list[Kernel]:
    """Return the kernel that writes the lists, or [] without lists."""
    if lists is None:
        return []
    tiles = lists.tiles
    constants = {"TILE_Q": tiles.tile_q, "TILE_K": tiles.tile_k, "PACK": tiles.pack, "BY_KEY": tiles.by_key}
    template = Template((sizes(problem), scalars(problem, lists), i32(lists.heads), i32(lists.own)), constants)
    return [Kernel(attention_mask_tiles, template, (lists.own, lists.batch * lists.heads), {"num_warps": 8})]


def total_bytes(used: int, lists: Lists | None) -> int:
    """Return the bytes of workspace including the lists."""
    return used if lists is None else align(used) + lists.bytes
