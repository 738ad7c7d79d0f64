"""Hooks of mkdocs: add the pages of the reference, and translate GitHub's links and formulas."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import generated
import reference
from latex2mathml.converter import convert
from mkdocs.structure.files import File

# Pages whose tables are so wide that they replace the table of contents.
WIDE = {"features.md", "use-with/transformers-models.md"}
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)")


def on_config(config: Any) -> Any:
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": math}],
    }
    return config


def on_files(files: Any, config: Any) -> Any:
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "reference/index.md":
        names = reference.index(reference.file_name)
        markdown = generated.PART.sub(lambda part: f"{part[1]}{names}\n{part[3]}", markdown)
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return inside(markdown, page.file.src_uri)


def math(source: str, *_: Any, **__: Any) -> str:
    """Return LaTeX as MathML, which browsers draw without a script."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def inside(text: str, page: str) -> str:
    """Replace links to files of the repository that are not pages by their paths."""

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        return link[0] if target.startswith("docs/") else f"`{target.partition('#')[0]}`"

    return OUTSIDE.sub(replace, text)
