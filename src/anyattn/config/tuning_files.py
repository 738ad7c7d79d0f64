"""Store of tuned values, which `anyattn tune` measures: one JSON file for each backend, in the user's cache folder."""

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
    """Return the entries of a file, by device; {} if there is no file or, with a warning, if it cannot be parsed."""
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
    """Replace the entries of a file, by device. Settings are then read again and plans made again.

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
    fresh.replace(target)  # atomic: another process reads either the old or the new file
    settings.reload()
    return target


def path(name: str) -> str:
    """Return the path of a file in the cache folder."""
    return os.path.join(settings.current().cache, name)
