"""A run of seconds in a separate process, for the fault matrix."""

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from limits import HANGS_SECONDS
from xla_flags import QUICK

_FOLDERS = contextlib.ExitStack()
atexit.register(_FOLDERS.close)
TRAIN = Path(__file__).parent.parent.parent / "train.py"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 8
SETTINGS = {
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "training.num_steps": 12,
    "training.batch_size": 4,
    "training.eval_every": 4,
    "training.save_every": 4,
    "training.log_every": 2,
    "training.sample_tokens": 5,
}


# Settings of runs in the tests' own process, which share compiled programs.
HERE = {"model__positions": "rotary", "mesh__data": 1}


def write_text_file(folder: Path) -> Path:
    """Writes a text to train on into a folder."""
    path = folder / "hamlet.txt"
    path.write_text(TEXT)
    return path


def command(folder: Path, text: Path, **changes: object) -> list[str]:
    """The command that starts or resumes such a run; changes to SETTINGS are named section__field."""
    values = SETTINGS | {"data.path": text, "run.folder": folder}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [sys.executable, str(TRAIN), *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Starts a command on one simulated device with pipes for stdout and stderr."""
    flags = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **flags, **environment},
    )


def finish(arguments: list[str], **environment: str) -> tuple[int, str, str]:
    """Runs a command to its end; returns exit code, stdout and stderr."""
    process = start(arguments, **environment)
    output, errors = process.communicate(timeout=HANGS_SECONDS)
    return process.returncode, output, errors


class FinishedRun(NamedTuple):
    """A run folder, its text, a compilation cache with its programs, and its duration in seconds."""

    run: Path
    text: Path
    cache: str
    seconds: float


@functools.cache
def finished_run(**changes: object) -> FinishedRun:
    """A run without faults, made once per test process.

    It has its own compilation cache, since a process that is killed while it writes to a cache leaves a partial file.
    """
    folder = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory()))
    text, cache = write_text_file(folder), str(folder / "cache")
    started = time.monotonic()
    code, _, errors = finish(command(folder / "run", text, **changes), JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    return FinishedRun(folder / "run", text, cache, time.monotonic() - started)
