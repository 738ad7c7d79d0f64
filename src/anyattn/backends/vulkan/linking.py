"""Linking of score functions into a shader: bodies replace stubs, with the functions of a library that they call.

Source: SPIR-V specification 1.6, sections 2.4 (order of a module) and 3.42 (instructions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ...definition.score.graph import BOOL, FLOAT, INT
from .score_code import ARITHMETIC, CONSTANT_CODE, Body, Extended, Step
from .spirv import CONSTANT_FALSE, CONSTANT_TRUE, DECORATE, DECORATION_BUILTIN, HEADER, Words, instructions

BOUND = 3  # word of the header: larger than every id
NAME, IMPORT, EXTENDED, MEMBER_DECORATE = 5, 11, 12, 72
FUNCTION, PARAMETER, FUNCTION_END, CALL, LABEL, RETURN_VALUE = 54, 55, 56, 57, 248, 254
DECORATION_BINDING, NO_CONTRACTION = 33, 42
TYPES = range(19, 34)
AGGREGATES = (28, 29, 30)  # arrays and structures, the only types that a module may declare twice
COMPARISONS = (170, 171)
KINDS = {FLOAT: (22, 32), INT: (21, 32, 1), BOOL: (20,)}  # types without their ids
# The numbers in the stubs of shaders/include/function.glsl
STUBS = {0x5C0E0001: "score_mod", 0x5C0E0002: "score_slope", 0x5C0E0003: "mask_mod"}
# Binding of the numbers, by shader: free in each
BINDINGS = {"forward": 10, "dq": 9, "dkdv": 9, "dbias": 9}
# Words that are not ids, in the instructions that a library may contain
_REST = 1 << 16
LITERALS = {
    **{EXTENDED: (4, 5), FUNCTION: (3, 4), 59: (3, 4), 61: (4, _REST), 62: (3, _REST), 247: (2, 3), 246: (3, _REST)},
    **{250: (4, _REST), 79: (5, _REST), 81: (4, _REST), 82: (5, _REST), CONSTANT_CODE: (3, _REST), 21: (2, _REST)},
    **{22: (2, _REST), 23: (3, 4), 32: (2, 3), DECORATE: (2, _REST), MEMBER_DECORATE: (2, _REST)},
}


def link(module: bytes, library: bytes, bodies: Mapping[str, Body], binding: int) -> bytes:
    """Return the module with these bodies in its stubs. binding: of the buffer that the library reads."""
    linker = _Linker(module)
    called = {step.code for body in bodies.values() for step in body.steps if isinstance(step.code, str)}
    linker.add_library(_Library(library), sorted(called), binding)
    linker.fill_stubs(bodies)
    return linker.module()


def _opcode(word: Words) -> int:
    return word[0] & 0xFFFF


def _instruction(code: int, *operands: int) -> Words:
    return [(len(operands) + 1) << 16 | code, *operands]


def _functions(words: Iterable[Words]) -> list[list[Words]]:
    """Return the instructions of each function."""
    found: list[list[Words]] = []
    for word in words:
        if _opcode(word) == FUNCTION:
            found.append([])
        found[-1].append(word)
    return found


class _Sections:
    """Instructions of a module: before the types (annotations included), types and constants, functions."""

    def __init__(self, module: bytes) -> None:
        words = np.frombuffer(module, "<u4").tolist()
        self.header, found = words[:HEADER], instructions(words)
        codes = [_opcode(word) for word in found]
        types_at, functions_at = next(i for i, code in enumerate(codes) if code in TYPES), codes.index(FUNCTION)
        self.before, self.types = found[:types_at], found[types_at:functions_at]
        self.functions = _functions(found[functions_at:])
        self.glsl = next(word[1] for word in self.before if _opcode(word) == IMPORT)


class _Library(_Sections):
    """Library whose functions have names."""

    def __init__(self, module: bytes) -> None:
        super().__init__(module)
        names = {word[1]: _text(word[2:]).split("(")[0] for word in self.before if _opcode(word) == NAME}
        self.by_id = {function[0][2]: function for function in self.functions}
        self.ids = {names[number]: number for number in self.by_id}

    def needed(self, names: Iterable[str]) -> list[int]:
        """Return the ids of functions and of all that they call."""
        found, todo = [], [self.ids[name] for name in names]
        while todo:
            one = todo.pop()
            if one not in found:
                found.append(one)
                todo += [word[3] for word in self.by_id[one] if _opcode(word) == CALL]
        return found


def _text(words: Words) -> str:
    return np.array(words, "<u4").tobytes().split(b"\0")[0].decode()


class _Linker(_Sections):
    """Module that grows."""

    def __init__(self, module: bytes) -> None:
        super().__init__(module)
        self.types_of = {_key(word): word[1] for word in self.types if _opcode(word) in TYPES}
        self.called: dict[str, int] = {}  # function of the library -> its id here
        self._constants: dict[tuple[str, int], int] = {}

    def module(self) -> bytes:
        functions = [word for function in self.functions for word in function]
        words = [x for word in (*self.before, *self.types, *functions) for x in word]
        return np.array(self.header + words, "<u4").tobytes()

    def new_id(self) -> int:
        self.header[BOUND] += 1
        return int(self.header[BOUND]) - 1

    def add_library(self, library: _Library, names: Iterable[str], binding: int) -> None:
        """Add functions of the library, and what they use, with new ids."""
        ids = {library.glsl: self.glsl}
        for word in library.types:
            moved = self._moved(word, ids)
            known = self.types_of.get(_key(moved)) if _opcode(word) in TYPES else None
            if known is None:
                self.types.append(moved)
            else:
                ids[word[1]] = known
        for number in library.needed(names):
            self.functions.append([self._moved(word, ids) for word in library.by_id[number]])
        self.called = {name: ids[number] for name, number in library.ids.items() if number in ids}
        for word in library.before:
            decorates = _opcode(word) in (DECORATE, MEMBER_DECORATE) and word[2] != DECORATION_BUILTIN
            if decorates and word[1] in ids:
                moved = self._moved(word, ids)
                if _opcode(word) == DECORATE and word[2] == DECORATION_BINDING:
                    moved[3] = binding
                self.before.append(moved)

    def _moved(self, word: Words, ids: dict[int, int]) -> Words:
        """Return the instruction with the ids of this module."""
        first, end = LITERALS.get(_opcode(word), (0, 0))
        moved = [word[0]]
        for at, x in enumerate(word[1:], 1):
            if first <= at < end:
                moved.append(x)
                continue
            if x not in ids:
                ids[x] = self.new_id()
            moved.append(ids[x])
        return moved

    def fill_stubs(self, bodies: Mapping[str, Body]) -> None:
        """Replace the bodies of the stubs. A stub without a body is left as it is."""
        marks = {word[2]: STUBS[word[3]] for word in self.types if _opcode(word) == CONSTANT_CODE and word[3] in STUBS}
        for number, function in enumerate(self.functions):
            compared = {x for word in function if _opcode(word) in COMPARISONS for x in word[3:]}
            name = next((marks[x] for x in compared if x in marks), "")
            if name in bodies:
                self.functions[number] = self._filled(function, bodies[name])

    def _filled(self, stub: list[Words], body: Body) -> list[Words]:
        parameters = [word for word in stub if _opcode(word) == PARAMETER]
        values, code = [word[2] for word in parameters], []
        for step in body.steps:
            result, words = self._step(step, values)
            values.append(result)
            code += words
        label = next(word for word in stub if _opcode(word) == LABEL)
        end = (_instruction(RETURN_VALUE, values[body.result]), _instruction(FUNCTION_END))
        return [stub[0], *parameters, label, *code, *end]

    def _step(self, step: Step, values: list[int]) -> tuple[int, list[Words]]:
        """Return the id of a step's value and its instructions."""
        if step.code == CONSTANT_CODE:
            return self._constant(step.kind, step.operands[0]), []
        kind, result = self.types_of[KINDS[step.kind]], self.new_id()
        operands = [values[x] for x in step.operands]
        if isinstance(step.code, str):
            return result, [_instruction(CALL, kind, result, self.called[step.code], *operands)]
        if isinstance(step.code, Extended):
            return result, [_instruction(EXTENDED, kind, result, self.glsl, step.code.number, *operands)]
        if step.code in ARITHMETIC:
            self.before.append(_instruction(DECORATE, result, NO_CONTRACTION))
        return result, [_instruction(step.code, kind, result, *operands)]

    def _constant(self, kind: str, value: int) -> int:
        if (kind, value) not in self._constants:
            result = self._constants[kind, value] = self.new_id()
            of_kind = self.types_of[KINDS[kind]]
            if kind == BOOL:
                self.types.append(_instruction(CONSTANT_TRUE if value else CONSTANT_FALSE, of_kind, result))
            else:
                self.types.append(_instruction(CONSTANT_CODE, of_kind, result, value))
        return self._constants[kind, value]


def _key(word: Words) -> tuple[int, ...]:
    """Return a type without its id; for arrays and structures, with it, because each has its own."""
    code = _opcode(word)
    return (code, *word[1:]) if code in AGGREGATES else (code, *word[2:])
