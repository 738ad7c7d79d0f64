"""Selection of tests and backends: the combinations that run, and those that run only in `make full`.

A test with an `engine` argument is marked with `every_backend`. Combinations are marked before pytest deselects by
`-m`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from anyattn.testing import Case
from harness.backends import Engine, engines
from harness.cases import SMALL, small

INTERPRETED_SCORES = 30_000  # scores of a case on Triton's interpreter; a larger case needs a GPU
# The interpreter's time is nearly proportional to the number of programs, whatever they compute.
INTERPRETED_PROGRAMS = 40
INTERPRETED_TILE = 64
_SMALL = frozenset(SMALL)

Condition = Callable[..., bool]


def every_backend(
    *,
    interpreter: bool = False,
    refusals: bool = False,
    full_if: Condition | None = None,
    only: tuple[str, ...] = (),
) -> pytest.MarkDecorator:
    """Mark a test with an `engine` argument, or a module of such tests, to run on every backend of this machine.

    interpreter: also run on Triton's interpreter. Set it for tests of results, not of size or speed.
    refusals: the test expects a refusal if a backend does not compute a dtype. Other tests are then deselected.
    full_if: a function of the engine and the test's other parameters. If it returns True, only `make full` runs the
        test.
    only: the backends that the test is for; empty: all.
    """
    return pytest.mark.every_backend(interpreter=interpreter, refusals=refusals, full_if=full_if, only=only)


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test by its engines. They vary fastest, so that expected results are computed once per case."""
    if "engine" in metafunc.fixturenames:
        wanted = _options(metafunc.definition)
        found = [engine for engine in engines() if wanted["interpreter"] or not engine.interpreted]
        found = [engine for engine in found if not wanted["only"] or engine.backend in wanted["only"]]
        metafunc.parametrize("engine", found, ids=str, indirect=True)


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect combinations in which a backend does not take part, and mark those that only `make full` runs."""
    quick, kept = config.getoption("--check"), []
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "engine" not in parameters:
            kept.append(item)
            continue
        options = _options(item)
        if not takes_part(**parameters, refusals=options["refusals"]) or (quick and not is_quick(**parameters)):
            continue
        kept.append(item)
        full_if = options["full_if"]
        if is_expensive(**parameters) or (full_if and full_if(**parameters)):
            item.add_marker(pytest.mark.full)
    config.hook.pytest_deselected(items=list(set(items).difference(kept)))
    items[:] = kept


def _options(node: Any) -> dict[str, Any]:
    marker = node.get_closest_marker("every_backend")
    if marker is None:
        raise ValueError(f"{node.nodeid} takes an engine and is not marked with every_backend")
    return dict(marker.kwargs)


def takes_part(engine: Engine, *, refusals: bool = True, **parameters: Any) -> bool:
    """Return whether the engine takes part in a test."""
    case = parameters.get("case")
    if engine.interpreted and isinstance(case, Case) and not small([case], INTERPRETED_SCORES):
        return False
    dtypes = [getattr(value, "dtype", value) for value in parameters.values()]
    return refusals or all(map(engine.computes, dtypes))


def is_quick(engine: Engine, **parameters: Any) -> bool:
    """Return whether `make check` runs a test: small cases, on NumPy and on the best instruction set of the CPU."""
    case = parameters.get("case")
    return engine in (Engine("numpy"), best_target()) and (not isinstance(case, Case) or case in _SMALL)


def best_target() -> Engine | None:
    """Return the CPU backend with the instruction set that it chooses by default; None without a CPU backend."""
    return next((engine for engine in engines() if engine.backend == "cpu"), None)


def is_expensive(engine: Engine, **parameters: Any) -> bool:
    """Return whether a test of a case takes too long for `make test`, so that only `make full` runs it."""
    case, direction = parameters.get("case"), parameters.get("direction", "forward")
    if not isinstance(case, Case):
        return False
    if engine.interpreted:
        return programs(case, direction) > INTERPRETED_PROGRAMS
    # AVX-512 BF16 has its own code only for bfloat16. A few cases show that its base computes the other dtypes.
    return engine.target == "avx512bf16" and parameters.get("dtype", case.dtype) != "bfloat16" and case not in _SMALL


def programs(case: Case, direction: str) -> int:
    """Return the number of programs that Triton's interpreter runs for a case."""
    nheads, extra = case.nheads_kv * case.group, case.batch + 2 if "varlen" in case.lengths else 0
    rows, keys = (case.batch * -(-n // INTERPRETED_TILE) + extra for n in (case.seqlen_q, case.seqlen_k))
    # Kernels by tiles of queries: forward, then delta and dq, and the tangent. Kernels by tiles of keys: dk and dv.
    by_rows = {"forward": 1, "tangent": 2, "forward_tangent": 3, "backward": 3, "second": 4}[direction]
    return by_rows * nheads * rows + (case.nheads_kv * keys if direction in ("backward", "second") else 0)
