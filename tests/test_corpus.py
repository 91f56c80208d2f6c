import errno
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.cli import main
from flax_decoder.config import DataConfig
from flax_decoder.data import corpus as corpus_module
from flax_decoder.data import encoding
from flax_decoder.data import plan as plan_module
from flax_decoder.data.corpus import no_progress, prepare_corpus, prepare_folder, read_text, require_fit
from flax_decoder.data.formats import files, texts
from flax_decoder.data.formats.part import BUILT_IN
from flax_decoder.data.long_array import Shards
from flax_decoder.data.shards import SPLITS, load_corpus
from flax_decoder.data.tokenizer import SubwordTokenizer, make_tokenizer
from flax_decoder.errors import FaultError, FolderWarning, UserError


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
    assert len(built_in) > 300_000 and "assert" in built_in
    write("input.txt", "mine")
    assert read_text(None) == "mine" and read_text(BUILT_IN) == built_in


def test_built_in_topics_stand_in_order_with_blank_lines_between(monkeypatch):
    module = types.SimpleNamespace(topics={"b": "two\n", "a": "one\n"})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    assert read_text(BUILT_IN) == "one\n\ntwo\n"


def test_a_python_without_its_help_texts(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "give data.path" in refusal(None)


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")).filter(str.strip))
def test_text_is_read_exactly(text):
    assert read_text(write("a.txt", text)) == text


def test_folder_glob_and_list():
    write("texts/b.txt", "b\n")
    write("texts/a.txt", "a")
    write("texts/deep/c.txt", "c")
    write("texts/notes.md", "notes")
    pathlib.Path("texts/folder.txt").mkdir()
    assert read_text("texts") == "a\nb\nc\nnotes"  # in the order of a listing: folders among the files
    assert read_text("texts/*.txt") == "a\nb\n"
    assert read_text("texts/**/*.txt") == "a\nb\nc"
    assert read_text(("texts/notes.md", "texts/deep", "texts/a.txt")) == "notes\nc\na"


def test_a_file_whose_name_looks_like_a_glob_is_that_file():
    write("a.txt", "wrong")
    assert read_text(write("[a].txt", "right")) == "right"


@pytest.mark.parametrize("path", ["", (), ("",)])
def test_an_empty_path_is_refused(path):
    write("a.txt", "text")  # "" must not be read as the current folder
    assert "the path of the text is empty" in refusal(path)


def test_what_is_not_there_is_refused():
    assert refusal("nowhere.txt").startswith("nowhere.txt: there is no such file")
    assert refusal("no*.txt").startswith("no*.txt: no file matches")
    pathlib.Path("folder").mkdir()
    assert refusal("folder").startswith("folder: there is no .txt, .md, .jsonl, ")
    assert refusal(write("a.txt", "text") + "/b.txt").startswith("a.txt/b.txt: cannot be read: Not a directory")


TEXT = "To be, or not to be: that is the question — " * 9 + "zéro"  # é stands in the validation part only


def prepare(folder: str = "corpus", given=None, num_processes=None, **data):
    pathlib.Path(folder).mkdir(exist_ok=True)
    return prepare_corpus(DataConfig(**data), pathlib.Path(folder), given, num_processes=num_processes)


def halves(text: str, fraction: float = 0.1) -> tuple[str, str]:
    border = int(len(text) * (1 - fraction))
    return text[:border], text[border:]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("text", [TEXT, "日本語テキスト" * 20])
def test_one_text_is_split_by_characters(kind, text):
    write("input.txt", text)
    tokenizer, corpus = prepare(tokenizer=kind, bpe_vocab_size=270)
    train, validation = halves(text)
    assert tokenizer.decode(corpus.train.tokens) == train
    assert tokenizer.decode(corpus.validation.tokens) == validation
    assert corpus.train.tokens.dtype == corpus.validation.tokens.dtype == np.uint16
    assert (corpus.train.num_bytes, corpus.validation.num_bytes) == (len(train.encode()), len(validation.encode()))
    assert (corpus.source, corpus.sha256) == ("input.txt", hashlib.sha256(text.encode()).hexdigest())
    assert corpus.train.document_starts.tolist() == [0] and corpus.validation.document_starts.tolist() == []


def test_the_built_in_text_is_split_as_others():
    tokenizer, corpus = prepare()
    text = read_text(BUILT_IN)
    assert tokenizer.decode(corpus.train.tokens) + tokenizer.decode(corpus.validation.tokens) == text
    assert len(corpus.train.tokens) == len(halves(text)[0]) and corpus.num_documents == 1


def test_bpe_learns_from_the_training_part_only():
    write("input.txt", "abab " * 900 + "xyxy " * 100)
    tokenizer, _ = prepare(tokenizer="bpe")
    assert len(tokenizer.encode("abab")) == 1
    assert len(tokenizer.encode("xyxy")) == 4


def test_bpe_learns_from_a_sample_of_all_parts(monkeypatch):
    for name in "ab":
        write(f"texts/{name}.txt", f"{name}1{name}2 " * 1000)
    write("texts/c.txt", "xyxy " * 200)
    seen = []
    make = corpus_module.make_tokenizer
    monkeypatch.setattr(
        corpus_module, "make_tokenizer", lambda kind, text, size: seen.extend(text) or make(kind, seen, size)
    )
    prepare(path="texts", tokenizer="bpe", bpe_train_bytes=4000, bpe_vocab_size=260)
    assert [len(text) for text in seen] == [2000, 2000]
    assert {text[0] for text in seen} == {"a", "b"}


def test_many_tokens_take_four_bytes():
    characters = "".join(map(chr, range(0x10000, 0x20001)))  # one more than fit in two bytes
    write("input.txt", characters)
    tokenizer, corpus = prepare()
    assert tokenizer.vocab_size == 2**16 + 1
    assert corpus.train.tokens.dtype == np.uint32
    assert corpus.validation.tokens[-1] == 2**16
    write("input.txt", characters[:-1])
    assert prepare("other")[1].train.tokens.dtype == np.uint16


def test_a_part_shorter_than_a_window_is_refused():
    write("input.txt", "x" * 120)
    data = DataConfig()
    tokenizer, corpus = prepare()
    require_fit(corpus, tokenizer, data, 11, None)
    with pytest.raises(UserError) as caught:
        require_fit(corpus, tokenizer, data, 12, None)
    assert str(caught.value) == (
        "the validation part of input.txt (last 10 %) has 12 tokens, but context_length = 12 needs at least 13: "
        "use a longer text or a smaller model.context_length"
    )
    data = DataConfig(validation_fraction=0.9)
    with pytest.raises(UserError, match=r"the training part of input.txt \(first 10 %\) has 11 tokens"):
        require_fit(prepare("other", validation_fraction=0.9)[1], tokenizer, data, 12, None)


def test_a_vocabulary_larger_than_the_models_is_refused():
    write("input.txt", TEXT)
    data = DataConfig(tokenizer="byte")
    tokenizer, corpus = prepare(tokenizer="byte")
    with pytest.raises(UserError, match=r"model\.vocab_size = 255 is too small: data\.tokenizer = byte has 256 tokens"):
        require_fit(corpus, tokenizer, data, 8, 255)
    for enough in (256, 300):
        require_fit(corpus, tokenizer, data, 8, enough)


def test_tokens_are_mapped_and_read_only():
    write("input.txt", TEXT)
    prepare()
    loaded = load_corpus("corpus")
    assert isinstance(loaded.train.tokens, np.memmap) and loaded.train.tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        loaded.train.tokens[0] = 1
    shards = [f"{split}-00000{end}.bin" for split in ("train", "validation") for end in ("", ".starts")]
    assert sorted(os.listdir("corpus")) == ["corpus.json", "tokenizer.json", *sorted(shards)]


@pytest.mark.parametrize("broken", ["train-00000.bin", "validation-00000.starts.bin", "corpus.json", "tokenizer.json"])
def test_a_write_that_fails_leaves_nothing_that_is_taken_for_a_corpus(broken, monkeypatch):
    write("input.txt", TEXT)
    replace = os.replace

    def fail(source, target):
        if pathlib.Path(target).name == broken:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FaultError, match=r"corpus: cannot write the corpus: No space left"):
        prepare()
    assert not [name for name in os.listdir("corpus") if name.endswith(".tmp")]
    with pytest.raises(FaultError, match=r"corpus\.json: is missing"):
        load_corpus("corpus")


