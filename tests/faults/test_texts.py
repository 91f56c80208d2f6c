"""Texts, prompts and configs of every kind: each comes back as it was, or is refused by name with nothing written."""

import gzip
import hashlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from limits import HANGS_SECONDS  # a FIFO that is waited for would be for ever

import flax_decoder.training.loop  # noqa: F401 (a test that goes on as another user cannot read the package)
from flax_decoder.cli import main
from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.tokenizer import load_tokenizer, make_tokenizer
from flax_decoder.io.files import open_regular

ROW = "Texts of every kind"
PROMPTS = "Prompts of every kind"
CONFIGS = "Config files of every kind"
NOBODY = 65534
ENGLISH = "To be, or not to be, that is the question:\n" * 40


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a folder for itself, and an end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {HANGS_SECONDS} s")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# Files, and the texts that come back from them: one byte order mark at the start is not part of a text.
ODD = "é 👩\u200d👧 שלום \u0a0a\r\n日本語\n" * 30
GOOD = {
    "ASCII": (ENGLISH, ENGLISH),
    "one character many times": ("é" * 900, "é" * 900),
    "mark of UTF-8": ("\ufeff" + ENGLISH, ENGLISH),
    "two marks of UTF-8": ("\ufeff\ufeff" + ENGLISH, "\ufeff" + ENGLISH),
    "UTF-16": (("\ufeff" + ODD).encode("utf-16-le"), ODD),
    "UTF-16, other order, two marks": (("\ufeff\ufeff" + ODD).encode("utf-16-be"), "\ufeff" + ODD),
    "CRLF": (ENGLISH.replace("\n", "\r\n"),) * 2,
    "CR": (ENGLISH.replace("\n", "\r"),) * 2,
    "all ends of lines": ("a\nb\r\nc\rd\u2028e\u2029f\x85g\x0bh\x0ci\n\r\n\n\r" * 30,) * 2,
    "control characters": ("".join(map(chr, range(1, 32))) * 30 + "\x7f\x80\x9f a",) * 2,
    "combining characters, emoji, right to left": ("e\u0301 é 👩\u200d👩\u200d👧 שלום \u202e abc 日本語" * 30,) * 2,
    "no spaces": ("abc123" * 300,) * 2,
    "noncharacters and private use": ("\ufffe\uffff\U0010ffff\ue000\ufffd " * 60,) * 2,
}


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("name", GOOD)
def test_what_is_text_comes_back_bit_by_bit(name: str, kind: str) -> None:
    content, text = GOOD[name]
    Path("text").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_comes_back("text", kind, text)


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("num_characters", [70_000, pytest.param(0x110000 - 0x800 - 1, marks=pytest.mark.full)])
def test_tens_of_thousands_of_characters_come_back(num_characters: int, kind: str) -> None:
    """As many different characters as a text can have: all but NUL and the halves of surrogate pairs."""
    codes = [code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, random.Random(0).sample(codes, num_characters)))
    text = text.removeprefix("\ufeff")
    Path("text").write_bytes(text.encode())
    assert_comes_back("text", kind, text)


def assert_comes_back(path: str, kind: str, text: str) -> None:
    """Text -> tokens -> disk -> tokens -> text, also by the tokenizer that its file makes."""
    Path("corpus").mkdir()
    tokenizer, _ = prepare_corpus(DataConfig(path=path, tokenizer=kind, bpe_vocab_size=300), Path("corpus"))
    loaded, again = load_corpus("corpus"), load_tokenizer("corpus/tokenizer.json")
    tokens = [np.asarray(split.tokens) for split in (loaded.train, loaded.validation)]
    assert "".join(map(tokenizer.decode, tokens)) == "".join(map(again.decode, tokens)) == text
    assert len(tokenizer.decode(tokens[0])) == int(len(text) * 0.9) or len(text) > 20_000_000
    assert loaded.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert loaded.train.num_bytes + loaded.validation.num_bytes == len(text.encode())


NUM_LINE_BYTES = 55_000_000
LINES = {
    "words": "the quick brown fox jumps over a lazy dog ",
    "one letter": "a",
    "no spaces": "q8Zj+w0hR2x/L5vT",
    "spaces": " ",
}


