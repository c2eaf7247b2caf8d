"""common/files.py: whole-file writes, local and remote, on disks that refuse what is not needed."""

import errno
import fcntl
import os
import stat

import pytest

from common import files


@pytest.mark.parametrize("folder", ["local", "memory://files"])
def test_a_failed_write_leaves_the_old_file(tmp_path, folder):
    path = files.join(tmp_path / folder if folder == "local" else folder, "deep", "text")
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.writing(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert files.read_text(path) == "old"
    assert files.list_files(path.rsplit("/", 1)[0]) == ["text"]
    files.remove(path)
    files.remove(path)
    assert files.read_text(path) is None


@pytest.mark.parametrize("error", [RuntimeError("disk\nfull"), KeyError("bug")])
def test_errors_of_a_full_disk_are_for_the_user(tmp_path, error):
    """torch.save raises RuntimeError there; what is no error of a disk keeps its kind."""
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": 1})
    kind = OSError if isinstance(error, RuntimeError) else KeyError
    with pytest.raises(kind), files.writing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("refused", ["chmod", "fsync"])
def test_what_a_mount_refuses_without_harm(tmp_path, monkeypatch, refused):
    """chmod without permission bits (S3, exFAT); fsync (CIFS, FUSE)."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, refused, refuse)
    files.write_text(tmp_path / "text", "content")
    assert files.read_text(tmp_path / "text") == "content"


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "text", "content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o640


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".tmp-1234.pt").write_text("half")
    files.write_text(tmp_path / "text", "content")
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_json_is_named(tmp_path, content):
    files.write_text(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match="a.json is not readable JSON"):
        files.read_json(tmp_path / "a.json")
    assert files.read_json(tmp_path / "none.json") == {}


def test_files_are_synced_by_a_writable_descriptor(tmp_path, monkeypatch):
    """As Windows demands."""
    real, synced = os.fsync, []

    def like_windows(descriptor: int) -> None:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if regular and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(regular)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", like_windows)
    files.write_text(tmp_path / "text", "content")
    assert synced == [True]


def test_errors_of_a_storage_are_for_the_user(monkeypatch):
    """Whatever kind its library raises, as without credentials."""
    import fsspec

    class NoCredentials(Exception):
        pass

    def fail(*_):
        raise NoCredentials("unable to locate credentials")

    for name in ("get_file", "isdir", "put_file", "rm_file"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, fail)
    path = "memory://bucket/file"
    calls = [files.read_text, files.list_files, files.remove, lambda p: files.write_text(p, "text")]
    for call in calls:
        with pytest.raises(OSError, match="memory://bucket/.*unable to locate credentials"):
            call(path)


def test_a_local_folder_may_have_any_name(tmp_path):
    """fsspec alone would read a :: as a chain of file systems."""
    folder = tmp_path / "a::b"
    files.write_text(folder / "step_1.pt", "text")
    assert files.list_files(folder, "step_") == ["step_1.pt"]
    files.remove(folder / "step_1.pt")
    assert files.list_files(folder) == []


def test_an_empty_folder_is_the_current_one():
    """`--out "$OUT"` with an unset variable does not write to the root of the file system."""
    assert files.join("", "config.json") == "./config.json"
