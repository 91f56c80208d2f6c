import os
import shutil
import socket
import subprocess
import sys

import pytest

from flax_decoder.io import files
from flax_decoder.io.files import make_folder, make_parents, new_folder, open_regular, replacing, write_text


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old and longer")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old and longer"  # not before it is complete
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_name_is_flushed_in_the_folder_that_has_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush_names", flushed.append)
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")  # it is there already
    make_parents(tmp_path / "b" / "c" / "file")
    assert flushed == [tmp_path, tmp_path / "b", tmp_path] and list((tmp_path / "b" / "c").iterdir()) == []
    flushed.clear()
    with new_folder(tmp_path / "d" / "e") as unfinished:
        (unfinished / "f").mkdir()
        assert flushed == [tmp_path]
        flushed.clear()
    assert flushed == [unfinished / "f", unfinished, tmp_path / "d"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_newlines_and_characters_stay_as_they_are(tmp_path):
    text = "a\r\nb\nc\ré \N{GRINNING FACE}"
    write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == text.encode()


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "made" / "folder"
    with pytest.raises(OSError, match="full"), new_folder(path) as unfinished:
        (unfinished / "half").write_text("x")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []  # the parent that was made for it is gone, too

    path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left = path.parent / f".folder.new-{socket.gethostname()}-{process.pid}"
    left.mkdir()
    (left / "by a crash").write_text("x")
    at_work = path.parent / f".folder.new-{socket.gethostname()}-{os.getppid()}"
    at_work.mkdir()
    with new_folder(path) as unfinished:
        assert not path.exists()
        (unfinished / "whole").write_text("x")
    assert {entry.name for entry in path.parent.iterdir()} == {"folder", at_work.name}
    assert [entry.name for entry in path.iterdir()] == ["whole"]


def test_what_a_crash_left_under_the_number_of_this_process_gives_way(tmp_path):
    """In a container each start may have the same number."""
    (tmp_path / f".folder.new-{socket.gethostname()}-{os.getpid()}").mkdir()
    with new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_processes_may_clear_away_the_same_leftover(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left = tmp_path / f".folder.new-{socket.gethostname()}-{process.pid}"
    left.mkdir()
    rmtree = shutil.rmtree

    def after_another(path, **options):
        left.rmdir() if left.exists() else None
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", after_another)
    with new_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_only_regular_files_are_opened(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one\r\ntwo")
    (tmp_path / "link").symlink_to(path)
    for name in ("a", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"one\r\ntwo"
    os.mkfifo(tmp_path / "fifo")
    for name, kind in {"fifo": "not a regular file", ".": "a folder", "/dev/zero": "not a regular file"}.items():
        with pytest.raises(OSError, match=f"is {kind}"):
            open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_file_whose_name_something_else_takes_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("text")
    really_open = os.open
    descriptors = []

    def swap(name, flags):
        path.unlink()
        os.mkfifo(path)
        descriptors.append(really_open(name, flags))  # returns at once, with no one to write into the FIFO
        return descriptors[-1]

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(OSError, match="is not a regular file"):
        open_regular(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_whoever_is_ready_first_has_the_new_folder(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "a") as unfinished:
        (unfinished / "mine").write_text("x")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


def test_an_error_without_a_name_gets_that_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="full") as caught, replacing(path):
        raise OSError(28, "full")
    assert caught.value.filename == str(path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.read(-1, 1))
    with pytest.raises(OSError, match=r"Bad file descriptor.*a\.txt"):
        write_text(path, "x")
    assert list(tmp_path.iterdir()) == []
