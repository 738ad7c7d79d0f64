"""Arguments of kernels for score functions: generated functions, captured arrays, and lists of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...definition.problem import Problem
from .launch import Address, Function, f32, i32, i64
from .score_source import generate
from .views import Scalars, scalars_type


class Tiles(NamedTuple):
    """Tiles of a kernel whose programs own tiles of queries or, if by_key, of keys. pack: see forward.py."""

    tile_q: int
    tile_k: int
    pack: bool = False
    by_key: bool = False


class Lists(NamedTuple):
    """Lists of tiles in the workspace: their address and their numbers."""

    tiles: Tiles
    address: Address
    own: int  # tiles that have a list
    other: int  # tiles in a list, at most
    batch: int  # 1 if mask_mod does not depend on the sequence
    heads: int  # 1 if it does not depend on the head

    @property
    def lists(self) -> int:
        """Return the number of lists."""
        return self.batch * self.heads * self.own

    @property
    def bytes(self) -> int:
        """Return the bytes of all lists."""
        return 4 * self.lists * (2 * self.other + 2)


def scalars(problem: Problem, lists: Lists | None = None) -> Any:
    """Return the scalars and functions of a problem."""
    softcap = f32(problem.softcap) if problem.softcap > 0 else None
    scale = f32(problem.scale)
    if not problem.score:
        return Scalars(scale, softcap)
    found = generate(problem.functions)
    functions = [None if one is None else Function(one) for one in (found.score, found.slope, found.mask)]
    names = (("captured", "float32"), ("captured_indices", "int32"))
    arrays = [None if getattr(problem, name) is None else Address(name, dtype) for name, dtype in names]
    return scalars_type(len(found.numbers))(scale, softcap, *functions, *arrays, *_steps(lists), *found.numbers)


def _steps(lists: Lists | None) -> tuple[Any, ...]:
    if lists is None:
        return (None,) * 5
    batch = lists.own * lists.heads if lists.batch > 1 else 0
    head = lists.own if lists.heads > 1 else 0
    return (lists.address, i64(batch), i64(head), i32(lists.other), i64(lists.lists))
