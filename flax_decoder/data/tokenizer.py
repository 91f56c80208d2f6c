"""Text <-> token ids.

Three kinds: one token a character, one token a byte, or subwords (byte-level BPE trained on the text, or any
tokenizer.json made elsewhere). Each writes a tokenizer.json that the Hugging Face `tokenizers` library reads and that
encodes and decodes the same there. The first two do not need that library, and encode a megabyte in milliseconds.
"""

import contextlib
import json
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from flax_decoder.data.tokenizer_json import byte_characters, byte_document, char_document
from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_named, read_content
from flax_decoder.io.strict_json import VOCABULARY, parse_object, shown

if TYPE_CHECKING:
    import tokenizers

# What `data.tokenizer` may be beside the path of a tokenizer.json.
KINDS = ("char", "byte", "bpe")

_NUM_CODE_POINTS = 0x110000  # all of Unicode
_MAX_TOKENS = 10_000_000  # the largest known vocabularies have 262,000
_LONGEST_REASON = 300  # characters of what the library complains of, which may quote its input

# Names of the tokens that open and close a text, in the tokenizer.json files of well-known models.
_START_TOKENS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_END_TOKENS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>")

# A long text is worked on in pieces: NumPy takes some 20 bytes a character for it, the library some 100 a token.
_PIECE_CHARACTERS = 1_000_000
_CUT_CONTEXT_CHARACTERS = 200  # far longer than any token that a cut after a newline could split
_CUT_TRIES = 100
_LONGEST_TRAINED_WORD = 256  # bytes; training takes time that grows with the square of a word's length


class Tokenizer(ABC):
    """Turns text into token ids and back, so that `decode(encode(text)) == text`.

    Attributes:
        vocab_size: V; ids run from 0 to V - 1.
        start_id: the token that opens a text, where the vocabulary has one.
        end_ids: the tokens that close a text, where the vocabulary has some.
    """

    vocab_size: int
    start_id: int | None = None
    end_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises UserError where the vocabulary cannot express it."""
        return self.encode_array(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued: with what the tokenizer.json puts before a text, such as a start token."""
        return self.encode(text)

    def encode_array(self, text: str, dtype: DTypeLike = np.int32) -> np.ndarray:
        """The same ids as an array of an integer type that holds them all; made for whole corpora.

        Beside text and array, memory holds what encoding a piece of the text takes, however long the text is.
        """
        ids = bytearray()  # it grows where it is, where joining arrays would hold all ids twice
        for piece in self._encode_pieces(text):
            ids += piece.astype(dtype, copy=False).data
        return np.frombuffer(ids, dtype)

    @abstractmethod
    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """The ids of a text, some at a time."""

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of token ids: integers from a list, a generator, or a one-dimensional NumPy or JAX array.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        if hasattr(ids, "__array__"):
            ids = np.asarray(ids)  # one copy from the device, where iterating would make one an element
        is_array = isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"
        array = np.asarray(ids).astype(np.int64) if is_array else np.fromiter(map(operator.index, ids), np.int64)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise ValueError(f"token id {array[outside][0]} is not in the vocabulary: 0 to {self.vocab_size - 1}")
        return self._decode(array)

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """The text of ids that are known to be in the vocabulary."""

    @abstractmethod
    def to_json(self) -> str:
        """The text of the tokenizer.json."""