# --- Documents, and how they are split ---


@pytest.fixture
def small_parts(monkeypatch):
    """Files are divided every few hundred bytes."""
    for module in (files, texts, plan_module):
        monkeypatch.setattr(module, "PART_BYTES", 400)


def as_lines(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def documents_of(tokenizer, split) -> list[str]:
    borders = [*split.document_starts, len(split.tokens)]
    return [tokenizer.decode(split.tokens[start:stop]) for start, stop in itertools.pairwise(borders)]


def test_a_document_is_a_line_a_row_or_a_file_and_ends_in_the_end_token(small_parts):
    """In all formats the same documents make the same tokens."""
    texts = [f"document {i} é" + " x" * (i % 7) for i in range(90)]
    write("a.jsonl", as_lines(texts))
    write("b.jsonl.gz", gzip.compress(as_lines(texts).encode()))
    write("c.jsonl.zst", zstandard.ZstdCompressor().compress(as_lines(texts).encode()))
    table = pyarrow.table({"n": list(range(90)), "text": texts})
    pyarrow.parquet.write_table(table, "d.parquet", row_group_size=20)
    with pyarrow.ipc.new_stream("e.arrow", table.schema) as stream:
        stream.write_table(table, 7)
    with pyarrow.ipc.new_file("f.arrow", table.schema) as file:
        file.write_table(table, 11)
    for i, text in enumerate(texts):
        write(f"g/{i}.txt", text)
    tokenizer = with_end_token()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f.arrow", "g"):
        _, corpus = prepare(f"out {name}", tokenizer, path=name)
        found = documents_of(tokenizer, corpus.train) + documents_of(tokenizer, corpus.validation)
        assert found == [text + "<|endoftext|>" for text in texts], name
        assert 5 <= len(corpus.validation.document_starts) <= 14, name
        assert ("90 files" if name == "g" else "1 file,") in corpus.what_was_read
        assert len(corpus.train.tokens) == corpus.train.document_starts[-1] + len(
            tokenizer.encode(documents_of(tokenizer, corpus.train)[-1])
        )


def with_end_token():
    library = tokenizers.Tokenizer.from_str(make_tokenizer("bpe", TEXT * 3, 280).to_json())
    library.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(library)


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (None, ["one\n", "two\n", "three\n"]),
        ("", ["one\n", "two", "three\n"]),
        ("|", ["one\n|", "two|", "three\n|"]),
    ],
)
def test_what_ends_a_document(separator, expected):
    for name, text in (("1", "one\n"), ("2", "two"), ("10", "three\n")):
        write(f"texts/{name}.txt", text)
    tokenizer, corpus = prepare(path="texts", document_separator=separator, validation_fraction=0.3)
    assert documents_of(tokenizer, corpus.train) + documents_of(tokenizer, corpus.validation) == expected


