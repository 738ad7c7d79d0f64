"""Tables of the documentation, made from results of `anyattn bench`."""

from __future__ import annotations

from typing import Any

from anyattn.bench import markdown


def case(name: str, **seconds: float) -> dict[str, Any]:
    return {"name": name, "label": "forward", "seconds": {who: {"median": time} for who, time in seconds.items()}}


def test_slower_lists_each_case_that_another_library_wins() -> None:
    cases = [case("won", anyattn=2.0, one=3.0), case("lost", anyattn=2.0, one=1.0, two=3.0), case("refused", one=1.0)]
    _, _, *rows = markdown.slower({"cases": cases}).splitlines()
    assert rows == ["| lost: forward | one 0.50 |"]
