"""The standard streams: any text can be printed, control characters have no effect on a terminal, errors are named."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

# C0 except tab and newline, delete, and C1, which some terminals obey as well.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
# Embeddings, overrides and isolates reverse the text around them, so that it reads as another one; and separators of
# lines. The marks of Arabic and Hebrew texts, U+061C, U+200E and U+200F, reverse nothing but themselves.
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*_BIDIRECTIONAL, 0x2028, 0x2029)}


def print_escaped(text: object, *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Prints untrusted text: a prompt, generated text, a message that quotes a file.

    On a terminal a control character is printed as in Python, such as \\x1b for escape: a raw one could clear the
    screen, hide a line or send keys to the shell. So are marks that reverse the text around them.
    A file or a pipe gets the text as it is.
    """
    file = file or sys.stdout
    print(str(text).translate(_ESCAPES) if file.isatty() else text, end=end, file=file, flush=flush)


class Guarded:
    """A stream whose errors go to a function: a full disk, a pipe without a reader, a terminal that is gone."""

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], None]):
        self._stream, self._on_error = stream, on_error

    def write(self, text: str) -> int:
        """Writes a text."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._on_error(error)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self._on_error(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded(stream: TextIO, on_error: Callable[[OSError], None]) -> TextIO:
    """`Guarded`, as the type of `sys.stdout`."""
    return cast(TextIO, Guarded(stream, on_error))


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Prepares the standard streams for a command.

    * A closed one becomes the null device: the next file to be opened would get its number, and with it the messages of
      libraries.
    * A character that the encoding lacks is printed as in Python, such as \\u0434.
    * An OSError of standard output names it. Those of standard error are dropped: there is no place to tell them.
    * What comes through a pipe is UTF-8, as files are.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_nothing()  # which takes the lowest number that is free
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or os.fdopen(_open_nothing(), "r")
    sys.stdout = sys.stdout or os.fdopen(_open_nothing(), "w")
    sys.stderr = sys.stderr or os.fdopen(_open_nothing(), "w")
    opened = [now for now, was in zip((sys.stdin, sys.stdout, sys.stderr), before, strict=True) if was is None]
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # somebody has read from it, who has decided
            sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="strict")
    outputs = sys.stdout, sys.stderr
    for stream in outputs:
        # Other ways to handle errors, which PYTHONIOENCODING may ask for, do not fail.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = guarded(outputs[0], _raise_named), guarded(outputs[1], lambda error: None)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in outputs:
            try:
                stream.flush()
            except OSError:  # Python would try again at exit, complain, and exit with 120
                os.dup2(_open_nothing(), stream.fileno())
        for stream in opened:
            stream.close()


def _open_nothing() -> int:
    return os.open(os.devnull, os.O_RDWR)


def _raise_named(error: OSError) -> None:
    raise OSError(error.errno, error.strerror, "standard output") from None
