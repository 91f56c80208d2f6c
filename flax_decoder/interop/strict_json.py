"""JSON that means one thing: no name twice, and an object at the top."""

import json
from pathlib import Path
from typing import Any

from flax_decoder.errors import UserError


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    Args:
        content: UTF-8.
        source: what the message of an error begins with.

    Raises:
        UserError: it is not JSON, not an object, or has a name twice, of which readers keep one or the other.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f'has the name "{twice}" twice')
        return result

    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not valid JSON: {error}; download or write it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{source}: must hold a JSON object, not {type(document).__name__}")
    return document


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError as `parse_object`, or where the file cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_object(content, str(path))
