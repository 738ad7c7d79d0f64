"""The matrix that `verify` runs: one problem per feature and dtype, on every engine that this machine has."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import api
from ..arguments import explicit
from ..config import settings
from ..definition import accuracy
from ..definition.dtypes import ATTENTION_DTYPES, widen
from ..definition.errors import UnsupportedProblem
from ..definition.inputs import flatten
from ..definition.passes import FORWARD
from ..definition.problem import Problem
from ..definition.problem import described as describe_arrays
from ..definition.validate import make_problem
from ..frameworks import numpy as numpy_arrays
from ..runtime import dispatch

Arguments = dict[str, Any]

# What each problem asks for; sizes are drawn. "lengths", "varlen" and "paged" name tables that `Draw` makes.
FEATURES: dict[str, Arguments] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, top left": {"causal": True, "alignment": "top-left"},
    "window": {"window": (30, 7)},
    "causal window": {"causal": True, "window": (40, None)},
    "chunk": {"chunk": 24, "causal": True},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": True, "causal": True},
    "mask": {"mask": True},
    "alibi": {"alibi_slopes": True, "causal": True},
    "sink": {"sink": True, "causal": True},
    "dropout": {"dropout_p": 0.2},
    "lengths": {"lengths": True, "causal": True},
    "varlen": {"varlen": True, "causal": True},
    "paged": {"paged": True, "causal": True},
    "everything": {
        "causal": True, "window": (50, None), "chunk": 80, "softcap": 4.0, "bias": True, "mask": True,
        "alibi_slopes": True, "sink": True, "dropout_p": 0.1, "lengths": True, "scale": -0.2,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """A backend; `target` is the instruction set that the native one is held to."""

    backend: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.backend} {self.target}".strip()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        variable = settings.VARIABLES["cpu_target"][0]
        before = os.environ.get(variable)
        if self.target:
            os.environ[variable] = self.target
            settings.reload()
        try:
            yield
        finally:
            if self.target:
                os.environ.pop(variable) if before is None else os.environ.update({variable: before})
                settings.reload()


@dataclass(slots=True)
class Outcome:
    """One problem on one engine. `forward`, `backward`: largest error as a share of its budget; None: not compared."""

    engine: str
    dtype: str
    name: str
    forward: float | None = None
    backward: float | None = None
    refused: str = ""
    mismatches: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def compare(self, expected: dict[str, accuracy.Expected], got: Arguments) -> float:
        """The largest error of its budget; what is beyond is a mismatch."""
        self.mismatches += accuracy.check(expected, got)
        return max(_share(want, got[name]) for name, want in expected.items())


def engines(backend: str | None) -> tuple[list[Engine], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    found: list[Engine] = []
    absent: dict[str, str] = {}
    for name in (backend,) if backend else dispatch.names():
        why = dispatch.get(name).available(named=bool(backend))
        if why:
            absent[name] = why
        elif name == "cpu":
            found.extend(Engine(name, target) for target in cpu_targets())
        else:
            found.append(Engine(name))
    return found, absent


def cpu_targets() -> list[str]:
    """Instruction sets that this machine and the library have."""
    from ..backends.cpu import library

    return library.load().targets()


def missing_dtypes() -> dict[str, str]:
    return {} if "bfloat16" in _dtypes() else {"bfloat16": "NumPy has it through ml_dtypes, which is not installed"}


def outcomes(found: list[Engine], seed: int) -> Iterator[Outcome]:
    """Each problem is computed once in float64, then by every engine."""
    for dtype, kind in _dtypes().items():
        for name, features in FEATURES.items():
            question = Question(dtype, kind, dict(features), zlib.crc32(f"{seed} {dtype} {name}".encode()))
            for engine in found:
                with engine.in_force():
                    yield question.ask(engine, name)


class Question:
    """One problem: its arrays, and what float64 says."""

    def __init__(self, dtype: str, kind: npt.DTypeLike, features: Arguments, seed: int) -> None:
        self.dtype = dtype
        self.arguments = draw(np.random.default_rng(seed), features, kind)
        self.problem, arrays = described(self.arguments)
        rng = np.random.default_rng(seed + 1)
        self.dout = rng.standard_normal(self.problem.out_shape).astype(kind)
        self.dlse = rng.standard_normal(self.problem.lse_shape).astype(self.problem.compute_dtype)
        dout, dlse = widen(self.dout, dtype), self.dlse.astype(np.float64)
        self.forward = accuracy.expected_forward(self.problem, arrays)
        self.backward = accuracy.expected_backward(self.problem, arrays, dout, dlse)

    def ask(self, engine: Engine, name: str) -> Outcome:
        """Both passes; one that the engine refuses is not compared, one that breaks is a mismatch."""
        outcome = Outcome(str(engine), self.dtype, name)
        start = time.perf_counter()
        given = {**self.arguments, "backend": engine.backend}
        try:
            out, lse = api.attention_forward(**given)
            outcome.forward = outcome.compare(self.forward, {"out": out, "lse": lse})
            gradients = api.attention_backward(self.dout, out=out, lse=lse, dlse=self.dlse, **given)
            outcome.backward = outcome.compare(self.backward, gradients._asdict())
        except UnsupportedProblem as refusal:
            which = "forward" if outcome.forward is None else "backward"
            outcome.refused = f"{which}: {'; '.join(refusal.refusals[engine.backend])}"
        except Exception as error:  # a finding, not the end of the run
            outcome.mismatches.append(f"{type(error).__name__}: {error}")
        outcome.seconds = time.perf_counter() - start
        return outcome


def draw(rng: np.random.Generator, features: Arguments, kind: npt.DTypeLike) -> Arguments:
    """Arguments of `attention_forward`: sizes drawn, True replaced by arrays, lengths by tables."""
    batch, nheads_kv, group = (int(rng.choice(choices)) for choices in ((1, 2, 3), (1, 2), (1, 1, 4)))
    seqlen_q, seqlen_k = (int(rng.choice((1, 17, 63, 64, 129, 160))) for _ in range(2))
    head_dim = int(rng.choice((8, 40, 64, 80, 128)))
    head_dim_v = int(rng.choice((head_dim, head_dim, 24)))
    nheads = nheads_kv * group

    def normal(*shape: int) -> npt.NDArray[Any]:
        return rng.standard_normal(shape).astype(kind)

    arguments = dict(features)
    rows_q: tuple[int, ...] = (batch, seqlen_q)
    rows_k: tuple[int, ...] = (batch, seqlen_k)
    if arguments.pop("varlen", False):
        arguments |= {"cu_seqlens_q": _starts(rng, batch, seqlen_q), "cu_seqlens_k": _starts(rng, batch, seqlen_k)}
        rows_q, rows_k = (int(arguments["cu_seqlens_q"][-1]),), (int(arguments["cu_seqlens_k"][-1]),)
    if arguments.pop("paged", False):
        page_size = int(rng.choice((5, 16)))
        pages = -(-seqlen_k // page_size)
        table = rng.permutation(batch * pages).reshape(batch, pages)
        arguments |= {"block_table": table, "seqused_k": rng.integers(0, seqlen_k + 1, batch)}
        rows_k = (batch * pages, page_size)
    if arguments.pop("lengths", False):
        used = rng.integers(0, seqlen_k + 1, batch)
        arguments |= {
            "seqused_q": rng.integers(0, seqlen_q + 1, batch),
            "seqused_k": used,
            "leftpad_k": rng.integers(0, used + 1),
        }
    made: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "bias": lambda: normal(1, nheads, seqlen_q, seqlen_k),
        "mask": lambda: rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.8,
        "alibi_slopes": lambda: rng.random(nheads),
        "sink": lambda: rng.standard_normal(nheads),
    }
    arguments |= {name: make() for name, make in made.items() if name in arguments}
    if "dropout_p" in arguments:
        arguments["seed"] = int(rng.integers(2**62))
    arguments["q"] = normal(*rows_q, nheads, head_dim)
    arguments["k"] = normal(*rows_k, nheads_kv, head_dim)
    arguments["v"] = normal(*rows_k, nheads_kv, head_dim_v)
    return arguments


def _starts(rng: np.random.Generator, batch: int, longest: int) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(rng.integers(0, longest + 1, batch))])


def _dtypes() -> dict[str, npt.DTypeLike]:
    """By name; bfloat16 only with ml_dtypes."""
    found: dict[str, npt.DTypeLike] = {name: np.dtype(name) for name in ATTENTION_DTYPES if name != "bfloat16"}
    try:
        import ml_dtypes
    except ImportError:
        return found
    return {**found, "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def described(arguments: Arguments) -> tuple[Problem, dict[str, Any]]:
    """The problem, and its arrays as the reference takes them."""
    given = dict(arguments)
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    inputs, options, seed, _ = explicit(q, k, v, given, "described")
    adapter, prepared = numpy_arrays.adapter, flatten(numpy_arrays.prepare(inputs, seed))
    problem = make_problem(describe_arrays(FORWARD.inputs, prepared, adapter.describe), options)
    return problem, describe_arrays(FORWARD.inputs, prepared, adapter.numpy)


def _share(want: accuracy.Expected, got: npt.NDArray[Any] | None) -> float:
    error = np.inf if got is None else want.error(got)
    return error / want.budget if want.budget else np.inf if error else 0.0
