"""The choice of a backend for a problem, with reasons. Argument > context manager > environment > automatic.

No backend is known here by name: `backends.ROWS` lists them, `register` adds others.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

from ..backends import ROWS, Row
from ..backends.base import Backend, Call, Plan
from ..config import settings
from ..definition.errors import CompilationError, DeviceError, UnsupportedProblem
from ..definition.inputs import FIELDS
from ..definition.problem import Problem, Variant

CACHE_SIZE = 1024
NONE: Mapping[str, list[str]] = MappingProxyType({})

logger = logging.getLogger("anyattn")
logger.addHandler(logging.NullHandler())

_named: ContextVar[tuple[str, ...]] = ContextVar("anyattn_backend", default=())
_rows: dict[str, Row] = {row.name: row for row in ROWS}  # in the order of automatic choice
_backends: dict[str, Backend] = {}
_passed_over: set[tuple[str, Variant]] = set()
_warned: set[str] = set()


class Explanation(NamedTuple):
    """The backend that a problem gets (None: none computes it) and the reasons of every backend that refuses it."""

    problem: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items() if reasons]
        return "\n".join([f"{self.problem}: {self.chosen or 'no backend'}", *(f"  not {line}" for line in lines)])


@contextmanager
def backend(*names: str) -> Iterator[None]:
    """Use only the named backends, in this order, inside the `with` block; none of them falls back to another.

    >>> with backend("numpy"):
    ...     pass
    """
    for name in names:
        get(name)
    token = _named.set(names)
    try:
        yield
    finally:
        _named.reset(token)


def names() -> tuple[str, ...]:
    """Return the names of all backends, in the order of automatic choice."""
    return tuple(_rows)


def register(name: str, load: Callable[[], Backend], *, after: str | None = None, offloads: bool = False) -> None:
    """Add a backend, or replace the one of that name; every cached plan is forgotten.

    Args:
        name: what `backend=` and ANYATTN_BACKEND call it.
        load: makes the backend, at its first use; import what it needs in there.
        after: the backend behind which automatic choice asks it; default: behind all others.
        offloads: it computes arrays in host memory on another device, so it is asked first about problems that it does
            not avoid.

    Raises:
        ValueError: there is no backend `after`.
    """
    if after is not None and after not in _rows:
        raise ValueError(f"after must be one of {', '.join(_rows)}; got {after!r}")
    rows = [row for row in _rows.values() if row.name != name]
    place = len(rows) if after is None else 1 + [row.name for row in rows].index(after)
    rows.insert(place, Row(name, load, offloads))
    _rows.clear()
    _rows.update((row.name, row) for row in rows)
    forget()


def unregister(name: str) -> None:
    """Remove a backend that `register` added."""
    if name in {row.name for row in ROWS}:
        raise ValueError(f"name must be a registered backend; got {name!r}, which is part of anyattn")
    _rows.pop(name)
    forget()


def get(name: str) -> Backend:
    """Return the backend of that name; it is made at first use."""
    # Without a lock, which a forked child might find held: of two that are made at once, one is kept.
    return _backends.get(name) or _backends.setdefault(name, _make(name))


def _make(name: str) -> Backend:
    row = _rows.get(name)
    if row is None:
        raise ValueError(f"backend must be one of {', '.join(_rows)}; got {name!r}")
    return row.load()


def named(argument: str | None) -> tuple[str, ...]:
    """Return the backends that the caller ("cpu,numpy"), a context manager or the environment named; (): automatic."""
    if argument and not isinstance(argument, str):
        raise TypeError(f"backend must be a name, or names separated by commas; got {argument!r}")
    return tuple(argument.split(",")) if argument else _named.get() or _from_settings("backend")


def _from_settings(which: str) -> tuple[str, ...]:
    """Return the backends that ANYATTN_BACKEND or ANYATTN_REQUIRE names."""
    found: tuple[str, ...] = getattr(settings.current(), which)
    for name in found:
        if name not in _rows:
            variable, _, meaning = settings.VARIABLES[which]
            raise ValueError(f"{variable}={','.join(found)!r}: expected {', '.join(_rows)} ({meaning}); got {name!r}")
    return found


def check_settings() -> None:
    """Raise ValueError where the environment names a backend that does not exist."""
    for which in ("backend", "require"):
        _from_settings(which)


def plan(problem: Problem, asked: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Plan:
    """Return a plan from the first backend that supports the problem and initialises successfully.

    Errors of backends that the caller named (`asked`) propagate. failed: reasons against those that were tried.
    """
    failed = dict(failed)
    while True:
        chosen = choose(problem, asked, failed)
        try:
            made = chosen.plan(problem)
            if chosen.may_fail and not asked:
                return FallbackPlan(made, chosen.name, problem)
            return made
        except (CompilationError, DeviceError) as error:
            if asked:
                raise
            logger.warning("%s passed over: %s", chosen.name, error)
            failed[chosen.name] = [str(error)]


class FallbackPlan:
    """An automatically chosen plan; on DeviceError, the next backend computes this and all later calls."""

    lse_optional = False  # the next backend may need it

    def __init__(self, made: Plan, name: str, problem: Problem) -> None:
        self._name, self._problem = name, problem
        self._use(made)

    def _use(self, made: Plan) -> None:
        self._plan, self.workspace_bytes = made, made.workspace_bytes

    def warmup(self) -> None:
        self._plan.warmup()

    def run(self, call: Call) -> None:
        try:
            self._plan.run(call)
        except DeviceError as error:
            self._fall_back(error, call)
            self._plan.run(call)

    def _fall_back(self, error: DeviceError, call: Call) -> None:
        logger.warning("%s failed, from now on the next backend computes %s: %s", self._name, self._problem, error)
        self._use(plan(self._problem, (), {self._name: [str(error)]}))
        size = self.workspace_bytes
        call.workspace = call.adapter.empty((size,), "uint8", call.q) if size else None


def choose(problem: Problem, asked: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Backend:
    """Return the first backend that computes the problem. failed: reasons against those that were tried.

    Raises:
        UnsupportedProblem: none does, among those that the caller named (`asked`) if any are.
    """
    _check_required()
    refusals: dict[str, list[str]] = {}
    for name in asked or _automatic(problem):
        reasons = failed.get(name) or refuse(get(name), problem, named=bool(asked))
        if not reasons:
            if not asked:
                _report(problem, refusals)
            return get(name)
        refusals[name] = reasons
    raise UnsupportedProblem(str(problem), refusals)


def _automatic(problem: Problem) -> tuple[str, ...]:
    """Return all backends, those first that gain from computing arrays in host memory on another device.

    A backend may avoid small problems without looking for its device.
    """
    offloading = [row.name for row in _rows.values() if row.offloads and problem.device == "cpu"]
    first = [name for name in offloading if not get(name).avoids(problem)]
    return (*first, *(name for name in _rows if name not in first))


def refuse(candidate: Backend, problem: Problem, *, named: bool = True) -> list[str]:
    """Return [] or why this backend does not compute the problem; unless the caller named it, it may avoid it.

    A backend that avoids the problem is not asked whether it is available, because that may mean to load a driver.
    """
    avoided = [] if named else candidate.avoids(problem)
    if avoided:
        return avoided
    missing = candidate.available(named=named)
    return [missing] if missing else unsupported(candidate, problem)


def unsupported(candidate: Backend, problem: Problem) -> list[str]:
    """Return [] or why this backend, where it is available, does not compute the problem."""
    return _unsupported_inputs(candidate, problem) or candidate.supports(problem)


def _unsupported_inputs(candidate: Backend, problem: Problem) -> list[str]:
    """Return [] or the pass, or the optional arrays, that the backend does not take."""
    if problem.pass_ not in candidate.passes:
        return [f"has no {problem.pass_} pass"]
    unknown = [name for name in problem.arrays if name in FIELDS and name not in candidate.extras]
    return [f"does not take {', '.join(unknown)}"] if unknown else []


def explain(problem: Problem, asked: tuple[str, ...]) -> Explanation:
    """Return what `choose` would do, with every backend's reasons."""
    order = asked or _automatic(problem)
    reasons = {name: refuse(get(name), problem, named=bool(asked)) for name in order}
    chosen = next((name for name, refusal in reasons.items() if not refusal), None)
    return Explanation(str(problem), chosen, reasons)


