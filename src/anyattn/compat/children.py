"""Names of other packages in new processes that a program starts: spawn, forkserver, torchrun, `sys.executable`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import package
from .installation import NAMES, roots

VARIABLE = "_ANYATTN_RUN"  # the processes' sitecustomize reads it
FOLDER = str(Path(__file__).absolute().parent / "_site")


@contextmanager
def served(names: Iterable[str], force: bool) -> Iterator[None]:
    """Let Python processes that are started inside the `with` block, and those that they start, find these names.

    Their environment has a folder on PYTHONPATH whose sitecustomize installs the names at the first import of one. A
    process that ignores PYTHONPATH (`python -I` or `-E`) or `site` (`-S`), or gets another environment, is not served.
    """
    rows = [f"{root}={name}={NAMES[name][root]}" for name in names for root in roots([name])]
    variable = " ".join([package.NAME, str(int(force)), *rows])
    given = {name: os.environ.get(name) for name in (VARIABLE, "PYTHONPATH")}
    others = given["PYTHONPATH"].split(os.pathsep) if given["PYTHONPATH"] else []
    folders = [FOLDER, *(folder for folder in others if folder != FOLDER)]
    os.environ.update({VARIABLE: variable, "PYTHONPATH": os.pathsep.join(folders)})
    try:
        yield
    finally:
        for name, value in given.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
