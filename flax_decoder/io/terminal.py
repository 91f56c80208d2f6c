"""Text from elsewhere, on a terminal: control characters in it are shown, so that they command nothing."""

import sys
from typing import TextIO

# All but newline and tab: C0 with the escape character, delete, and C1, which some terminals obey as well.
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)]
_SHOWN = {code: f"\\x{code:02x}" for code in _CONTROLS}


def print_escaped(text: object, *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Prints a text that is not only ours: a prompt, what a model wrote, a message that quotes a file.

    On a terminal a control character shows as Python writes it, such as \\x1b for escape: a bare one could clear the
    screen, hide a line or send keys to the shell. Into a file or a pipe the text goes as it is.

    Args:
        text: what to print.
        end: what to print after it.
        file: where to; standard output if left out.
        flush: does not wait for more.
    """
    file = file or sys.stdout
    print(str(text).translate(_SHOWN) if file.isatty() else text, end=end, file=file, flush=flush)
