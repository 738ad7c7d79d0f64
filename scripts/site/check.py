"""Check the pages of the built site: `python scripts/site/check.py SITE`.

mkdocs itself fails on links, anchors and names that do not exist. This program reads the pages that mkdocs wrote.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import reference

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", re.I)
# GitHub accepts a list, a table or a block of code directly after a line of text. Python-Markdown needs an empty line.
GLUED = re.compile(r"<p>(?:(?!</p>).)*?(?:(?:^|(?<=<p>))[*|] |<div )", re.DOTALL | re.MULTILINE)


def main(site: Path) -> int:
    problems = [f"{path.relative_to(site)}: {text}" for path in sorted(site.rglob("*.html")) for text in wrong(path)]
    problems += [text for name in (*reference.NAMES, *reference.MODULES) for text in undocumented(site, name)]
    if problems:
        sys.stderr.write("\n".join([*problems, ""]))
    return 1 if problems else 0


def wrong(path: Path) -> Iterator[str]:
    """Yield the addresses that one page loads from the network, and the lists that Python-Markdown reads as text."""
    html = path.read_text(encoding="utf-8")
    yield from (f"loads {url}" for url in LOADED.findall(html))
    yield from (
        f"a list, table or block without an empty line around it: {found[-60:]}" for found in GLUED.findall(html)
    )


def undocumented(site: Path, name: str) -> Iterator[str]:
    """Yield a message if the page of a name lacks its heading or the docstring below it."""
    path = site / "reference" / reference.file_name(name).replace(".md", ".html")
    html = path.read_text(encoding="utf-8") if path.exists() else ""
    if f'<h1 id="{name}"' not in html or not re.search(r'class="doc doc-contents.*?<p>', html, re.DOTALL):
        yield f"{path.relative_to(site)}: does not document {name}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
