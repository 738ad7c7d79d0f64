"""Environment variables: nonsense raises and names the variable, what came and what is accepted; so does info."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.cli import main
from anyattn.config import settings
from anyattn.runtime import dispatch
from harness.backends import engines

X = np.ones((1, 4, 2, 8), np.float32)
Set = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Set]:
    """Sets variables for one test; this project's others are unset."""
    for variable, _, _ in settings.VARIABLES.values():
        if variable != "ANYATTN_LIBRARY":
            monkeypatch.delenv(variable, raising=False)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings._current.clear()  # as in a fresh process: the first call reads them
        dispatch.forget()

    yield set_variables
    monkeypatch.undo()
    settings.reload()


def info(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["info", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


NONSENSE = {
    "ANYATTN_NUM_THREADS": (("many", "-1", "1.5", "4097", "2,2", "²", "0x4", "9" * 40), "an integer from 0 to 4096"),
    "ANYATTN_THREAD_POOL": (("gomp", "Own", "1"), "one of openmp, own, or nothing"),
    "ANYATTN_PRECISION": (("half", "Fast", "1"), "one of exact, fast, or nothing"),
    "ANYATTN_CHECK": (("yes", "2", "-1"), "an integer from 0 to 1"),
    "ANYATTN_HOPPER": (("yes", "2"), "an integer from 0 to 1"),
    "ANYATTN_BACKEND": (("cuda", "cpu,abacus"), "cpu, triton, vulkan, numpy"),
    "ANYATTN_REQUIRE": (("cuda",), "cpu, triton, vulkan, numpy"),
    "ANYATTN_CPU_TARGET": (("abacus", "AVX2", "0"), "baseline"),
}


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [(name, value, accepted) for name, (values, accepted) in NONSENSE.items() for value in values],
)
def test_invalid_values_are_refused(
    variable: str, value: str, accepted: str, environment: Set, capsys: pytest.CaptureFixture[str]
) -> None:
    if variable == "ANYATTN_CPU_TARGET" and not any(engine.backend == "cpu" for engine in engines()):
        pytest.skip("instruction sets are the native library's")
    with pytest.raises(ValueError) as caught:
        environment(**{variable: value})
        anyattn.attention(X, X, X)
    message = str(caught.value)
    assert message.startswith(f"{variable} must be ") and f"got {value!r}" in message and accepted in message
    assert message in json.dumps(info(capsys), ensure_ascii=False).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("variable", "value", "field", "parsed"),
    [
        ("OMP_NUM_THREADS", "", "omp_num_threads", ()),
        ("OMP_NUM_THREADS", " ", "omp_num_threads", ()),
        ("OMP_NUM_THREADS", "4", "omp_num_threads", (4,)),
        ("OMP_NUM_THREADS", " 4 , 2 ", "omp_num_threads", (4, 2)),
        ("OMP_NUM_THREADS", "+4", "omp_num_threads", (4,)),
        ("ANYATTN_NUM_THREADS", "", "num_threads", 0),
        ("ANYATTN_NUM_THREADS", " 7 ", "num_threads", 7),
        ("ANYATTN_NUM_THREADS", "4096", "num_threads", 4096),
        ("ANYATTN_THREAD_POOL", "", "thread_pool", ""),
        ("ANYATTN_THREAD_POOL", " own ", "thread_pool", "own"),
        ("ANYATTN_THREAD_POOL", "openmp", "thread_pool", "openmp"),
        ("ANYATTN_PRECISION", "", "precision", "exact"),
        ("ANYATTN_PRECISION", " fast ", "precision", "fast"),
        ("ANYATTN_CHECK", "1", "check", True),
        ("ANYATTN_CHECK", "", "check", False),
        ("ANYATTN_HOPPER", "1", "hopper", True),
        ("ANYATTN_BACKEND", " numpy , cpu ", "backend", ("numpy", "cpu")),
    ],
)
def test_valid_values_are_accepted(variable: str, value: str, field: str, parsed: object, environment: Set) -> None:
    environment(**{variable: value})
    assert getattr(settings.current(), field) == parsed
    assert np.array_equal(anyattn.attention(X, X, X), X)


FOREIGN = ("0", "abc", "-1", "4097", "9" * 40, "4,0", "4,,2", "4,", ",", "1.5", "++2", "4 2", "²", "all", "3500m")


@pytest.mark.parametrize("value", FOREIGN)
def test_invalid_omp_num_threads_is_ignored_with_one_warning(value: str, environment: Set) -> None:
    """Containers and job systems set it, and the OpenMP runtimes go on too."""
    environment(OMP_NUM_THREADS=value)
    with pytest.warns(RuntimeWarning, match=re.escape(f"OMP_NUM_THREADS={value!r} is ignored because it must be")):
        assert np.array_equal(anyattn.attention(X, X, X), X)
    assert settings.current().omp_num_threads == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(anyattn.attention(X, X, X), X)


def test_anyattn_num_threads_overrides_omp_num_threads(environment: Set) -> None:
    environment(ANYATTN_NUM_THREADS="2", OMP_NUM_THREADS="0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(anyattn.attention(X, X, X), X)


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "another library"])
def test_invalid_library_path_is_reported(kind: str, environment: Set, tmp_path: Path) -> None:
    """The variable and the path, in the warning, in a named backend's refusal and in info."""
    import _ctypes

    path = tmp_path / "libanyattn.so"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is no library")
    elif kind == "another library":
        path = Path(_ctypes.__file__)
    environment(ANYATTN_LIBRARY=str(path))
    reason = dispatch.get("cpu").available()
    assert reason is not None and str(path) in reason and "ANYATTN_LIBRARY" in reason
    with pytest.raises(anyattn.UnsupportedProblem, match="ANYATTN_LIBRARY"):
        anyattn.attention(X, X, X, backend="cpu")
    with pytest.warns(RuntimeWarning, match="ANYATTN_LIBRARY") as warned:
        dispatch._warned.clear()
        anyattn.attention(X, X, X)
    assert len(warned) == 1
