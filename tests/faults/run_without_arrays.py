"""A run with bytes in place of arrays: all that it does with files, in a few milliseconds."""

from pathlib import Path

from power_cut import SECTOR

from flax_decoder.config import DataConfig, RunConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.io.files import new_folder
from flax_decoder.training.checkpoint import NO_FACTS, commit, prune, remove_unfinished, steps_folder
from flax_decoder.training.metrics import MetricsLog

RUN = "runs/x"
TEXT = "hamlet.txt"  # beside the disk


def save(run: Path, step: int) -> None:
    """A checkpoint that has bytes in place of arrays; its folders are made as Orbax makes them."""
    new = steps_folder(run) / f".new-{step}"
    (new / "params").mkdir(parents=True)
    (new / "params" / "d").write_bytes(bytes([step]) * 2 * SECTOR)
    commit(new, {"step": step, "val_loss": None, **NO_FACTS, "arrays": {}})
    prune(run, 2)


def live(root: Path) -> None:
    """A run that saves at steps 2, 4 and 6, and then goes on from step 4 as if the last checkpoint were damaged."""
    run = root / RUN
    with new_folder(run) as unfinished:
        (unfinished / "corpus").mkdir()
        (root.parent / TEXT).write_text("to be, or not to be\n" * 9)
        prepare_corpus(DataConfig(path=str(root.parent / TEXT)), unfinished / "corpus")
    log = MetricsLog(RunConfig(), run, 0)
    for step in (1, 2, 3, 4, 5, 6, 7, 5, 6, 7):
        if log.rows and step <= log.rows[-1]["step"]:
            remove_unfinished(run, 4)
            log = MetricsLog(RunConfig(), run, 4)
        log.add(row(step))
        if step % 2 == 0:
            save(run, step)


def row(step: int) -> dict[str, float]:
    """A line of a log, longer than a sector of the disk."""
    return {"step": step, "train_loss": 1 / step} | {f"{'more' * 9}{number}": 0 for number in range(15)}
