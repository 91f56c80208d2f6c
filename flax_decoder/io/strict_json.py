"""JSON from untrusted files: bounded in size and depth before it is parsed, and with only one possible meaning."""

import itertools
import json
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any

from flax_decoder.errors import UserError

MAX_DEPTH = 32  # real files reach 8
# What CPython allocates for a list or object, for a name in an object, and for a value, rounded up.
_BYTES_PER_BRACKET, _BYTES_PER_COLON, _BYTES_PER_COMMA = 90, 160, 60
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
_DEPTH_CHANGE = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one kind of file, well above real files."""

    num_bytes: int  # of the file
    memory_bytes: int  # of the parsed document, estimated from above
    name_characters: int | None = 500  # of a name, which must also be printable; None allows any name


SETTINGS = Limits(1_000_000, 20_000_000)
"""config.json and generation_config.json: a few kilobytes in practice."""
LISTING = Limits(5_000_000, 100_000_000)
"""Headers and indices, of some 100 bytes per tensor, and tokenizer_config.json."""
VOCABULARY = Limits(40_000_000, 250_000_000, None)
"""tokenizer.json: 33 MB for the 262,000 tokens of Gemma 3; 245 MB of memory for a token per character of Unicode."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlist = _short.maxdict = 8
_short.maxlevel = 3
_MAX_SHOWN_CHARACTERS = 400


def shown(value: Any) -> str:
    """The repr of a value for a message: on one line, and shortened if it is long."""
    text = _short.repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[: _MAX_SHOWN_CHARACTERS - 3] + "..."


def parse_object(
    content: bytes, source: str, limits: Limits, advice: str = "download or write it again"
) -> dict[str, Any]:
    """Parses a JSON object in UTF-8; messages begin with `source` and end with `advice`.

    Raises:
        UserError: not JSON, not an object, too large, too deep, or ambiguous between parsers: a repeated name, NaN, a
            number outside of float64, half a surrogate pair.
    """
    if (excess := excess_of(content, limits)) is not None:
        raise UserError(f"{source}: {excess}; it is damaged or malicious")
    if _depth(content) > MAX_DEPTH:
        raise UserError(f"{source}: is nested more than {MAX_DEPTH} levels deep; it is damaged or malicious")

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
            content.decode("utf-8"), object_pairs_hook=unique, parse_constant=_finite, parse_float=_finite
        )
        if _SURROGATE.search(content):  # the only way to write half a surrogate pair
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise UserError(f"{source}: is not valid JSON: {error}; {advice}") from None
    if not isinstance(document, dict):
        raise UserError(f"{source}: must hold a JSON object, not {type(document).__name__}; {advice}")
    return document


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999, or NaN and Infinity, which Python would accept
        raise ValueError(f"has the number {shown(text)}, which is not finite")
    return value


def excess_of(content: bytes, limits: Limits) -> str | None:
    """What is too large in the content of a JSON file, for a message; None if nothing is."""
    if len(content) > limits.num_bytes:
        return f"has {len(content):,} bytes, over the limit of {limits.num_bytes:,}"
    # Those inside of strings count too: this is an upper bound.
    brackets, colons, commas = content.count(b"[") + content.count(b"{"), content.count(b":"), content.count(b",")
    memory_bytes = _BYTES_PER_BRACKET * brackets + _BYTES_PER_COLON * colons + _BYTES_PER_COMMA * commas
    if memory_bytes > limits.memory_bytes:
        return (
            f"would take {memory_bytes:,} bytes of memory, over the limit of {limits.memory_bytes:,}: "
            f"{brackets:,} brackets, {colons:,} colons, {commas:,} commas"
        )
    return None


def _depth(content: bytes) -> int:
    """The nesting depth of lists and objects, in JSON up to its first error."""
    # Without escaped quotes, each quote begins or ends a string. Dropping two quotes with no bracket in between changes
    # nothing about which brackets are outside of strings, and leaves little to split.
    marks = content.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_MARKS).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    return max(itertools.accumulate(map(_DEPTH_CHANGE.__getitem__, outside)), default=0)
