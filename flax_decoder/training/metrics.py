"""The log of a run: metrics.jsonl, the loss curve, and on request TensorBoard and Weights & Biases."""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_decoder.config import RunConfig
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import write_text
from flax_decoder.io.terminal import print_escaped
from flax_decoder.lens.pictures import picture_path, save_picture
from flax_decoder.training.flops import UNKNOWN

# A line of the log: names and numbers, or "unknown".
LogRow = dict[str, Any]
# Blue and vermilion of Okabe and Ito's palette.
TRAINING, VALIDATION = "#0072b2", "#d55e00"
# A white background keeps a number readable on top of the curve.
LABEL = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}


class MetricsLog:
    """Appends lines to metrics.jsonl, one JSON object each.

    Attributes:
        rows: all lines so far, including those from before the run was resumed.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int, *, writes: bool = True):
        """Opens the log of a run at `step`; lines of later steps, which will be repeated, are dropped.

        Only one process of a job writes; the others keep their lines in memory.
        """
        self._path = folder / "metrics.jsonl"
        self._writes = writes
        self._reporters = open_reporters(config, folder) if writes else []
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        if writes:
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: LogRow) -> None:
        """Writes a line to disk, and its known numbers to the other reporters, of which one that fails is switched off.

        Raises:
            FaultError: the line cannot be written to disk.
        """
        self.rows.append(row)
        if self._writes:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise FaultError(f"{self._path}: cannot be written: {error.strerror}") from error
        numbers = {name: value for name, value in row.items() if value != UNKNOWN}
        for report in list(self._reporters):
            try:
                report(numbers)
            except Exception as error:  # of another library: of any kind
                self._reporters.remove(report)
                _tell_switched_off(report.__name__.removeprefix("to_"), error)

    def seconds(self) -> float:
        """Training time of the run up to the last line, in seconds."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0


def read_metrics(path: Path) -> list[LogRow]:
    """The lines of a metrics.jsonl, without a last one cut short by a crash; none if there is no file.

    Raises:
        BrokenError: a line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenError(f"{path}: line {number} is damaged: {error}; repair or delete it") from None
        rows.append(row)
    return rows


def require_reporters(config: RunConfig) -> None:
    """Raises UserError if the config asks for a reporter that is not installed."""
    for asked, name, module in (
        (config.tensorboard, "tensorboard", "tensorboardX"),
        (config.wandb is not None, "wandb", "wandb"),
    ):
        try:
            if asked:
                importlib.import_module(module)
        except ImportError:
            raise UserError(f'run.{name} needs: pip install "flax-decoder[{name}]"') from None


def open_reporters(config: RunConfig, folder: Path) -> list[Callable[[LogRow], None]]:
    """A function per reporter in the config, to be called with each line; one that cannot be opened is left out."""
    reporters: list[Callable[[LogRow], None]] = []
    for name, is_on, open_reporter in (
        ("tensorboard", config.tensorboard, _open_tensorboard),
        ("wandb", config.wandb is not None, _open_wandb),
    ):
        try:
            if is_on:
                reporters.append(open_reporter(config, folder))
        except (FaultError, UserError):
            raise
        except Exception as error:  # of another library: of any kind
            _tell_switched_off(name, error)
    return reporters


def _open_tensorboard(config: RunConfig, folder: Path) -> Callable[[LogRow], None]:
    # Not its SummaryWriter, whose thread writes later: where the disk is full, it ends with a traceback, and the
    # training then waits for it for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    events = folder / "tensorboard"
    events.mkdir(exist_ok=True)
    writer = EventsWriter(os.fspath(events / "events"))

    def to_tensorboard(row: LogRow) -> None:
        for name, value in row.items():
            writer.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=scalar(name, value)))
        writer.flush()

    return to_tensorboard


def _open_wandb(config: RunConfig, folder: Path) -> Callable[[LogRow], None]:
    import wandb

    # With the folder's name as id, a resumed run continues the same chart.
    run = wandb.init(project=config.wandb, name=folder.name, id=folder.name, dir=folder, resume="allow")

    def to_wandb(row: LogRow) -> None:
        run.log(dict(row), step=int(row["step"]))

    return to_wandb


def _tell_switched_off(name: str, error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    print_escaped(f"warning: run.{name} is switched off, training goes on: {reason}", file=sys.stderr)


def plot_losses(rows: list[LogRow] | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Plots training and validation loss over the steps, as a PNG or an SVG.

    Args:
        rows: the lines of a run's log, or the path of its metrics.jsonl.
        path: of the image, ending in .png or .svg; an existing file is replaced.

    Raises:
        UserError: `path` has another ending or a missing folder, or there are no losses.
        BrokenError: metrics.jsonl is damaged.
    """
    path = picture_path(path)
    from matplotlib.figure import Figure

    source = "rows" if isinstance(rows, list) else os.fspath(rows)
    rows = rows if isinstance(rows, list) else read_metrics(Path(rows))
    train, validation = (
        [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        for name in ("train_loss", "val_loss")
    )
    if not train and not validation:
        raise UserError(f"{source}: has no losses to plot; give the metrics.jsonl of a run, or its lines")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    # Distinguishable with any colour vision, and in grey by markers and line width.
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAINING, linewidth=0.8, label="training, single batches")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=VALIDATION, linewidth=2, label="validation")
        step, loss = min(validation, key=lambda point: point[1])
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 10), ha="center", bbox=LABEL)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def advice(rows: list[LogRow]) -> str:
    """One line on what to try next, given the course of the validation loss."""
    losses = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if len(losses) < 2:
        return "Only one evaluation so far: train longer to see a trend."
    (best_step, best), (last_step, last) = min(losses, key=lambda point: point[1]), losses[-1]
    if last > best * 1.005:
        return (
            f"Validation loss has risen since step {best_step}: overfitting. Try more text, model.dropout, "
            f"a smaller model, or {best_step} steps."
        )
    # Settled: less than half a percent below the loss a fifth of the run ago.
    before = [loss for step, loss in losses if step <= 0.8 * last_step] or [losses[0][1]]
    if last < before[-1] * 0.995:
        return f"Still falling: train longer, for example --training.num-steps {2 * last_step}."
    return "The loss has settled: a larger model or more text would take it further."


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Loss in bits per byte of text, which unlike nats per token can be compared between tokenizers.

    Args:
        loss: mean cross-entropy in nats per token.
        num_tokens: tokens of the text.
        num_bytes: bytes of the same text in UTF-8.
    """
    return loss / math.log(2) * num_tokens / num_bytes


def log_row(**values: Any) -> LogRow:
    """A line for the log; floats of NumPy and JAX become Python's."""
    return {name: value if isinstance(value, int | str) else float(value) for name, value in values.items()}
