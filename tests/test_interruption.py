import errno
import os
import signal
import subprocess
import sys

import pytest

from flax_decoder import cli
from flax_decoder.training.interruption import SIGNALS, Interruption

# The main thread spends minutes in one C call, during which Python runs no signal handler.
AT_ONE_LINE = """
import hashlib
from flax_decoder.training.interruption import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
    print("the line has come to its end", flush=True)
"""


@pytest.fixture(autouse=True)
def hang_up_is_heard():
    """Also where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers():
    return [signal.getsignal(each) for each in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number, capsys):
    before = handlers()
    with Interruption() as interruption:
        assert interruption.signal is None and not interruption.requested()
        assert handlers() != before
        os.kill(os.getpid(), number)
        assert interruption.signal is number and interruption.requested()
    assert handlers() == before
    assert number.name in capsys.readouterr().out


@pytest.mark.parametrize(("first", "second"), [SIGNALS[:2], SIGNALS[1::-1]])
def test_the_second_one_leaves_at_once_whatever_is_under_way(first, second):
    with subprocess.Popen([sys.executable, "-c", AT_ONE_LINE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        process.stdout.readline()
        assert first.name in process.stdout.readline()
        process.send_signal(second)
        # Otherwise the script would have printed its last line.
        assert process.stdout.read() == ""
        assert process.wait() == 128 + second


def test_a_terminal_that_is_closed_may_say_so_twice():
    """The shell and the system both do. If the second one ended the process, this would end the tests."""
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
    assert interruption.signal is signal.SIGHUP


def test_a_terminal_that_is_gone_is_no_other_fault():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        interruption._note_output_error(OSError(errno.EIO, "Input/output error"))
    assert interruption.signal is signal.SIGHUP and interruption.output_error is None


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.signal is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        monkeypatch.setattr(cli, "_run", lambda arguments: os.kill(os.getpid(), signal.SIGHUP) or 0)
        assert cli.main([]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_come_back_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError), Interruption():
        raise RuntimeError
    assert handlers() == before
