"""Bytes that a rank allocates for a call, forward and backward, fall as 1/P, where P is the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.distributed_jobs import Case
from harness.ranks import Ranks

SIZES = (1, 2, 4)
# With 8 heads or more for each rank, the CPU engine needs no memory for partial sums.
DENSE = Case(queries=2048, keys=2048, batch=1, nheads=8, nheads_kv=8, dtype="float32")
CASES = {
    "ring": DENSE,
    "causal ring": DENSE._replace(arguments={"causal": True}, sharding="zigzag"),
    "ulysses": DENSE._replace(nheads=32, nheads_kv=32, schedule="ulysses"),
}
BUFFERS = 2.25  # the keys in flight and their gradients take more than one process needs for the same number of rows


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    found = {size: Ranks(size) for size in SIZES}
    yield found
    for ranks in found.values():
        ranks.close()


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_of_a_rank_falls_as_the_number_of_ranks_grows(name: str, groups: dict[int, Ranks]) -> None:
    """P times the peak of the busiest rank stays below a constant times the peak of one process."""
    whole, *divided = (
        max(peak for _, peak, _ in groups[size].results("measure_memory", CASES[name])) * size for size in SIZES
    )
    assert max(divided) <= BUFFERS * whole, (whole, divided)
    assert min(divided) >= 0.75 * whole, (whole, divided)  # what is measured is the memory of the call
