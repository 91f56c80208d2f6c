import dataclasses
import hashlib
import os
import pathlib
import sys
import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import BUILT_IN, load_corpus, prepare_corpus, read_text, save_corpus, split_text
from flax_decoder.errors import FaultError, UserError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes | str) -> str:
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def refusal(path) -> str:
    """The message that reading the path is refused with: one or two lines that name it."""
    with pytest.raises(UserError) as caught:
        read_text(path)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_no_path_is_input_txt_else_the_built_in_text():
    built_in = read_text(None)
    assert built_in.name == BUILT_IN
    assert len(built_in.text) > 300_000 and "assert" in built_in.text
    assert read_text(BUILT_IN) == built_in
    write("input.txt", "mine")
    assert (read_text(None).text, read_text(None).name) == ("mine", "input.txt")
    assert read_text(BUILT_IN) == built_in


def test_built_in_topics_stand_in_order_with_blank_lines_between(monkeypatch):
    module = types.SimpleNamespace(topics={"b": "two\n", "a": "one\n"})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    assert read_text(BUILT_IN).text == "one\n\ntwo\n"


def test_a_python_without_its_help_texts(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "give data.path" in refusal(None)


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")).filter(str.strip))
def test_text_is_read_exactly(text):
    source = read_text(write("a.txt", text))
    assert source.text == text
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_folder_glob_and_list():
    write("texts/b.txt", "b\n")
    write("texts/a.txt", "a")
    write("texts/deep/c.txt", "c")
    write("texts/notes.md", "notes")
    pathlib.Path("texts/folder.txt").mkdir()
    assert read_text("texts").text == "a\nb\nc"
    assert read_text("texts/*.txt").text == "a\nb\n"
    assert read_text("texts/**/*.txt").text == "a\nb\nc"
    both = read_text(("texts/notes.md", "texts/deep", "texts/a.txt"))
    assert (both.text, both.name) == ("notes\nc\na", "texts/notes.md, texts/deep, texts/a.txt")


def test_a_file_whose_name_looks_like_a_glob_is_that_file():
    write("a.txt", "wrong")
    assert read_text(write("[a].txt", "right")).text == "right"


@pytest.mark.parametrize("path", ["", (), ("",)])
def test_an_empty_path_is_refused(path):
    write("a.txt", "text")  # "" must not be read as the current folder
    assert "the path of the text is empty" in refusal(path)


def test_what_is_not_there_is_refused():
    assert refusal("nowhere.txt").startswith("nowhere.txt: there is no such file")
    assert refusal("no*.txt").startswith("no*.txt: no file matches")
    pathlib.Path("folder").mkdir()
    assert refusal("folder").startswith("folder: there is no .txt file")
    assert refusal(write("a.txt", "text") + "/b.txt").startswith("a.txt/b.txt: cannot be read: Not a directory")


def test_split_is_by_characters():
    assert split_text("abcdefghij", 0.1) == ("abcdefghi", "j")
    assert split_text("日本語テキスト", 0.5) == ("日本語", "テキスト")


TEXT = "To be, or not to be: that is the question — " * 9 + "zéro"  # é stands in the validation part only


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_prepared_parts_are_the_text(kind):
    write("input.txt", TEXT)
    tokenizer, corpus = prepare_corpus(DataConfig(tokenizer=kind, bpe_vocab_size=270), 8, None)
    train, validation = split_text(TEXT, 0.1)
    assert tokenizer.decode(corpus.train_tokens) == train
    assert tokenizer.decode(corpus.validation_tokens) == validation
    assert corpus.train_tokens.dtype == corpus.validation_tokens.dtype == np.uint16
    assert (corpus.train_bytes, corpus.validation_bytes) == (len(train.encode()), len(validation.encode()))
    assert (corpus.source, corpus.sha256) == ("input.txt", hashlib.sha256(TEXT.encode()).hexdigest())


def test_bpe_learns_from_the_training_part_only():
    write("input.txt", "abab " * 900 + "xyxy " * 100)
    tokenizer, _ = prepare_corpus(DataConfig(tokenizer="bpe"), 8, None)
    assert len(tokenizer.encode("abab")) == 1
    assert len(tokenizer.encode("xyxy")) == 4


def test_many_tokens_take_four_bytes():
    characters = "".join(map(chr, range(0x10000, 0x20001)))  # one more than fit in two bytes
    write("input.txt", characters)
    tokenizer, corpus = prepare_corpus(DataConfig(), 8, None)
    assert tokenizer.vocab_size == 2**16 + 1
    assert corpus.train_tokens.dtype == np.uint32
    assert corpus.validation_tokens[-1] == 2**16
    write("input.txt", characters[:-1])
    assert prepare_corpus(DataConfig(), 8, None)[1].train_tokens.dtype == np.uint16


def test_a_part_shorter_than_a_window_is_refused():
    write("input.txt", "x" * 120)
    prepare_corpus(DataConfig(), 11, None)
    with pytest.raises(UserError) as caught:
        prepare_corpus(DataConfig(), 12, None)
    assert str(caught.value) == (
        "the validation part of input.txt (last 10 %) has 12 tokens, but context_length = 12 needs at least 13: "
        "use a longer text or a smaller model.context_length"
    )
    with pytest.raises(UserError, match=r"the training part of input.txt \(first 10 %\) has 11 tokens"):
        prepare_corpus(DataConfig(validation_fraction=0.9), 12, None)


def test_a_vocabulary_larger_than_the_models_is_refused():
    write("input.txt", TEXT)
    with pytest.raises(UserError, match=r"model\.vocab_size = 255 is too small: data\.tokenizer = byte has 256 tokens"):
        prepare_corpus(DataConfig(tokenizer="byte"), 8, 255)
    for enough in (256, 300):
        assert prepare_corpus(DataConfig(tokenizer="byte"), 8, enough)[0].vocab_size == 256


def test_preparing_writes_nothing():
    write("input.txt", TEXT)
    prepare_corpus(DataConfig(tokenizer="bpe"), 8, None)
    assert os.listdir() == ["input.txt"]


@pytest.fixture
def corpus():
    write("input.txt", TEXT)
    return prepare_corpus(DataConfig(), 8, None)[1]


def test_saved_corpus_comes_back_mapped_and_read_only(corpus):
    save_corpus(corpus, "run/corpus")
    loaded = load_corpus("run/corpus")
    for field in dataclasses.fields(corpus):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(corpus, field.name))
    assert isinstance(loaded.train_tokens, np.memmap) and loaded.train_tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        loaded.train_tokens[0] = 1
    save_corpus(loaded, "run/corpus")  # over the files that it is mapped from
    np.testing.assert_array_equal(load_corpus("run/corpus").train_tokens, corpus.train_tokens)
    assert sorted(os.listdir("run/corpus")) == ["corpus.json", "train.npy", "validation.npy"]


@pytest.mark.parametrize("broken", ["train.npy", "validation.npy", "corpus.json"])
def test_a_save_that_breaks_off_is_not_taken_for_a_corpus(corpus, broken, monkeypatch):
    save_corpus(corpus, "corpus")
    replace = os.replace

    def fail(source, target):
        if pathlib.Path(target).name == broken:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FaultError, match=r"corpus: cannot write the corpus: .*No space left"):
        save_corpus(corpus, "corpus")
    assert not [name for name in os.listdir("corpus") if name.endswith(".tmp")]
    with pytest.raises(FaultError, match=r"corpus\.json: is missing"):
        load_corpus("corpus")


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_preparing_a_text_takes_little_more_memory_than_text_and_tokens(kind):
    """Per byte of text: one in the text, one in one of its parts, two in its token, and one to spare.

    What does not grow with the text cancels out.
    """

    def peak(num_bytes):
        write("input.txt", "to be, or not to be\n" * (num_bytes // 20))
        tracemalloc.start()
        try:
            prepare_corpus(DataConfig(tokenizer=kind), 8, None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8_000_000) - peak(4_000_000) < 5 * 4_000_000
