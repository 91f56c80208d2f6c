"""A disk that is full, fails, or denies permission."""

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import HERE, command, finish

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.io import files
from flax_decoder.training import metrics
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.verification import verify_run

# Wide enough that arrays, not folders, take most of a checkpoint's space.
SIZES = {"model__embed_dim": 128, "training__keep_newest": 3}
DISK_BYTES = 64_000_000


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_holds(run, steps):
    assert [result for result in verify_run(run) if result.passed is False] == []
    assert saved_steps(run) == steps


def assert_no_leftovers(run):
    assert [name for name in names(run) if ".new" in name or ".old" in name or ".tmp" in name] == []


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run without faults, its parameters, and the bytes of a checkpoint on a disk with pages."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert finish(command(run, text, **SIZES))[0] == 0
    steps = run / "checkpoints" / "12"
    pages = sum(-(-path.stat().st_size // 4096) * 4096 for path in steps.rglob("*") if path.is_file())
    return run, fd.load(run)[1], pages


def with_a_small_disk(folder):
    """A command prefix that mounts a small disk at a folder; skips if that is not permitted."""
    mount = f'mount -t tmpfs -o size={DISK_BYTES} none "{folder}" && exec "$@"'
    for flags in ("-m", "-Urm"):
        start = ["unshare", flags, "sh", "-c", mount, "sh"]
        if shutil.which("unshare") and subprocess.run([*start, "true"], capture_output=True).returncode == 0:
            return start
    pytest.skip("this system lets nobody mount a disk of limited size")


@pytest.mark.fault("disk full, in checkpoints")
@pytest.mark.short("1.5")
@pytest.mark.parametrize("room", [0.5, 1.5, 2.5])
def test_a_disk_that_becomes_full(text, finished, tmp_path, room):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    run, ballast = disk / "run", disk / "ballast"
    arguments = command(run, text, **SIZES)
    driver = str(Path(__file__).parent / "on_a_filling_disk.py")
    filling = [sys.executable, driver, str(int(room * finished[2])), str(ballast), *arguments[2:]]
    # The disk vanishes with the command, so its contents are copied after each run.
    script = (
        f'{shlex.join(filling)}; echo "code $?"; cp -a "{run}" "{kept}/left"; rm "{ballast}"; '
        f'{shlex.join(arguments)}; echo "code $?"; cp -a "{run}" "{kept}/end"'
    )
    code, output, errors = finish([*with_a_small_disk(disk), "sh", "-c", script])
    assert code == 0
    assert [line for line in output.splitlines() if line.startswith("code ")] == ["code 1", "code 0"], errors
    # Threads of tensorstore may print to the same line.
    (error,) = re.findall("fault: .*", errors)
    assert f"{run}/checkpoints: cannot save a checkpoint: " in error and os.strerror(errno.ENOSPC) in error
    assert_holds(kept / "left", [4, 8, 12][: int(room)])
    assert_holds(kept / "end", [4, 8, 12])
    assert_no_leftovers(kept / "end")
    np.testing.assert_array_equal(fd.load(kept / "end")[1]["embedding"], finished[1]["embedding"])


def failing(number, is_meant, call):
    """The function `call`, but it fails if `is_meant(first argument)`."""

    def fail_or_call(target, *arguments, **options):
        if is_meant(Path(target) if not isinstance(target, int) else target):
            raise OSError(number, os.strerror(number), str(target))
        return call(target, *arguments, **options)

    return fail_or_call


@pytest.mark.fault("EIO and EACCES in write, flush, rename, delete, log")
@pytest.mark.short("write-EIO", "delete-EACCES", "log-EIO")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=["EIO", "EACCES"])
@pytest.mark.parametrize("operation", ["write", "flush", "rename", "delete", "log"])
def test_what_a_disk_refuses_is_told_and_harms_nothing(text, trained, tmp_path, monkeypatch, capsys, operation, number):
    run = tmp_path / "run"
    arguments = ["train", *command(run, text, **HERE)[2:]]

    def later(path):
        """From the second checkpoint on."""
        return bool(saved_steps(run)) and threading.current_thread() is not threading.main_thread()

    with monkeypatch.context() as patch:
        if operation == "write":
            patch.setattr(files, "open", failing(number, later, open), raising=False)
        elif operation == "flush":
            patch.setattr(os, "fsync", failing(number, later, os.fsync))
        elif operation == "rename":
            patch.setattr(os, "rename", failing(number, lambda path: later(path) and "new" in path.name, os.rename))
        elif operation == "delete":
            patch.setattr(shutil, "rmtree", failing(number, lambda path: ".old" in path.name, shutil.rmtree))
        else:
            patch.setattr(metrics, "open", failing(number, lambda path: bool(saved_steps(run)), open), raising=False)
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fault: ") and error.count("\n") == 1
    assert os.strerror(number) in error and str(run) in error
    assert [result for result in verify_run(run) if result.passed is False] == []
    assert saved_steps(run)
    assert main(arguments) == 0
    assert_holds(run, saved_steps(trained[0]))
    assert_no_leftovers(run)
    for one, other in zip(*(jax.tree.leaves(fd.load(each)[1]) for each in (run, trained[0])), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.fault("too little space, before the first step")
def test_a_disk_that_is_too_small_is_told_before_the_first_step(text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = ["train", *command(run, text, **HERE | {"training__keep_newest": 2})[2:]]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "3 checkpoints need 0.00 GB there, but 0.00 GB are free" in error and "--training.keep_newest" in error
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()
    monkeypatch.undo()
    assert main(arguments) == 0
