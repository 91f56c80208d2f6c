"""Every command where its surroundings are poor: streams that fail or lack characters, no home, few open files.

It ends with the documented exit code and at most two lines of errors, and what it had to write is there, or the same
command writes it.
"""

import errno
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import reference
import tiny_run
from limits import HANGS_SECONDS
from run_state import last_step, leftovers, losses, newest_verified
from tiny_run import command, finish
from xla_flags import QUICK

from flax_decoder.cli import main
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.nn.decoder import Decoder
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
    monkeypatch.setattr(loop, "advice", lambda *arguments, **known: odd)
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
    if num_bytes == 0:  # that it goes on is shown by the other cases
        return
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


# --- In processes of their own ---


@pytest.fixture(scope="session")
def russian(tmp_path_factory):
    """A folder with a text in Russian, a finished run on it, a model to chat with, and compiled programs."""
    folder = tmp_path_factory.mktemp("russian")
    text = folder / "hamlet.txt"
    text.write_text(RUSSIAN, "utf-8")
    code, _, errors = finish(command(folder / "run", text), JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
    assert code == 0, errors
    tokenizer = CharTokenizer("".join(sorted({*RUSSIAN, *"é"})))
    sizes = {"vocab_size": tokenizer.vocab_size, "num_layers": 1, "embed_dim": 12, "num_heads": 2, "tied_head": False}
    model = Decoder(ModelConfig(**sizes, norm="rmsnorm", feed_forward="swiglu", positions="rotary"))
    (folder / "hf").mkdir()
    write_folder(folder / "hf", model.config, reference.random_params(model), tokenizer, FAMILIES["llama"])
    (folder / "hf" / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


# Arguments, with RUN, HF, TEXT and OUT in place of paths.
SIZES = [f"--{name}={value}" for name, value in tiny_run.SETTINGS.items()]
COMMANDS = {
    "train": ["train", "--data.path=TEXT", "--run.folder=OUT", *SIZES],
    "generate": ["generate", "RUN", "--prompt", "Быть", "--max-new-tokens", "40"],
    "chat": ["chat", "HF", "--max-new-tokens", "20"],
    "eval": ["eval", "RUN", "TEXT"],
    "lens": ["lens", "RUN", "--prompt", "Быть", "--out", "OUT"],
    "convert": ["convert", "HF", "OUT"],
    "compare": ["compare", "RUN", "--json", "OUT"],
    "verify": ["verify", "RUN"],
    "bench": ["bench", "--data.path=TEXT", *SIZES],
    "doctor": ["doctor", "--data.path=TEXT", *SIZES],
    "plan": ["plan", "--json", "OUT", "--model.vocab-size=40", *SIZES],
}
# Variables, where None takes one away, and a line of bash; 0 is asked for where no exit codes are named.
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS = {
    "no home": ({"HOME": None, "XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": None}, '"$@"', {0}),
    "a home that cannot be written": ({"HOME": "/proc", "JAX_COMPILATION_CACHE_DIR": None}, '"$@"', {0}),
    "no folder for temporary files": ({"TMPDIR": "/missing"}, '"$@"', {0}),
    "locale C": ({"LC_ALL": "C", "LANG": "C"}, '"$@"', {0}),
    "locale C, ASCII": (ASCII_ONLY, '"$@"', {0}),
    "ASCII": ({"PYTHONIOENCODING": "ascii"}, '"$@"', {0}),
    "cp1252": ({"PYTHONIOENCODING": "cp1252"}, '"$@"', {0}),
    "no standard output": ({}, '"$@" >&-', {0}),
    "no standard error": ({}, '"$@" 2>&-', {0}),
    "no standard stream": ({}, '"$@" <&- >&- 2>&-', {0}),
    "full": ({}, '"$@" > /dev/full', {1}),
    "full, at once": ({"PYTHONUNBUFFERED": "1"}, '"$@" > /dev/full', {1}),
    "full standard error": ({}, '"$@" 2> /dev/full', {0}),
    "head": ({}, 'set -o pipefail; "$@" | head -1', {0, 141}),
    "no reader": ({"PYTHONUNBUFFERED": "1"}, 'set -o pipefail; "$@" | true', {0, 141}),
    "umask 077": ({}, 'umask 077; "$@"', {0}),
    "64 open files": ({}, 'ulimit -n 64; "$@"', {0}),
    "no assertions": ({"PYTHONOPTIMIZE": "1"}, '"$@"', {0}),
}


@pytest.mark.full
@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("surroundings", ENVIRONMENTS)
def test_a_command(russian, tmp_path, surroundings, name):
    variables, line, codes = ENVIRONMENTS[surroundings]
    if name == "compare":
        pytest.importorskip("transformers")
    out = tmp_path / "out"
    paths = {"RUN": russian / "run", "HF": russian / "hf", "TEXT": russian / "hamlet.txt", "OUT": out}
    words = [re.sub("RUN|HF|TEXT|OUT", lambda found: str(paths[found[0]]), word) for word in COMMANDS[name]]
    ours = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(russian / "cache")}
    environment = {name: value for name, value in (os.environ | ours | variables).items() if value is not None}
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-m", "flax_decoder", *words],
        input="Быть\n".encode(),
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        timeout=HANGS_SECONDS,
    )
    errors = done.stderr.decode(errors="replace")
    assert done.returncode in codes, errors
    assert len(errors.splitlines()) <= 2 and "Traceback" not in errors and "ignored" not in errors, errors
    if "full" in surroundings and "error" not in surroundings:
        assert errors.startswith(TOLD), errors
    if name == "train":
        assert newest_verified(out) == last_step(out) > 0
        again = [sys.executable, "-m", "flax_decoder", *words]
        code, _, errors = finish(again, JAX_COMPILATION_CACHE_DIR=str(russian / "cache"))
        assert code == 0, errors
        expected = losses(russian / "run")
        assert {number: losses(out)[number] for number in expected} == expected
        assert (out / "loss.png").exists() and leftovers(out) == []
    elif "OUT" in COMMANDS[name]:
        assert out.exists()
    elif codes == {0} and "output" not in surroundings and "stream" not in surroundings:
        assert done.stdout
