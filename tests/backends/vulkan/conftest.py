"""Fixtures of the Vulkan tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anyattn.runtime import dispatch
from backends.vulkan.common import VULKAN


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Forget every plan before and after the test: it changes what plans are made of."""
    VULKAN.use()
    dispatch.forget()
    yield
    dispatch.forget()
