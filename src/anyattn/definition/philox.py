"""Dropout bits: Philox4x32 with 7 rounds, the counter layout of every backend, and the NumPy implementation.

    key     = seed (64 bits)
    counter = (key_index // 8, query_index, b * nheads + h, offset mod 2^32)

Key j uses the 16-bit half `key_index % 8` of the 128 bits, low half of the first word first. The key is kept when
half >= threshold, with threshold = round(p * 2^16). Kept entries are scaled by 1 / (1 - threshold / 2^16). Indices
count within the sequence. Padded, packed and paged calls therefore drop the same entries, for any tiles and threads.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 7
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint64]


def threshold(dropout_p: float) -> int:
    """Return the 16-bit number below which an entry is dropped."""
    return round(dropout_p * 65536)


def keep_scale(dropout_p: float) -> float:
    """Return 1 / (1 - p) for the p that is really used, a multiple of 2^-16."""
    return 1.0 / (1.0 - threshold(dropout_p) / 65536.0)


def philox(counter: tuple[Words, Words, Words, Words], seed: int, rounds: int = ROUNDS) -> tuple[Words, ...]:
    """Return four 32-bit words for each counter; counters are uint64 arrays that hold 32-bit values and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 x 32 -> 64 bits, never overflows
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep(
    rng_state: npt.NDArray[np.int64],
    dropout_p: float,
    head: int,
    queries: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Return booleans (len(queries), len(keys)): the entries of one head (b * nheads + h) that are kept."""
    seed, offset = (int(word) & 0xFFFFFFFFFFFFFFFF for word in rng_state)
    groups, column = np.unique(keys // 8, return_inverse=True)
    words = philox(
        (
            groups.astype(np.uint64)[None, :] & _LOW,
            queries.astype(np.uint64)[:, None] & _LOW,
            np.uint64(head & 0xFFFFFFFF) + np.zeros((1, 1), np.uint64),
            np.uint64(offset & 0xFFFFFFFF) + np.zeros((1, 1), np.uint64),
        ),
        seed,
    )
    bits = np.stack(np.broadcast_arrays(*words), axis=-1)  # (queries, groups, 4)
    halves = np.stack([bits & np.uint64(0xFFFF), bits >> np.uint64(16)], axis=-1).reshape(*bits.shape[:2], 8)
    return np.asarray(halves[:, column, keys % 8] >= threshold(dropout_p))
