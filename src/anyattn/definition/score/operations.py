"""Operations of score functions, one row each: the kinds of its arguments and its result, and its values in NumPy.

Values are computed in the compute dtype. Integers are int32 in range; the division by 0 of integers gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .graph import BOOL, FLOAT, INT

# Kinds of arguments: all FLOAT; all INT; numbers (all INT or all FLOAT); INT or BOOL; all BOOL; anything.
FLOATS, INTS, NUMBERS, BITS, BOOLS, ANY = FLOAT, INT, FLOAT + INT, INT + BOOL, BOOL, FLOAT + INT + BOOL
SAME = ""  # result of the kind of the arguments


class Operation(NamedTuple):
    """Elementwise operation. `where` is the only one whose arguments differ in kind."""

    compute: Callable[..., Any]
    accepts: str
    result: str = SAME


def _sigmoid(x: Any) -> Any:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _truncate(x: Any) -> Any:
    return np.nan_to_num(np.trunc(np.clip(x, -(2.0**31), 2.0**31 - 1))).astype(np.int64)


OPERATIONS: dict[str, Operation] = {
    "neg": Operation(np.negative, NUMBERS),
    "abs": Operation(np.abs, NUMBERS),
    "sign": Operation(np.sign, NUMBERS),
    "floor": Operation(np.floor, FLOATS),
    "round": Operation(np.rint, FLOATS),  # ties to even
    "exp": Operation(np.exp, FLOATS),
    "log": Operation(np.log, FLOATS),
    "sqrt": Operation(np.sqrt, FLOATS),
    "tanh": Operation(np.tanh, FLOATS),
    "sigmoid": Operation(_sigmoid, FLOATS),
    "sin": Operation(np.sin, FLOATS),
    "cos": Operation(np.cos, FLOATS),
    "add": Operation(np.add, NUMBERS),
    "sub": Operation(np.subtract, NUMBERS),
    "mul": Operation(np.multiply, NUMBERS),
    "div": Operation(np.divide, FLOATS),
    "pow": Operation(np.power, FLOATS),
    "floordiv": Operation(np.floor_divide, NUMBERS),  # rounds down, also for negative numbers
    "mod": Operation(np.remainder, NUMBERS),  # has the sign of the divisor
    "min": Operation(np.minimum, NUMBERS),  # NaN if one argument is NaN
    "max": Operation(np.maximum, NUMBERS),
    "lt": Operation(np.less, NUMBERS, BOOL),
    "le": Operation(np.less_equal, NUMBERS, BOOL),
    "eq": Operation(np.equal, ANY, BOOL),
    "ne": Operation(np.not_equal, ANY, BOOL),
    "and": Operation(np.bitwise_and, BITS),
    "or": Operation(np.bitwise_or, BITS),
    "xor": Operation(np.bitwise_xor, BITS),
    "not": Operation(np.logical_not, BOOLS),
    "shl": Operation(np.left_shift, INTS),
    "shr": Operation(np.right_shift, INTS),
    "where": Operation(np.where, ANY),
    "to_float": Operation(lambda x: x, BITS, FLOAT),  # evaluation casts to the compute dtype
    "to_int": Operation(_truncate, FLOATS + BOOL, INT),  # rounds towards zero
    "to_bool": Operation(lambda x: x != 0, NUMBERS, BOOL),
}
UNARY = ("neg", "abs", "sign", "floor", "round", "exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos", "not")
BINARY = (
    *("add", "sub", "mul", "div", "pow", "floordiv", "mod", "min", "max", "lt", "le", "eq", "ne"),
    *("and", "or", "xor", "shl", "shr"),
)