def test_a_separator_may_be_any_token_of_the_tokenizer():
    write("a.jsonl", as_lines(["x", "y", "z"]))
    tokenizer = with_end_token()
    tokenizer._tokenizer.add_special_tokens(["<sep>"])
    _, corpus = prepare("out", SubwordTokenizer(tokenizer._tokenizer), path="a.jsonl", document_separator="<sep>")
    assert np.asarray(corpus.train.tokens)[-1] == tokenizer.token_id("<sep>")


def test_validation_is_whole_documents_unless_one_text_is_too_long():
    for i in range(10):
        write(f"even/{i}.txt", str(i) * 100)
    _, corpus = prepare("a", path="even", tokenizer="byte")
    assert set(corpus.validation.tokens.tolist()) == {ord("9"), 10} and corpus.train.document_starts.shape == (9,)
    for name, size in (("a", 300), ("b", 300), ("c", 400)):
        write(f"few/{name}.txt", name * size)
    _, corpus = prepare("b", path="few", tokenizer="byte")
    assert set(corpus.validation.tokens.tolist()) == {ord("c"), 10}
    assert corpus.validation.tokens.shape == (101,) and "validation begins inside of few/c.txt" in corpus.what_was_read
    write("one.jsonl", as_lines(["only one document"]))
    with pytest.raises(UserError, match=r"one\.jsonl: has only one document, .*data\.validation_path"):
        prepare("c", path="one.jsonl")


