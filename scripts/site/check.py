"""Fails where the built site lacks what it promises: `python scripts/site/check.py SITE`.

mkdocs itself fails on links, anchors and names that do not exist; this looks at the pages that came out.
"""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import reference

LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", re.IGNORECASE
)


def main(site: Path) -> int:
    problems = [f"{path.relative_to(site)}: {text}" for path in sorted(site.rglob("*.html")) for text in page(path)]
    problems += [f"{name}: not on its page" for name in reference.NAMES if not documented(site, name)]
    if problems:
        sys.stderr.write("\n".join([*problems, ""]))
    return 1 if problems else 0


def page(path: Path) -> list[str]:
    """What is wrong in one page."""
    html = path.read_text(encoding="utf-8")
    problems = [f"loads {url}" for url in LOADED.findall(html)]
    return problems + ["a marker was not filled"] * ("<!-- generated:" in html)


def documented(site: Path, name: str) -> bool:
    """Whether the name's page has its heading, and text below it."""
    path = site / "reference" / reference.file_name(name).replace(".md", ".html")
    if not path.exists():
        return False
    html = unescape(path.read_text(encoding="utf-8"))
    return "doc-contents" in html and (name in reference.MODULES or f'id="{name}"' in html)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
