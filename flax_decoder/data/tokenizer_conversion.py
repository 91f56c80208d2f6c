"""The tokenizer.json of a model folder that has older files in its place.

Only what can be said exactly is converted: the byte-level BPE of GPT-2 and Qwen2 (`vocab.json` and `merges.txt`), and
the BPE of sentencepiece as Mistral has it (`tokenizer.model`), which encodes each text between special tokens as the
`sentencepiece` library does.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_decoder.data.sentencepiece_file import BYTE, CONTROL, MAX_BYTES, NORMAL, UNKNOWN, Piece, parse_sentencepiece
from flax_decoder.data.special_tokens import read_special_tokens, read_tokenizer_config
from flax_decoder.data.tokenizer_json import tokenizer_document
from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import VOCABULARY, parse_object, shown

_VOCAB, _MERGES, _SENTENCEPIECE, _ADDED = "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"
_GPT2, _QWEN2, _LLAMA = "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"
# The class of a tokenizer where tokenizer_config.json names none.
_CLASSES = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "phi", "codegen", "starcoder2", "jais2", "opt"), _GPT2),
    **dict.fromkeys(("qwen2", "qwen3"), _QWEN2),
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
}
# Classes that encode as another one does.
_SAME = {"CodeGenTokenizer": _GPT2}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARK = "\u2581"  # sentencepiece's sign for a space
_END = "<|endoftext|>"
# The special tokens that a class has where nothing names others.
_DEFAULTS = {
    _GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END),
    _QWEN2: dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END),
    _LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def convert_tokenizer(folder: Path, model_type: str | None) -> tuple[dict[str, Any], Path] | None:
    """The document of the tokenizer.json that a folder does not have, and the file that it is made from.

    Args:
        folder: of a model.
        model_type: of its config.json.

    Returns:
        None if there are no other files, or none from which it can be told exactly.

    Raises:
        UserError: one of the files is damaged.
    """
    settings = read_tokenizer_config(folder)
    given = settings.get("tokenizer_class")
    name = given.removesuffix("Fast") if isinstance(given, str) else _CLASSES.get(model_type or "")
    name = _SAME.get(name or "", name)
    has = {name: os.path.lexists(folder / name) for name in (_VOCAB, _MERGES, _SENTENCEPIECE)}
    document: dict[str, Any] | None
    if name in (_GPT2, _QWEN2) and has[_VOCAB] and has[_MERGES]:
        document, path = _byte_level(folder, name, settings), folder / _VOCAB
    elif name == _LLAMA and has[_SENTENCEPIECE]:
        document, path = _sentencepiece(folder, settings), folder / _SENTENCEPIECE
    else:
        return None
    special = _DEFAULTS[name] | read_special_tokens(folder, settings)
    document = document and _with_special_tokens(document, folder, settings, special)
    return None if document is None else (document, path)


def _byte_level(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    vocab = _read_ids(folder, _VOCAB)
    byte_level = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space") is True}
    byte_level |= {"trim_offsets": True, "use_regex": name == _GPT2}
    words = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    return tokenizer_document(
        _bpe(vocab, _read_merges(folder, vocab)),
        normalizer={"type": "NFC"} if name == _QWEN2 else None,
        pre_tokenizer=byte_level if name == _GPT2 else {"type": "Sequence", "pretokenizers": [words, byte_level]},
        decoder={**byte_level, "add_prefix_space": True, "use_regex": True},
    )


def _read_ids(folder: Path, name: str) -> dict[str, int]:
    """The ids of tokens in a JSON file."""
    ids = parse_object(_content(folder, name), str(folder / name), VOCABULARY)
    for text, id in ids.items():
        if type(id) is not int:
            raise UserError(f"{folder / name}: {shown(text)} = {shown(id)} must be a token id; get it again")
    return ids


def _read_merges(folder: Path, vocab: Mapping[str, Any]) -> list[list[str]]:
    path = folder / _MERGES
    try:
        lines = _content(folder, _MERGES).decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text; get it again") from None
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"{path}: line {number}, {shown(line)}, is no pair of tokens of {_VOCAB}; get both again")
        merges.append(pair)
    return merges


def _sentencepiece(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """None of other kinds of models, and of what later versions of the class do after special tokens.

    Whether a text begins with the start token, they also answer differently where the settings do not.
    """
    path = folder / _SENTENCEPIECE
    model = parse_sentencepiece(_content(folder, _SENTENCEPIECE, MAX_BYTES), str(path))
    kinds = {piece.kind for piece in model.pieces}
    normal = [(id, piece) for id, piece in enumerate(model.pieces) if piece.kind == NORMAL]
    is_ordered = len({piece.score for _, piece in normal}) == len(normal)
    is_known = model.is_bpe and model.is_plain and model.has_bytes and model.begins_with_space and is_ordered
    as_ever = settings.get("add_prefix_space") in (None, True) and settings.get("legacy") in (None, True)
    as_ever = as_ever and type(settings.get("add_bos_token")) is bool
    if not (is_known and as_ever and kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}):
        return None
    vocab = {piece.text: id for id, piece in enumerate(model.pieces)}
    if len(vocab) < len(model.pieces):
        raise UserError(f"{path}: lists a token twice; get it again")
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    as_spaces = {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [as_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    controls = [piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)]
    return tokenizer_document(
        _bpe(vocab, _merges_of(normal), unk_token=unknown, fuse_unk=True, byte_fallback=True),
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _MARK}, replaced]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        added_tokens=[_added(vocab[text], text, special=True) for text in controls],
    )


def _merges_of(normal: Iterable[tuple[int, Piece]]) -> list[list[str]]:
    """The pairs that become a token, in the order in which sentencepiece merges them: by the score of the token."""
    pieces = sorted(normal, key=lambda numbered: (-numbered[1].score, numbered[0]))
    texts = {piece.text for _, piece in pieces}
    return [
        [piece.text[:cut], piece.text[cut:]]
        for _, piece in pieces
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in texts and piece.text[cut:] in texts
    ]


def _with_special_tokens(
    document: dict[str, Any], folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]
) -> dict[str, Any] | None:
    """Adds the tokens that stand outside of the vocabulary, marks the special ones, and puts the first before texts."""
    vocab = document["model"]["vocab"]
    added = {token["content"]: token for token in document["added_tokens"]}
    if os.path.lexists(folder / _ADDED):
        added |= {text: _added(id, text, special=False) for text, id in _read_ids(folder, _ADDED).items()}
    listed = settings.get("added_tokens_decoder")
    for id, token in (listed if isinstance(listed, dict) else {}).items():
        if not (id.isascii() and id.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise UserError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{shown(id)}] is no token")
        known = {field: token[field] for field in _added(0, "", special=False) if field in token}
        added[token["content"]] = _added(int(id), token["content"], special=False) | known
    for text in special.values():
        if text not in added and text not in vocab:
            return None  # transformers would add it to the vocabulary
        added[text] = added.get(text, _added(vocab.get(text), text, special=True)) | {"special": True}
    document["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    if settings.get("add_bos_token") is True and "bos_token" in special:
        document["post_processor"] = _begins_with(special["bos_token"], added[special["bos_token"]]["id"])
    return document


def _begins_with(text: str, id: int) -> dict[str, Any]:
    start, first = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": text, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    token = {"id": text, "ids": [id], "tokens": [text]}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, *second],
        "special_tokens": {text: token},
    }


def _added(id: Any, text: str, *, special: bool) -> dict[str, Any]:
    around = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": id, "content": text, **around, "normalized": not special, "special": special}


def _bpe(vocab: Mapping[str, Any], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": vocab, "merges": merges, **settings}


def _content(folder: Path, name: str, max_bytes: int = VOCABULARY.num_bytes) -> bytes:
    return read_content(open_inside(folder, name), max_bytes, str(folder / name))
