"""The progress of a run on the console: a bar in a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from flax_decoder.training.flops import UNKNOWN
from flax_decoder.training.metrics import LogRow, losses_of_sources

# Lines per run without a terminal, in addition to those of evaluations.
NUM_PLAIN_LINES = 20


class Progress:
    """Shows step, loss, speed and remaining time."""

    def __init__(self, num_steps: int, step: int, tokens_per_step: int, seconds_before: float = 0.0):
        """Starts at `step`, after `seconds_before` of training before the run was resumed."""
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._start = time.perf_counter() - seconds_before
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=num_steps, completed=step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.stop()

    def seconds(self) -> float:
        """Training time since the start of the run, including the time before it was resumed."""
        return time.perf_counter() - self._start

    def update(self, row: LogRow) -> None:
        """Moves the bar to the step of a log line, and prints evaluations (without a terminal, other lines too)."""
        step, tokens_per_second = int(row["step"]), row["tokens_per_second"]
        loss = row["train_loss"] if row["train_loss"] == UNKNOWN else f"{row['train_loss']:.4f}"
        speed = f"{tokens_per_second:,.0f} tokens/s"
        if row["mfu"] != UNKNOWN:
            speed += f"  {row['mfu']:.1%} MFU"
        self._bar.update(self._task, completed=step, description=f"loss {loss}  {speed}")
        line = f"step {step:>{len(str(self._num_steps))}}  loss {loss}"
        if "val_loss" in row:
            bits = row["val_bits_per_byte"]
            each = losses_of_sources(row)
            self._console.print(f"{line}  validation {row['val_loss']:.4f} ({bits:.3f} bits per byte){each}")
        elif not self._console.is_terminal and step % max(self._num_steps // NUM_PLAIN_LINES, 1) == 0:
            left = (self._num_steps - step) * self._tokens_per_step / tokens_per_second
            self._console.print(f"{line}  {speed}  {left:,.0f} s left")