def test_validation_from_a_path_of_its_own():
    write("train.txt", "abc" * 20)
    write("held/1.txt", "abd" * 10)
    tokenizer, corpus = prepare(path="train.txt", validation_path="held")
    assert tokenizer.decode(corpus.train.tokens) == "abc" * 20 + "\n"
    assert tokenizer.decode(corpus.validation.tokens) == "abd" * 10 + "\n"
    assert "2 files, 2 documents" in corpus.what_was_read


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_parts_leave_no_trace_in_a_long_text(kind, small_parts):
    text = "".join(f"line {i}: é日 cat; sat\n" for i in range(300))
    write("input.txt", text)
    write("whole.txt", text)
    tokenizer, corpus = prepare("a", tokenizer=kind, bpe_vocab_size=300)
    assert isinstance(corpus.train.tokens, Shards)
    assert tokenizer.decode(np.asarray(corpus.train.tokens)) + tokenizer.decode(corpus.validation.tokens) == text
    assert corpus.train.document_starts.tolist() == [0]
    written = tokenizer.encode(text)
    assert [*np.asarray(corpus.train.tokens), *corpus.validation.tokens] == written


def test_the_same_bytes_from_any_number_of_processes_and_after_any_stop(small_parts, monkeypatch):
    """The parts that are small here are large in the other processes, so the plan is made here alone."""
    write("a.jsonl", as_lines(f"document {i} " + "x" * (i % 50) for i in range(200)))
    _, corpus = prepare("one", path="a.jsonl", tokenizer="byte", num_processes=1)
    wanted = files_in("one")
    assert len(wanted) > 40 and corpus.num_documents == 200

    done, perform = [], encoding.perform

    def stop(task, tokenizer):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(task.output)
        return perform(task, tokenizer)

    monkeypatch.setattr(encoding, "perform", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("two", path="a.jsonl", tokenizer="byte", num_processes=1)
    started = []
    encode = encoding._encode
    monkeypatch.setattr(encoding, "perform", perform)
    monkeypatch.setattr(
        encoding, "_encode", lambda task, tokenizer: started.append(task.output) or encode(task, tokenizer)
    )
    prepare("two", path="a.jsonl", tokenizer="byte", num_processes=1)
    assert files_in("two") == wanted and not {*started} & {*done} and len(done) == 7


@pytest.mark.full
def test_two_processes_write_the_same_bytes(small_parts):
    write("a.jsonl", as_lines(f"document {i} " + "x" * (i % 50) for i in range(200)))
    for kind in ("char", "bpe"):
        for num_processes in (1, 2, 4):
            prepare(f"{kind} {num_processes}", path="a.jsonl", tokenizer=kind, num_processes=num_processes)
        assert files_in(f"{kind} 1") == files_in(f"{kind} 2") == files_in(f"{kind} 4")


@pytest.mark.full
def test_killed_and_called_again_it_ends_with_the_same_bytes():
    line = json.dumps({"text": "to be, or not to be " * 50}) + "\n"
    write("a.jsonl", line * (70_000_000 // len(line)))
    command = [sys.executable, "-m", "flax_decoder", "prepare", "a.jsonl", "--data.tokenizer", "byte", "--out"]
    subprocess.run([*command, "whole"], check=True)
    unfinished = pathlib.Path(".killed.unfinished")
    for num_done in (1, 3):
        with subprocess.Popen([*command, "killed"]) as process:
            while len([*unfinished.glob("*.done")]) < num_done and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert not pathlib.Path("killed").exists()
    assert [*unfinished.glob("*.done")]
    subprocess.run([*command, "killed"], check=True)
    assert files_in("killed") == files_in("whole")


def files_in(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_other_texts_or_settings_begin_anew(small_parts, monkeypatch):
    write("a.jsonl", as_lines(f"document {i}" for i in range(100)))

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(corpus_module, "write_facts", stop)
        prepare(path="a.jsonl", tokenizer="byte")
    _, corpus = prepare(path="a.jsonl", tokenizer="byte", document_separator="|")
    assert bytes(corpus.validation.tokens.astype(np.uint8)).endswith(b"99|")
    assert files_in("corpus").keys() == {name for name in files_in("corpus") if not name.endswith((".done", ".hashes"))}


def test_what_was_read_is_said():
    for name, text in (
        ("a.txt", "text\n"),
        ("b.TXT", "text\n"),
        ("c.md", "more"),
        ("empty.txt", ""),
        ("blank.txt", " \n"),
    ):
        write(f"texts/{name}", text)
    for name in (".git/x.txt", "._a.txt"):
        write(f"texts/{name}", b"\0hidden")
    for i in range(2):
        write(f"texts/picture{i}.png", b"\x89PNG")
    _, corpus = prepare(path="texts", tokenizer="byte", validation_fraction=0.4)
    assert corpus.what_was_read == (
        "4 files, 3 documents, 15 bytes; skipped: 2 empty, 2 hidden; ignored endings: .png 2; "
        "1 document is the same as an earlier one"
    )


def test_linked_folders_are_read_once():
    write("real/x.txt", "x")
    write("top/a.txt", "a")
    os.symlink("../real", "top/link")
    os.symlink("../real", "top/second")
    os.symlink("..", "top/up")
    assert read_text("top") == "a\nx"


def test_a_prepared_corpus_is_shared(monkeypatch):
    write("a.jsonl", as_lines(f"document {i}" for i in range(30)))
    data = DataConfig(path=("a.jsonl",), tokenizer="bpe", bpe_vocab_size=260)
    with monkeypatch.context() as limit:

        def refuse(*args, **options):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        limit.setattr(np, "memmap", refuse)
        facts = prepare_folder(data, pathlib.Path("prepared"), progress=no_progress)  # opens no shard
        assert sum(shard["documents"] for split in SPLITS for shard in facts[split]["shards"]) == 30
        with pytest.raises(FaultError, match=r"train-00000\.bin: the process may not map as much memory"):
            load_corpus("prepared")
    tokenizer, corpus = prepare("run", path="prepared")
    assert tokenizer.vocab_size == 260 and corpus.num_documents == 30
    assert os.path.samefile("run/train-00000.bin", "prepared/train-00000.bin")
    with pytest.raises(UserError, match="prepared: was prepared with another tokenizer than the model's"):
        prepare("other", make_tokenizer("byte", "", 0), path="prepared")
    with pytest.raises(UserError, match="prepared: exists; give a new folder"):
        prepare_folder(data, pathlib.Path("prepared"), progress=no_progress)
    write("prepared/train-00000.bin", b"x" + pathlib.Path("prepared/train-00000.bin").read_bytes()[1:])
    with pytest.raises(FaultError, match=r"train-00000\.bin: is missing or damaged"):
        prepare("third", path="prepared")


MIXTURE = ({"path": "a.txt", "weight": 3}, {"path": "b.jsonl"})


def test_a_mixture_is_a_corpus_of_each_source_and_one_tokenizer():
    write("a.txt", TEXT)
    write("b.jsonl", as_lines(f"δ {i}" for i in range(40)))
    tokenizer, mixture = prepare("mix", mixture=MIXTURE)
    assert [(source.name, source.weight) for source in mixture.sources] == [("a", 0.75), ("b", 0.25)]
    for (name, weight), source in zip((("a.txt", 0.75), ("b.jsonl", 0.25)), mixture.sources, strict=True):
        pathlib.Path(f"alone {name}").mkdir()
        _, alone = prepare_corpus(DataConfig(path=name), pathlib.Path(f"alone {name}"), tokenizer)
        assert (source.corpus.source, source.corpus.sha256) == (name, alone.sha256)
        np.testing.assert_array_equal(source.corpus.train.tokens, alone.train.tokens)
        assert source.weight == weight
    assert {"é", "δ"} <= set(tokenizer.decode(range(tokenizer.vocab_size)))
    lines = mixture.describe(1000, 7).splitlines()
    assert lines[0].startswith("a  75.0% of the rows, ") and "40 documents" in lines[1]
    assert mixture.arranged(DataConfig(document_mask=True)).train.parts[1].masked_documents is not None
    with pytest.raises(UserError, match="mix: is a mixture; give its sources"):
        prepare("again", path="mix")
    with pytest.raises(UserError, match=r"the validation part of a\.txt .* needs at least 90"):
        require_fit(mixture, tokenizer, DataConfig(mixture=MIXTURE), 89, None)
    before = pathlib.Path("mix/1/corpus.json").read_bytes()
    write("mix/1/corpus.json", before + b" ")
    with pytest.raises(FaultError, match=r"mix/1/corpus\.json: is missing or damaged: its SHA-256 is"):
        load_corpus("mix")
    write("mix/1/corpus.json", before)
    listing = pathlib.Path("mix/corpus.json").read_text()
    for old, new in (("0.75", "0.5"), ("0.75", "-0.75"), ('"a"', '"b"'), ('"a"', '"\\u001b[1m"'), ('"name"', '"nome"')):
        write("mix/corpus.json", listing.replace(old, new))
        with pytest.raises(FaultError, match=r"mix/corpus\.json: is missing or damaged"):
            load_corpus("mix")


def test_bpe_of_a_mixture_learns_from_all_training_text():
    write("a.txt", "abab" * 200)
    write("b.jsonl", as_lines(["xyxy" * 200] * 9))
    tokenizer, _ = prepare("mix", mixture=MIXTURE, tokenizer="bpe", bpe_vocab_size=262)
    assert len(tokenizer.encode("abab")) < 4 and len(tokenizer.encode("xyxy")) < 4


def test_prepared_sources_of_a_mixture_have_one_tokenizer():
    write("a.txt", TEXT)
    write("b.txt", TEXT[::-1])
    for path, data in (("a", {}), ("b", {"tokenizer": "a/tokenizer.json"}), ("c", {"tokenizer": "byte"})):
        source = "a.txt" if path == "a" else "b.txt"
        prepare_folder(DataConfig(path=source, **data), pathlib.Path(path), progress=no_progress)
    tokenizer, mixture = prepare("mix", mixture=({"path": "a"}, {"path": "b"}, {"path": "b.txt"}))
    assert [source.name for source in mixture.sources] == ["a", "b", "b-2"]
    assert os.path.samefile("mix/1/train-00000.bin", "b/train-00000.bin")
    assert tokenizer.decode(mixture.sources[2].corpus.train.tokens) == TEXT[::-1][: int(len(TEXT) * 0.9)]
    with pytest.raises(UserError, match=r"^c: was prepared with another tokenizer than a; .* a/tokenizer\.json"):
        prepare("other", mixture=({"path": "a"}, {"path": "c"}))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("x/books.jsonl.gz", "y/books.txt", "books"), ["books", "books-2", "books-3"]),
        (("data/*.txt", "/", "über\x1b[1m.txt", "x" * 99), ["data", "source", "ber-1m", "x" * 28]),
    ],
)
def test_names_of_sources_are_safe_to_print(paths, names):
    assert corpus_module._names_of(paths) == names


def test_tokens_of_nanogpt():
    tokenizer = with_end_token()
    (end,) = tokenizer.end_ids
    ids = [*tokenizer.encode("to be"), end, *tokenizer.encode("or not"), end] * 10
    write("tokenizer.json", tokenizer.to_json())
    write("a.bin", np.array(ids, "<u2").tobytes())
    np.save("b.npy", np.array(ids, np.int64))
    for name in ("a.bin", "b.npy"):
        _, corpus = prepare(f"out {name}", path=name, tokenizer="tokenizer.json")
        assert [*corpus.train.tokens, *corpus.validation.tokens] == ids
        assert documents_of(tokenizer, corpus.validation) == ["or not<|endoftext|>"] or corpus.num_documents == 20
        assert corpus.train.num_bytes + corpus.validation.num_bytes == len(tokenizer.decode(ids))
    with pytest.raises(UserError, match=r"a\.bin: holds tokens, but data\.tokenizer = char"):
        prepare("out", path="a.bin")
    with pytest.raises(UserError, match=r"a\.bin: has the token 2\d\d at 0?.*, but the tokenizer has 256"):
        prepare("out", make_tokenizer("byte", "", 0), path="a.bin")
    with pytest.raises(UserError, match=r"a\.bin: holds tokens; give a text"):
        read_text("a.bin")


def test_a_dataset_that_datasets_saved():
    table = pyarrow.table({"text": ["one", "two"]})
    for name in ("data-00000-of-00001.arrow", "cache-1.arrow"):
        pathlib.Path("saved/train").mkdir(parents=True, exist_ok=True)
        with pyarrow.ipc.new_stream(f"saved/train/{name}", table.schema) as stream:
            stream.write_table(table)
    write("saved/train/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    write("saved/train/dataset_info.json", "{}")
    write("saved/dataset_dict.json", '{"splits": ["train"]}')
    assert read_text("saved/train") == "one\ntwo"
    assert "several splits (train); give one of them" in refusal("saved")
    write("saved/train/state.json", json.dumps({"_data_files": [{"filename": "../../x"}]}))
    assert "names a file that is none in this folder" in refusal("saved/train")


def parquet(name, column, **more):
    pyarrow.parquet.write_table(pyarrow.table({"text": column} | more), name)
    return name


BAD = {
    "truncated gzip": (lambda: write("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9]), "damaged or cut off"),
    "not gzip": (lambda: write("a.txt.gz", b"plain"), "damaged or cut off"),
    "truncated zstandard": (
        lambda: write("a.txt.zst", zstandard.ZstdCompressor().compress(b"to be or not " * 99)[:-3]),
        "damaged or cut off: it ends inside of a frame",
    ),
    "no zstandard": (lambda: write("a.txt.zst", b"plain"), "damaged or cut off"),
    "parquet without the field": (lambda: parquet("a.parquet", ["x"] * 3), r"no column 'body', but \['text'\]"),
    "parquet of numbers": (lambda: parquet("a.parquet", [1, 2]), "the column 'text' holds int64"),
    "parquet of lists": (lambda: parquet("a.parquet", [["x"]]), "the column 'text' holds list"),
    "a row of null": (lambda: parquet("a.parquet", ["x", None]), "row 2 has no text: 'text' is null"),
    "damaged parquet": (lambda: write("a.parquet", b"PAR1" + bytes(99)), "damaged or cut off"),
    "no parquet": (lambda: write("a.parquet", b"text"), "damaged or cut off"),
    "no arrow": (lambda: write("a.arrow", b"some text"), "damaged or cut off"),
    "a nested field": (lambda: write("a.jsonl", '{"text": {"body": "x"}}\n'), "line 1 has an object as 'text'"),
    "a null": (lambda: write("a.jsonl", '{"text": "x"}\n\n{"text": null}\n'), "line 3 has null as 'text'"),
    "another field": (lambda: write("a.jsonl", '{"content": "x"}\n'), r"line 1 has no 'text'; it has \['content'\]"),
    "an array": (lambda: write("a.json", '[{"text": "x"}]'), "line 1 must be a JSON object, .* not a list"),
    "a list over lines": (lambda: write("a.json", "[\n{}\n]"), "line 1 is not JSON: .*one object a line"),
    "half an object": (lambda: write("a.jsonl", '{"text": "x"}\n{"text"'), "line 2 is not JSON"),
    "not UTF-8 in a line": (lambda: write("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n'), "line 2 is not UTF-8"),
    "NUL in a line": (lambda: write("a.jsonl", '{"text": "a\\u0000"}\n'), "line 1 has the character NUL"),
    "half a pair": (lambda: write("a.jsonl", '{"text": "\\ud800"}\n'), r"line 1 has U\+D800, half a surrogate pair"),
    "deep nesting": (lambda: write("a.jsonl", "[" * 100_000), "line 1 is not JSON"),
    "NUL in a text": (lambda: write("a.txt", "text\n\0"), "byte 0x00 at offset 5, line 2"),
    "Latin-1": (lambda: write("a.txt", b"text\ncaf\xe9"), "byte 0xE9 at offset 8, line 2"),
    "gzip in a text": (lambda: write("a.txt", gzip.compress(b"x")), "is a gzip file; give it the ending .gz"),
    "a PDF": (lambda: write("a.txt", b"%PDF-1.7"), "is a PDF file"),
    "only white space": (lambda: write("a.txt", " \n" * 50), "only white space"),
    "zero documents": (lambda: write("a.jsonl", '{"text": ""}\n' * 9), "only white space"),
    "nothing": (lambda: write("a.txt", ""), "is empty"),
    "a pickle as .npy": (lambda: write("a.npy", b"\x80\x04N."), "does not hold token ids"),
    "floats as .npy": (lambda: np.save("a.npy", np.zeros(4)) or "a.npy", "float64 .* are integers in one dimension"),
    "an odd .bin": (lambda: write("a.bin", b"abc"), "3 bytes, an odd number"),
    "a checkpoint as .bin": (lambda: write("a.bin", b"PK\x03\x04" + bytes(8)), "looks like a checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_leaves_nothing(name, capsys):
    make, reason = BAD[name]
    path = make()
    field = "body" if "field" in name and "parquet" in name else "text"
    arguments = ["prepare", path, "--out", "corpus", "--data.tokenizer", "byte", "--data.text-field", field]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert path in error and len(error.splitlines()) <= 4 and os.listdir() == [path]


def test_all_bad_files_are_told_at_once():
    for name in "abc":
        write(f"texts/{name}.txt", b"caf\xe9" if name != "b" else b"good")
    with pytest.raises(UserError) as caught:
        prepare(path="texts")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 files or rows cannot be used:" and len(lines) == 3
    assert "texts/a.txt" in lines[1] and "texts/c.txt" in lines[2]


def test_lines_of_json_under_another_name_are_asked_about():
    write("a.txt", as_lines(["x", "y"]))
    with pytest.warns(FolderWarning, match=r"a\.txt: looks like lines of JSON, .*rename it to \.jsonl"):
        read_text("a.txt")
    write("b.txt", "{plain text}\n{more}\n")
    read_text("b.txt")


def test_a_document_that_the_tokenizer_cannot_encode_is_named():
    tokenizer = make_tokenizer("char", "abc \n", 0)
    write("a.jsonl", as_lines(["abc", "ab", "abd"]))
    with pytest.raises(UserError, match=r"a\.jsonl: line 3: the text has 'd'"):
        prepare("out", tokenizer, path="a.jsonl", validation_fraction=0.4)


def test_an_older_corpus_is_refused_with_what_to_do():
    write("corpus/corpus.json", '{"train_tokens": 1, "validation_tokens": 1}')
    with pytest.raises(UserError, match=r"corpus: was written by an older version.*\n.*--run\.start-from"):
        load_corpus("corpus")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 8))
def test_shards_are_indexed_as_one_array(numbers, num_cuts):
    whole = np.array(numbers, np.uint16)
    shards = Shards(np.array_split(whole, num_cuts))
    assert len(shards) == len(whole)
    index = np.random.default_rng(0).integers(0, len(whole), (3, 4))
    np.testing.assert_array_equal(shards[index], whole[index])
    np.testing.assert_array_equal(shards[1:7], whole[1:7])
    np.testing.assert_array_equal(np.asarray(shards), whole)
