"""Turns SIGINT, SIGTERM and a failing output into a request that the training loop grants at the end of a step."""

import os
import signal
import sys
import threading
from typing import Any, Self

from flax_decoder.io.terminal import guarded, print_escaped
from flax_decoder.parallel.processes import max_over_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which the first of the two signals is noted and the second ends the process at once.

    Python runs its signal handlers between two bytecode instructions, but compiling can be one instruction that takes
    minutes. So a thread listens to the wakeup file descriptor, to which Python's C handler writes at once.

    A standard output that cannot be written counts as SIGPIPE. Nothing is printed any more.

    Attributes:
        signal: the signal that was received, or None.
        output_error: why standard output cannot be written; None if it can, or if its reader has just closed the pipe.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.output_error: OSError | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Whether any process of the job has received a signal; all processes get the same answer."""
        number = max_over_processes(self.signal or 0)
        self.signal = signal.Signals(number) if number else None
        return number > 0

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in SIGNALS:  # the C handler is only installed along with a Python handler
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
        if not isinstance(error, BrokenPipeError):
            self.output_error = self.output_error or error

    def _listen(self, read_end: int) -> None:
        is_second = False
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                if is_second:
                    os._exit(128 + number[0])
                is_second = True
                self._note(number[0])
                name = signal.Signals(number[0]).name
                print_escaped(f"\n{name}: finishing this step and saving; once more to exit at once", flush=True)
