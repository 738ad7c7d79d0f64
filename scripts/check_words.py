"""Print words and openings of docstrings that readers of this project find hard. The reminder never fails.

    python scripts/check_words.py          a line per word, with the number of its places and some of them
    python scripts/check_words.py --all    every place

Each entry of WORDS has a suggestion. A sentence that reads well may keep its word.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("src", "scripts", "examples", "benchmarks", "tests")
PLACES = 3  # shown per word without --all

OPENER = re.compile(r"(What|Where|Which|Whether|How|Those|The same|Of)\b")
WORDS = {
    r"(?<!CPU )(?<!copy )\bengines?\b(?!\.)": "backend, except for the C++ code: the CPU engine",
    r"\bhonou?r(s|ed)?\b": "support",
    r"\btold\b|\btells\b": "pass, report",
    r"\b(lies|lie)\b": "is stored at, is in",
    r"\bin force\b": "active",
    r"\bbeside\b|\bbesides\b": "next to, compared with, in addition to",
    r"\bfor want of\b": "because there is no",
    r"\banew\b": "again",
    r"\b(row|query|rows|queries) sees?\b": "attend to",
    r"\bhidden\b(?!_)": "masked",
    r"\bthat of\b|\bthose of\b|\bthe latter\b": "repeat the noun",
    r"\bis there\b|\bare there\b": "is available, is installed",
    r"\bbehind\b|\bahead\b": "after, before",
    r"\bhanded\b|\bdrawn\b|\bmended\b": "passed, sampled, fixed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print words that readers find hard. Never fails.")
    parser.add_argument("--all", action="store_true", help="print every place")
    show_all = parser.parse_args().all
    found: dict[str, list[str]] = {}
    for place, text, is_docstring in texts(Path(__file__).resolve().parent.parent):
        if is_docstring and (opener := OPENER.match(text)):
            found.setdefault(f"docstring opens with {opener[1]}: start with a verb or a noun", []).append(place)
        for word, suggestion in WORDS.items():
            for match in re.finditer(word, text):
                found.setdefault(f"{match[0]}: {suggestion}", []).append(place)
    for label, places in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = places if show_all else places[:PLACES]
        print(f"{len(places):4} {label} ({', '.join(shown)}{', ...' if len(shown) < len(places) else ''})")


def texts(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (file:line, text, whether it is a docstring) of every docstring and comment."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if path == Path(__file__).resolve():
                continue
            source, name = path.read_text(encoding="utf-8"), path.relative_to(root)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield f"{name}:{node.body[0].lineno}", text, True
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type == tokenize.COMMENT:
                    yield f"{name}:{token.start[0]}", token.string, False


if __name__ == "__main__":
    main()