class CharTokenizer(Tokenizer):
    """One token a character: ids are the ranks of the characters by code point."""

    def __init__(self, text: str):
        """Takes the characters of `text`, each once, as the vocabulary."""
        present = np.zeros(_NUM_CODE_POINTS, bool)  # marking is linear in the text, where sorting is not
        for piece in pieces_of(text):
            present[_code_points(piece)] = True
        self._code_points = np.flatnonzero(present).astype("<u4")
        self.characters = self._code_points.tobytes().decode("utf-32-le", "surrogatepass")
        _utf8(self.characters)
        self.vocab_size = len(self._code_points)
        self._ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
        self._ids[self._code_points] = np.arange(self.vocab_size)

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        start = 0
        for piece in pieces_of(text):
            ids = self._ids[_code_points(piece)]  # one look-up in a table a character
            lacking = ids < 0
            if lacking.any():
                place = start + int(lacking.argmax())
                character, line = text[place], text.count("\n", 0, place) + 1
                raise UserError(
                    f"the text has {character!r} (U+{ord(character):04X}, at character {place}, line {line}), which "
                    f"this char vocabulary of {self.vocab_size} characters lacks;\nuse one of its characters, or train "
                    'with data.tokenizer = "byte"'
                )
            yield ids
            start += len(piece)

    def _decode(self, ids: np.ndarray) -> str:
        return self._code_points[ids].tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        """A WordLevel model whose words are single characters."""
        return json.dumps(char_document(self.characters), ensure_ascii=False)


class ByteTokenizer(Tokenizer):
    """One token a byte of the UTF-8 text. Ids that are no UTF-8 decode to the replacement character U+FFFD."""

    vocab_size = 256

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        return (np.frombuffer(_utf8(piece), np.uint8) for piece in pieces_of(text))

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Byte-level BPE that never merges."""
        return json.dumps(byte_document(), ensure_ascii=False)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: BPE trained here, or any tokenizer.json."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer"):
        """Wraps a tokenizer, which from then on neither cuts nor pads a text."""
        tokenizer.no_truncation()  # a file made for a classifier may cut each text at 512 tokens
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())  # ids may have gaps
        added_tokens = tokenizer.get_added_tokens_decoder()
        special_ids = {token.content: id for id, token in added_tokens.items() if token.special}
        self.start_id = next((special_ids[name] for name in _START_TOKENS if name in special_ids), None)
        self.end_ids = tuple(special_ids[name] for name in _END_TOKENS if name in special_ids)[:1]

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """As the library encodes the text, without the special tokens it may put around it."""
        for piece in pieces_of(text):
            _utf8(piece)
        start = 0
        while start < len(text):
            end = self._find_cut(text, start + _PIECE_CHARACTERS)
            yield np.array(self._encode_piece(text[start:end]), np.int32)
            start = end

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer.encode_prompt`; what the file puts behind a text would end it, and is left out."""
        plain = self.encode(text)
        with _refusing("the tokenizer cannot encode this text"):
            around = self._tokenizer.encode(text, add_special_tokens=True).ids
        starts = range(len(around) - len(plain) + 1)
        start = next((i for i in starts if around[i : i + len(plain)] == plain), 0)
        return around[:start] + plain

    def _encode_piece(self, piece: str) -> list[int]:
        with _refusing("the tokenizer cannot encode this text"):
            return self._tokenizer.encode(piece, add_special_tokens=False).ids

    def _find_cut(self, text: str, earliest: int) -> int:
        """Where, from `earliest` on, the text can be cut with no change to its tokens, at the latest at its end.

        What may happen at a cut depends on the tokenizer (some put a space before each text), so it is tried out with
        some text before and after it.
        """
        for start in range(earliest, len(text), _PIECE_CHARACTERS):
            for cut in _cuts(text, start, start + _PIECE_CHARACTERS):
                before = text[max(cut - _CUT_CONTEXT_CHARACTERS, 0) : cut]
                after = text[cut : cut + _CUT_CONTEXT_CHARACTERS]
                if self._encode_piece(before + after) == self._encode_piece(before) + self._encode_piece(after):
                    return cut
        return len(text)

    def _decode(self, ids: np.ndarray) -> str:
        with _refusing("the tokenizer cannot decode its own tokens"):
            return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        """As the library writes it."""
        return self._tokenizer.to_str()


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of which each may be worked on by itself, as long as only its characters matter."""
    return (text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS))


def _cuts(text: str, start: int, end: int) -> Iterator[int]:
    """Places to try and cut a text at: after its newlines; in long lines before their spaces, else anywhere."""
    for separator, length in (("\n", 1), (" ", 0), ("", 0)):
        place = start
        for _ in range(_CUT_TRIES):
            place = text.find(separator, place, end)
            if place < 0:
                break
            yield place + length
            place += 1


def make_tokenizer(kind: str, text: str, bpe_vocab_size: int) -> Tokenizer:
    """The tokenizer that `data.tokenizer` asks for.

    Args:
        kind: "char", "byte", "bpe", or the path of a tokenizer.json.
        text: what a char vocabulary is collected from and a bpe vocabulary trained on.
        bpe_vocab_size: tokens a bpe tokenizer is trained to have; a short text may give fewer.

    Raises:
        UserError: `kind` is none of these, or the file cannot be used.
    """
    if kind == "char":
        return CharTokenizer(text)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return _train_bpe(text, bpe_vocab_size)
    if not os.path.exists(kind):
        raise UserError(
            f'data.tokenizer = "{kind}": there is no such file; choose "char", "byte", "bpe" or the path of a '
            "tokenizer.json"
        )
    return load_tokenizer(kind)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json: one written by this package, or any that the `tokenizers` library reads.

    Raises:
        UserError: the file is missing or is no tokenizer.json.
    """
    content = read_content(open_named(Path(path)), VOCABULARY.num_bytes, str(path))
    return parse_tokenizer(content, str(path))


