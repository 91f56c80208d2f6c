"""The exceptions of the package, and the exit code of a command that ends with one."""

import contextlib
import difflib
import errno
import operator
import os
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, get_args

# Errors of a disk or a network, for which nothing that the user gave is to blame.
DEVICE_FAILS = (errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT)
_MAX_REASON_CHARACTERS = 300  # of an error message of a library, which may quote its input


class UserError(ValueError):
    """Invalid input: a setting, a file, a prompt. Exit code 2.

    The message has one or two lines: file, field and value, and what to do.
    """


class FaultError(RuntimeError):
    """A fault during work: the disk, a checkpoint, a loss that is not a number. Exit code 1."""


class BrokenError(FaultError):
    """A damaged file: a bit has changed, or a part is missing. Exit code 1."""


class LostProcessError(RuntimeError):
    """Another process of the job has ended, or no longer answers. Exit code 75."""


class FolderWarning(UserWarning):
    """Something in a model folder that is passed over, and said on one line."""


class InUseError(RuntimeError):
    """Another process uses the run folder. Exit code 73."""


def as_one_line(value: Any) -> str:
    """The beginning of a value, for a message."""
    return f"{' '.join(repr(value).split()):.60}"


# No setting has a longer name; looking for one like it takes time that grows with the square of the length.
MAX_NAME = 100


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near.

    Of SECTION.FIELD, the field must be near, as all fields of a section share its name; in another section it must be
    the same.
    """

    if len(name) > MAX_NAME:
        return ""

    def parts_of(word: str) -> tuple[str, str]:
        section, _, field = word.lstrip("-").replace("_", "-").rpartition(".")
        return section, field

    def likeness(word: str) -> float:
        (section, field), (known_section, known_field) = parts_of(name), parts_of(word)
        whole = difflib.SequenceMatcher(None, name, word).ratio() / 100  # decides between equal fields
        if field == known_field:
            return 1 + whole
        if section not in ("", known_section) or not field:
            return 0
        is_part = known_field.startswith(f"{field}-") or known_field.endswith(f"-{field}")
        return max(difflib.SequenceMatcher(None, field, known_field).ratio(), 0.75 * is_part) + whole

    nearest = max(known, key=likeness, default="")
    return f"; did you mean {nearest}?" if nearest and likeness(nearest) >= 0.75 else ""


def require_type(name: str, value: Any, kind: Any, example: str = "") -> None:
    """Raises UserError unless a value is of a type, or of one of a union; `example` says where to get one."""
    if not isinstance(value, kind):
        wanted = " or ".join(part.__name__ for part in get_args(kind) or (kind,) if part is not NoneType)
        hint = f", {example}" if example else ""
        raise UserError(f"{name} must be of type {wanted}{hint}, not {type(value).__name__}: {as_one_line(value)}")


def as_path(value: Any) -> str:
    """A path as text. Raises UserError if it is none, or is empty."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise UserError(f"the path must be a text or a pathlib.Path, not {type(value).__name__}: {as_one_line(value)}")
    return path


def as_whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number, of Python, NumPy or JAX, as Python's.

    Raises:
        UserError: it is none (2.0 and True are none), below `least` or above `most`.
    """
    limits = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise UserError(f"{name} = {as_one_line(value)} must be a whole number, {limits}")
    return number


@contextlib.contextmanager
def as_user_error(complaint: str) -> Iterator[None]:
    """Turns anything that a library such as `tokenizers` raises into a UserError: the complaint, then the reason."""
    try:
        yield
    except BaseException as error:
        # A panic of its Rust code is not an Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MAX_REASON_CHARACTERS]
        raise UserError(f"{complaint}: {reason}") from None
