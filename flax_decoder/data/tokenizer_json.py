"""The tokenizer.json of char and byte vocabularies, with all fields that the `tokenizers` library writes.

A file that the library has read and saved is therefore still recognized.
"""

import itertools
from collections.abc import Iterator
from typing import Any


def char_document(characters: str) -> dict[str, Any]:
    """The tokenizer.json of a char vocabulary.

    Its unknown token is not in the vocabulary, so the library refuses an unknown character, as CharTokenizer does.
    """
    vocab = {character: rank for rank, character in enumerate(characters)}
    return tokenizer_document(
        model={"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        pre_tokenizer={"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        decoder={"type": "Fuse"},
    )


def byte_document() -> dict[str, Any]:
    """The tokenizer.json of the byte vocabulary."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(byte_characters())},
        "merges": [],
    }
    return tokenizer_document(model, pre_tokenizer=byte_level, decoder=byte_level)


def tokenizer_document(
    model: dict[str, Any],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    added_tokens: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A tokenizer.json of its parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens or [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def byte_characters() -> Iterator[str]:
    """The characters for the bytes 0 to 255 in GPT-2's files: visible Latin-1 itself, the others U+0100, U+0101, ..."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return (chr(byte if byte in visible else next(others)) for byte in range(0x100))
