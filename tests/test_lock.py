import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from flax_decoder.errors import FaultError, InUseError
from flax_decoder.io import lock as lock_module
from flax_decoder.io.lock import LOCK, OWNER, FolderLock, refuse_if_in_use

HOLDER = """
import sys
from pathlib import Path
from flax_decoder.io.lock import FolderLock
lock = FolderLock()
lock.take(Path(sys.argv[1]))
lock.announce()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_one_is_refused_with_the_name_of_the_first_and_changes_nothing(tmp_path, holder):
    before = (tmp_path / LOCK).read_bytes()
    for refuse in (FolderLock().take, refuse_if_in_use):
        with pytest.raises(InUseError, match=rf"in use by process {holder.pid} on .* since .*--run\.folder"):
            refuse(tmp_path)
    assert (tmp_path / LOCK).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_process_frees_its_folder_however_it_ends(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    refuse_if_in_use(tmp_path)
    with FolderLock() as lock:
        lock.take(tmp_path)


def test_a_process_that_is_stopped_keeps_its_folder(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(InUseError):
        refuse_if_in_use(tmp_path)


def test_what_the_file_says_is_of_its_owner_and_not_of_one_before(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "long ago", "command": "x" * 999}))
    with FolderLock() as lock:
        lock.take(tmp_path)
        lock.announce()
        holder = json.loads((tmp_path / LOCK).read_bytes())
        assert holder["pid"] == os.getpid() and holder.keys() == {"pid", "host", "since", "command"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]", b'{"pid": 1}'])
def test_an_owner_that_has_not_said_who_it_is_is_another_process(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with FolderLock() as lock:
        lock.take(tmp_path)
        with pytest.raises(InUseError, match="in use by another process"):
            FolderLock().take(tmp_path)


def test_it_goes_with_its_folder_to_another_name(tmp_path):
    (tmp_path / "new").mkdir()
    with FolderLock() as lock:
        lock.take(tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "run")
        with pytest.raises(InUseError):
            refuse_if_in_use(tmp_path / "run")
    refuse_if_in_use(tmp_path / "run")


def test_a_folder_without_a_lock_is_not_given_one_by_a_look(tmp_path):
    refuse_if_in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_opened_is_a_fault(tmp_path):
    (tmp_path / LOCK).mkdir()
    with FolderLock() as lock, pytest.raises(FaultError, match=r"\.lock: cannot be locked: "):
        lock.take(tmp_path)


def test_a_named_owner_that_has_ended_is_not_said_to_be_at_work(tmp_path, holder):
    """Whoever may open the file can hold the lock; the name in it is that of an owner before."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    owner = json.loads((tmp_path / LOCK).read_bytes())
    (tmp_path / LOCK).write_text(json.dumps(owner | {"pid": ended.pid}))
    with pytest.raises(InUseError, match=rf"process {ended.pid} .* which has ended: another process"):
        refuse_if_in_use(tmp_path)


def test_a_lock_can_be_held_by_its_owner_alone(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path)
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600
        (tmp_path / LOCK).chmod(0o644)  # of an earlier version
        lock.announce()
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP])
def without_locks(request, monkeypatch):
    """A file system without flock."""

    def fail(descriptor, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_without_locks_one_process_has_the_folder_too(tmp_path, without_locks, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock() as lock:
        lock.take(folder)
        lock.announce()
        assert "no locks" in capsys.readouterr().err
        folder = folder.rename(tmp_path / "renamed")  # as that of a new run
        before = (folder / OWNER).read_bytes()
        for refuse in (FolderLock().take, refuse_if_in_use):
            with pytest.raises(InUseError, match=rf"by process {os.getpid()} on .*\n.* rm .*/renamed/\.lock\.owner$"):
                refuse(folder)
        assert (folder / OWNER).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [LOCK]
    changed = folder.stat().st_mtime_ns
    refuse_if_in_use(folder)
    assert folder.stat().st_mtime_ns == changed  # two that look at the same instant do not see each other
    with FolderLock() as lock:
        lock.take(folder)


def test_without_locks_the_mark_of_a_killed_process_is_named(tmp_path, without_locks):
    """Nothing tells whether a process on another machine runs, so its owner decides."""
    (tmp_path / OWNER).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "noon", "command": "train"}))
    with pytest.raises(InUseError, match=r"process 1 on elsewhere since noon .*\n.*if that process was killed, delete"):
        FolderLock().take(tmp_path)
    (tmp_path / OWNER).unlink()
    (tmp_path / OWNER).symlink_to(tmp_path / "outside")  # the mark is never written through a link
    with pytest.raises(InUseError):
        FolderLock().take(tmp_path)
    assert not (tmp_path / "outside").exists()


def test_without_locks_a_folder_that_has_gone_is_released(tmp_path, without_locks):
    (tmp_path / "run").mkdir()
    with FolderLock() as lock:
        lock.take(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert lock._folder is None and lock._descriptor is None


def test_without_locks_a_mark_that_cannot_be_written_does_not_stay(tmp_path, without_locks, monkeypatch):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock_module, "_this_process", fail)
    with pytest.raises(FaultError, match=r"\.lock\.owner: cannot be created: No space left"):
        FolderLock().take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
