import builtins
import dataclasses
import hashlib
import os
import pathlib
import socket
import sys
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


def test_newlines_stay_and_one_mark_of_utf8_goes():
    write("a.txt", b"\xef\xbb\xbf\xef\xbb\xbfone\r\ntwo\rthree")
    write("b.txt", b"\xef\xbb\xbffour\n")
    assert read_text(("a.txt", "b.txt")).text == "\ufeffone\r\ntwo\rthree\nfour\n"


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
    assert "data.path is empty" in refusal(path)


def test_what_is_not_there_is_refused():
    assert refusal("nowhere.txt").startswith("nowhere.txt: there is no such file")
    assert refusal("no*.txt").startswith("no*.txt: no file matches")
    pathlib.Path("folder").mkdir()
    assert refusal("folder").startswith("folder: there is no .txt file")
    assert refusal(write("a.txt", "text") + "/b.txt").startswith("a.txt/b.txt: cannot be read: Not a directory")


def test_no_permission_is_refused(monkeypatch):
    path = write("my text.txt", "text")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert "no permission to read it; chmod u+r 'my text.txt'" in refusal(path)


def test_what_is_no_file_is_never_opened(monkeypatch):
    os.mkfifo("fifo")
    os.symlink("/dev/zero", "zeros")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")

    def fail(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr("io.open", fail)
    for path in ("fifo", "zeros", "socket"):
        assert refusal(path).startswith(f"{path}: is not a regular file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \r\n\t\n", "has only white space"),
        ("To be".encode("utf-16"), "is UTF-16, not UTF-8; iconv -f UTF-16 -t utf-8 a.txt > a.utf8.txt"),
        (b"\xfe\xff" + "To be".encode("utf-16-be"), "is UTF-16, not UTF-8; iconv -f UTF-16 "),
        ("To be".encode("utf-32"), "is UTF-32, not UTF-8; iconv -f UTF-32 "),
        (b"\0\0\xfe\xff" + "To be".encode("utf-32-be"), "is UTF-32, not UTF-8; iconv -f UTF-32 "),
        ("To be\r\n".encode("utf-16-le"), "is UTF-16LE, not UTF-8; iconv -f UTF-16LE "),
        ("To be\r\n".encode("utf-16-be"), "is UTF-16BE, not UTF-8; iconv -f UTF-16BE "),
        ("To be\r\n".encode("utf-32-le"), "is UTF-32LE, not UTF-8; iconv -f UTF-32LE "),
        ("To be\r\n".encode("utf-32-be"), "is UTF-32BE, not UTF-8; iconv -f UTF-32BE "),
        (("x" * 2047 + "😀").encode("utf-16-le"), "is UTF-16LE, not UTF-8"),  # the sample ends inside 😀
        (b"hello\0 world", "has NUL bytes (the first at offset 5)"),
        (b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\0\x3e\0", "has NUL bytes (the first at offset 7)"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is a PNG image"),
        (b"\x1f\x8b\x08\0\0", "is gzip-compressed, not text; unpack it with gunzip"),
        (b"PK\x03\x04\x14\0", "is a zip archive"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF"),
        (
            b"one\ntwo\ncaf\xe9 au lait",
            "is not UTF-8 (byte 0xE9 at offset 11, line 3);\nif it is Latin-1: iconv -f latin1",
        ),
        (b"\xef\xbb\xbf\xff", "is not UTF-8 (byte 0xFF at offset 3, line 1)"),
        ("half of é".encode()[:-1], "is not UTF-8 (byte 0xC3 at offset 8, line 1)"),
        (b"a surrogate \xed\xa0\x80", "is not UTF-8 (byte 0xED at offset 12, line 1)"),
    ],
)
def test_what_is_no_utf8_text_is_refused_with_the_way_to_mend_it(content, reason):
    write("a.txt", content)
    assert refusal("a.txt").startswith(f"a.txt: {reason}")
    write("folder/good.txt", "good")
    write("folder/bad.txt", content)
    assert refusal("folder").startswith("folder/bad.txt: ")


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


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "corpus.json"])
def test_missing_or_damaged_files_are_faults(corpus, name):
    path = pathlib.Path("corpus", name)
    for damage in (pathlib.Path.unlink, lambda path: os.truncate(path, 70), lambda path: os.truncate(path, 0)):
        save_corpus(corpus, "corpus")
        damage(path)
        with pytest.raises(FaultError, match=f"corpus/{name}: is missing or damaged"):
            load_corpus("corpus")


def test_truncated_tokens_are_a_fault(corpus):
    save_corpus(corpus, "corpus")
    path = pathlib.Path("corpus/train.npy")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FaultError, match=r"corpus/train\.npy"):
        load_corpus("corpus")


def test_tokens_that_corpus_json_does_not_tell_of_are_a_fault(corpus):
    save_corpus(corpus, "corpus")
    np.save("corpus/train.npy", corpus.train_tokens[:-1])
    with pytest.raises(FaultError, match=rf"holds uint16 .* but corpus\.json says {len(corpus.train_tokens)} tokens"):
        load_corpus("corpus")
    np.save("corpus/train.npy", corpus.train_tokens.astype(np.float32))
    with pytest.raises(FaultError, match="holds float32"):
        load_corpus("corpus")
    for content in ("[]", "3", "{}"):
        pathlib.Path("corpus/corpus.json").write_text(content)
        with pytest.raises(FaultError, match=r"corpus\.json: is missing or damaged"):
            load_corpus("corpus")
