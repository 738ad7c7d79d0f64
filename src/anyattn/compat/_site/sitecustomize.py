"""Serves the names of `anyattn run` in Python processes that its program starts: this folder is on their PYTHONPATH.

Nothing is imported before one of the names is, no error here reaches the process, and a sitecustomize of the user's own
runs as usual.
"""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock  # importing threading would take time in every process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIABLE = (
    "_ANYATTN_RUN"  # package, force (0 or 1), and for each top-level import name: import name=name of install=module
)


class Waiting:
    """Finder of the names that imports anyattn when the first of them is loaded.

    Python holds its import lock in `find_spec`. An import there could wait for a thread that waits for this lock.
    """

    def __init__(self, package: str, force: str, *rows: str) -> None:
        self.package, self.force = package, force == "1"
        self.places = {root: (name, place) for root, name, place in (row.split("=") for row in rows)}
        self.free: dict[str, bool] = {}  # by the name of install
        self.installed: set[str] = set()
        self.lock = allocate_lock()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return a spec that loads anyattn's module; None for every other name, and if another package has the name."""
        if fullname not in self.places or not self.serves(self.places[fullname][0]):
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, Loading(self, fullname), origin=self.package, is_package=True)  # type: ignore[arg-type]

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        """Return the distribution that anyattn serves under one of the names."""
        root = (getattr(context, "name", None) or "").replace("-", "_")
        if root not in self.places or not self.serves(self.places[root][0]):
            return ()
        try:
            return list(self.install(self.places[root][0])._finder.find_distributions(context))
        except Exception:
            return ()

    def serves(self, name: str) -> bool:
        """Check that a name of install still waits, that anyattn is there, and that no other package has the name."""
        if name in self.installed:  # a finder of anyattn's own serves it
            return False
        if name not in self.free:
            others = () if self.force else [root for root, (owner, _) in self.places.items() if owner == name]
            self.free[name] = self.exists(self.package.partition(".")[0]) and not any(map(self.exists, others))
        return self.free[name]

    def exists(self, root: str) -> bool:
        """Check that another finder than this one knows a top-level name; nothing is imported."""
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        return any(finder.find_spec(root, None) is not None for finder in finders)

    def install(self, name: str) -> Any:
        """Install a name, and return the module that did it."""
        from importlib import import_module

        installation = import_module(f"{self.package}.compat.installation")
        with self.lock:
            if name not in self.installed:
                installation.install(name, force=True)  # another package would have been found
                self.installed.add(name)
        return installation


class Loading:
    """Loader of the first module of a name."""

    def __init__(self, waiting: Waiting, fullname: str) -> None:
        self.waiting, self.fullname = waiting, fullname

    def create_module(self, spec: Any) -> Any:
        """Install the name, and return anyattn's module."""
        name, place = self.waiting.places[self.fullname]
        try:
            installation = self.waiting.install(name)
            self.alias = installation.Alias(f"{self.waiting.package}.compat.{place}")
            return self.alias.create_module(spec)
        except ImportError:
            raise
        except Exception as error:  # programs that can do without the name expect no other
            raise ImportError(f"anyattn cannot serve {self.fullname}: {error}", name=self.fullname) from error

    def exec_module(self, module: Any) -> None:
        """Give the module, which was executed under its own name, its own spec back."""
        self.alias.exec_module(module)


def _serve() -> None:
    try:
        sys.meta_path.insert(0, Waiting(*os.environ[VARIABLE].split(" ")))
    except Exception:  # not started by `anyattn run`
        return


def _run_another() -> None:
    """Run the sitecustomize that this one hides, as `site` would."""
    from importlib.machinery import PathFinder

    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


_serve()
_run_another()
