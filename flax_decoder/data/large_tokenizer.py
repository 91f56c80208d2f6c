"""Reads the tokenizer.json of a large vocabulary without making Python objects of its tokens and merges.

They are most of the file, and only the `tokenizers` library uses them. It reads the model first, by itself, which shows
where the model begins and ends; the rest is read as in small files, and bounded before the library sees it.
"""

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_decoder.data.tokenizer_growth import growth_of
from flax_decoder.errors import UserError, as_user_error
from flax_decoder.io.strict_json import LISTING, VOCABULARY, parse_object

if TYPE_CHECKING:
    import tokenizers

COMPLAINT = "is not a tokenizer.json that the tokenizers library can use"
_ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_MIN_BYTES = 4_000_000  # of a file; smaller ones take a fraction of a second all the same
_MODEL = re.compile(rb'"model"\s*:\s*(?=\{)')
_BPE = re.compile(rb'\{\s*"type"\s*:\s*"BPE"')
_VOCAB = re.compile(rb'"vocab"\s*:\s*\{')
_MERGES = re.compile(rb'"merges"\s*:\s*\[')
_ID = re.compile(rb'"\s*:\s*(\d{1,10})(?=\s*[,}])')


def read_large(content: bytes, source: str) -> tuple["tokenizers.Tokenizer", dict[str, Any], int, int] | None:
    """Reads a large tokenizer.json with the layout that the library writes: the model last, of BPE.

    Args:
        content: of the file.
        source: start of error messages.

    Returns:
        The tokenizer, the document without its model, the growth of texts (see `growth_of`), and V; or None if it is
        small, or of another layout, or not to be read.

    Raises:
        UserError: texts would become too long, or what surrounds the model is no JSON.
    """
    found = _MODEL.search(content) if len(content) >= _MIN_BYTES else None
    end = content.rfind(b"}", 0, content.rfind(b"}")) + 1
    if found is None or not _BPE.match(content, found.end()) or len(content) > VOCABULARY.num_bytes:
        return None
    start = found.end()
    from tokenizers import AddedToken, Tokenizer, models

    model = models.BPE()
    try:
        with as_user_error(source):
            model.__setstate__(content[start:end])  # fails unless this is one JSON object, and nothing more
    except UserError:
        return None
    document = parse_object(content[:start] + b"{}" + content[end:], source, LISTING)
    if document.get("model") != {}:
        return None  # it was the model of something inside
    merges = _MERGES.search(content, start)
    if merges and _VOCAB.search(content, merges.end()):
        return None  # the library writes the vocabulary before them
    vocab = content[start : merges.start() if merges else end]
    growth = growth_of(document, source, _longest_string(vocab))
    added = document.get("added_tokens") or []
    if not all(isinstance(token, dict) and token.keys() == _ADDED for token in added):
        return None
    rest = document | {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    with as_user_error(f"{source}: {COMPLAINT}"):
        library = Tokenizer.from_str(json.dumps(rest))
        library.model = model
        tokens = [AddedToken(**{name: value for name, value in token.items() if name != "id"}) for token in added]
        for is_special, group in itertools.groupby(tokens, lambda token: token.special):
            (library.add_special_tokens if is_special else library.add_tokens)([*group])
    return library, document, growth, _vocab_size(library, vocab)


def _longest_string(text: bytes) -> int:
    """An upper bound, in bytes: quotes inside of strings have a backslash before them, and do not count as an end."""
    numbers = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(numbers == ord('"'))
    quotes = quotes[numbers[quotes - 1] != ord("\\")]
    return int(np.diff(quotes, append=len(text)).max(initial=0))


def _vocab_size(library: "tokenizers.Tokenizer", vocab: bytes) -> int:
    """One more than the largest id; asking the library for all of them takes long, so first the text is looked at."""
    size: int = library.get_vocab_size()
    ids = max(map(int, _ID.findall(vocab)), default=0)
    added = max(library.get_added_tokens_decoder(), default=0)
    if max(ids, added) == size - 1 and library.id_to_token(size - 1) is not None:
        return size
    return 1 + max(library.get_vocab().values())
