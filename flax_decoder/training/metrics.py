"""The log of a run: metrics.jsonl, the loss curve, and on request TensorBoard and Weights & Biases."""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flax_decoder.config import RunConfig
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import flush, make_folder, open_regular, without_links, write_text
from flax_decoder.io.strict_json import Limits, parse_object, shown
from flax_decoder.io.terminal import print_escaped
from flax_decoder.lens.pictures import picture_path, save_picture
from flax_decoder.training.flops import UNKNOWN
from flax_decoder.training.run_id import new_id, read_id

LOG = "metrics.jsonl"
# A line of the log: names and numbers, or "unknown".
LogRow = dict[str, Any]
# A line has some 400 bytes.
_LINE = Limits(100_000, 2_000_000)
_ADVICE = "repair or delete the line"
# What others compute with; each may else be a word, as "unknown" is.
_NUMBERS = ("step", "val_loss", "val_bits_per_byte", "seconds")
_MAX_NUMBER = 1e100  # far beyond float32 and any count of tokens, and still a number that can be plotted
# Blue and vermilion of Okabe and Ito's palette.
TRAINING, VALIDATION = "#0072b2", "#d55e00"


class MetricsLog:
    """Appends lines to metrics.jsonl, one JSON object each; `rows` are all so far, those before a resume too.

    Set `folder` where the run folder has been renamed.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int, run_id: str | None = None, *, writes: bool = True):
        """Opens the log of a run at `step`; lines of later steps, which will be repeated, are dropped.

        Only one process of a job writes; the others keep their lines in memory. A line says so if there is none of the
        checkpoint of `step`.

        Raises:
            BrokenError: the file cannot be read, or a line that is kept is damaged.
        """
        self.folder = folder
        self._stamp = {} if run_id is None else {"run_id": run_id}
        self._writes = writes
        rows, last_step = _rows_until(self._path, step, run_id)
        self._reporters = open_reporters(config, folder, step, last_step) if writes else []
        self.rows = rows
        if writes:
            if step > 0 and (not rows or rows[-1]["step"] < step):
                print_escaped(f"warning: {self._path}: {lost_line(step)}", file=sys.stderr)
            write_text(self._path, "".join(map(self._line, self.rows)))

    @property
    def _path(self) -> Path:
        return self.folder / LOG

    def _line(self, row: LogRow) -> str:
        return json.dumps(row | self._stamp) + "\n"

    def add(self, row: LogRow) -> None:
        """Writes a line to disk, and its known numbers to the other reporters, of which one that fails is switched off.

        Raises:
            FaultError: the line cannot be written to disk.
        """
        self.rows.append(row)
        if self._writes:
            try:
                with open(self._path, "a", encoding="utf-8", opener=without_links) as file:
                    file.write(self._line(row))
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
        return float(self.rows[-1].get("seconds", 0)) if self.rows else 0.0


def flush_log(folder: Path) -> None:
    """Waits until the lines of a run's log are on disk, if it has one: a checkpoint needs those before it."""
    with contextlib.suppress(FileNotFoundError), open_regular(folder / LOG, follow_links=False) as file:
        flush(file)


def lost_line(step: int) -> str:
    """What is said where the log lacks the line that was written before the checkpoint of a step."""
    return f"has no line of step {step}, of which there is a checkpoint: lines are lost, but training can go on"


def _rows_until(path: Path, step: int, run_id: str | None) -> tuple[list[LogRow], int]:
    """The lines up to a step, and the step of the last one that can be read.

    Later lines were perhaps not on disk yet when the power went: as they are written again, damage in them is nothing.
    """
    rows, last_step = [], 0
    try:
        for row in metrics_rows(path, run_id):
            last_step = max(last_step, row["step"])
            if row["step"] <= step:
                rows.append(row)
    except BrokenError as error:
        if last_step < step or isinstance(error.__cause__, OSError):  # it cannot be read at all
            raise
    return rows, last_step


def evaluations_since_best(rows: Sequence[LogRow]) -> int:
    """The number of evaluations after that of the lowest validation loss, the first of equal ones."""
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def read_metrics(path: Path) -> list[LogRow]:
    """The lines of a metrics.jsonl, as `metrics_rows`."""
    return list(metrics_rows(path))


