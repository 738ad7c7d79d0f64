"""Dropout bits: published vectors, the layout of counters, the share that is kept, and independence of any tiling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyattn.definition import philox

# philox4x32 of Random123's kat_vectors: rounds, counter, key, result.
KNOWN_ANSWERS = """
7   00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
7   ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
7   243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10  00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


def words_of(counter: list[int], seed: int, rounds: int = philox.ROUNDS) -> list[int]:
    """One counter, in Python's own integers: an implementation to compare with."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_words_equal_the_published_vectors(line: str) -> None:
    rounds, *numbers = line.split()
    values = [int(number, 16) for number in numbers]
    seed = values[4] | values[5] << 32
    counter = tuple(np.array([value], np.uint64) for value in values[:4])
    assert [int(word[0]) for word in philox.philox(counter, seed, int(rounds))] == values[6:]
    assert words_of(values[:4], seed, int(rounds)) == values[6:]


def test_philox_has_seven_rounds() -> None:
    assert philox.ROUNDS == 7


@pytest.mark.parametrize("state", [(0, 0), (12345, 7), (-1, -1), (-(2**63), 2**40 + 3)])
def test_counters_follow_the_documented_layout(state: tuple[int, int]) -> None:
    """(key_index // 8, query_index, b * nheads + h, offset mod 2^32); column j takes half j % 8, low halves first."""
    seed, offset = (number % 2**64 for number in state)
    head, p = 5, 0.37
    keys, queries = np.array([0, 1, 7, 8, 23, 1000, 2**31 - 1]), np.array([0, 3, 2**31 - 1])
    kept = philox.keep(np.array(state, np.int64), p, head, queries, keys)
    for row, i in enumerate(queries.tolist()):
        for column, j in enumerate(keys.tolist()):
            word = words_of([j // 8, i, head, offset % 2**32], seed)[j % 8 // 2]
            half = word >> 16 if j % 2 else word & 0xFFFF
            assert kept[row, column] == (half >= round(p * 65536))


@pytest.mark.parametrize("p", [0.0, 2.0**-16, 0.1, 0.5, 0.9, 1 - 2.0**-16])
def test_kept_share_equals_one_minus_p(p: float) -> None:
    """Within five standard deviations of 1 - p, for a fixed state; and the kept are scaled so that the mean is 1."""
    kept = philox.keep(np.array([3, 0]), p, 0, np.arange(512), np.arange(1024))
    share = 1 - philox.threshold(p) / 65536
    deviation = math.sqrt(share * (1 - share) / kept.size)
    assert abs(kept.mean() - share) <= 5 * deviation
    assert philox.keep_scale(p) * share == pytest.approx(1, rel=1e-15)


def test_bits_do_not_depend_on_the_tiling() -> None:
    state, p = np.array([99, 4]), 0.3
    whole = philox.keep(state, p, 2, np.arange(40), np.arange(100))
    for rows, keys in [(7, 13), (40, 8), (1, 100), (16, 3)]:
        queries = [np.arange(i, min(40, i + rows)) for i in range(0, 40, rows)]
        columns = [np.arange(j, min(100, j + keys)) for j in range(0, 100, keys)]
        tiles = [[philox.keep(state, p, 2, i, j) for j in columns] for i in queries]
        assert np.array_equal(np.block(tiles), whole)


def test_bits_differ_between_heads_offsets_and_seeds() -> None:
    def bits(state: tuple[int, int], head: int) -> bytes:
        return philox.keep(np.array(state), 0.5, head, np.arange(8), np.arange(64)).tobytes()

    assert len({bits((1, 0), 0), bits((1, 0), 1), bits((1, 1), 0), bits((2, 0), 0), bits((1 + 2**32, 0), 0)}) == 5


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (2.0**-18, 0), (0.5, 32768), (0.1, 6554), (1 - 2.0**-16, 65535)])
def test_threshold_is_p_rounded_to_sixteen_bits(p: float, expected: int) -> None:
    assert philox.threshold(p) == expected
