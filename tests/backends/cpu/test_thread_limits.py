"""The number of threads at run time: anyattn's own functions and threadpoolctl."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import anyattn
from harness.processes import fresh


@pytest.fixture(autouse=True)
def follow() -> Iterator[None]:
    anyattn.set_num_threads(0)
    yield
    anyattn.set_num_threads(0)


def test_set_num_threads_holds_until_it_is_set_to_zero() -> None:
    before = anyattn.get_num_threads()
    anyattn.set_num_threads(3)
    assert anyattn.get_num_threads() == 3
    anyattn.set_num_threads(0)
    assert anyattn.get_num_threads() == before


def test_context_manager_restores_the_number_of_threads() -> None:
    anyattn.set_num_threads(3)
    with anyattn.num_threads(1):
        assert anyattn.get_num_threads() == 1
    assert anyattn.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), anyattn.num_threads(2):
        raise ZeroDivisionError
    assert anyattn.get_num_threads() == 3


@pytest.mark.parametrize("limit", [1, 5])
def test_threadpoolctl_limits_the_engine(limit: int) -> None:
    before = anyattn.get_num_threads()
    with threadpool_limits(limit):
        assert anyattn.get_num_threads() == limit
    assert anyattn.get_num_threads() == before
    with threadpool_limits(limit, user_api="blas"):
        assert anyattn.get_num_threads() == before
    (ours,) = (x for x in ThreadpoolController().info() if x["user_api"] == "anyattn")
    assert ours["num_threads"] == before
    assert ours["version"] == "0.1"


def test_engine_follows_torch_again_after_limits() -> None:
    program = (
        "import torch, numpy as np, anyattn, threadpoolctl\n"
        "x = torch.ones(1, 4, 2, 8)\n"
        "anyattn.attention(x, x, x)\n"
        "with anyattn.num_threads(4), threadpoolctl.threadpool_limits(3): assert anyattn.get_num_threads() == 3\n"
        "torch.set_num_threads(1)\n"
        "assert anyattn.get_num_threads() == 1, anyattn.get_num_threads()\n"
    )
    result = fresh(program)
    assert (result.returncode, result.stderr) == (0, "")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 300, 4, 32), dtype=np.float32)
    results = []
    for count in (1, 2, 7):
        with anyattn.num_threads(count):
            results.append(anyattn.attention(q, k, v, causal=True))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("count", "error"), [(-1, ValueError), (4097, ValueError), (1.0, TypeError), ("2", TypeError), (True, TypeError)]
)
def test_wrong_numbers_of_threads_are_refused(count: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"num_threads must be .*, got {count!r}"):
        anyattn.set_num_threads(count)  # type: ignore[arg-type]
