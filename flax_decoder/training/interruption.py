"""SIGINT and SIGTERM as a wish that the loop can grant at the end of a step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """While it is entered, the first of the two signals is noted; the second one acts as it would without.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

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
