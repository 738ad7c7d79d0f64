"""Inputs that are not text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def guesses(model: Any, name: str, parameters: Any) -> Iterator[Any]:
    yield from ()
