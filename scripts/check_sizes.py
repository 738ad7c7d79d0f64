"""Fail if a function or a file has more lines than a reader can follow.

lizard counts the lines of C, C++ and shaders. This file counts those of Python itself, because the docstring of a
function does not count, and a nested function counts in its parent too, which lizard does not support.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lizard


class Caps(NamedTuple):
    """Largest length of a function and of a file."""

    function: int
    file: int


PYTHON = Caps(function=60, file=400)
KERNELS = Caps(function=150, file=500)  # native code, shaders, jit-compiled Python
TESTS = Caps(function=80, file=500)

PYTHON_FOLDERS = ("src", "tests", "scripts", "examples", "benchmarks", "docs")
KERNEL_FOLDERS = ("native", "shaders", "examples")
KERNEL_SUFFIXES = {".c", ".cc", ".cpp", ".h", ".hpp", ".inc", ".comp", ".glsl"}

Function = tuple[str, int, int]  # name, first line, length


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    problems = [text for path in sources(root) for text in check(path, root)]
    if problems:
        sys.stderr.write("\n".join([*problems, ""]))
    return 1 if problems else 0


def sources(root: Path) -> Iterator[Path]:
    for folder in PYTHON_FOLDERS:
        yield from sorted(path for path in (root / folder).rglob("*.py"))
    for folder in KERNEL_FOLDERS:
        yield from sorted(path for path in (root / folder).rglob("*") if path.suffix in KERNEL_SUFFIXES)


def check(path: Path, root: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root)
    caps = caps_of(name, text)
    lines = len(text.splitlines())
    if lines > caps.file:
        yield f"{name}: {lines} lines, at most {caps.file}"
    for function, line, length in python_functions(text) if path.suffix == ".py" else braced_functions(text):
        if length > caps.function:
            yield f"{name}:{line}: {function} has {length} lines, at most {caps.function}"


def caps_of(name: Path, text: str) -> Caps:
    if name.suffix != ".py":
        return KERNELS
    if name.parts[0] == "tests":
        return TESTS
    return KERNELS if re.search(r"^@(triton|gluon)\.jit", text, re.MULTILINE) else PYTHON


def python_functions(text: str) -> Iterator[Function]:
    """Yield every function. A nested one counts in its parent too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None:
                length -= first.end_lineno - first.lineno + 1
            yield node.name, node.lineno, length


def braced_functions(text: str) -> Iterator[Function]:
    """Yield every function outside of others. Lambdas count in the function around them. GLSL is parsed as C++."""
    for function in lizard.analyze_file.analyze_source_code("file.cpp", text).function_list:
        yield function.name, function.start_line, function.length


if __name__ == "__main__":
    sys.exit(main())
