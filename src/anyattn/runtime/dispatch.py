"""Which backend computes a problem, and why not the others. Argument > context manager > environment > automatic."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ..backends.base import Backend, Call, Plan
from ..config import settings
from ..definition.errors import CompilationError, DeviceError, UnsupportedProblem
from ..definition.problem import Problem, Variant

if TYPE_CHECKING:
    from ..definition.kvcache import Append

NAMES = ("cpu", "triton", "vulkan", "numpy")  # automatic order, but for what Vulkan gains from
CACHE_SIZE = 1024
NONE: Mapping[str, list[str]] = MappingProxyType({})

logger = logging.getLogger("anyattn")
logger.addHandler(logging.NullHandler())

_named: ContextVar[tuple[str, ...]] = ContextVar("anyattn_backend", default=())
_backends: dict[str, Backend] = {}
_passed_over: set[tuple[str, Variant]] = set()
_warned = False


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
    """Uses only the named backends, in this order, inside the `with` block; none of them falls back to another.

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


def get(name: str) -> Backend:
    """The backend of that name; created at first use."""
    # Without a lock, which a forked child might find held: of two that are created at once, one is kept.
    return _backends.get(name) or _backends.setdefault(name, _create(name))


def _create(name: str) -> Backend:
    if name == "cpu":
        from ..backends.cpu.backend import CpuBackend

        return CpuBackend()
    if name == "triton":
        from ..backends.triton.backend import TritonBackend

        return TritonBackend()
    if name == "vulkan":
        from ..backends.vulkan.backend import VulkanBackend

        return VulkanBackend()
    if name == "numpy":
        from ..backends.numpy import NumpyBackend

        return NumpyBackend()
    raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")


def named(argument: str | None) -> tuple[str, ...]:
    """The backends that the caller ("cpu,numpy"), a context manager or the environment named; (): automatic."""
    if argument and not isinstance(argument, str):
        raise TypeError(f"backend must be a name, or names separated by commas; got {argument!r}")
    return tuple(argument.split(",")) if argument else _named.get() or _from_settings("backend")


def _from_settings(which: str) -> tuple[str, ...]:
    """The backends that ANYATTN_BACKEND or ANYATTN_REQUIRE names."""
    names: tuple[str, ...] = getattr(settings.current(), which)
    for name in names:
        if name not in NAMES:
            variable, _, meaning = settings.VARIABLES[which]
            raise ValueError(f"{variable}={','.join(names)!r}: expected {', '.join(NAMES)} ({meaning}); got {name!r}")
    return names


def check_settings() -> None:
    """Raises ValueError where the environment names a backend that does not exist."""
    for which in ("backend", "require"):
        _from_settings(which)


