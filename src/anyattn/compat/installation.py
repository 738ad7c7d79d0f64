"""Installation of anyattn's modules under the import names of other packages, in this process and until it is undone.

`import flash_attn` then returns anyattn's module. Nothing is imported before that, and nothing on disk changes. A
forked process keeps the installation. A new process has it if the process calls `install`, or if its program runs below
`anyattn run`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Name for `install` -> import names and their modules. Longer names take precedence.
NAMES = {
    "flash_attn": {
        "flash_attn": "flash_attn",
        "flash_attn.cute": "flash_attn_4",
        "flash_attn_3": "flash_attn_3",
        "flash_attn_interface": "flash_attn_3.flash_attn_interface",
    },
    "aule": {"aule": "aule"},
    "flash_attention": {"flash_attention": "flash_attention"},
    "flash_attention_amd": {"flash_attention_amd": "flash_attention_amd"},
    "flash_attn_triton": {"flash_attn_triton": "flash_attn_triton"},
}
FLASH_ATTN_VERSION = "2.8.3"  # flash_attn.__version__, without importing it
PACKAGE = __name__.rpartition(".")[0]


class Installation:
    """Names installed by one call, undone by `uninstall` or at the end of a `with` block."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def uninstall(self) -> None:
        """Uninstall these names and restore the modules that were hidden. A second call does nothing."""
        if self.names:
            uninstall(*self.names)
        self.names = ()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.uninstall()


def install(*names: str, force: bool = False) -> Installation:
    """Make `import NAME` return anyattn's module for each name. Names that are already installed are not changed.

    Args:
        *names: "flash_attn" (with flash_attn.bert_padding, .layers.rotary, .modules.mha, .ops.triton.rotary, .cute,
            flash_attn_interface and flash_attn_3), "aule", "flash_attention", "flash_attention_amd" or
            "flash_attn_triton".
        force: install even if another package of that name can be imported. That package is hidden, not changed, and
            code that has already imported from it is not affected.

    Returns:
        An Installation of the newly installed names: call its `uninstall`, or use it in a `with` statement.

    Raises:
        ValueError: a name is unknown.
        ImportError: another package has that name, and force is False. Nothing was installed.

    >>> from anyattn import compat
    >>> with compat.install("flash_attn", force=True):
    ...     import flash_attn
    >>> flash_attn.__name__
    'anyattn.compat.flash_attn'
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    added = [name for name in dict.fromkeys(names) if name not in _finder.installed]
    if not force:
        for root in roots(added):
            _check_free(root)
    for name in added:
        _finder.installed[name] = {alias: sys.modules.pop(alias) for alias in _loaded(roots([name]))}
    if added and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return Installation(added)


def install_flash_attn(force: bool = False) -> Installation:
    """Install flash_attn, like `install("flash_attn", force=force)`.

    Args:
        force: install even if another package named flash_attn can be imported.
    """
    return install("flash_attn", force=force)


def uninstall(*names: str) -> None:
    """Uninstall the given names; without names, all installed ones.

    Args:
        *names: names that were passed to `install`.
    """
    for name in names or tuple(_finder.installed):
        hidden = _finder.installed.pop(name, None)
        if hidden is not None:
            for alias in _loaded(roots([name])):
                del sys.modules[alias]
            sys.modules.update(hidden)
    if not _finder.installed and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def importable(name: str) -> bool:
    """Return whether a package other than anyattn's has an import name that `install(name)` would use."""
    try:
        for root in roots([name]):
            _check_free(root)
    except ImportError:
        return True
    return False


def roots(names: Iterable[str]) -> list[str]:
    """Return the top-level import names of these installations."""
    return list(dict.fromkeys(alias.partition(".")[0] for name in names for alias in NAMES[name]))


def _loaded(roots: Sequence[str]) -> list[str]:
    return [alias for alias in sys.modules if alias.partition(".")[0] in roots]


def _check_free(root: str) -> None:
    try:
        found = find_spec(root)
    except ValueError:  # sys.modules contains a module without a spec
        found = ModuleSpec(root, None)
    if found is not None:
        raise ImportError(
            f"{root} is importable from {found.origin or 'this process'}. Uninstall it, or hide it with force=True."
        )


def _spec_below(place: str) -> ModuleSpec | None:
    """Return the spec of a module of this package; nothing is imported.

    Python holds its import lock while it asks a finder. An import could wait for a thread that waits for this lock.
    """
    name, path, found = PACKAGE, sys.modules[PACKAGE].__path__, None
    for part in place.split("."):
        name = f"{name}.{part}"
        specs = (finder.find_spec(name, path, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next((spec for spec in specs if spec is not None), None)
        if found is None:
            return None
        path = found.submodule_search_locations or []
    return found


class Finder(DistributionFinder):
    """Finder of the installed names and of the distribution that flash_attn's callers look up.

    It precedes all others.
    """

    def __init__(self) -> None:
        self.installed: dict[str, dict[str, ModuleType]] = {}  # name -> modules that it hides

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of anyattn's module for that import name, or None."""
        aliases = {alias: place for name in self.installed for alias, place in NAMES[name].items()}
        parent = fullname
        while parent not in aliases:
            parent = parent.rpartition(".")[0]
            if not parent:
                return None
        place = f"{aliases[parent]}{fullname.removeprefix(parent)}"
        found = _spec_below(place)
        if found is None:
            return None
        return ModuleSpec(
            fullname,
            Alias(f"{PACKAGE}.{place}"),
            origin=found.origin,
            is_package=found.submodule_search_locations is not None,
        )

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """Yield the distribution flash-attn, in the version whose interface is provided."""
        context = context or DistributionFinder.Context()
        if "flash_attn" in self.installed and (context.name or "flash_attn").replace("-", "_") == "flash_attn":
            yield FlashAttnDistribution()


class Alias(Loader):
    """Loader that returns the module of another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module. The import system will write `spec` into it."""
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; it was executed under its own name."""
        module.__spec__ = self.spec


class FlashAttnDistribution(Distribution):
    """Metadata of flash-attn, without files."""

    def read_text(self, filename: str) -> str | None:
        """Return name, version and import name."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_ATTN_VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        """Raise FileNotFoundError, because no file is installed."""
        raise FileNotFoundError(f"anyattn provides flash_attn without files, so there is no {path}.")


_finder = Finder()
