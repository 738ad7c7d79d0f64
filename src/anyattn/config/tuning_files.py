"""Store of the values that `anyattn tune` measures: one JSON file per backend, in the user's cache folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from . import private_files, settings

if TYPE_CHECKING:
    from pathlib import Path

Entry = TypeVar("Entry")

logger = logging.getLogger("anyattn")


def load(name: str, parse: Callable[[Any], Entry]) -> dict[str, Entry]:
    """Return the entries of a file by device; {} without a file or, with a warning, if the file cannot be used."""
    if not settings.current().cache:
        return {}
    try:
        content = private_files.read(path(name))
        import json  # imported here because most machines have no such file

        found = json.loads(content.decode("utf-8"))
        return {device: parse(entry) for device, entry in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        warnings.warn(f"ignoring tuned values: {error}", RuntimeWarning, stacklevel=2)
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("ignoring %s, because `anyattn tune` did not write it in this form: %s", path(name), error)
        return {}


def save(name: str, entries: Mapping[str, Any]) -> Path:
    """Replace the entries of a file, by device. Settings are read again and cached plans are discarded.

    Raises:
        OSError: the cache folder does not exist, cannot be written, or is writable by other users.
    """
    if not settings.current().cache:
        raise FileNotFoundError("this user has no cache folder. Set ANYATTN_CACHE.")
    import json
    from pathlib import Path

    target = Path(path(name))
    private_files.write(str(target), json.dumps(entries, indent=1).encode("utf-8"))
    settings.reload()
    return target


def path(name: str) -> str:
    """Return the path of a file in the cache folder."""
    return os.path.join(settings.current().cache, name)
