"""Files in the user's cache folder. Nobody else can change them, because they decide what a process runs.

A cache folder may be shared or prepared by somebody else. A file is read only if it is a regular file of at most
`LIMIT` bytes, belongs to this user or to root, and neither it nor its folder is writable by other users.
"""

from __future__ import annotations

import os
import stat

LIMIT = 64 << 20  # bytes; compiled shaders take about one MiB
PRIVATE = 0o700


def read(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file does not exist, is not a regular file, or is too large.
        PermissionError: another user owns the file, or can write it or its folder.
    """
    _check_folder(os.path.dirname(path))
    # Opening does not block on a FIFO and does not follow a symbolic link.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} must be a regular file.")
        _check(status, path)
        if status.st_size > LIMIT:
            raise OSError(f"{path} must have at most {LIMIT} bytes, got {status.st_size}.")
        return file.read(LIMIT)


def write(path: str, content: bytes) -> None:
    """Replace a file atomically, so that another process reads either the old or the new content.

    The folder is created with mode 0700 if it does not exist.

    Raises:
        OSError: the folder cannot be created or written, or another user owns it or can write it.
    """
    import tempfile  # imported here because it is slow to import and rarely needed

    folder = os.path.dirname(path)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    try:
        os.mkdir(folder, PRIVATE)
    except FileExistsError:
        _check_folder(folder)
    descriptor, fresh = tempfile.mkstemp(dir=folder)  # unpredictable name, opened exclusively with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def _check_folder(path: str) -> None:
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{path} must be a folder.")
    _check(status, path)


def _check(status: os.stat_result, path: str) -> None:
    if not hasattr(os, "geteuid"):  # Windows: the access list of a user's folder excludes other users
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}). Set ANYATTN_CACHE to your own folder."
        )
    mode = status.st_mode
    by_group = mode & stat.S_IWGRP and status.st_gid != os.getegid()
    by_others = mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)  # like /tmp
    if by_group or by_others:
        bits = f"{stat.S_IMODE(mode):o}"
        raise PermissionError(f"{path} must not be writable by other users, got mode {bits}. Run chmod go-w on it.")
