"""Every command where its surroundings are poor: streams that fail or lack characters, no home, few open files.

It ends with the documented exit code and at most two lines of errors, and what it had to write is there, or the same
command writes it.
"""

import errno
import io
import os
import shutil
import sys

import pytest
from run_state import last_step, losses, newest_verified

from flax_decoder.cli import main
from flax_decoder.training import loop

ROW = "Commands in poor surroundings"
RUSSIAN = "Быть или не быть, вот в чём вопрос.\n" * 30


# --- In this process ---


class Failing(io.RawIOBase):
    """A stream that takes some bytes and then fails."""

    def __init__(self, error, num_bytes=0):
        self.error, self.left = error, num_bytes
        self.descriptor = os.open(os.devnull, os.O_WRONLY)

    def fileno(self):
        return self.descriptor

    def writable(self):
        return True

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return len(data)


PIPE, FULL = BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device")
TOLD = "fault: standard output: No space left on device"


def failing(error, num_bytes=0):
    return io.TextIOWrapper(io.BufferedWriter(Failing(error, num_bytes)), encoding="utf-8")


@pytest.fixture
def unfinished(trained, tmp_path, monkeypatch):
    """A copy of a run that only lacks its results, the command that writes them, and a sample in Russian."""
    monkeypatch.setattr(loop, "generate_sample", lambda *_: RUSSIAN)
    folder = shutil.copytree(trained[0], tmp_path / "run")
    for name in loop.RESULTS:
        (folder / name).unlink()
    return folder, [word.replace(str(trained[0]), str(folder)) for word in trained[1]]


@pytest.mark.fault(ROW)
@pytest.mark.short("surrogateescape-ascii")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "replace"])
def test_text_that_the_output_cannot_encode_is_escaped(unfinished, monkeypatch, encoding, errors):
    folder, arguments = unfinished
    odd = "é\udcff 𝄞"
    monkeypatch.setattr(loop, "advice", lambda rows: odd)
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(arguments) == 0
    shown = output.buffer.getvalue()
    how = errors if errors == "replace" else "backslashreplace"
    assert RUSSIAN.encode(encoding, how) in shown and odd.encode(encoding, how) in shown
    assert (folder / "sample.txt").read_text("utf-8") == RUSSIAN and (folder / "loss.png").exists()


@pytest.mark.fault(ROW)
@pytest.mark.short("pipe")
@pytest.mark.parametrize("error", [PIPE, FULL], ids=["pipe", "full"])
def test_results_are_written_before_they_are_shown(unfinished, monkeypatch, capsys, error):
    folder, arguments = unfinished
    monkeypatch.setattr(sys, "stdout", failing(error))
    code, told = main(arguments), capsys.readouterr().err
    assert all((folder / name).exists() for name in loop.RESULTS)
    assert (code, told) == ((141, "") if error is PIPE else (1, TOLD + "\n"))


@pytest.mark.fault(ROW)
@pytest.mark.short("full-0")
@pytest.mark.parametrize("num_bytes", [0, 400])
@pytest.mark.parametrize("error", [PIPE, FULL], ids=["pipe", "full"])
def test_a_run_whose_output_fails_is_saved(trained, tmp_path, monkeypatch, capsys, error, num_bytes):
    folder = tmp_path / "run"
    arguments = [word.replace(str(trained[0]), str(folder)) for word in trained[1]]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", failing(error, num_bytes))
        code, told = main(arguments), capsys.readouterr().err
    step = newest_verified(folder)
    assert 0 < step == last_step(folder) < 12
    saved = f"{TOLD}; saved at step {step}; the same command continues\n"
    assert (code, told) == ((141, "") if error is PIPE else (1, saved))
    assert main(arguments) == 0
    rows, expected = losses(folder), losses(trained[0])
    assert {number: rows[number] for number in expected} == expected
    assert (folder / "sample.txt").read_bytes() == (trained[0] / "sample.txt").read_bytes()


@pytest.mark.fault(ROW)
def test_an_error_output_that_fails_changes_no_exit_code(monkeypatch):
    for error in (PIPE, FULL):
        monkeypatch.setattr(sys, "stderr", failing(error))
        sys.stderr.reconfigure(line_buffering=True)
        assert main(["generate", "nowhere", "--prompt", "a"]) == 2


@pytest.mark.fault(ROW)
def test_help_that_nobody_reads(monkeypatch):
    for error, code in ((PIPE, 141), (FULL, 1)):
        monkeypatch.setattr(sys, "stdout", failing(error))
        assert main(["train", "--help"]) == code
