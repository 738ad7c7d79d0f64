"""Shardings: every position once, lengths, positions, division and joining."""

from __future__ import annotations

import pytest
import torch

from anyattn.distributed import Interval, Sharding
from anyattn.distributed.pairs import Band, Document, pairs, pieces

SHARDINGS = {
    "contiguous": Sharding.contiguous,
    "zigzag": Sharding.zigzag,
    "documents": lambda n, p: Sharding.zigzag(n, p, [0, n // 3, n // 3, n]),
    "striped": Sharding.striped,
}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 4, 29])
@pytest.mark.parametrize("kind", SHARDINGS)
def test_unshard_inverts_shard(kind: str, length: int, size: int) -> None:
    sharding = SHARDINGS[kind](length, size)
    assert sharding.length == length and sharding.world_size == size
    x = torch.arange(2 * length).view(2, length, 1)
    parts = [sharding.shard(x, rank) for rank in range(size)]
    assert [part.shape[1] for part in parts] == list(sharding.lengths())
    for rank, part in enumerate(parts):
        assert torch.equal(part[0, :, 0], sharding.positions(rank))
    assert torch.equal(sharding.unshard(parts), x)


def test_zigzag_balances_a_causal_mask() -> None:
    sharding = Sharding.zigzag(64, 4)
    assert sharding.positions(1).tolist() == [*range(8, 16), *range(48, 56)]
    assert {int(sharding.positions(rank).sum()) for rank in range(4)} == {504}


@pytest.mark.parametrize(
    "intervals",
    [((Interval(0, 3),), (Interval(2, 3),)), ((Interval(0, 3),), (Interval(4, 3),)), ((Interval(-1, 2),),), ()],
)
def test_intervals_must_cover_every_position_once(intervals: tuple[tuple[Interval, ...], ...]) -> None:
    with pytest.raises(ValueError, match="intervals must"):
        Sharding(intervals)


BANDS = [Band(), Band(right=0), Band(left=4, right=0), Band(3, 2), Band(right=0, chunk=5), Band(chunk=7)]
SHARDED_BANDS = [(kind, band) for kind in SHARDINGS for band in BANDS if kind != "striped" or not band.chunk]


@pytest.mark.parametrize("shift", [-9, 0, 4])
@pytest.mark.parametrize(("kind", "band"), SHARDED_BANDS)
def test_pairs_contain_every_visible_entry_once(kind: str, shift: int, band: Band) -> None:
    n, m, size = 23, 31, 3
    queries, keys = SHARDINGS[kind](n, size), SHARDINGS[kind](m, size)
    count = torch.zeros(n, m, dtype=torch.int64)
    document = [Document(n, 0, m, shift, shift)]
    for receiver in range(size):
        for owner in range(size):
            own = pieces(queries.intervals[receiver], [0, n])
            for q, k, chunk in pairs(own, pieces(keys.intervals[owner], [0, m]), document, band):
                assert chunk == 0 or k.start % chunk == 0
                rows = torch.arange(q.length) * q.step + q.start
                columns = torch.arange(k.length) * k.step + k.start
                count[rows[:, None], columns] += 1
    p, c = torch.arange(n)[:, None] + shift, torch.arange(m)
    visible = (p - c <= band.left) & (c - p <= band.right)
    if band.chunk:
        visible &= torch.div(p, band.chunk, rounding_mode="floor") == torch.div(c, band.chunk, rounding_mode="floor")
    assert int(count.max()) == 1
    assert bool((count[visible] == 1).all())
