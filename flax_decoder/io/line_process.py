"""A program in a process of its own that answers each line of JSON with one."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class LineProcess:
    """A Python process with which documents are exchanged. It ends when this one does, as its standard input ends."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, is_quiet: bool = False):
        """Starts Python with these arguments and this environment alone; if quiet, its standard error is dropped."""
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if is_quiet else None,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone
        )

    def exchange(self, request: Any) -> Any:
        """The reply to a request; None if the process has ended instead."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def wait(self) -> int:
        """The exit code of a process that has ended by itself."""
        return self._process.wait()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass
