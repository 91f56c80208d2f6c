import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flax_decoder.data import tokenizer as module
from flax_decoder.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
)
from flax_decoder.errors import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ODD_TEXT = (
    "To be,\r\n\r\n  or not\t to be:\n\né e\u0301 ﬁ ß İ 日本語 العربية हिन्दी \U0001f468\u200d\U0001f469\u200d\U0001f467"
    " \U0001f3f3\ufe0f\u200d\U0001f308 \u2028\x00\x85\ufeff<unk></s> \n"
)
ALL_SCRIPTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ROUNDS = settings(deadline=None, max_examples=100)
BPE = make_tokenizer("bpe", "the cat sat on the mat; the cat sat again\n\nand again " * 5, 300)


def every_kind(text: str) -> list[Tokenizer]:
    return [CharTokenizer(text), ByteTokenizer(), BPE]


@ROUNDS
@given(ALL_SCRIPTS.filter(bool))
@example(ODD_TEXT)
def test_round_trips_are_exact_here_and_in_the_library(text):
    for tokenizer in every_kind(text):
        library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        ids = library.encode(text, add_special_tokens=False).ids
        array = tokenizer.encode_array(text)
        assert ids == tokenizer.encode(text) == array.tolist() and array.dtype == np.int32
        assert library.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == text
        assert library.get_vocab_size() == tokenizer.vocab_size > max(ids)


@given(st.lists(st.integers(0, 255), max_size=20))
@ROUNDS
def test_bytes_that_are_no_utf8_decode_as_in_the_library(ids):
    theirs = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    assert ByteTokenizer().decode(ids) == theirs.decode(ids)


def test_char_ids_are_ranks_by_code_point():
    tokenizer = CharTokenizer("b\na😀é")
    assert tokenizer.characters == "\nabé😀"
    assert tokenizer.encode("😀ab\n") == [4, 1, 2, 0]
    assert tokenizer.vocab_size == 5


def test_byte_ids_are_byte_values():
    assert ByteTokenizer().encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert ByteTokenizer().vocab_size == 256


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_decode_takes_any_iterable_of_integers(kind):
    tokenizer = make_tokenizer(kind, "hello", 260)
    ids = tokenizer.encode("hello")
    for form in (ids, tuple(ids), iter(ids), np.array(ids, np.uint16), [np.int32(id) for id in ids]):
        assert tokenizer.decode(form) == "hello"
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []
    with pytest.raises(ValueError, match=r"must be integers \(T,\), not \[1.5\]"):
        tokenizer.decode([1.5])


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_decode_refuses_ids_outside_the_vocabulary(kind):
    tokenizer = make_tokenizer(kind, "hello", 260)
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {id} is not in the vocabulary"):
            tokenizer.decode([0, id])


def test_char_names_the_character_it_lacks():
    with pytest.raises(
        UserError, match=r"'é' \(U\+00E9, at character 4, line 1\), which this char vocabulary of 4 characters lacks"
    ):
        CharTokenizer("hello").encode("hellé")
    with pytest.raises(Exception, match="UNK"):  # and the library refuses it as well
        tokenizers.Tokenizer.from_str(CharTokenizer("hello").to_json()).encode("hellé")


def test_half_a_surrogate_pair_is_refused():
    for tokenizer in every_kind("a"):
        with pytest.raises(UserError, match=r"U\+DC80"):
            tokenizer.encode("a\udc80")
    with pytest.raises(UserError, match=r"U\+DC80"):
        CharTokenizer("a\udc80")


def test_own_files_are_recognised(tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in every_kind(ODD_TEXT):
        saved_by_library = tokenizers.Tokenizer.from_str(tokenizer.to_json()).to_str(pretty=True)
        for content in (tokenizer.to_json(), saved_by_library):
            path.write_text(content, encoding="utf-8")
            loaded = load_tokenizer(path)
            assert type(loaded) is type(tokenizer)
            assert loaded.encode(ODD_TEXT) == tokenizer.encode(ODD_TEXT)
            assert loaded.to_json() == tokenizer.to_json()


def test_a_file_nearly_like_ours_is_left_to_the_library(tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (CharTokenizer("abAB"), ByteTokenizer()):
        document = json.loads(tokenizer.to_json())
        document["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(document), encoding="utf-8")
        loaded = load_tokenizer(path)
        assert isinstance(loaded, SubwordTokenizer)
        assert loaded.decode(loaded.encode("AB")) == "ab"


def test_bpe_learns_the_text_and_is_deterministic():
    text = "the cat sat on the mat\n" * 50
    tokenizer = make_tokenizer("bpe", text, 270)
    assert 256 < tokenizer.vocab_size <= 270  # the text may have fewer pairs to merge
    assert make_tokenizer("bpe", text, 260).vocab_size == 260
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert make_tokenizer("bpe", text, 270).to_json() == tokenizer.to_json()
    assert tokenizer.start_id is None and tokenizer.end_ids == ()


@pytest.mark.parametrize("word", ["a" * 300, "ab" * 150, "a b" * 100])
def test_words_of_no_more_than_the_longest_trained_one_are_learned_whole(word, monkeypatch):
    """Longer ones are cut in training, and nowhere else: the tokenizer is the one that a plain training gives."""
    text = f"{word} cat\n" * 20
    monkeypatch.setattr(module, "_MAX_TRAINED_WORD_BYTES", 300)
    whole = make_tokenizer("bpe", text, 400).to_json()
    monkeypatch.setattr(module, "_MAX_TRAINED_WORD_BYTES", 4)
    cut = make_tokenizer("bpe", text, 400)
    assert (cut.to_json() == whole) == (" " in word)
    assert json.loads(cut.to_json())["pre_tokenizer"] == json.loads(whole)["pre_tokenizer"] == BYTE_LEVEL
    assert cut.decode(cut.encode(text)) == text


def test_file_made_elsewhere_is_neither_cut_nor_padded_nor_framed(tmp_path):
    assert BPE.vocab_size < 300
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_str(BPE.to_json())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    text = "the cat sat on a mat</s>"
    assert loaded.encode(text) == [*BPE.encode("the cat sat on a mat"), end]
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.start_id, loaded.end_ids) == (start, (end,))
    # A prompt is opened as the file says; what closes a text would end it.
    assert loaded.encode_prompt("the cat") == [start, *BPE.encode("the cat")]
    assert loaded.encode_prompt("") == [] and BPE.encode_prompt("the cat") == BPE.encode("the cat")
    assert loaded.vocab_size == BPE.vocab_size + 2
    path.write_text(loaded.to_json())
    assert load_tokenizer(path).encode(text) == loaded.encode(text)


def test_end_of_text_counts_only_as_a_special_token(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_str(BPE.to_json())
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.start_id == tokenizer.token_to_id("<|endoftext|>")
    assert loaded.end_ids == (loaded.start_id,)


def test_vocabulary_reaches_to_the_largest_id(tmp_path):
    document = json.loads(BPE.to_json())
    document["model"]["vocab"]["gap"] = 1000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert load_tokenizer(path).vocab_size == 1001


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("the cat\n\nsat on\n the\n\n\nmat;\r\n" * 200, id="lines"),
        pytest.param("the cat sat on the  mat; " * 200, id="one line"),
        pytest.param("the;cat;123" * 500, id="no spaces"),
    ],
)
def test_a_long_text_is_encoded_in_pieces_without_a_trace(text, monkeypatch):
    whole = BPE.encode(text)
    encoded = []
    encode_batch = SubwordTokenizer._encode_batch

    def record(self, pieces, *options):
        encoded.extend(map(len, pieces))
        return encode_batch(self, pieces, *options)

    monkeypatch.setattr(module, "_SUBWORD_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(module, "_CUT_CONTEXT_CHARACTERS", 20)
    monkeypatch.setattr(SubwordTokenizer, "_encode_batch", record)
    assert BPE.encode(text) == whole
    assert 110 < max(encoded) < 200
    cut = text.find(" ") if " " in text else text.find(";")
    (ids,) = BPE.encode_many([(text[:cut], text[cut:])])
    assert ids.tolist() == whole[len(BPE.encode(text[:cut])) :]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_pieces_leave_no_trace(kind, monkeypatch):
    """In the vocabulary, in the ids, and in the place of a character that is lacking."""
    text = ODD_TEXT + "the cat\rsat\r\non a\n\nmat; " * 9
    whole = make_tokenizer(kind, text, 300)
    ids = whole.encode(text)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 7)
    monkeypatch.setattr(module, "_SUBWORD_PIECE_CHARACTERS", 7)
    assert list(module._lines(text)) == text.splitlines(keepends=True)
    in_pieces = make_tokenizer(kind, text, 300)
    assert in_pieces.to_json() == whole.to_json()
    assert in_pieces.encode(text) == ids
    assert in_pieces.encode_array(text, np.uint16).tolist() == ids
    assert in_pieces.encode_array(text, np.uint16).dtype == np.uint16
    if kind == "char":
        with pytest.raises(UserError, match=r"at character 10, line 2\)"):
            in_pieces.encode("the cat\non\u0101")


def test_a_text_is_cut_without_a_mark_at_the_cut(monkeypatch):
    """Metaspace puts a mark before each text, but a piece in the middle has none."""
    vocab = {"▁": 0, "a": 1, "\n": 2}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer = SubwordTokenizer(library)
    whole = tokenizer.encode("a\n" * 100)
    assert len(whole) == 201
    monkeypatch.setattr(module, "_SUBWORD_PIECE_CHARACTERS", 10)
    assert tokenizer.encode("a\n" * 100) == whole
    assert len(list(tokenizer._split("", "a\n" * 100))) > 10


def test_a_text_is_not_cut_where_that_would_change_tokens(monkeypatch):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    tokenizer = SubwordTokenizer(library)
    monkeypatch.setattr(module, "_SUBWORD_PIECE_CHARACTERS", 11)
    pieces = [piece for _, piece in tokenizer._split("", "a" * 100)]
    assert all(len(piece) % 2 == 0 for piece in pieces) and len(pieces) > 5
    assert tokenizer.encode("a" * 100) == [1] * 50


def test_a_text_the_library_cannot_encode_is_a_users_error():
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>")
    with pytest.raises(UserError, match="cannot encode this text"):
        SubwordTokenizer(tokenizers.Tokenizer(model)).encode("b")


def test_unknown_kind_names_the_choices(tmp_path):
    with pytest.raises(UserError, match=r'"sentencepiece".*"char", "byte", "bpe" or the path'):
        make_tokenizer("sentencepiece", "text", 300)
    path = tmp_path / "tokenizer.json"
    path.write_text(ByteTokenizer().to_json(), encoding="utf-8")
    assert isinstance(make_tokenizer(str(path), "text", 300), ByteTokenizer)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read: No such file"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="is a folder"):
        load_tokenizer(tmp_path)


def test_char_and_byte_never_import_the_library(tmp_path):
    """Start-up time: the library takes a noticeable part of a second to import."""
    path = tmp_path / "tokenizer.json"
    path.write_text(CharTokenizer("hello").to_json(), encoding="utf-8")
    program = (
        "import sys\n"
        "from flax_decoder.data.tokenizer import load_tokenizer, make_tokenizer\n"
        f"load_tokenizer({os.fspath(path)!r}); make_tokenizer('byte', '', 300)\n"
        "print('tokenizers' in sys.modules, 'jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