def available() -> list[str]:
    """Return the names of the backends that run here, best first."""
    return [name for name in _rows if get(name).available() is None]


def _check_required() -> None:
    for name in _from_settings("require"):
        missing = get(name).available(named=True)
        if missing:
            raise RuntimeError(f"ANYATTN_REQUIRE names {name}, which is not available: {missing}")


def _report(problem: Problem, refusals: dict[str, list[str]]) -> None:
    """Log once per class of problems which backends were passed over; warn once about one that should be there."""
    for name, reasons in refusals.items():
        if (name, problem.variant) not in _passed_over:
            _passed_over.add((name, problem.variant))
            logger.info("%s passed over for %s: %s", name, problem, "; ".join(reasons))
        warning = _rows[name].missed
        missing = get(name).available() if warning and name not in _warned else None
        if missing:
            _warned.add(name)
            warnings.warn(f"{warning}: {missing}", RuntimeWarning, stacklevel=2)


class Ready(NamedTuple):
    """Cached result of a lookup: the validated problem, its plan, and what every call reads of the problem."""

    problem: Problem
    plan: Plan
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype
    has_tables: bool


class _Cache(threading.local):
    """Per thread: raw metadata and the backends asked for -> Ready. Cleared when full or when the settings change."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, Ready] = {}


_cache = _Cache()


def lookup(key: Hashable, backend: str | None, build: Callable[[], Problem]) -> Ready:
    """Return the validated problem and its plan, found by a raw tuple of metadata; built at the first such call."""
    entries, wanted = _cache.entries, (key, backend or _named.get())
    try:
        found = entries.get(wanted)
    except TypeError:  # a list or an array where a number belongs: the checks name it
        named(backend)
        build()
        raise
    if found is None:
        if len(entries) >= CACHE_SIZE:
            entries.clear()
        problem = build()
        made = plan(problem, named(backend))
        outputs = tuple((name, array.shape, array.dtype) for name, array in problem.outputs().items())
        found = entries[wanted] = Ready(problem, made, outputs, problem.has_tables)
    return found


@settings.on_reload
def forget() -> None:
    """Drop every cached plan and backend."""
    global _cache
    _cache = _Cache()
    _backends.clear()
