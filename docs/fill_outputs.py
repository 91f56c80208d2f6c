"""Puts what the Python blocks of a page print into the text blocks behind them, so that a page shows what it does.

Run it where the run folders are that the page opens:

    python train.py && python docs/fill_outputs.py docs/tour.md
"""

import contextlib
import io
import re
import sys
from pathlib import Path

# A block of Python and, where there is one, the block directly behind it that says what it printed.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def filled(page: str) -> str:
    """The page with what its blocks print now; they run one after the other and share their names."""
    names: dict[str, object] = {}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], "<page>", "exec"), names)
        lines = "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{lines}```\n" if lines else "")

    return BLOCK.sub(run, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