def metrics_rows(path: Path, run_id: str | None = None) -> Iterator[LogRow]:
    """Yields the lines of a metrics.jsonl, without a last one cut short by a crash; none if there is no file.

    Each says in the file which run it is of, which is left out; lines of earlier versions do not.

    Raises:
        BrokenError: the file cannot be read, or a line is damaged, or of another run than that of a given id.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE.num_bytes + 1), b""), start=1):
                if line.endswith(b"\n") or len(line) > _LINE.num_bytes:
                    row = _row_of(line, f"{path}: line {number}")
                    written_by = row.pop("run_id", run_id)
                    if run_id is not None and written_by != run_id:
                        raise UserError(f"{path}: line {number}: is of another run, {shown(written_by)}; {_ADVICE}")
                    yield row
    except FileNotFoundError:
        return
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read: {error.strerror}; repair or delete it") from error
    except UserError as error:
        raise BrokenError(str(error)) from None


def _row_of(line: bytes, source: str) -> LogRow:
    """The content of a line, with which the rest of this module can compute; raises UserError."""
    row = parse_object(line, source, _LINE, _ADVICE)
    for name, value in row.items():
        is_word = isinstance(value, str) and name.partition("/")[0] not in _NUMBERS
        if not is_word and not (type(value) in (int, float) and abs(value) <= _MAX_NUMBER):
            raise UserError(f"{source}: {name} = {shown(value)} is not a number of a run; {_ADVICE}")
    if type(row.get("step")) is not int or row["step"] < 0:
        raise UserError(f"{source}: step = {shown(row.get('step'))} must be a whole number, 0 or more; {_ADVICE}")
    if ("val_loss" in row) != ("val_bits_per_byte" in row):
        raise UserError(f"{source}: has only one of val_loss and val_bits_per_byte; {_ADVICE}")
    return row


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


def open_reporters(config: RunConfig, folder: Path, step: int, last_step: int) -> list[Callable[[LogRow], None]]:
    """A function per reporter in the config, to be called with each line; one that cannot be opened is left out.

    The run continues at `step`; lines up to `last_step` come again, if it was killed after later ones.

    Raises:
        BrokenError: the id of the run at a reporter cannot be read.
    """
    reporters: list[Callable[[LogRow], None]] = []
    for name, is_on, open_reporter in (
        ("tensorboard", config.tensorboard, lambda: _open_tensorboard(folder, step)),
        ("wandb", config.wandb is not None, lambda: _open_wandb(config, folder, last_step)),
    ):
        try:
            if is_on:
                reporters.append(open_reporter())
        except (FaultError, UserError):
            raise
        except Exception as error:  # of another library: of any kind
            _tell_switched_off(name, error)
    return reporters


def _open_tensorboard(folder: Path, step: int) -> Callable[[LogRow], None]:
    # Not its SummaryWriter, whose thread writes later: where the disk is full, it ends with a traceback, and the
    # training then waits for it for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    events = folder / "tensorboard"
    make_folder(events)
    writer = EventsWriter(os.fspath(events / "events"))
    # TensorBoard then forgets the lines that come again.
    start = SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def to_tensorboard(row: LogRow) -> None:
        for name, value in row.items():
            writer.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=scalar(name, value)))
        writer.flush()

    return to_tensorboard


def _open_wandb(config: RunConfig, folder: Path, last_step: int) -> Callable[[LogRow], None]:
    import wandb

    id = read_id(folder / "wandb_id", "delete it to begin a new chart")
    is_known = id is not None
    if id is None:  # not the name of the folder: ids are those of a whole project
        id = new_id()
        write_text(folder / "wandb_id", id + "\n")
    run = wandb.init(project=config.wandb, name=folder.name, id=id, dir=folder, resume="allow")
    # The server knows which steps it has and drops those that come again; without it, none may come again.
    num_sent = last_step if is_known and run.offline else 0

    def to_wandb(row: LogRow) -> None:
        if row["step"] > num_sent:
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
        best = min(loss for _, loss in validation)
        label = f"validation, {best:.3f} at best"
        axes.plot(*zip(*validation, strict=True), "o-", color=VALIDATION, linewidth=2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)  # above the axes, where it covers no curve
    save_picture(figure, path)


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """A loss in nats per token as bits per byte of the text in UTF-8, which can be compared between tokenizers."""
    return loss / math.log(2) * num_tokens / num_bytes


def losses_of_sources(row: LogRow) -> str:
    """The validation loss of each source of a mixture, to be put behind that of all; nothing of other runs."""
    losses = [(name.partition("/")[2], loss) for name, loss in row.items() if name.startswith("val_loss/")]
    return f": {', '.join(f'{name} {loss:.4f}' for name, loss in losses)}" if losses else ""


def log_row(**values: Any) -> LogRow:
    """A line for the log; floats of NumPy and JAX become Python's."""
    return {name: value if isinstance(value, int | str) else float(value) for name, value in values.items()}
