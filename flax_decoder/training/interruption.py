"""What makes the training loop stop at the end of a step: a signal, a failing output, a run folder that was renamed."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from flax_decoder.io.place import Place
from flax_decoder.io.terminal import guarded, print_escaped
from flax_decoder.parallel.processes import ask_largest, broadcast_path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Stands for a run folder that was renamed; above all signals.
_RENAMED = 1000


class Writer(Protocol):
    """What writes into a run folder."""

    folder: Path


class Interruption:
    """A context in which the first signal is noted and the second ends the process at once.

    Python runs its signal handlers between two bytecode instructions, but compiling can be one instruction that takes
    minutes. So a thread listens to the wakeup file descriptor, to which Python's C handler writes at once.

    A terminal that is closed may send SIGHUP several times, so that is never taken for a second signal. With nohup it
    stays ignored.

    A standard output that cannot be written counts as SIGPIPE. Nothing is printed any more.

    A run folder that is renamed takes its writers along, for the last line and the last checkpoint: another run may
    begin at its path.

    """

    def __init__(self, place: Place | None = None) -> None:
        """Watches a run folder, in the process that has its lock; in others `place` is None."""
        self.place = place
        self.signal: signal.Signals | None = None  # that was received
        self.renamed: Path | None = None  # where the run folder is now, if it was renamed
        self.writers: list[Writer] = []
        self.output_error: OSError | None = None  # of standard output, but not that its reader has closed the pipe
        self._handlers_before: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Whether any process of the job is to stop; all processes get the same answer. Call it before each write.

        Raises:
            FaultError: the run folder has been deleted, or moved to where it cannot be found.
        """
        return self.ask()()

    def ask(self) -> Callable[[], bool]:
        """Begins to ask; what it returns waits for the answer, as `requested`. See `processes.ask_largest`."""
        largest = ask_largest(self._own_answer)
        return lambda: self._note_answer(largest())

    def _own_answer(self) -> int:
        stays = self.place is None or self.place.is_here()
        return (self.signal or 0) if stays else _RENAMED

    def _note_answer(self, number: int) -> bool:
        if number == _RENAMED:
            self.renamed = broadcast_path(self.place.find if self.place is not None else None)
            for writer in self.writers:
                writer.folder = self.renamed
        else:
            self.signal = signal.Signals(number) if number else None
        return number > 0

    def folder(self, otherwise: Path) -> Path:
        """Where the run folder is now, in the process that has its lock; in others `otherwise`."""
        return otherwise if self.place is None else self.place.find()

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in SIGNALS:  # the C handler is only installed along with a Python handler
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._handlers_before[number] = signal.signal(number, lambda number, frame: self._note(number))
        self._thread = threading.Thread(target=self._listen, args=(read_end,), daemon=True)
        self._thread.start()
        self._stdout_before = sys.stdout
        sys.stdout = guarded(sys.stdout, self._note_output_error)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        sys.stdout = self._stdout_before
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # which ends the thread
        self._thread.join()

    def _note(self, number: int) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _note_output_error(self, error: OSError) -> None:
        self._note(signal.SIGPIPE)
        if self.signal == signal.SIGHUP:  # the terminal is gone
            return
        if not isinstance(error, BrokenPipeError):
            self.output_error = self.output_error or error

    def _listen(self, read_end: int) -> None:
        is_second = False
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS or (is_second and number[0] == signal.SIGHUP):
                    continue
                if is_second:
                    os._exit(128 + number[0])
                is_second = True
                self._note(number[0])
                name = signal.Signals(number[0]).name
                print_escaped(f"\n{name}: finishing this step and saving; once more to exit at once", flush=True)
