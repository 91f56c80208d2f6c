"""A run that takes seconds, as a process of its own: what the matrix kills, fills up and damages."""

import os
import subprocess
import sys
from pathlib import Path

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
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}  # see ../conftest.py
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
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors
