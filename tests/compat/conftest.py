"""Fixtures of the tests of foreign APIs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from anyattn import api


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the two functions that the adapter is over."""
    seen: list[dict[str, Any]] = []
    for name in ("attention", "attention_varlen"):
        original = getattr(api, name)

        def spy(*arrays: Any, _name: str = name, _original: Any = original, **arguments: Any) -> Any:
            seen.append({"function": _name, "q": arrays[0], "k": arrays[1], **arguments})
            return _original(*arrays, **arguments)

        monkeypatch.setattr(api, name, spy)
    yield seen
