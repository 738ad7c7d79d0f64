"""Files of the user's cache folder, which decide what a process runs: read and written so that nobody else can.

A cache folder may be shared or prepared by somebody else. A file is read only if it is a regular file of at most
`LIMIT` bytes, belongs to this user or to root, and no other user can write it or its folder.
"""

from __future__ import annotations

import os
import stat

LIMIT = 64 << 20  # bytes; compiled shaders take about one MiB
PRIVATE = 0o700


def read(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: there is no such file, it is no regular file, or it is too large.
        PermissionError: another user owns it, or can write it or its folder.
    """
    _check_folder(os.path.dirname(path))
    # a FIFO does not block, and a symbolic link is not followed
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        _check(status, path)
        if status.st_size > LIMIT:
            raise OSError(f"{path} has {status.st_size} bytes, more than {LIMIT}")
        return file.read(LIMIT)


def write(path: str, content: bytes) -> None:
    """Replace a file atomically: another process reads either the old content or the new. The folder is made (0700).

    Raises:
        OSError: the folder cannot be made or written, or another user owns it or can write it.
    """
    import tempfile  # slow to import, and rarely needed

    folder = os.path.dirname(path)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    try:
        os.mkdir(folder, PRIVATE)
    except FileExistsError:
        _check_folder(folder)
    descriptor, fresh = tempfile.mkstemp(dir=folder)  # a name that nobody guesses, opened exclusively, mode 0600
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
        raise NotADirectoryError(f"{path} is not a folder")
    _check(status, path)


def _check(status: os.stat_result, path: str) -> None:
    if not hasattr(os, "geteuid"):  # Windows: the access list of a user's folder keeps others out
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}). Set ANYATTN_CACHE to your own folder"
        )
    mode = status.st_mode
    by_group = mode & stat.S_IWGRP and status.st_gid != os.getegid()
    by_others = mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)  # as /tmp: files are safe
    if by_group or by_others:
        bits = f"{stat.S_IMODE(mode):o}"
        raise PermissionError(f"{path} can be written by other users (mode {bits}). Run chmod go-w on it")
