"""A run that takes seconds, as a process of its own: what the matrix kills, fills up and damages."""

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


# Runs in the process of the tests, where they are of no special kind, are of this one: it is compiled once for all.
HERE = {"model__positions": "rotary", "mesh__data": 1}


def write_text_file(folder: Path) -> Path:
    """A text to train on, in a folder."""
    path = folder / "hamlet.txt"
    path.write_text(TEXT)
    return path


def command(folder: Path, text: Path, **changes: object) -> list[str]:
    """The command that trains such a run, or goes on with it; changes to SETTINGS are named section__field."""
    values = SETTINGS | {"data.path": text, "run.folder": folder}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [sys.executable, str(TRAIN), *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Starts a command on one simulated device; its two outputs are to be read."""
    flags = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **flags, **environment},
    )


def finish(arguments: list[str], **environment: str) -> tuple[int, str, str]:
    """Runs a command to its end: exit code, output, and errors."""
    process = start(arguments, **environment)
    output, errors = process.communicate(timeout=HANGS_SECONDS)
    return process.returncode, output, errors


class Whole(NamedTuple):
    """A run folder, its text, a cache that has its programs, and the seconds from its start to its end."""

    run: Path
    text: Path
    cache: str
    seconds: float


@functools.cache
def whole(**changes: object) -> Whole:
    """A run that nothing happens to; made once in each process that runs tests.

    A cache of its own: a program that is killed while it writes to the cache leaves half a file there.
    """
    folder = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory()))
    text, cache = write_text_file(folder), str(folder / "cache")
    started = time.monotonic()
    code, _, errors = finish(command(folder / "run", text, **changes), JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    return Whole(folder / "run", text, cache, time.monotonic() - started)
