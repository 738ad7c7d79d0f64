"""Exceptions and public objects survive pickle, copies and process pools."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import errors
from anyattn.backends.cpu.library import LibraryError
from anyattn.backends.vulkan.api import DeviceLost, VulkanError

EXCEPTIONS: list[Exception] = [
    anyattn.UnsupportedProblem("attention of 3 queries", {"cpu": ["no"], "numpy": ["neither", "nor"]}),
    errors.CacheOverflow("full"),
    errors.CompilationError("no"),
    errors.DeviceError("gone"),
    errors.DeviceMemoryError("full"),
    VulkanError("vkQueueSubmit", -3),
    DeviceLost("vkQueueSubmit", -4),
    LibraryError("not there"),
]


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_exceptions_survive_copies(error: Exception, copied: Any) -> None:
    got = copied(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert vars(got) == vars(error)


def refused(_: int) -> Any:
    x = np.ones((1, 8, 1, 16), np.float64)
    return anyattn.attention(x, x, x, backend="vulkan,triton")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("nothing_required")  # a process forked from one that used Vulkan lacks it
def test_refusals_pass_through_a_pool(method: str) -> None:
    with (
        multiprocessing.get_context(method).Pool(1) as pool,
        pytest.raises(anyattn.UnsupportedProblem, match="float64"),
    ):
        pool.map_async(refused, [0]).get(timeout=60)
