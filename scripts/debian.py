"""Unpack Debian packages of another suite or architecture into a folder. The system does not change."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")


def unpack(
    root: Path, suites: Iterable[str], packages: Iterable[str], alone: Iterable[str] = (), architecture: str = ""
) -> None:
    """Unpack `packages` with their dependencies, and the packages in `alone` without dependencies.

    The last suite is preferred. Default of architecture: the architecture of this machine.
    """
    suites, state = list(suites), root.parent / "apt"
    shutil.rmtree(state, ignore_errors=True)
    _prepare(state, suites)
    _apt(state, architecture, "update")
    _apt(state, architecture, "-t", suites[-1], "-y", "--download-only", "install", *packages)
    for package in alone:
        _apt(state, architecture, "download", package)
    for archive in [*state.glob("cache/archives/*.deb"), *state.glob("*.deb")]:
        command("dpkg-deb", "--extract", archive, root)
    shutil.rmtree(state)


def only(folder: Path, pattern: str) -> Path:
    """Return the first path in the folder that matches the pattern. Raise FileNotFoundError without a match."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"the packages have no {pattern}")
    return found[0]


def command(*arguments: str | Path, folder: Path | None = None) -> None:
    """Run a command. If it fails, raise RuntimeError with the end of its messages."""
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{arguments[0]} {arguments[-1]}: {result.stderr.strip()[-1000:]}")


def _prepare(state: Path, suites: Iterable[str]) -> None:
    """Create a separate apt state without installed packages, so that apt fetches everything that the packages need."""
    (state / "lists/partial").mkdir(parents=True)
    (state / "cache/archives/partial").mkdir(parents=True)
    (state / "status").touch()
    lines = [f"deb [signed-by={KEYS}] {_mirror()} {suite} main\n" for suite in suites]
    (state / "sources.list").write_text("".join(lines), encoding="utf-8")


def _mirror() -> str:
    """Return the mirror that a Debian system uses, otherwise the default."""
    for path in map(Path, SOURCES):
        found = re.search(r"^(?:URIs:|deb) +(https?://\S+/debian/?)\s", path.read_text() if path.exists() else "", re.M)
        if found:
            return found[1]
    return MIRROR


def _apt(state: Path, architecture: str, *arguments: str) -> None:
    options = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
        "Acquire::Retries": "3",
        "APT::Update::Error-Mode": "any",  # a missing package list is an error immediately
    }
    if architecture:
        options |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
    command("apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()), *arguments, folder=state)
