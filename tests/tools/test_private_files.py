"""Files of the cache folder: what other users prepared is not read, and nothing of theirs is overwritten."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from anyattn.config import private_files, settings, tuning_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and owners")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    return path


def test_written_files_are_read(folder: Path) -> None:
    private_files.write(str(folder / "new" / "file"), b"content")
    assert private_files.read(str(folder / "new" / "file")) == b"content"
    private_files.write(str(folder / "new" / "file"), b"other")
    assert private_files.read(str(folder / "new" / "file")) == b"other"
    assert [path.name for path in (folder / "new").iterdir()] == ["file"]


def test_new_files_and_folders_are_private(folder: Path) -> None:
    mask = os.umask(0)
    try:
        private_files.write(str(folder / "new" / "file"), b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "new" / "file").stat().st_mode) == 0o600


def test_fifo_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "file")
    with pytest.raises(OSError, match="must be a regular file"):
        private_files.read(str(folder / "file"))


def test_file_in_place_of_the_folder_is_refused() -> None:
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        private_files.read(f"{os.devnull}/file")


def test_symbolic_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "file").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic link"):
        private_files.read(str(folder / "file"))
    private_files.write(str(folder / "file"), b"mine")
    assert (tmp_path / "secret").read_text() == "secret"


def test_large_files_are_not_read(folder: Path) -> None:
    with (folder / "file").open("wb") as file:
        file.truncate(private_files.LIMIT + 1)
    with pytest.raises(OSError, match=f"at most {private_files.LIMIT}"):
        private_files.read(str(folder / "file"))


@pytest.mark.parametrize("what", ["file", "folder"])
def test_files_writable_by_others_are_refused(folder: Path, what: str) -> None:
    (folder / "file").write_bytes(b"x")
    (folder / "file" if what == "file" else folder).chmod(0o666 if what == "file" else 0o777)
    with pytest.raises(PermissionError, match="must not be writable by other users"):
        private_files.read(str(folder / "file"))
    if what == "folder":
        with pytest.raises(PermissionError, match="must not be writable by other users"):
            private_files.write(str(folder / "file"), b"")


def test_files_in_a_sticky_folder_are_checked_individually(folder: Path) -> None:
    """Check a folder like /tmp, to which others can add files but not replace existing ones."""
    folder.chmod(0o1777)
    private_files.write(str(folder / "file"), b"x")
    assert private_files.read(str(folder / "file")) == b"x"


def test_the_file_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_bytes(b"x")
    owner = (folder / "file").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:  # root's files are trusted: the file must belong to a third user
        os.chown(folder / "file", 54321, 54321)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_files.read(str(folder / "file"))


@pytest.mark.parametrize("content", [b"[" * 200000, b"\xff\xfe{", b"null", b""], ids=["deep", "utf16", "null", "empty"])
def test_malformed_tuned_values_are_ignored(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANYATTN_CACHE", str(folder))
    settings.reload()
    (folder / "values.json").write_bytes(content)
    assert tuning_files.load("values.json", float) == {}
    assert "did not write it in this form" in caplog.text
    monkeypatch.undo()
    settings.reload()


def test_tuned_values_of_another_user_are_ignored_with_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_CACHE", str(folder))
    settings.reload()
    (folder / "values.json").write_text('{"device": 1}')
    assert tuning_files.load("values.json", float) == {"device": 1.0}
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="ignoring tuned values.*must not be writable by other users"):
        assert tuning_files.load("values.json", float) == {}
    monkeypatch.undo()
    settings.reload()
