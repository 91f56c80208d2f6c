"""A tokenizer.model of the `sentencepiece` library: read without that library, and without trust.

It is a message of protocol buffers: fields, each with a number and a value
(https://protobuf.dev/programming-guides/encoding). The numbers are those of sentencepiece_model.proto.
"""

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from flax_decoder.errors import UserError

MAX_BYTES = 20_000_000  # of a file; the largest known have 4 MB, for 256,000 tokens
_MAX_PIECES = 1_000_000
_MAX_PIECE_CHARACTERS = 100  # of a token; sentencepiece's own limit is 16, which some models raise
_BPE = 2  # TrainerSpec.model_type
_MAX_SHIFT = 63  # of a number, in bits
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Piece:
    """A token: its text, how early it is merged (larger is earlier), and one of the kinds above."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        pieces: the tokens; their places are the ids.
        is_bpe: tokens are merged pair by pair.
        has_bytes: what is no token becomes tokens for its bytes.
        begins_with_space: a space is put before each text.
        is_plain: nothing else is done to a text.
    """

    pieces: tuple[Piece, ...]
    is_bpe: bool
    has_bytes: bool
    begins_with_space: bool
    is_plain: bool


def parse_sentencepiece(content: bytes, source: str) -> SentencePieceModel:
    """Reads a tokenizer.model.

    Args:
        content: of the file, of at most `MAX_BYTES`.
        source: start of error messages.

    Raises:
        UserError: it is not such a file.
    """
    try:
        fields = list(itertools.islice(_fields(content), _MAX_PIECES))
        pieces = tuple(_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
        trainer, normalizer, denormalizer = (_last(fields, number) for number in (2, 3, 5))
    except (ValueError, struct.error) as error:
        raise UserError(f"{source}: is not a file of sentencepiece: {error}; get it again") from None
    if not 0 < len(pieces) < _MAX_PIECES:
        raise UserError(f"{source}: is not a file of sentencepiece: it has {len(pieces):,} tokens; get it again")
    escapes, strips, words_end = normalizer.get(5, 1), normalizer.get(4, 1), trainer.get(24, 0)
    maps = normalizer.get(2) or normalizer.get(6) or denormalizer.get(2) or denormalizer.get(6)
    return SentencePieceModel(
        pieces,
        is_bpe=trainer.get(3, 1) == _BPE,
        has_bytes=bool(trainer.get(35, 0)),
        begins_with_space=bool(normalizer.get(3, 1)),
        is_plain=bool(escapes) and not (strips or words_end or maps),
    )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise ValueError("a token has another form")
    piece = Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)
    if not math.isfinite(piece.score) or len(piece.text) > _MAX_PIECE_CHARACTERS:
        raise ValueError(f"a token has the score {piece.score} and {len(piece.text):,} characters")
    return piece


def _last(fields: list[tuple[int, int | bytes]], wanted: int) -> dict[int, int | bytes]:
    """The fields of an inner message; empty without one."""
    content = dict(fields).get(wanted, b"")
    return dict(_fields(content)) if isinstance(content, bytes) else {}


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value, where floats stay bytes. Raises ValueError if it is none."""
    at = 0
    while at < len(content):
        key, at = _number(content, at)
        match key & 7:
            case 0:
                value, at = _number(content, at)
                yield key >> 3, value
                continue
            case 1:
                length = 8
            case 2:
                length, at = _number(content, at)
            case 5:
                length = 4
            case kind:
                raise ValueError(f"a field of kind {kind}")
        if at + length > len(content):
            raise ValueError("it is cut off")
        yield key >> 3, content[at : at + length]
        at += length


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place after it."""
    number = 0
    for shift in range(0, _MAX_SHIFT + 1, 7):
        if at == len(content):
            raise ValueError("it is cut off")
        number |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return number, at
    raise ValueError("a number of more than 64 bits")