@pytest.mark.fault(ROW)
@pytest.mark.parametrize(
    ("kind", "line", "num_bytes"),
    [
        *((kind, "words", 2_000_000) for kind in ("char", "byte")),
        pytest.param("bpe", "words", 2_000_000, marks=pytest.mark.full),
        *(("bpe", line, 300_000) for line in LINES if line != "words"),
        *(pytest.param("bpe", line, 2_000_000, marks=pytest.mark.full) for line in LINES if line != "words"),
        *(pytest.param(kind, "words", NUM_LINE_BYTES, marks=pytest.mark.full) for kind in ("char", "byte")),
        *(pytest.param("bpe", line, NUM_LINE_BYTES, marks=pytest.mark.full) for line in LINES),
    ],
)
def test_a_line_of_megabytes_comes_back(kind: str, line: str, num_bytes: int) -> None:
    text = LINES[line] * (num_bytes // len(LINES[line])) + "end"
    Path("text").write_text(text)
    assert_comes_back("text", kind, text)


# To learn a vocabulary takes time that grows with the square of a word: one of a megabyte once took minutes.
@pytest.mark.fault(ROW)
@pytest.mark.parametrize("line", LINES)
def test_a_vocabulary_is_learned_from_short_words(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    sequence = tokenizers.pre_tokenizers.Sequence
    monkeypatch.setattr(tokenizers.pre_tokenizers, "Sequence", lambda parts: made.append(sequence(parts)) or made[-1])
    text = LINES[line] * (20_000 // len(LINES[line]))
    make_tokenizer("bpe", text, 300)
    (cut,) = made
    words = [word for word, _ in cut.pre_tokenize_str(text)]
    assert sum(map(len, words)) == len(text) and max(map(len, words)) <= 256


GOOD_START = "one\ntwo\n" * 2000 + "three "  # longer than what is read first
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
# What is no text, and what the refusal says of it.
BAD = {
    "empty": (b"", "is empty"),
    "a mark of UTF-8 alone": (b"\xef\xbb\xbf", "is empty"),
    "spaces": (b" " * 5000, "has only white space"),
    "ends of lines": (b"\r\n\t\n" * 5000, "has only white space"),
    "random bytes": (random.Random(1).randbytes(100_000), "line "),
    "PNG": (PNG, "is not UTF-8 text (byte 0x89 at offset 0, line 1)"),
    "gzip": (gzip.compress(ENGLISH.encode()), "is a gzip file; give it the ending .gz"),
    "zip": (b"PK\x03\x04\x14\0", "is a zip file"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF file"),
    "NUL": (b"hello\n\0 world", "is not UTF-8 text (byte 0x00 at offset 6, line 2)"),
    "NUL at the end": (GOOD_START.encode() + b"\0", f"(byte 0x00 at offset {len(GOOD_START)}, line 4001)"),
    "Latin-1": (
        b"one\ntwo\ncaf\xe9 au lait",
        "is not UTF-8 text (byte 0xE9 at offset 11, line 3); convert it, for example: iconv -f latin1 -t utf-8 text > ",
    ),
    "UTF-16 without mark": (ENGLISH.encode("utf-16-le"), "is not UTF-8 text (byte 0x00 at offset 1, line 1)"),
    "UTF-16 cut in a character": (b"\xff\xfea\0\n\0b", "is not UTF-16 text (near byte "),
    "NUL in UTF-16": ("\ufeff\U0001f600\n\0".encode("utf-16-be"), "has the character NUL at character 2"),
    "UTF-32": (ENGLISH.encode("utf-32"), "has the character NUL at character 0"),
    "UTF-32, other order": (b"\0\0\xfe\xff" + ENGLISH.encode("utf-32-be"), "is not UTF-8 text (byte 0x00 at offset 0"),
    "overlong slash": (b"a\n\xc0\xaf" * 9, "(byte 0xC0 at offset 2, line 2)"),
    "surrogate": (b"a surrogate \xed\xa0\x80", "(byte 0xED at offset 12, line 1)"),
    "cut in a character": ("half of é".encode()[:-1], "(byte 0xC3 at offset 8, line 1)"),
    "a bad byte far in": (GOOD_START.encode() + b"\xff", f"(byte 0xFF at offset {len(GOOD_START)}, line 4001)"),
    "a mark of UTF-8, then a bad byte": (b"\xef\xbb\xbf\xff", "(byte 0xFF at offset 3, line 1)"),
}


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused(name: str, refused, count_cases) -> None:
    content, reason = BAD[name]
    Path("text").write_bytes(content)
    Path("folder").mkdir()
    Path("folder/a.txt").write_text(ENGLISH)
    Path("folder/b.txt").write_bytes(content)  # one bad file among good ones
    assert_refused(refused, ["train", "--data.path=text"], "text", reason)
    assert_refused(refused, ["eval", "no_run", "text"], "text", reason)
    reason = reason.replace(" text >", " folder/b.txt >")
    if "empty" in reason or "white space" in reason:  # one among others is passed over
        count_cases(2)
        return
    for path in ("folder", "folder/*"):
        assert_refused(refused, ["train", f"--data.path={path}"], "folder/b.txt", reason)
    count_cases(4)


def assert_refused(refused, command: list[str], path: str, reason: str) -> None:
    error = refused(*command)
    assert path in error and reason in error, error


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def make_link(target: str):
    return lambda path: os.symlink(target, path)


# What is no file to read, and what the refusal says of it.
PLACES = {
    "FIFO": (os.mkfifo, "is not a regular file"),
    "link to a FIFO": (lambda path: (os.mkfifo("fifo"), os.symlink("fifo", path)), "is not a regular file"),
    "socket": (make_socket, "is not a regular file"),
    "/dev/zero": (make_link("/dev/zero"), "is not a regular file"),
    "/dev/null": (make_link("/dev/null"), "is not a regular file"),
    "the terminal": (make_link("/dev/tty"), "cannot be read: "),
    "folder without texts": (os.mkdir, "there is no .txt, .md, .jsonl, "),
    "nothing": (lambda path: None, "there is no such file"),
    "link to nothing": (make_link("nowhere"), "there is no such file"),
    "links in a circle": (lambda path: os.symlink(path, path), "cannot be read: Too many levels"),
}


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_never_opened(name: str, refused, monkeypatch, count_cases) -> None:
    make, reason = PLACES[name]
    make("text")
    opened = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or really_open(path, *rest, **more))
    assert_refused(refused, ["train", "--data.path=text"], "text", reason)
    assert_refused(refused, ["eval", "no_run", "text"], "text", reason)
    assert not [path for path in opened if str(path) in ("text", "fifo")]
    count_cases(2)


@pytest.fixture
def as_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For root, to whom all files are open: the test goes on as a user without rights."""
    if os.geteuid() != 0:
        yield
        return
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # root's may lie where this user cannot go, which is told
    tmp_path.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed_places() -> None:
    """A file, a folder and a folder in a folder that only their owner may look into, and who has no right to."""
    Path("file.txt").write_text(ENGLISH)
    Path("closed").mkdir()
    Path("closed/text.txt").write_text(ENGLISH)
    Path("outer/closed").mkdir(parents=True)
    Path("outer/text.txt").write_text(ENGLISH)
    for path in ("file.txt", "closed", "outer/closed"):
        os.chmod(path, 0)


@pytest.mark.fault(ROW)
def test_no_permission_is_refused(closed_places, as_nobody, capsys, count_cases) -> None:
    cases = {
        "file.txt": "file.txt: there is no permission to read it; chmod u+r file.txt",
        "closed": "closed: this folder cannot be read: Permission denied",
        "closed/text.txt": "closed/text.txt: there is no permission to read it",
        "outer": "outer/closed: this folder cannot be read: Permission denied",  # else a part of the text is missing
    }
    for path, reason in cases.items():
        assert main(["train", f"--data.path={path}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {reason}")
        if path != "outer":
            assert main(["eval", "no_run", path]) == 2
            assert capsys.readouterr().err.startswith(f"error: {reason}")
    assert main(["train", "file.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: file.txt: cannot be read: Permission denied")
    count_cases(2 * len(cases))


# What no config file is, and what the refusal says of it.
BAD_CONFIGS = {
    "random bytes": (random.Random(2).randbytes(5000), "is not UTF-8 (byte 0x"),
    "Latin-1": (b"[data]\npath = 'caf\xe9'\n", "is not UTF-8 (byte 0xE9 at offset 18, line 2)"),
    "UTF-16": ("[model]\n".encode("utf-16"), "is not UTF-8 (byte 0xFF at offset 0, line 1)"),
    "NUL": (b"[model]\nnum_layers = 1\0\n", "is not valid TOML"),
    "NUL in a path": (b'[data]\npath = "a\\u0000b"\n', "data.path = 'a\\x00b' has a NUL character"),
    "NUL in a list of paths": (b'[data]\npath = ["a", "b\\u0000"]\n', "data.path = 'b\\x00' has a NUL character"),
    "deep list": (b"x = " + b"[" * 100_000, "is not valid TOML: it is nested too deep"),
    "deep table": (b"[model]\nnum_layers." + b"a." * 900 + b"a = 1\n", "model.num_layers = {'a': {'a': "),
    "long key": (b"a." * 200_000 + b"a = 1\n", "over 1,000 dots"),
    "long table": (b"[" + b"a." * 1001 + b"a]\n", "over 1,000 dots"),
    "many keys": (b"".join(b"a%d = 1\n" % i for i in range(1001)), "over 1,000 settings"),
    "many quoted parts": (b"'a'.\"b\"." * 501 + b"a = 1\n", "over 1,000 dots"),
    "long name": (b"a" * 400_000 + b".b = 1\n", "there is no section [aaaa"),
    "long name of a setting": (b"model." + b"a" * 400_000 + b" = 1\n", "there is no setting model.aaaa"),
    "huge number": (b"[model]\nnum_layers = " + b"9" * 5000 + b"\n", "is not valid TOML: "),
    "long text": (b"[model]\nnum_layers = '" + b"9" * 5000 + b"'\n", "99...99"),
    "over a megabyte": (b"#" * 1_000_001, "has over 500,000 bytes"),
}


@pytest.mark.fault(CONFIGS)
@pytest.mark.parametrize("command", ["train", "bench"])
@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_what_is_no_config_is_refused(name: str, command: str, refused) -> None:
    content, reason = BAD_CONFIGS[name]
    Path("mine.toml").write_bytes(content)
    error = refused(command, "mine.toml")
    assert error.startswith("mine.toml: ") and reason in error and len(error) < 1000, error


@pytest.mark.fault(CONFIGS)
@pytest.mark.parametrize("name", PLACES)
def test_a_config_that_is_no_file_is_refused(name: str, refused) -> None:
    make, reason = PLACES[name]
    make("mine.toml")
    error = refused("train", "mine.toml")
    reason = {"folder without texts": "is a folder"}.get(name, reason.replace("such file", "such config"))
    assert error.startswith("mine.toml: ") and reason in error, error


@pytest.mark.fault(CONFIGS)
@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        ("config_file", ["train", "large"], "has over 500,000 bytes"),
        ("data.formats.part", ["train", "--data.path=large"], "is not UTF-8 text (byte 0x00 at offset 0, line 1)"),
    ],
)
def test_a_gigabyte_that_is_no_text_is_not_read(module, arguments, reason, refused, monkeypatch) -> None:
    with open("large", "wb") as file:
        file.truncate(2**30)
    opened = []

    def open_and_keep(path):
        opened.append(os.fdopen(os.dup((file := open_regular(path)).fileno()), "rb"))  # they share a place in the file
        return file

    monkeypatch.setattr(f"flax_decoder.{module}.open_regular", open_and_keep)
    assert reason in refused(*arguments)
    for file in opened:
        with file:
            assert file.tell() < 1_100_000  # a reader may ask for somewhat more than it gives
    assert opened


@pytest.mark.fault(CONFIGS)
def test_a_config_may_begin_with_a_mark(refused) -> None:
    Path("mine.toml").write_bytes(b"\xef\xbb\xbf[data]\npath = 'nowhere.txt'\n")
    assert refused("train", "mine.toml").startswith("nowhere.txt: there is no such file")


# Arguments with bytes that are not UTF-8, as Python gives them to a program.
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.fault(CONFIGS)
@pytest.mark.parametrize(
    ("argument", "part"),
    [
        (f"--data.path={NOT_UTF8}", r"data.path = 'caf\udce9' has a NUL character or is not UTF-8"),
        (f"--run.folder={NOT_UTF8}", r"run.folder = 'caf\udce9' has a NUL character or is not UTF-8"),
        (f"--data.path=['{NOT_UTF8}']", r"data.path = 'caf\udce9' has a NUL"),
        (f"--model.num-layers={'[' * 100_000}", "model.num_layers"),
        (f"--model.num-layers={'9' * 5000}", "model.num_layers"),
    ],
)
def test_arguments_that_are_no_text_are_refused(argument: str, part: str, refused) -> None:
    assert part in refused("train", argument)


@pytest.mark.fault(PROMPTS)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\n\xed\xa0\x80", "is not UTF-8 text (byte 0xED at offset 4, line 2)"),
        (b"a\0b", "is not UTF-8 text (byte 0x00 at offset 1, line 1)"),
        (b"", "prompt is empty"),
        ("é".encode(), "the text has 'é' (U+00E9, at character 0, line 1)"),
    ],
)
def test_prompts_that_are_no_text_are_refused(content, reason, run, refused, monkeypatch, count_cases) -> None:
    assert reason in refused("generate", run, "--prompt", os.fsdecode(content))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert reason in refused("generate", run)
    count_cases(2)


@pytest.mark.fault(PROMPTS)
def test_half_of_a_pair_is_refused(run, refused) -> None:
    error = refused("generate", run, "--prompt", "a\ud800")
    assert error.startswith("--prompt: is not UTF-8 text (byte 0xED at offset 1, line 1)")


class Zeros(io.RawIOBase):
    """As /dev/zero, and counts."""

    num_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.num_read += len(buffer)
        assert self.num_read < 10**9, "nothing ends it"
        buffer[:] = bytes(len(buffer))
        return len(buffer)


@pytest.mark.fault(PROMPTS)
def test_a_prompt_without_end_is_refused(run, refused, monkeypatch) -> None:
    zeros = Zeros()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(zeros)))
    assert "standard input: has over 16,000,000 bytes" in refused("generate", run)
    assert zeros.num_read < 17_000_000  # a reader may ask for somewhat more than it gives


@pytest.mark.fault(PROMPTS)
def test_no_standard_input_is_an_empty_prompt(run, refused, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "prompt is empty" in refused("generate", run)


@pytest.mark.fault(ROW)
def test_a_text_with_a_character_that_the_model_lacks_is_refused(run, refused) -> None:
    Path("mine.txt").write_text("To be\nor é")
    error = refused("eval", run, "mine.txt")
    assert error.startswith("mine.txt: the text has 'é' (U+00E9, at character 9, line 2)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one step, whose characters are those of ENGLISH."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.write_text(ENGLISH)
    sizes = ["--model.context-length=8", "--model.num-layers=1", "--model.embed-dim=8", "--model.num-heads=2"]
    steps = ["--training.num-steps=1", "--training.batch-size=2", "--training.sample-tokens=0"]
    assert main(["train", *sizes, *steps, f"--data.path={text}", f"--run.folder={folder / 'x'}"]) == 0
    return str(folder / "x")


@pytest.mark.full
@pytest.mark.fault(ROW)
def test_what_is_no_text_is_refused_by_the_command_itself(tmp_path: Path, count_cases) -> None:
    """As a process of its own: bytes that are no UTF-8 reach it as such."""
    command = [sys.executable, "-m", "flax_decoder"]
    os.mkfifo("fifo")
    cases = [
        ([*command, "train", "--data.path=fifo"], b"", b"fifo: cannot be read: is not a regular file"),
        (
            [*command, "generate", "no_run", b"--prompt=caf\xe9"],
            b"",
            b"--prompt: is not UTF-8 text (byte 0xE9 at offset 3",
        ),
        ([*command, "train", b"--caf\xe9=3"], b"", rb"unknown argument --caf\udce9"),
        (
            [*command, "generate", "no_run"],
            b"a\n\xff",
            b"standard input: is not UTF-8 text (byte 0xFF at offset 2, line 2)",
        ),
    ]
    for arguments, given, reason in cases:
        result = subprocess.run(arguments, input=given, capture_output=True, timeout=HANGS_SECONDS)
        assert result.returncode == 2 and result.stdout == b"" and result.stderr.startswith(b"error: " + reason)
    assert os.listdir() == ["fifo"]
    count_cases(len(cases))
