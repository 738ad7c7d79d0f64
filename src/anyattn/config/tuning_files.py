"""What `anyattn tune` measured on this machine: one JSON file for each engine, in the user's cache folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from . import settings

if TYPE_CHECKING:
    from pathlib import Path

Entry = TypeVar("Entry")

logger = logging.getLogger("anyattn")


def load(name: str, parse: Callable[[Any], Entry]) -> dict[str, Entry]:
    """The entries of a file, by device; {} without a file and, with a warning, where it is not what was written."""
    if not settings.current().cache:
        return {}
    try:
        with open(path(name), encoding="utf-8") as file:
            import json  # most machines have no such file

            found = json.load(file)
        return {device: parse(entry) for device, entry in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not what `anyattn tune` writes: %s", path(name), error)
        return {}


def save(name: str, entries: Mapping[str, Any]) -> Path:
    """Writes the entries, by device, in place of all that were there; settings and plans are made anew.

    Raises:
        OSError: there is no cache folder, or it cannot be written.
    """
    if not settings.current().cache:
        raise FileNotFoundError("there is no cache folder for this user: set ANYATTN_CACHE")
    import json
    from pathlib import Path

    target = Path(path(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    fresh.replace(target)  # at once: a process that reads meanwhile sees the old or the new
    settings.reload()
    return target


def path(name: str) -> str:
    return os.path.join(settings.current().cache, name)
