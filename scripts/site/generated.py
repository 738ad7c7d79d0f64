"""The parts of pages that are generated when the site is built: `<!-- generated: NAME -->` becomes what NAME makes.

Nothing of it is committed, so none of it can be out of date.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import masks

from anyattn import capabilities, cli
from anyattn.bench import markdown, plots, report
from anyattn.config import settings

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "native" / "include"
MARKER = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)


def fill(text: str, page: str) -> str:
    """The page with every marker replaced."""
    return MARKER.sub(lambda marker: PARTS[marker[1]](page), text)


@cache
def pictures() -> dict[str, bytes]:
    """Path -> content: the plots of the committed results."""
    with tempfile.TemporaryDirectory() as folder:
        return {f"plots/{path.name}": path.read_bytes() for path in plots.plot(results(), Path(folder))}


@cache
def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    return loaded


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def settings_table(_: str) -> str:
    rows = [(f"`{name}`", default or "-", meaning) for name, default, meaning in settings.VARIABLES.values()]
    return table(("Variable", "Default", "Meaning"), rows)


def features_table(_: str) -> str:
    found = capabilities.collect()
    notes = [f"* [{number}] {reason}" for reason, number in capabilities.footnotes(found).items()]
    header, rows = capabilities.cells(found)
    # Markdown would read "[3][4]" as a link
    rows = [[cell.replace("][", "], [") for cell in row] for row in rows]
    return "\n".join([table(header, rows), "", *notes])


def command_line(_: str) -> str:
    parts = []
    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"):  # what argparse asks for width and color
        for name, parser in cli.parsers()[1].items():
            parts.append(f"## anyattn {name}\n\n```\n{parser.format_help()}```")
    return "\n\n".join(parts)


def plot(name: str, page: str) -> str:
    path = posixpath.relpath(f"plots/{name}.png", posixpath.dirname(page))
    return f"![{name}]({path})"


def measured(title: str, _: str) -> str:
    """The tables of `anyattn bench` whose titles begin so."""
    found = [part for part in report.tables(results()) if part.title.startswith(title)]
    assert found, f"the committed results have no table {title!r}"
    return "\n\n".join(f"**{part.title}**\n\n{table(part.header, part.rows)}" for part in found)


def header(_: str) -> str:
    """The C header, as it is: its comments are the documentation."""
    return f"```c\n{(INCLUDE / 'anyattn.h').read_text(encoding='utf-8')}```"


def struct(name: str, _: str) -> str:
    """A struct of the C++ header with the comment above it."""
    text = (INCLUDE / "anyattn" / "call.hpp").read_text(encoding="utf-8")
    found = re.search(rf"^(//[^\n]*\n)*struct {name}\b.*?^}};\n", text, re.DOTALL | re.MULTILINE)
    assert found, f"call.hpp has no struct {name}"
    return f"```cpp\n{found[0]}```"


def _parts() -> Iterator[tuple[str, Callable[[str], str]]]:
    yield "settings", settings_table
    yield "command line", command_line
    yield "features", features_table
    yield "hardware", lambda _: markdown.hardware()
    yield "machine", lambda _: next(report.notes(results())) + f", {results()['machine']['date']}"
    yield "refused", lambda _: "\n".join(f"* {note}" for note in report.notes(results()) if note.startswith("refused"))
    yield "accuracy", lambda _: markdown.accuracy(results())
    yield "speed", lambda _: markdown.speed(results())
    yield "workloads", lambda _: markdown.workloads(results())
    for title in ("features", "small calls", "a fresh process", "beside a torch", "peak MiB"):
        yield f"measured {title}", partial(measured, title)
    for group in masks.GROUPS:
        yield f"masks {group}", lambda _, group=group: masks.drawn(group)
    for name in plots.PANELS:
        yield f"plot {name}", partial(plot, name)
    yield "anyattn.h", header
    for name in ("Call", "Append"):
        yield f"struct {name}", partial(struct, name)


PARTS = dict(_parts())
