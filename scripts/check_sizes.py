"""Fails where a function or a file has grown past the size at which people stop reading it.

Lengths are in lines; a Python function's docstring does not count. C++ and shader functions are found by their braces.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Caps(NamedTuple):
    """The longest function and the longest file."""

    function: int
    file: int


PYTHON = Caps(function=60, file=400)
KERNELS = Caps(function=150, file=500)  # native code, shaders, jit-compiled Python
TESTS = Caps(function=80, file=500)
TABLES = Caps(function=80, file=1500)  # generated rows of tests/harness/cases*.py

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
    try:
        functions = list(python_functions(text) if path.suffix == ".py" else braced_functions(text))
    except (SyntaxError, ValueError) as error:
        yield f"{name}: {error}"
        return
    caps = caps_of(name, text)
    lines = len(text.splitlines())
    if lines > caps.file:
        yield f"{name}: {lines} lines, at most {caps.file}"
    for function, line, length in functions:
        if length > caps.function:
            yield f"{name}:{line}: {function} has {length} lines, at most {caps.function}"


def caps_of(name: Path, text: str) -> Caps:
    if name.suffix != ".py":
        return KERNELS
    if name.parts[0] == "tests":
        return TABLES if name.name.startswith("cases") else TESTS
    return KERNELS if re.search(r"^@(triton|gluon)\.jit", text, re.MULTILINE) else PYTHON


def python_functions(text: str) -> Iterator[Function]:
    """Every function; a nested one counts in its parent too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None:
                length -= first.end_lineno - first.lineno + 1
            yield node.name, node.lineno, length


# What can hide a brace: comments, literals, preprocessor lines with their continuations.
HIDDEN = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)" | "(?:\\.|[^"\\\n])*" | (?<!\w)'(?:\\.|[^'\\\n])+'
        | ^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
# A function's header ends with its parameters and what may follow them; `struct alignas(64) Name` does not.
FUNCTION_HEADER = re.compile(r"\)(?:\s|const\b|noexcept\b|override\b|final\b|&|->[^()]*|:.*)*$", re.DOTALL)
FUNCTION_NAME = re.compile(r"([~\w:]+|operator\s*\S+)\s*\(")


def braced_functions(text: str) -> Iterator[Function]:
    """Every function body at namespace or class level; lambdas and inner blocks count in their function."""
    code = HIDDEN.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    header_start, depth, function = 0, 0, None
    for brace in re.finditer(r"[{};]", code):
        header = code[header_start : brace.start()]
        if brace.group() == "{":
            depth += 1
            name = FUNCTION_NAME.search(header) if FUNCTION_HEADER.search(header) else None
            if name and not function:
                start = header_start + len(header) - len(header.lstrip())
                function = (name.group(1), code.count("\n", 0, start) + 1, depth)
        elif brace.group() == "}":
            if function and function[2] == depth:
                yield function[0], function[1], code.count("\n", 0, brace.start()) + 2 - function[1]
                function = None
            depth -= 1
        header_start = brace.end()
    if depth:
        raise ValueError(f"unbalanced braces: {depth}")


if __name__ == "__main__":
    sys.exit(main())
