"""SIGINT and SIGTERM as a wish that the loop can grant at the end of a step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from flax_decoder.parallel.processes import largest


class Interruption:
    """While it is entered, the first of the two signals is noted; the second one acts as it would without.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def has_come(self) -> bool:
        """Whether a signal has come to this process or, with others in a job, to any: all must stop at one step."""
        number = largest(self.signal or 0)
        self.signal = signal.Signals(number) if number else None
        return number > 0

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        print(f"\n{self.signal.name}: finishing this step and saving; once more to leave at once", flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
