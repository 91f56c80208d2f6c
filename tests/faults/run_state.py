"""What a run folder tells of a run, to the last bit."""

import json
import re
from pathlib import Path

import jax
import numpy as np

import flax_decoder as fd
from flax_decoder.training.checkpoint import saved_steps, steps_folder
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import read_metrics

LOSSES = ("train_loss", "val_loss", "gradient_norm", "learning_rate")
# What is on its way in or out, or was set aside. The lock stays, and is empty of meaning once its owner is gone.
UNFINISHED = re.compile(r"\.(new|old)-|\.tmp|-tmp|\.broken|^\.(?!lock$)")


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """The numbers of each step in the log that do not hang on the clock; none where there is no log yet."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))  # one line each
    return {row["step"]: {name: row[name] for name in LOSSES if name in row} for row in rows}


def last_step(folder: Path) -> int:
    """The step of the last whole line of the log, at a glance; 0 where there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 2000, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def newest_verified(folder: Path) -> int:
    """The newest checkpoint, 0 where there is none. Each that has the name of a step must hold, to the last bit."""
    for step in saved_steps(folder):
        verify(steps_folder(folder) / str(step))
    return max(saved_steps(folder), default=0)


def leftovers(folder: Path) -> list[str]:
    """Names of what is unfinished in a run folder and beside it."""
    paths = [*folder.parent.iterdir(), *folder.rglob("*")]
    return [path.name for path in paths if UNFINISHED.search(path.name)]


def assert_ended_alike(folder: Path, expected: Path) -> None:
    """That a run has the losses, parameters, snapshots and sample of one that was never stopped, and left nothing."""
    assert losses(folder) == losses(expected)
    assert (folder / "sample.txt").read_bytes() == (expected / "sample.txt").read_bytes()
    snapshots, expected_snapshots = (
        {p.name: p.read_bytes() for p in (run / "lens").iterdir()} for run in (folder, expected)
    )
    assert snapshots == expected_snapshots
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    ours, theirs = (fd.load(path)[1] for path in (folder, expected))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert newest_verified(folder) == newest_verified(expected)
    assert leftovers(folder) == []
