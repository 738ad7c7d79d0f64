"""What mkdocs asks while it builds the site: pages and figures that are generated, and GitHub's Markdown."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

import generated
import reference
from latex2mathml.converter import convert
from mkdocs.structure.files import File

FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
# A list or a table below a line of text, or below a block of code: GitHub sees it, Python-Markdown wants an empty line.
GLUED = re.compile(r"^(?![*|#\s]|\d+\. )(.+)\n(?=\* |\d+\. |\|)", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)")


def on_config(config: Any) -> Any:
    pages = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    config.nav = expand(config.nav, pages | reference.pages().keys())
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": math}],
    }
    return config


def on_files(files: Any, config: Any) -> Any:
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for path, content in generated.pictures().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    parts = FENCE.split(inside(markdown, page.file.src_uri))
    text = "".join(f"{part}\n" if part.startswith("```") else GLUED.sub(r"\1\n\n", part) for part in parts)
    return generated.fill(text, page.file.src_uri)


def expand(nav: list[Any], pages: set[str]) -> list[Any]:
    """The navigation, each pattern replaced by the pages that match it and are not named themselves."""
    named = set(re.findall(r"[\w./-]+\.md", str(nav)))

    def entries(items: list[Any]) -> list[Any]:
        found: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                found += [{title: entries(value) for title, value in item.items()}]
            elif "*" in item:
                found += sorted((page for page in pages - named if PurePosixPath(page).match(item)), key=str.lower)
            else:
                found.append(item)
        return found

    return entries(nav)


def math(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML, which browsers draw without a script."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def inside(text: str, page: str) -> str:
    """Links to files of the repository that are no pages become their paths."""

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        return link[0] if target.startswith("docs/") else f"`{target.partition('#')[0]}`"

    return OUTSIDE.sub(replace, text)
