"""First contact with the Vulkan drivers of this machine, in a child process.

A broken driver then ends only the child.

Automatic choice calls this before this process loads a driver that nobody has named. The answer is stored in the cache
folder, under a digest of everything that distinguishes sets of drivers. Answers of failure expire after a day.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ...config import private_files, settings
from . import api, driver_files
from .api import VulkanError

FORMAT = 1  # version of the stored answer and of the child's task
SECONDS = 30  # time limit of the child
FAILURE_LASTS = 24 * 3600  # seconds
ENDED_FROM_OUTSIDE = ("SIGINT", "SIGTERM", "SIGKILL", "SIGHUP")  # not caused by a driver
NO_WINDOW = 0x08000000  # Windows: open no console window for the child of a graphical program
# The child does not run __init__ of the package and of `backends`, so that it does not import NumPy.
CHILD = """
import sys, types
for name, path in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from anyattn.backends.vulkan.first_contact_child import main
main()
"""


class Report(NamedTuple):
    """Device that a child process has chosen and opened, or why there is none."""

    name: str = ""
    kind: str = ""
    cache_key: str = ""
    refusal: str = ""  # the child answered that no device can compute
    crash: str = ""  # the child did not answer and ended like this


_reports: dict[str, Report] = {}  # by digest, in this process


def report() -> Report:
    """Return what a child process found out about the drivers, now or earlier."""
    digest = _digest()
    found = _reports.get(digest) or _load(digest)
    if found is None:
        found, lasting = _ask()
        if lasting:
            _save(digest, found)
    _reports[digest] = found
    return found


def reason(found: Report) -> str:
    """Return why automatic choice does not use the drivers, or ""."""
    if not found.crash:
        return found.refusal
    stored = path(_digest())
    forget = f", then delete {stored}" if stored else ""
    return (
        f"the Vulkan drivers of this machine ended the process that tried them ({found.crash}). "
        f"Repair or remove the driver, or choose others with VK_DRIVER_FILES{forget}"
    )


def known_crash() -> str:
    """Return why the drivers must not be loaded, if a child process has already shown it. No child is started."""
    digest = _digest()
    found = _reports.get(digest) or _load(digest)
    return reason(found) if found and found.crash else ""


def path(digest: str) -> str:
    """Return the path of a stored answer; "" without a cache folder."""
    folder = settings.current().cache
    return str(Path(folder) / f"vulkan-drivers-{digest}.json") if folder else ""


def _digest() -> str:
    """Return the digest of everything that the answer depends on, as 16 hexadecimal digits."""
    current = settings.current()
    facts = [FORMAT, current.vulkan_device, current.vulkan_validate, driver_files.fingerprint()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _load(digest: str) -> Report | None:
    """Return the stored answer, or None if there is no valid one."""
    if not path(digest):
        return None
    try:
        stored = json.loads(private_files.read(path(digest)).decode("utf-8"))
        found, age = Report(**stored["report"]), time.time() - stored["time"]
        if not all(isinstance(text, str) for text in found):
            return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    fails = found.crash or found.refusal
    return None if fails and not 0 <= age < FAILURE_LASTS else found


def _save(digest: str, found: Report) -> None:
    """Store an answer for later processes. If the folder cannot be written, each process asks again."""
    if not path(digest):
        return
    content = json.dumps({"time": time.time(), "report": found._asdict()}, indent=1)
    try:
        private_files.write(path(digest), content.encode("utf-8"))
    except OSError:
        return


def _ask() -> tuple[Report, bool]:
    """Return the answer of a new child process, and whether it is valid for later processes."""
    import subprocess

    try:
        api.library()  # only the loader, which does not load a driver yet
    except VulkanError as error:
        return Report(refusal=str(error)), False
    python = _interpreter()
    if not python:
        why = f"no Python is available to try the drivers first (sys.executable is {sys.executable!r})"
        return Report(refusal=f"{why}. Name the backend to load them"), False
    backends = Path(__file__).absolute().parents[1]
    packages = [("anyattn", str(backends.parent)), ("anyattn.backends", str(backends))]
    command = [python, "-I", "-S", "-c", CHILD.format(packages=packages)]
    flags = NO_WINDOW if sys.platform == "win32" else 0
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False, creationflags=flags
        )
    except subprocess.TimeoutExpired:
        return Report(refusal=f"the Vulkan drivers did not answer within {SECONDS} s. Name the backend to wait"), True
    except OSError as error:
        return Report(refusal=f"no child process could be started to try the drivers: {error}"), False
    return _understand(result.returncode, result.stdout, result.stderr)


def _interpreter() -> str:
    """Return the path of Python; "" in a frozen or embedding program, whose executable may be something else."""
    executable = sys.executable or ""
    name = Path(executable).name.lower()
    return executable if name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False) else ""


def _understand(status: int, out: bytes, err: bytes) -> tuple[Report, bool]:
    """Return the child's answer, its last printed line, and whether the answer is valid for later processes."""
    try:
        if status == 0:
            return Report(**json.loads(out.splitlines()[-1])), True
    except (IndexError, ValueError, TypeError):
        pass
    if status < 0:
        ending = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    else:
        ending = f"exit status {status:#x}" if status > 255 else f"exit status {status}"
    if ending in ENDED_FROM_OUTSIDE:
        return Report(refusal=f"{ending} ended the process that tries the drivers; the next program tries again"), False
    last = err.decode(errors="replace").strip().rpartition("\n")[2][-200:]
    return Report(crash=f"{ending}: {last}" if last else ending), True
