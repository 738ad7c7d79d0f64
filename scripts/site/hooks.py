"""Hooks of mkdocs: pages of the reference, and links and formulas as GitHub's Markdown has them."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import generated
import reference
from latex2mathml.converter import convert
from mkdocs.structure.files import File

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
    return inside(markdown, page.file.src_uri)


def math(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML, which browsers draw without a script."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def inside(text: str, page: str) -> str:
    """Links to files of the repository that are no pages become their paths."""

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        return link[0] if target.startswith("docs/") else f"`{target.partition('#')[0]}`"

    return OUTSIDE.sub(replace, text)
