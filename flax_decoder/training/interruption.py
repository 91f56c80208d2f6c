"""SIGINT and SIGTERM as a wish that the loop can grant at the end of a step."""

import os
import signal
import threading
from types import TracebackType
from typing import Any, Self

from flax_decoder.parallel.processes import max_over_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, the first of the two signals is noted; the second one ends the process at once.

    Python calls its handlers between two lines of Python, and compiling or a long evaluation is one line. So a thread
    listens: it hears of a signal from the handler below Python, whatever the main thread is at.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._heard = False

    def has_come(self) -> bool:
        """Whether a signal has come to this process or, with others in a job, to any: all must stop at one step."""
        number = max_over_processes(self.signal or 0)
        self.signal = signal.Signals(number) if number else None
        return number > 0

    def __enter__(self) -> Self:
        listen, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._wakeup_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        for number in SIGNALS:  # without a handler in Python the one below it would not be there
            self._before[number] = signal.signal(number, lambda number, frame: self._note(number))
        self._thread = threading.Thread(target=self._listen, args=(listen,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._tell)  # which ends the thread
        self._thread.join()

    def _note(self, number: int) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _listen(self, listen: int) -> None:
        with os.fdopen(listen, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                if self._heard:
                    os._exit(128 + number[0])
                self._heard = True
                self._note(number[0])
                name = signal.Signals(number[0]).name
                print(f"\n{name}: finishing this step and saving; once more to leave at once", flush=True)
