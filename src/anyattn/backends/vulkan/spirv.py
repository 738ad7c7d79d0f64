"""Freezing of specialization constants: the driver gets plain numbers, folded, and a fixed workgroup size.

Some drivers' compilers reject specialization constants in some places (matrix shapes, shared arrays) or ignore the one
for the workgroup size. Plain constants work everywhere. Source: SPIR-V specification 1.6, sections 3.42 and 2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

MASK = 0xFFFFFFFF
HEADER = 5  # words
EXECUTION_MODE, DECORATE, TYPE_BOOL, LOOP_MERGE = 16, 71, 20, 246
CONSTANT_TRUE, CONSTANT_FALSE, CONSTANT, CONSTANT_COMPOSITE = 41, 42, 43, 44
SPEC_TRUE, SPEC_FALSE, SPEC_CONSTANT, SPEC_COMPOSITE, SPEC_OP = 48, 49, 50, 51, 52
DECORATION_SPEC_ID, DECORATION_BUILTIN, WORKGROUP_SIZE, LOCAL_SIZE = 1, 11, 25, 17
SELECT, NOT = 169, 168
UNROLL, DONT_UNROLL = 1, 2

Words = list[int]


def _signed(x: int) -> int:
    return x - (1 << 32) if x & 0x80000000 else x


_BINARY: dict[int, Callable[[int, int], int]] = {
    128: lambda a, b: a + b,
    130: lambda a, b: a - b,
    132: lambda a, b: a * b,
    134: lambda a, b: a // b if b else 0,
    135: lambda a, b: int(_signed(a) / _signed(b)) if b else 0,
    137: lambda a, b: a % b if b else 0,
    166: lambda a, b: bool(a) or bool(b),
    167: lambda a, b: bool(a) and bool(b),
    170: lambda a, b: a == b,
    171: lambda a, b: a != b,
    172: lambda a, b: a > b,
    173: lambda a, b: _signed(a) > _signed(b),
    174: lambda a, b: a >= b,
    175: lambda a, b: _signed(a) >= _signed(b),
    176: lambda a, b: a < b,
    177: lambda a, b: _signed(a) < _signed(b),
    178: lambda a, b: a <= b,
    179: lambda a, b: _signed(a) <= _signed(b),
    194: lambda a, b: a >> (b & 31),
    196: lambda a, b: a << (b & 31),
    197: lambda a, b: a | b,
    198: lambda a, b: a ^ b,
    199: lambda a, b: a & b,
}


def instructions(words: Words) -> list[Words]:
    """Return the instructions of a module."""
    found, at = [], HEADER
    while at < len(words):
        length = words[at] >> 16
        found.append(words[at : at + length])
        at += length
    return found


def freeze(module: bytes, constants: Mapping[int, int], *, unroll: bool = False) -> bytes:
    """Return the module with `constants` (by specialization id); other constants keep their defaults.

    Loops over the vectors of a row have a hint not to be unrolled, because compilers for CPUs would take long. `unroll`
    reverses these hints.
    """
    words = np.frombuffer(module, "<u4").tolist()
    return _Freezer(words, constants, unroll).run()


class _Freezer:
    def __init__(self, words: Words, constants: Mapping[int, int], unroll: bool) -> None:
        self.words, self.constants, self.unroll = words, constants, unroll
        self.spec_ids: dict[int, int] = {}  # result id -> specialization id
        self.values: dict[int, int] = {}  # result id -> value
        self.bools: set[int] = set()
        self.workgroup = 0  # result id of the workgroup size
        self.size: Words = []

    def run(self) -> bytes:
        for word in instructions(self.words):
            self._look(word)
        out, local_size = self.words[:HEADER], 0
        for word in instructions(self.words):
            if word[0] & 0xFFFF == EXECUTION_MODE and word[2] == LOCAL_SIZE:
                local_size = len(out) + 3
            out += self._rewrite(word)
        if local_size and self.size:
            out[local_size : local_size + 3] = self.size
        return np.array(out, "<u4").tobytes()

    def _look(self, word: Words) -> None:
        """Record decorations and types, which precede the instructions that they refer to."""
        op = word[0] & 0xFFFF
        if op == DECORATE and word[2] == DECORATION_SPEC_ID:
            self.spec_ids[word[1]] = word[3]
        elif op == DECORATE and word[2] == DECORATION_BUILTIN and word[3] == WORKGROUP_SIZE:
            self.workgroup = word[1]
        elif op == TYPE_BOOL:
            self.bools.add(word[1])

    def _given(self, result: int) -> int | None:
        return self.constants.get(self.spec_ids.get(result, -1))

    def _rewrite(self, word: Words) -> Words:
        op = word[0] & 0xFFFF
        if op == DECORATE and word[2] == DECORATION_SPEC_ID:
            return []
        if op in (SPEC_TRUE, SPEC_FALSE):
            given = self._given(word[2])
            return self._constant(word[1], word[2], int(op == SPEC_TRUE if given is None else bool(given)))
        if op == SPEC_CONSTANT:
            given = self._given(word[2])
            self.values[word[2]] = value = word[3] if given is None else given & MASK
            return [4 << 16 | CONSTANT, word[1], word[2], value]
        if op == SPEC_COMPOSITE:
            if word[2] == self.workgroup:
                self.size = [self.values[x] for x in word[3:]]
            return [word[0] & ~0xFFFF | CONSTANT_COMPOSITE, *word[1:]]
        if op == SPEC_OP:
            value_or_none = self._fold(word[3], word[4:])
            return word if value_or_none is None else self._constant(word[1], word[2], value_or_none)
        if op == LOOP_MERGE and self.unroll and word[3] & DONT_UNROLL:
            return [*word[:3], word[3] & ~DONT_UNROLL | UNROLL, *word[4:]]
        if op == CONSTANT and len(word) == 4:
            self.values[word[2]] = word[3]
        elif op in (CONSTANT_TRUE, CONSTANT_FALSE):
            self.values[word[2]] = int(op == CONSTANT_TRUE)
        return word

    def _constant(self, kind: int, result: int, value: int) -> Words:
        self.values[result] = value = int(value) & MASK
        if kind in self.bools:
            return [3 << 16 | (CONSTANT_TRUE if value else CONSTANT_FALSE), kind, result]
        return [4 << 16 | CONSTANT, kind, result, value]

    def _fold(self, op: int, operands: Words) -> int | None:
        """Return the value of an operation on constants, or None if an operand is unknown."""
        if any(x not in self.values for x in operands):
            return None
        known = [self.values[x] for x in operands]
        if op == SELECT:
            return known[1] if known[0] else known[2]
        if op == NOT:
            return int(not known[0])
        return int(_BINARY[op](*known)) if op in _BINARY else None
