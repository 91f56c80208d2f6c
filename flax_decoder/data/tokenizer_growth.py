"""How much longer a tokenizer.json may make a text, told before the `tokenizers` library reads it.

A file of a kilobyte can ask for a text of terabytes: nine steps, each of which replaces one letter by twenty. The
library then ends the process. So the bound comes from arithmetic on the steps alone.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax_decoder.errors import UserError

# Known tokenizers reach 330: a map of Unicode (33), a mark for spaces (5), a replacement (2).
_MAX_GROWTH = 400
_MAX_TOKEN_BYTES = 100_000  # the longest known tokens have a thousand, all of them spaces
_MAX_ADDED_BYTES = 100_000_000  # the library normalizes all added tokens at once


def growth_of(document: Mapping[str, Any], source: str, longest: int = 0) -> int:
    """The most bytes that a tokenizer.json makes of one byte of text before it looks for tokens.

    Args:
        document: of a tokenizer.json, not checked.
        source: start of error messages.
        longest: length of the longest token, where the document does not have the vocabulary.

    Raises:
        UserError: texts, or the texts of tokens, become too long.
    """
    growths = []
    for parts, what in (
        (("normalizer", "pre_tokenizer"), "a text"),
        (("post_processor",), "a row of tokens"),
        (("decoder",), "a token"),
    ):
        try:
            growth = math.prod(_growth(document.get(part)) for part in parts)
        except ValueError as error:
            raise UserError(f"{source}: has {error} in its {' or '.join(parts)}; get it again") from None
        if growth > _MAX_GROWTH:
            raise UserError(
                f"{source}: makes {what} up to {growth:.0e} times as long, over the limit of {_MAX_GROWTH:,}; "
                "it is damaged or malicious"
            )
        growths.append(growth)
    text, _, decoded = growths
    added = [len(token) for token in _texts(document.get("added_tokens"))]
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    longest = decoded * max(longest, *map(len, _texts(vocab)), *added, 0)
    if longest > _MAX_TOKEN_BYTES or text * sum(added) > _MAX_ADDED_BYTES:
        raise UserError(
            f"{source}: has tokens that become {max(longest, text * sum(added)):,} characters long; "
            "it is damaged or malicious"
        )
    return text


def _texts(tokens: Any) -> Iterator[str]:
    """The texts of tokens, as all kinds of vocabularies and lists of added tokens have them."""
    for token in tokens if isinstance(tokens, dict | list) else ():
        if isinstance(token, dict):
            token = token.get("content")
        elif isinstance(token, list):
            token = token[0] if token else None
        if isinstance(token, str):
            yield token


def _growth(part: Any, *, is_inner: bool = False) -> int:
    """The product over all steps in a part of the document, the steps in sequences included.

    Raises:
        ValueError: a list stands where the library would take it for a step, without the names of its fields.
    """
    if isinstance(part, list) and not is_inner:
        raise ValueError("a step that is a list")
    product = _growth_of_step(part) if isinstance(part, dict) else 1
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        if product > _MAX_GROWTH:  # the numbers of a long sequence would be long, too
            break
        product *= _growth(inner, is_inner=isinstance(part, dict))
    return product


def _growth_of_step(step: Mapping[str, Any]) -> int:
    """Bytes from one byte, in one step.

    The library takes steps without their "type", too, so their other fields decide what they are. Normal forms of
    Unicode, lower case and spaces around characters are not counted: once done, doing them again changes little.
    """
    match step:
        case {"pattern": dict(pattern), "content": str(content)}:  # Replace
            # A regular expression may match where nothing is, before and behind each character.
            literal = pattern.get("String")
            width = len(literal.encode("utf-8")) if isinstance(literal, str) else 0
            added = len(content.encode("utf-8"))
            return max(1, -(-added // width)) if width else 1 + 2 * added
        case {"prepend": str(text)}:
            return 1 + len(text.encode("utf-8"))
        case {"precompiled_charsmap": str(encoded)}:
            return max(1, *map(len, _replacements(encoded)))
        case {"single": _} | {"pair": _}:  # TemplateProcessing
            tokens = step.get("special_tokens")
            tokens = tokens.values() if isinstance(tokens, dict) else ()
            rows = [token.get("ids") for token in tokens if isinstance(token, dict)]
            pieces = max(_length(step.get("single")), _length(step.get("pair")))
            return max(1, pieces) * max([1, *map(_length, rows)])
        case {"replacement": _} | {"str_rep": _}:  # Metaspace: a mark of four bytes before a word
            return 5
        case {"type": "ByteLevel"} | {"trim_offsets": _} | {"use_regex": _}:  # two for a byte; a space before a word
            return 4
        case {"suffix": ""} | {"word_delimiter_token": ""}:  # a space between all letters
            return 2
    return 1


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _replacements(encoded: str) -> list[bytes]:
    """The texts in a map of sentencepiece, which follow its table."""
    try:
        content = base64.b64decode(encoded)
    except (binascii.Error, ValueError):
        return [b""]
    return content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
