"""The texts of special tokens in a model folder: tokenizer_config.json, then special_tokens_map.json."""

import os
from pathlib import Path
from typing import Any

from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import LISTING, parse_object


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty without one. Raises UserError if it cannot be used."""
    return _read_object(folder, "tokenizer_config.json")


def read_special_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name, such as "eos_token" -> "</s>".

    Args:
        folder: of a model.
        tokenizer_config: from `read_tokenizer_config`; a token in it counts before one in special_tokens_map.json.

    Raises:
        UserError: special_tokens_map.json cannot be used.
    """
    return _texts(_read_object(folder, "special_tokens_map.json")) | _texts(tokenizer_config)


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not os.path.lexists(path):
        return {}
    return parse_object(read_content(open_inside(folder, name), LISTING.num_bytes, str(path)), str(path), LISTING)


def _texts(document: dict[str, Any]) -> dict[str, str]:
    """Tokens are texts, or objects with a text and how to look for it."""
    values = {name: value for name, value in document.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
