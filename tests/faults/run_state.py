"""The state of a run folder, bit by bit."""

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
# Names of temporary and quarantined files. The lock file stays; without an owner it means nothing.
UNFINISHED = re.compile(r"\.(new|old)-|\.tmp|-tmp|\.broken|^\.(?!lock$)")


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """The logged numbers per step, without those that depend on the clock; empty if there is no log."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))  # one line each
    return {row["step"]: {name: row[name] for name in LOSSES if name in row} for row in rows}


def last_step(folder: Path) -> int:
    """The step of the last complete line of the log, read quickly; 0 if there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 2000, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def newest_verified(folder: Path) -> int:
    """The step of the newest checkpoint, or 0; all checkpoints must be valid."""
    for step in saved_steps(folder):
        verify(steps_folder(folder) / str(step))
    return max(saved_steps(folder), default=0)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything below a folder: when it was last changed, and the bytes of files."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def leftovers(folder: Path) -> list[str]:
    """Names of unfinished files in and next to a run folder."""
    paths = [*folder.parent.iterdir(), *folder.rglob("*")]
    return [path.name for path in paths if UNFINISHED.search(path.name)]


def assert_ended_alike(folder: Path, expected: Path) -> None:
    """Asserts that a run has the results of an uninterrupted one, bit by bit, and no leftovers."""
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
