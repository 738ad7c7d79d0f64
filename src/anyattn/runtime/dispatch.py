"""Choice of a backend for a problem, with reasons. Argument > context manager > environment > automatic.

This module does not depend on any backend's name. `backends.ROWS` lists the backends, and `register` adds others.
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
    """Backend chosen for a problem (None: no backend computes it), and the reasons of the backends that refuse it."""

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
    """Add a backend, or replace the backend of that name. Every cached plan is discarded.

    Args:
        name: name for `backend=` and ANYATTN_BACKEND.
        load: creates the backend at its first use. Import the backend's dependencies inside it.
        after: name of the backend after which automatic choice tries this one; default: last.
        offloads: the backend computes arrays in host memory on another device. Automatic choice then tries it first for
            problems that it does not avoid.

    Raises:
        ValueError: no other backend is named `after`.
    """
    rows = [row for row in _rows.values() if row.name != name]
    others = [row.name for row in rows]
    if after is not None and after not in others:
        raise ValueError(f"after must be one of {', '.join(others)}, got {after!r}.")
    place = len(rows) if after is None else 1 + others.index(after)
    rows.insert(place, Row(name, load, offloads))
    _rows.clear()
    _rows.update((row.name, row) for row in rows)
    forget()


def unregister(name: str) -> None:
    """Remove a backend that `register` added. Every cached plan is discarded.

    Raises:
        ValueError: `register` did not add the backend. The backends of anyattn cannot be removed.
    """
    if name not in _rows or name in {row.name for row in ROWS}:
        added = [row for row in _rows if row not in {row.name for row in ROWS}]
        raise ValueError(f"name must be a backend added by register() ({', '.join(added) or 'none'}), got {name!r}.")
    _rows.pop(name)
    forget()


def get(name: str) -> Backend:
    """Return the backend of that name, which is created at first use."""
    # No lock, because a forked child might inherit a held lock. If two threads create a backend, one of the two
    # remains.
    return _backends.get(name) or _backends.setdefault(name, _make(name))


def _make(name: str) -> Backend:
    row = _rows.get(name)
    if row is None:
        raise ValueError(f"backend must be one of {', '.join(_rows)}, got {name!r}.")
    return row.load()


def named(argument: str | None) -> tuple[str, ...]:
    """Return the backends named by the caller ("cpu,numpy"), a context manager or the environment; () if automatic."""
    if argument and not isinstance(argument, str):
        raise TypeError(f"backend must be a name, or names separated by commas, got {argument!r}.")
    return tuple(argument.split(",")) if argument else _named.get() or _from_settings("backend")


def _from_settings(which: str) -> tuple[str, ...]:
    """Return the backends that ANYATTN_BACKEND or ANYATTN_REQUIRE names."""
    found: tuple[str, ...] = getattr(settings.current(), which)
    for name in found:
        if name not in _rows:
            variable, _, meaning = settings.VARIABLES[which]
            accepted, requested = ", ".join(_rows), ",".join(found)
            raise ValueError(f"{variable} must be one or more of {accepted} ({meaning}), got {requested!r}.")
    return found


def check_settings() -> None:
    """Raise ValueError if the environment names an unknown backend."""
    for which in ("backend", "require"):
        _from_settings(which)


def plan(problem: Problem, requested: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Plan:
    """Return a plan from the first backend that supports the problem and initialises successfully.

    Errors of backends that the caller named (`requested`) propagate. failed: reasons of the backends already tried.
    """
    failed = dict(failed)
    while True:
        chosen = choose(problem, requested, failed)
        try:
            made = chosen.plan(problem)
            if chosen.may_fail and not requested:
                return FallbackPlan(made, chosen.name, problem)
            return made
        except (CompilationError, DeviceError) as error:
            if requested:
                raise
            logger.warning("skipping backend %s: %s", chosen.name, error)
            failed[chosen.name] = [str(error)]


class FallbackPlan:
    """Automatically chosen plan. On a DeviceError, switch to the next backend for this and all later calls."""

    lse_optional = False  # because the next backend may need lse

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
        logger.warning("%s failed, so the next backend now computes %s: %s", self._name, self._problem, error)
        self._use(plan(self._problem, (), {self._name: [str(error)]}))
        size = self.workspace_bytes
        call.workspace = call.adapter.empty((size,), "uint8", call.q) if size else None


def choose(problem: Problem, requested: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Backend:
    """Return the first backend that supports the problem. failed: reasons of the backends already tried.

    Raises:
        UnsupportedProblem: no backend supports it, or none of those that the caller named (`requested`).
    """
    _check_required()
    refusals: dict[str, list[str]] = {}
    for name in requested or _automatic(problem):
        reasons = failed.get(name) or refuse(get(name), problem, named=bool(requested))
        if not reasons:
            if not requested:
                _report(problem, refusals)
            return get(name)
        refusals[name] = reasons
    raise UnsupportedProblem(str(problem), refusals)


def _automatic(problem: Problem) -> tuple[str, ...]:
    """Return all backends, starting with those that gain from moving host arrays to another device.

    Such a backend may avoid small problems before it looks for its device.
    """
    offloading = [row.name for row in _rows.values() if row.offloads and problem.device == "cpu"]
    first = [name for name in offloading if not get(name).avoids(problem)]
    return (*first, *(name for name in _rows if name not in first))


def refuse(candidate: Backend, problem: Problem, *, named: bool = True) -> list[str]:
    """Return why this backend does not compute the problem, or []. A backend that was not named may avoid the problem.

    The availability of a backend that avoids the problem is not checked, because the check may load a driver.
    """
    avoided = [] if named else candidate.avoids(problem)
    if avoided:
        return avoided
    missing = candidate.available(named=named)
    return [missing] if missing else unsupported(candidate, problem)


def unsupported(candidate: Backend, problem: Problem) -> list[str]:
    """Return why this backend, if available, does not support the problem, or []."""
    return _unsupported_inputs(candidate, problem) or candidate.supports(problem)


def _unsupported_inputs(candidate: Backend, problem: Problem) -> list[str]:
    """Return why the backend does not support the pass, score functions or the optional arrays, or []."""
    if problem.pass_ not in candidate.passes:
        return [f"has no {problem.pass_} pass"]
    if problem.score and problem.pass_ not in candidate.score_functions:
        others = [name for name in names() if problem.pass_ in get(name).score_functions]
        remedy = f"; computed by {', '.join(others)}" if others else ""
        return [f"has no {problem.pass_} pass with score_mod and mask_mod{remedy}"]
    if problem.tcaptured is not None:
        return [
            f"has no {problem.pass_} pass with a tangent of arrays that score_mod reads. Detach them, or do not "
            "differentiate their gradients"
        ]
    unknown = [name for name in problem.arrays if name in FIELDS and name not in candidate.extras]
    return [f"does not support {', '.join(unknown)}"] if unknown else []


def explain(problem: Problem, requested: tuple[str, ...]) -> Explanation:
    """Return the backend that `choose` would return, with the reasons of every other backend."""
    order = requested or _automatic(problem)
    reasons = {name: refuse(get(name), problem, named=bool(requested)) for name in order}
    chosen = next((name for name, refusal in reasons.items() if not refusal), None)
    return Explanation(str(problem), chosen, reasons)


def available() -> list[str]:
    """Return the names of the backends that run on this machine, best first."""
    return [name for name in _rows if get(name).available() is None]


def _check_required() -> None:
    for name in _from_settings("require"):
        missing = get(name).available(named=True)
        if missing:
            raise RuntimeError(f"ANYATTN_REQUIRE must name available backends, got {name}: {missing}")


def _report(problem: Problem, refusals: dict[str, list[str]]) -> None:
    """Log the skipped backends once per class of problems. Warn once about a backend that should be available."""
    for name, reasons in refusals.items():
        if (name, problem.variant) not in _passed_over:
            _passed_over.add((name, problem.variant))
            logger.info("skipping backend %s for %s: %s", name, problem, "; ".join(reasons))
        warning = _rows[name].missed
        missing = get(name).available() if warning and name not in _warned else None
        if missing:
            _warned.add(name)
            warnings.warn(f"{warning}: {missing}", RuntimeWarning, stacklevel=2)


class Ready(NamedTuple):
    """Cached result of a lookup: the validated problem, its plan, and the fields needed on every call."""

    problem: Problem
    plan: Plan
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype
    has_tables: bool


class _Cache(threading.local):
    """Cache per thread: raw metadata and the requested backends -> Ready. Cleared if full or if the settings change."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, Ready] = {}


_cache = _Cache()


def lookup(key: Hashable, backend: str | None, build: Callable[[], Problem]) -> Ready:
    """Return the validated problem and its plan from the cache. The key is a raw tuple of metadata."""
    entries, wanted = _cache.entries, (key, backend or _named.get())
    try:
        found = entries.get(wanted)
    except TypeError:  # unhashable key: a list or an array was passed for a number, and `build` names it
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
    """Discard every cached plan and backend."""
    global _cache
    _cache = _Cache()
    _backends.clear()
