"""The progress of reading a large text: a bar in a terminal, a few plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# A smaller text is read in a moment.
_LEAST_BYTES = 50_000_000
_NUM_PLAIN_LINES = 10


class ReadingProgress:
    """Shows bytes, documents, speed and remaining time. It is a `Progress` for `prepare_corpus`."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._bar = Progress(
            TextColumn("reading"),
            DownloadColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=None)
        self._start = time.perf_counter()
        self._num_lines = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, done_bytes: int, all_bytes: int, documents: int) -> None:
        """Moves the bar."""
        if all_bytes < _LEAST_BYTES:
            return
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=done_bytes, total=all_bytes, description=f"{documents:,} documents")
        elif done_bytes * _NUM_PLAIN_LINES // all_bytes > self._num_lines:
            self._num_lines = done_bytes * _NUM_PLAIN_LINES // all_bytes
            seconds = time.perf_counter() - self._start
            speed = done_bytes / seconds
            self._console.print(
                f"read {done_bytes / 1e6:,.0f} of {all_bytes / 1e6:,.0f} MB  {documents:,} documents  "
                f"{speed / 1e6:,.1f} MB/s  {(all_bytes - done_bytes) / speed:,.0f} s left"
            )
