"""pre-commit and `make lint` use the same versions of the same tools."""

from __future__ import annotations

import re

from harness.paths import ROOT

TOOLS = {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format", "codespell": "codespell"}


def test_versions_of_pre_commit_equal_those_of_make_lint() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revs = re.findall(r"repo: https://github\.com/[\w-]+/([\w-]+)\n    rev: v(\S+)$", text, re.MULTILINE)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements/lint.txt").read_text(), re.MULTILINE))
    assert len(revs) == text.count("repo: https://") >= 2
    assert {TOOLS[repository]: rev for repository, rev in revs} == {
        TOOLS[repository]: pins[TOOLS[repository]] for repository, _ in revs
    }


def test_pre_commit_formats_every_file_that_make_lint_formats() -> None:
    pattern = re.search(
        r"id: clang-format\n(?: {8}.*\n)*? {8}files: (.*)$",
        (ROOT / ".pre-commit-config.yaml").read_text(),
        re.MULTILINE,
    )
    suffixes = re.search(r"^NATIVE := .*$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert pattern and suffixes
    for folder in ("native", "examples"):
        for suffix in re.findall(r"'\*(\.\w+)'", suffixes[0]):
            assert re.search(pattern[1], f"{folder}/file{suffix}"), suffix
