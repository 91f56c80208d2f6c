"""A function in a user's Python file. Nothing else in the package runs code that is not its own or installed."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax_decoder.errors import UserError


def function_of(place: str) -> Callable[[], Any]:
    """Runs a Python file, as `python FILE.py` would, and returns a function of it.

    Args:
        place: FILE.py:FUNCTION. The folder of the file comes first in `sys.path`, as it does for a script.

    Returns:
        The function; what it raises is a UserError.

    Raises:
        UserError: there is no such file or function, or the file cannot be run.
    """
    file, colon, name = place.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise UserError(f"--torch {place}: must be FILE.py:FUNCTION, such as my_model.py:make_model")
    if not path.is_file():
        raise UserError(f"--torch {place}: there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_name = path.stem if path.stem not in sys.modules else f"_{path.stem}_of_user"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    with _reported(place, path):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        found = [n for n, value in vars(module).items() if callable(value) and value.__module__ == module_name]
        raise UserError(f"--torch {place}: {path} has no function {name}; it has {', '.join(found) or 'none'}")

    def make() -> Any:
        with _reported(place, path):
            return function()

    return make


@contextmanager
def _reported(place: str, path: Path) -> Iterator[None]:
    """Reports what the user's code raises in two lines, the last line of their file that ran among them."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
        where = f", line {line}" if line else ""
        reason = " ".join(str(error).split())
        raise UserError(f"--torch {place}: failed{where}:\n{type(error).__name__}: {reason:.300}") from None
