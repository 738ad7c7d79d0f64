"""Gives anyattn's modules the import names of other packages, in this process and until it is undone.

`import flash_attn` then finds anyattn's module itself, not a copy; nothing is imported before that, nothing on disk
changes, and child processes start without it (a forked one keeps it).
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

# What `install` takes -> the import names that it serves, and where; longer names win.
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
FLASH_ATTN_VERSION = "2.8.3"  # flash_attn.__version__, which must not be imported to tell it
PACKAGE = __name__.rpartition(".")[0]


class Installation:
    """What one call installed: undone by `uninstall`, or by leaving a `with` block."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def uninstall(self) -> None:
        """Takes back these names; what was hidden under them is there again. A second call does nothing."""
        if self.names:
            uninstall(*self.names)
        self.names = ()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.uninstall()


def install(*names: str, force: bool = False) -> Installation:
    """Makes `import NAME` find anyattn's module for each name; one that is installed already is left as it is.

    Args:
        names: "flash_attn" (with flash_attn.bert_padding, .layers.rotary, .modules.mha, .ops.triton.rotary, .cute,
            flash_attn_interface and flash_attn_3), "aule", "flash_attention", "flash_attention_amd" or
            "flash_attn_triton".
        force: also where a package of that name can be imported. It is hidden, not changed; what already imported
            something from it keeps that.

    Returns:
        An Installation of the names that were not installed before: call its `uninstall`, or use it in a `with`.

    Raises:
        ValueError: an unknown name. ImportError: another package has that name, and force is False; nothing was
            installed.

    >>> from anyattn import compat
    >>> with compat.install("flash_attn", force=True):
    ...     import flash_attn
    >>> flash_attn.__name__
    'anyattn.compat.flash_attn'
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"install knows {', '.join(NAMES)}, got {name!r}")
    added = [name for name in dict.fromkeys(names) if name not in _finder.installed]
    if not force:
        for root in _roots(added):
            _check_free(root)
    for name in added:
        _finder.installed[name] = {alias: sys.modules.pop(alias) for alias in _loaded(_roots([name]))}
    if added and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return Installation(added)


def install_flash_attn(force: bool = False) -> Installation:
    """`install("flash_attn", force=force)`."""
    return install("flash_attn", force=force)


def uninstall(*names: str) -> None:
    """Takes back the names that are installed; without names, all of them."""
    for name in names or tuple(_finder.installed):
        hidden = _finder.installed.pop(name, None)
        if hidden is not None:
            for alias in _loaded(_roots([name])):
                del sys.modules[alias]
            sys.modules.update(hidden)
    if not _finder.installed and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def importable(name: str) -> bool:
    """Whether another package than anyattn's has an import name that `install(name)` would serve."""
    try:
        for root in _roots([name]):
            _check_free(root)
    except ImportError:
        return True
    return False


def _roots(names: Iterable[str]) -> list[str]:
    """The top-level import names that these installations serve."""
    return list(dict.fromkeys(alias.partition(".")[0] for name in names for alias in NAMES[name]))


def _loaded(roots: Sequence[str]) -> list[str]:
    return [alias for alias in sys.modules if alias.partition(".")[0] in roots]


def _check_free(root: str) -> None:
    try:
        found = find_spec(root)
    except ValueError:  # sys.modules holds a module without a spec
        found = ModuleSpec(root, None)
    if found is not None:
        raise ImportError(
            f"{root} can be imported from {found.origin or 'this process'}: uninstall it, or hide it with force=True"
        )


class Finder(DistributionFinder):
    """Finds the installed names, before every other finder, and the distribution that flash_attn's callers look up."""

    def __init__(self) -> None:
        self.installed: dict[str, dict[str, ModuleType]] = {}  # name -> the modules that it hides

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of anyattn's module of that import name; None if there is no such module."""
        aliases = {alias: place for name in self.installed for alias, place in NAMES[name].items()}
        parent = fullname
        while parent not in aliases:
            parent = parent.rpartition(".")[0]
            if not parent:
                return None
        name = f"{PACKAGE}.{aliases[parent]}{fullname.removeprefix(parent)}"
        found = find_spec(name)
        if found is None:
            return None
        return ModuleSpec(
            fullname, Alias(name), origin=found.origin, is_package=found.submodule_search_locations is not None
        )

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """flash-attn, in the version of the interface that is served."""
        context = context or DistributionFinder.Context()
        if "flash_attn" in self.installed and (context.name or "flash_attn").replace("-", "_") == "flash_attn":
            yield FlashAttnDistribution()


class Alias(Loader):
    """Loads a module by handing out the one of another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself; the import system will write `spec` into it."""
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module was executed under its own name; it gets its own spec back."""
        module.__spec__ = self.spec


class FlashAttnDistribution(Distribution):
    """The metadata of flash-attn, without files."""

    def read_text(self, filename: str) -> str | None:
        """Name, version and import name."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_ATTN_VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        """Nothing is installed."""
        raise FileNotFoundError(f"anyattn serves flash_attn by itself: there is no {path}")


_finder = Finder()
