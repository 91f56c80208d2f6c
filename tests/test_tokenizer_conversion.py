"""Folders with `vocab.json` and `merges.txt`, or `tokenizer.model`: the tokens are as of the libraries."""

import itertools
import json
import random
import struct

import pytest
import tokenizers

import flax_decoder as fd
from flax_decoder.data.sentencepiece_file import parse_sentencepiece
from flax_decoder.data.tokenizer_conversion import convert_tokenizer
from flax_decoder.huggingface.folder import read_tokenizer

WORDS = "the cat sat on the mat's lid, and on 2026 mats; aaaa aaab  aabaab\n\tété 日本 😀 "
MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def texts(count):
    rng = random.Random(0)
    letters = "aaaabbst he\u2581\n\té日😀'1,\u0301A"
    for number in range(count):
        start = rng.randrange(len(WORDS))
        yield (
            "".join(rng.choices(letters, k=number % 30))
            if number % 2
            else " " * (number % 3) + WORDS[start : start + 40]
        )


# --- vocab.json and merges.txt ---


@pytest.fixture
def byte_level(tmp_path):
    """The folder of a byte-level tokenizer, and the tokenizer."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([WORDS * 5], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    library.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tmp_path, library


def test_vocabulary_and_merges_of_gpt2_open(byte_level):
    folder, library = byte_level
    tokenizer = read_tokenizer(folder)
    for text in texts(60):
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|endoftext|>")[-1:] == [0] and tokenizer.end_ids == (0,)
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 300}))
    settings = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<new>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode_prompt("cat<new>") == [0, *library.encode("cat").ids, 300] and tokenizer.end_ids == (300,)


@pytest.mark.full
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer"])
@pytest.mark.parametrize("special", [False, True])
def test_vocabulary_and_merges_encode_as_in_transformers(byte_level, name, special):
    transformers = pytest.importorskip("transformers")
    folder, _ = byte_level
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    added = {"300": token | {"normalized": False}, "301": token | {"content": "on the", "normalized": True}}
    more = {"add_prefix_space": True, "added_tokens_decoder": added, "eos_token": "<|im_end|>"} if special else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | more))
    ours, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*texts(400), "cat<|im_end|>on the<|endoftext|> mat"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs) and theirs.eos_token_id in ours.end_ids


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("vocab.json", b'{"a": "b"}', "vocab.json: 'a' = 'b' must be a token id"),
        ("vocab.json", b'{"a": 0, "a": 1}', "vocab.json: is not valid JSON: has the name 'a' twice"),
        ("merges.txt", b"#version: 0.2\nt h e\n", "merges.txt: line 2, 't h e', is no pair of tokens of vocab.json"),
        ("merges.txt", b"\xff", "merges.txt: is not text"),
        ("added_tokens.json", b'{"<new>": 1.5}', "added_tokens.json: '<new>' = 1.5 must be a token id"),
        ("added_tokens.json", b'{"<new>": 7}', "vocab.json: gives the added token '<new>' the id 7"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder['x'] is no token"),
    ],
)
def test_damaged_files_are_named(byte_level, name, content, part):
    folder, _ = byte_level
    (folder / name).write_bytes(content)
    with pytest.raises(fd.UserError) as caught:
        read_tokenizer(folder)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"tokenizer_class": "BloomTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}, {"eos_token": "<absent>"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_what_is_not_known_exactly_is_left(byte_level, settings):
    folder, _ = byte_level
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(folder) is None


# --- tokenizer.model ---


def number(value):
    """A number as protocol buffers write it."""
    return bytes([value & 0x7F | 0x80]) + number(value >> 7) if value > 0x7F else bytes([value])


def message(*fields):
    """Fields of (number, value)."""
    parts = []
    for key, value in fields:
        if isinstance(value, float):
            parts.append(number(key << 3 | 5) + struct.pack("<f", value))
        elif isinstance(value, int):
            parts.append(number(key << 3) + number(value))
        else:
            parts.append(number(key << 3 | 2) + number(len(value)) + value)
    return b"".join(parts)


MERGED = [
    "aa",
    "th",
    "the",
    "\u2581a",
    "aaa",
    "aaaa",
    "ab",
    "aab",
    "\u2581the",
    "\u2581\u2581",
    "at",
    "\u2581c",
    "\u2581cat",
]
PIECES = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
PIECES += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
PIECES += [(text, float(-rank), NORMAL) for rank, text in enumerate([*MERGED, *"\u2581abthesc"])]
TRAINER, NORMALIZER = {3: 2, 35: 1}, {1: b"identity", 3: 1, 4: 0, 5: 1}


def sentencepiece_model(pieces=PIECES, trainer=(), normalizer=()):
    encoded = [(1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in pieces]
    parts = (TRAINER | dict(trainer), NORMALIZER | dict(normalizer))
    return message(*encoded, *((2 + place, message(*fields.items())) for place, fields in enumerate(parts)))


def merged(text):
    """The tokens of a text: of neighbours that make a token, the one with the highest score, and of those the first."""
    scores = {text: (score, id) for id, (text, score, kind) in enumerate(PIECES) if kind == NORMAL}
    symbols = list((MARK + text).replace(" ", MARK)) if text else []
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(symbols)]
        pairs = [(scores[token][0], -place) for place, token in enumerate(joined) if token in scores]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    groups = ([scores[symbol][1]] if symbol in scores else [3 + byte for byte in symbol.encode()] for symbol in symbols)
    return [id for group in groups for id in group]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "legacy": True}))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    return tmp_path


def test_a_model_of_sentencepiece_opens(folder):
    tokenizer = read_tokenizer(folder)
    for text in texts(200):
        ids = tokenizer.encode(text)
        assert ids == merged(text) and tokenizer.decode(ids) == text.replace(MARK, " ")
    assert tokenizer.encode_prompt("a") == [1, *tokenizer.encode("a")]
    assert (tokenizer.start_id, tokenizer.end_ids) == (1, (2,))


@pytest.mark.full
def test_a_model_of_sentencepiece_encodes_as_in_its_library(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()), read_tokenizer(folder)
    for text in texts(2000):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {3: 1}},  # unigram
        {"trainer": {24: 1}},  # spaces end words
        {"trainer": {35: 0}},  # no bytes
        {"normalizer": {2: b"map"}},
        {"normalizer": {3: 0}},
        {"normalizer": {4: 1}},  # drops spaces
        {"pieces": [*PIECES, ("mat", 0.0, 4)]},  # a token that somebody has defined
        {"pieces": [*PIECES, ("b\u2581", -3.0, NORMAL)]},  # of two with one score, the place decides
    ],
    ids=lambda changes: str(next(iter(changes.items())))[:40],
)
def test_other_models_of_sentencepiece_are_left(folder, changes):
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**changes))
    assert read_tokenizer(folder) is None


def test_settings_that_versions_read_differently_are_left(folder):
    for settings in ({}, {"add_bos_token": True, "legacy": False}, {"add_bos_token": True, "add_prefix_space": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert convert_tokenizer(folder, "mistral") is None


def test_a_damaged_model_of_sentencepiece_is_named():
    content = sentencepiece_model()
    for end in (1, 10, len(content) - 1):
        with pytest.raises(fd.UserError, match="x: is not a file of sentencepiece: it is cut off"):
            parse_sentencepiece(content[:end], "x")
    cases = {b"": "has 0 tokens", b"\x0b": "a field of kind 3", b"\x08" + b"\xff" * 11: "more than 64 bits"}
    cases[message((1, message((1, b"a" * 101))))] = "101 characters"
    cases[message((1, message((1, b"a"), (2, float("nan")))))] = "the score nan"
    cases[message((1, message((1, b"\xff"))))] = "can't decode"
    for content, part in cases.items():
        with pytest.raises(fd.UserError, match=part):
            parse_sentencepiece(content, "x")
