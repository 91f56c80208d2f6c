"""JSON from elsewhere: it means one thing, and what it will cost is known before it is parsed."""

import itertools
import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_decoder.errors import UserError

_DEEPEST = 32  # real files reach 8
# What Python keeps for a list or object, for a name in an object, and for a value, with room to spare.
_BYTES_A_BRACKET, _BYTES_A_COLON, _BYTES_A_COMMA = 90, 160, 60
_NOT_MARKS = bytes(set(range(256)) - set(b'"[]{}'))


@dataclass(frozen=True)
class Limits:
    """How large a kind of file may be; real ones stay well below.

    Attributes:
        num_bytes: of the file.
        memory_bytes: of what is parsed out of it, by an estimate that is rather too high.
        name_characters: of a name in it, which must also be printable; None where names can be any text.
    """

    num_bytes: int
    memory_bytes: int
    name_characters: int | None = 500


SETTINGS = Limits(1_000_000, 20_000_000)
"""config.json and generation_config.json: a few kilobytes in practice."""
LISTING = Limits(5_000_000, 100_000_000)
"""Headers and indices, of some 100 bytes a tensor, and tokenizer_config.json."""
VOCABULARY = Limits(40_000_000, 200_000_000, None)
"""tokenizer.json: 33 MB for the 262,000 tokens of Gemma 3, the largest known."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlist = _short.maxdict = 8
_short.maxlevel = 3
_LONGEST_SHOWN = 400


def shown(value: Any) -> str:
    """A value as a message quotes it: as Python writes it, on one line, and cut short where it is long."""
    text = _short.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def parse_object(content: bytes, source: str, limits: Limits) -> dict[str, Any]:
    """The JSON object in some bytes.

    Args:
        content: UTF-8.
        source: what the message of an error begins with.
        limits: how large it may be.

    Raises:
        UserError: it is not JSON, not an object, too large or too deep, or says something that readers understand
            differently: a name twice, a number that is none, half a surrogate pair.
    """
    _refuse_excess(content, source, limits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = sorted(name for name, _ in pairs)
            twice = next(name for name, following in itertools.pairwise(names) if name == following)
            raise ValueError(f"has the name {shown(twice)} twice")
        if limits.name_characters is not None:
            for name in result:
                if len(name) > limits.name_characters or not name.isprintable():
                    raise ValueError(f"has the name {shown(name)}, which is too long or cannot be printed")
        return result

    try:
        document = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\u" in content:  # the only way to half a surrogate pair
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise UserError(f"{source}: is not valid JSON: {error}; download or write it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{source}: must hold a JSON object, not {type(document).__name__}; download it again")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"has {name} where JSON has no such number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"has the number {shown(text)}, which no float can hold")
    return value


def _refuse_excess(content: bytes, source: str, limits: Limits) -> None:
    """Raises UserError where a document would take too much memory, or is nested too deep. Costs little."""
    if len(content) > limits.num_bytes:
        raise UserError(f"{source}: has {len(content):,} bytes, over the limit of {limits.num_bytes:,}")
    # Brackets, colons and commas in texts count too: this is an upper bound.
    brackets, colons, commas = content.count(b"[") + content.count(b"{"), content.count(b":"), content.count(b",")
    memory_bytes = _BYTES_A_BRACKET * brackets + _BYTES_A_COLON * colons + _BYTES_A_COMMA * commas
    if memory_bytes > limits.memory_bytes:
        raise UserError(
            f"{source}: would take {memory_bytes:,} bytes of memory, over the limit of {limits.memory_bytes:,}: "
            f"{brackets:,} brackets, {colons:,} colons, {commas:,} commas; it is damaged or made to do harm"
        )
    if _depth(content) > _DEEPEST:
        raise UserError(f"{source}: is nested more than {_DEEPEST} levels deep; it is damaged or made to do harm")


def _depth(content: bytes) -> int:
    """How deep lists and objects are nested, in what is JSON at least as far as a parser would read it."""
    # Without escaped quotes, each quote begins or ends a text. Two quotes with no bracket between them can go: what
    # lies outside of texts stays outside.
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(unescaped.translate(None, _NOT_MARKS).replace(b'""', b""), np.uint8)
    is_outside = np.cumsum(marks == ord('"'), dtype=np.int32) % 2 == 0
    opens, closes = (is_outside & np.isin(marks, list(pair)) for pair in (b"[{", b"]}"))
    steps = opens.astype(np.int8) - closes.astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))
