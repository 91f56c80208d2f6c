"""Untrusted text on a terminal: control characters are escaped, so that they have no effect."""

import sys
from typing import TextIO

# C0 except tab and newline, delete, and C1, which some terminals obey as well.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def print_escaped(text: object, *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Prints untrusted text: a prompt, generated text, a message that quotes a file.

    On a terminal a control character is printed as in Python, such as \\x1b for escape: a raw one could clear the
    screen, hide a line or send keys to the shell. A file or a pipe gets the text as it is.

    Args:
        text: what to print.
        end: printed after it.
        file: standard output by default.
        flush: as in `print`.
    """
    file = file or sys.stdout
    print(str(text).translate(_ESCAPES) if file.isatty() else text, end=end, file=file, flush=flush)
