"""Write the generated parts of the README and of the pages: tables, help texts, drawings and plots.

A part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`. The parts and the pictures below
docs/images are committed, so that every page is complete where its Markdown is read. `make pages` writes them, and a
test compares them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import masks
import reference

from anyattn import capabilities, cli
from anyattn.bench import markdown, plots, report
from anyattn.config import settings

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "native" / "include"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
# The first processor has all tables and pictures; the others, those that compare processors.
PROCESSORS = {"AMD EPYC, Zen 5": RESULTS / "cpu-zen5.json", "AMD EPYC, Zen 4": RESULTS / "cpu-zen4.json"}
PART = re.compile(r"^(<!-- generated: (.+?) -->\n).*?^(<!-- end of generated -->)$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Return every file that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(text: str, page: Path) -> str:
    """Return the text of a page with every generated part made again."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]](page)}\n{part[3]}", text)


def drawings() -> dict[Path, str]:
    """Return the drawings of masks, by the files that hold them."""
    return {IMAGES / f"masks-{group}.svg": masks.drawing(group) for group in masks.GROUPS}


def draw_plots() -> None:
    """Draw the committed results: a picture for each kind of plot, and one for the README."""
    plots.plot(results(), IMAGES, source=source())
    plots.plot(results(), IMAGES / "cpu.png", ("forward", "backward", "memory"), source=source())


def source() -> str:
    """Return the digest of the results, which the plots contain."""
    return hashlib.sha256(next(iter(PROCESSORS.values())).read_bytes()).hexdigest()


@cache
def processors() -> dict[str, dict[str, Any]]:
    """Return the committed results of each processor."""
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in PROCESSORS.items()}


def results() -> dict[str, Any]:
    """Return the results of the first processor."""
    return next(iter(processors().values()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def settings_table(_: Path) -> str:
    rows = [(f"`{name}`", default or "-", meaning) for name, default, meaning in settings.VARIABLES.values()]
    return table(("Variable", "Default", "Meaning"), rows)


def features_table(_: Path) -> str:
    found = capabilities.collect()
    notes = [f"* [{number}] {reason}" for reason, number in capabilities.footnotes(found).items()]
    header, rows = capabilities.cells(found)
    # Markdown would read "[3][4]" as a link
    rows = [[cell.replace("][", "], [") for cell in row] for row in rows]
    return "\n".join([table(header, rows), "", *notes])


def command_line(_: Path) -> str:
    parts = []
    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"):  # argparse reads width and color from them
        for name, parser in cli.parsers()[1].items():
            parts.append(f"## anyattn {name}\n\n```\n{parser.format_help()}```")
    return "\n\n".join(parts)


def picture(name: str, text: str, page: Path) -> str:
    return f"![{text}]({os.path.relpath(IMAGES / name, page.parent)})"


def measured(title: str, _: Path) -> str:
    """Return the tables of `anyattn bench` whose titles begin with `title`."""
    found = [part for part in report.tables(results()) if part.title.startswith(title)]
    assert found, f"the committed results have no table {title!r}"
    return "\n\n".join(f"**{part.title}**\n\n{table(part.header, part.rows)}" for part in found)


def measured_everywhere(title: str, _: Path) -> str:
    """Return the tables of every processor whose titles begin with `title`."""
    return "\n\n".join(
        f"**{processor}, {data['machine']['date']}: {part.title}**\n\n{table(part.header, part.rows)}"
        for processor, data in processors().items()
        for part in report.tables(data)
        if part.title.startswith(title)
    )


def header(_: Path) -> str:
    """Return the whole C header, because its comments are the documentation."""
    return f"```c\n{(INCLUDE / 'anyattn.h').read_text(encoding='utf-8')}```"


def struct(name: str, _: Path) -> str:
    """Return a struct of the C++ header with the comment above it."""
    text = (INCLUDE / "anyattn" / "call.hpp").read_text(encoding="utf-8")
    found = re.search(rf"^(//[^\n]*\n)*struct {name}\b.*?^}};\n", text, re.DOTALL | re.MULTILINE)
    assert found, f"call.hpp has no struct {name}"
    return f"```cpp\n{found[0]}```"


def _parts() -> Iterator[tuple[str, Callable[[Path], str]]]:
    yield "settings", settings_table
    yield "command line", command_line
    yield "features", features_table
    yield "hardware", lambda _: markdown.hardware()
    yield "names", lambda _: reference.index(reference.source)
    yield "machine", lambda _: next(report.notes(results())) + f", {results()['machine']['date']}"
    yield "refused", lambda _: "\n".join(f"* {note}" for note in report.notes(results()) if note.startswith("refused"))
    yield "accuracy", lambda _: markdown.accuracy(results())
    yield "speed", lambda _: "\n\n".join(map(markdown.speed, processors().values()))
    yield "highlights", lambda _: markdown.highlights(processors())
    yield "slower", lambda _: markdown.slower(results())
    yield "workloads", lambda _: markdown.workloads(results())
    titles = ("features", "small calls", "a fresh process", "next to a torch", "peak MiB")
    for title in titles:
        yield f"measured {title}", partial(measured, title)
    for title in ("derivatives", "score functions", "block mask"):
        yield f"measured {title}", partial(measured_everywhere, title)
    for group in masks.GROUPS:
        yield f"masks {group}", partial(picture, f"masks-{group}.svg", f"masks: {group}")
    for name in plots.PANELS:
        yield f"plot {name}", partial(picture, f"{name}.png", plots.CAPTIONS[name])
    yield "anyattn.h", header
    for name in ("Call", "Append"):
        yield f"struct {name}", partial(struct, name)


PARTS = dict(_parts())


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for path, drawing in drawings().items():
        path.write_text(drawing, encoding="utf-8")
    draw_plots()
    for page in pages():
        page.write_text(fill(page.read_text(encoding="utf-8"), page), encoding="utf-8")


if __name__ == "__main__":
    main()