def plan(problem: Problem, names: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Plan:
    """Of the first backend that computes the problem and whose device and kernels work; those of a named one must.

    failed: reasons against those that were tried.
    """
    failed = dict(failed)
    while True:
        chosen = choose(problem, names, failed)
        try:
            made = chosen.plan(problem)
            if chosen.may_fail and not names:
                return Retreat(made, chosen.name, problem)
            return made
        except (CompilationError, DeviceError) as error:
            if names:
                raise
            logger.warning("%s passed over: %s", chosen.name, error)
            failed[chosen.name] = [str(error)]


class Retreat:
    """A plan that nobody named, on a device that may fail: then the next backend computes this call and later ones."""

    lse_optional = False  # the next backend may need it

    def __init__(self, made: Plan, name: str, problem: Problem) -> None:
        self._name, self._problem = name, problem
        self._take(made)

    def _take(self, made: Plan) -> None:
        self._plan, self.forward_bytes, self.backward_bytes = made, made.forward_bytes, made.backward_bytes

    def warmup(self) -> None:
        self._plan.warmup()

    def forward(self, call: Call) -> None:
        try:
            self._plan.forward(call)
        except DeviceError as error:
            self._retreat(error, call, "forward_bytes")
            self._plan.forward(call)

    def backward(self, call: Call) -> None:
        try:
            self._plan.backward(call)
        except DeviceError as error:
            self._retreat(error, call, "backward_bytes")
            self._plan.backward(call)

    def _retreat(self, error: DeviceError, call: Call, workspace: str) -> None:
        logger.warning("%s failed, from now on the next backend computes %s: %s", self._name, self._problem, error)
        self._take(plan(self._problem, (), {self._name: [str(error)]}))
        size = getattr(self, workspace)
        call.workspace = call.adapter.empty((size,), "uint8", call.q) if size else None


def choose(problem: Problem, names: tuple[str, ...], failed: Mapping[str, list[str]] = NONE) -> Backend:
    """The first backend that computes the problem. failed: reasons against those that were tried.

    Raises:
        UnsupportedProblem: none does, among those named if any are.
    """
    _check_required()
    refusals: dict[str, list[str]] = {}
    for name in names or _automatic(problem):
        reasons = failed.get(name) or refuse(get(name), problem, named=bool(names))
        if not reasons:
            if not names:
                _tell(problem, refusals)
            return get(name)
        refusals[name] = reasons
    raise UnsupportedProblem(str(problem), refusals)


def _automatic(problem: Problem) -> tuple[str, ...]:
    """Vulkan first where it pays to go through a GPU; for small problems no device is even looked for."""
    if problem.device != "cpu" or get("vulkan").avoids(problem):
        return NAMES
    return ("vulkan", *(name for name in NAMES if name != "vulkan"))


def refuse(candidate: Backend, problem: Problem, *, named: bool = True) -> list[str]:
    """[] or why this backend does not compute the problem; one that the caller did not name may have more reasons."""
    missing = candidate.available(named=named)
    return [missing] if missing else ([] if named else candidate.avoids(problem)) or candidate.supports(problem)


def choose_append(append: Append, names: tuple[str, ...]) -> Backend:
    """The first backend that appends to this cache; the attention behind it may use another.

    Raises:
        UnsupportedProblem: none does, among those named if any are.
    """
    _check_required()
    refusals: dict[str, list[str]] = {}
    for name in names or NAMES:
        candidate = get(name)
        missing = candidate.available(named=bool(names))
        refusals[name] = [missing] if missing else candidate.supports_append(append)
        if not refusals[name]:
            return candidate
    raise UnsupportedProblem(f"an append to a {append.k.shape} cache on {append.q.device}", refusals)


def explain(problem: Problem, names: tuple[str, ...]) -> Explanation:
    """What `choose` would do, with every backend's reasons."""
    order = names or _automatic(problem)
    reasons = {name: refuse(get(name), problem, named=bool(names)) for name in order}
    chosen = next((name for name, refusal in reasons.items() if not refusal), None)
    return Explanation(str(problem), chosen, reasons)


def available() -> list[str]:
    """Names of the backends that run here, best first."""
    return [name for name in NAMES if get(name).available() is None]


def _check_required() -> None:
    for name in _from_settings("require"):
        missing = get(name).available(named=True)
        if missing:
            raise RuntimeError(f"ANYATTN_REQUIRE names {name}, which is not available: {missing}")


def _tell(problem: Problem, refusals: dict[str, list[str]]) -> None:
    """Logs once per class of problems which backends were passed over; warns once if the native engine is missing."""
    global _warned
    for name, reasons in refusals.items():
        if (name, problem.variant) not in _passed_over:
            _passed_over.add((name, problem.variant))
            logger.info("%s passed over for %s: %s", name, problem, "; ".join(reasons))
    missing = get("cpu").available() if "cpu" in refusals else None
    if missing and not _warned:
        _warned = True
        warnings.warn(f"anyattn uses its slower NumPy backend: {missing}", RuntimeWarning, stacklevel=2)


class Ready(NamedTuple):
    """What calls with the same metadata have in common; of the problem, what each of them reads."""

    problem: Problem
    plan: Plan
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    has_tables: bool


class _Cache(threading.local):
    """Per thread: raw metadata and who is asked for -> Ready. Cleared when full, replaced when the settings change."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, Ready] = {}


_cache = _Cache()


def lookup(key: Hashable, backend: str | None, build: Callable[[], Problem]) -> Ready:
    """The validated problem and its plan, found by a raw tuple of metadata; built at the first such call."""
    entries, asked = _cache.entries, (key, backend or _named.get())
    try:
        found = entries.get(asked)
    except TypeError:  # a list or an array where a number belongs: told by name
        named(backend)
        build()
        raise
    if found is None:
        if len(entries) >= CACHE_SIZE:
            entries.clear()
        problem = build()
        made = plan(problem, named(backend))
        found = entries[asked] = Ready(problem, made, problem.out_shape, problem.lse_shape, problem.has_tables)
    return found


@settings.on_reload
def forget() -> None:
    """Drops every cached plan and backend."""
    global _cache
    _cache = _Cache()
    _backends.clear()