def parse_tokenizer(content: bytes, source: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, as `load_tokenizer` gives it.

    Args:
        content: of the file.
        source: what the message of an error begins with.

    Raises:
        UserError: it is not one, is too large, or could mean something else to another reader.
    """
    document = parse_object(content, source, VOCABULARY)
    own = _recognise(document)
    if own is not None:
        return own
    model, added_tokens = document.get("model"), document.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{source}: is not a tokenizer.json: it has no model with a vocab; get it again")
    del document, model  # the library parses it all again
    import tokenizers

    with _refusing(f"{source}: is not a tokenizer.json that the tokenizers library can use"):
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        tokenizer = SubwordTokenizer(library)
        tokenizer.encode_prompt("")  # where a template names tokens that there are none of, it fails only here
        # The library quietly gives another id to an added token whose own is not the next one.
        added = {token["content"]: token["id"] for token in added_tokens}
        wrong = next((token for token, id in added.items() if library.token_to_id(token) != id), None)
    if wrong is not None:
        raise UserError(
            f"{source}: gives the added token {shown(wrong)} the id {shown(added[wrong])}, which does not go with the "
            "vocabulary; get it again"
        )
    if tokenizer.vocab_size > _MAX_TOKENS:
        raise UserError(
            f"{source}: has the token id {tokenizer.vocab_size - 1:,}, but no vocabulary has {_MAX_TOKENS:,} tokens; "
            "it is damaged or made to do harm"
        )
    return tokenizer


@contextlib.contextmanager
def _refusing(complaint: str) -> Iterator[None]:
    """Makes a UserError of anything that the `tokenizers` library raises."""
    try:
        yield
    except BaseException as error:
        # Where its Rust code panics, that is no Exception, and has no name that could be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(f"{complaint}: {reason}") from None


def _recognise(document: Any) -> Tokenizer | None:
    """The fast tokenizer that would write this very document, if there is one."""
    if document == byte_document():
        return ByteTokenizer()
    match document:
        case {"model": {"type": "WordLevel", "vocab": dict(vocab)}}:
            characters = "".join(sorted(vocab))
            if document == char_document(characters):
                return CharTokenizer(characters)
    return None


def _train_bpe(text: str, vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE as in GPT-2. All 256 bytes are tokens, so any text can be encoded, not only the one trained on."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_TRAINED_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, parts])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(byte_characters())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_lines(text), trainer)
    tokenizer.pre_tokenizer = byte_level
    return SubwordTokenizer(tokenizer)


def _lines(text: str) -> Iterator[str]:
    """The same as `text.splitlines(keepends=True)`, a list that can be several times as large as the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1 or len(text)
        yield from text[start:end].splitlines(keepends=True)
        start = end


def _code_points(text: str) -> np.ndarray:
    # Half a surrogate pair passes here, and is then refused like any character that a vocabulary lacks.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text has U+{code:04X}, half a surrogate pair, which is no character; remove it") from None
