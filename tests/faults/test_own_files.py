"""The files of a run with any value in any place: each is read, or refused by name; none ends in a traceback."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import OptimizerConfig, RunConfig
from flax_decoder.data.corpus import read_text
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.tokenizer import load_tokenizer
from flax_decoder.errors import FaultError, InUseError, UserError
from flax_decoder.io.lock import LOCK, FolderLock
from flax_decoder.lens.history import read_history
from flax_decoder.training.advice import advice
from flax_decoder.training.checkpoint import choose_step
from flax_decoder.training.manifest import read_manifest
from flax_decoder.training.metrics import MetricsLog
from flax_decoder.training.run_folder import require_same_inputs, require_same_model, saved_config

pytestmark = pytest.mark.fault("Own files with any value in any place")

DEEP = "[" * 100_000 + "]" * 100_000
# Values as they may stand in JSON; some cannot stand in Python, so all are text.
ODD = {
    "nothing": "null",
    "true": "true",
    "minus one": "-1",
    "zero": "0",
    "a large number": "9" * 30,
    "a number of 5,000 digits": "9" * 5000,
    "a fraction": "0.5",
    "1e308": "1e308",
    "1e400": "1e400",
    "NaN": "NaN",
    "a number as text": '"5"',
    "no text": '""',
    "a word": '"unknown"',
    "odd text": '"a\\u0000\\u001b[2J\\n../é"',
    "half a pair": '"\\ud800"',
    "long text": '"' + "x" * 10_000 + '"',
    "a list": "[]",
    "a list of lists": "[[1, [2]], {}]",
    "an object": "{}",
    "a name twice": '{"a": 1, "a": 2}',
    "a deep list": DEEP,
}
SHORT_ODD = ("nothing", "1e400", "a number as text", "a list")
MARK = "the odd value"


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value in a JSON document; of a list or object with many alike, to the first three."""
    if path:
        yield path
    document = dict(enumerate(document)) if isinstance(document, list) else document
    items = list(document.items()) if isinstance(document, dict) else []
    for key, value in items[:3] if path else items:
        yield from places(value, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], odd: str | None) -> str:
    """The document as JSON with another value in a place, or without that place."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if odd is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = MARK
    return json.dumps(document, indent=1).replace(json.dumps(MARK), odd or "")


def sealed(text: str, name: str, indent: int | None) -> bytes:
    """JSON that ends with its own hash, as a manifest does, if it can be written so at all."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(text)
        end = "\n" if indent else ""
        digest = hashlib.sha256((json.dumps(document, indent=indent) + end).encode()).hexdigest()
        return json.dumps(document | {name: digest}, indent=indent).encode() + b"\n"
    return text.encode()


class Case:
    """A file of a run: where it is, what it holds, and everything that reads it."""

    def __init__(self, name: str, read: Callable[[Path], Any], write: Callable[[str], bytes] = str.encode):
        self.name, self.read, self.write = name, read, write

    def document(self, run: Path) -> Any:
        lines = (run / self.name).read_text().splitlines()
        document = json.loads(lines[-1] if self.name.endswith("jsonl") else "\n".join(lines))
        return {name: value for name, value in document.items() if name not in ("sha256", "manifest_sha256")} | (
            {"sha256": document["sha256"]} if self.name == "corpus/corpus.json" else {}
        )

    def content(self, run: Path, text: str) -> bytes:
        """The file with this JSON in it."""
        if self.name.endswith("jsonl"):  # between good lines
            line = json.dumps(self.document(run)).encode() + b"\n"
            return line + self.write(" ".join(text.splitlines())) + b"\n" + line
        return self.write(text)


def read_log(run: Path) -> None:
    log = MetricsLog(RunConfig(), run, 100)
    assert log.seconds() >= 0 and advice(log.rows, OptimizerConfig(), num_steps=100, epochs=2.0, vocab_size=50)
    for row in log.rows:
        assert "val_loss" not in row or row["val_loss"] + row["val_bits_per_byte"] > -1e99


def read_a_manifest(run: Path) -> None:
    choose_step(run, "best")
    require_same_model(run, saved_config(run))
    require_same_inputs(run)
    read_manifest(run / "checkpoints/12")["arrays"].get("params", {}).items()


def read_corpus(run: Path) -> None:
    corpus = load_corpus(run / "corpus")
    assert all(len(split.tokens) / split.num_bytes for split in (corpus.train, corpus.validation))


def read_lock(run: Path) -> None:
    with FolderLock() as lock, FolderLock() as other:
        lock.take(run)
        other.take(run)


def read_tokenizer(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode_prompt("")) is not None and tokenizer.vocab_size > 0


FILES = {
    "log": Case("metrics.jsonl", read_log),
    "manifest": Case("checkpoints/12/manifest.json", read_a_manifest, lambda text: sealed(text, "manifest_sha256", 1)),
    "corpus": Case("corpus/corpus.json", read_corpus),
    "lens": Case("lens/history.json", read_history, lambda text: sealed(text, "sha256", None)),
    "lock": Case(LOCK, read_lock),
    "tokenizer": Case("tokenizer.json", read_tokenizer),
}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def is_read_or_refused(read: Callable[[], Any], part: str, capsys: Any) -> None:
    """Any other error is a fault of the reader."""
    try:
        read()
    except (UserError, FaultError, InUseError) as error:
        message = ascii(str(error))
        assert part in message and len(str(error).splitlines()) <= 2 and len(message) < 2000, message[:3000]
    capsys.readouterr()


# Those of a manifest are many.
SHORT = [(odd, kind) for odd in SHORT_ODD for kind in FILES if kind != "manifest" or odd == "a list"]


@pytest.mark.short("None-log", "a deep list-log", "a deep list-lock", *(f"{odd}-{kind}" for odd, kind in SHORT))
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("odd", [None, *ODD])
def test_any_value_in_any_place(run, capsys, count_cases, kind, odd):
    case = FILES[kind]
    path, document = run / case.name, case.document(run)
    before = path.read_bytes()
    found = list(places(document))
    for place in found:
        path.write_bytes(case.content(run, with_value(document, place, ODD.get(odd))))
        is_read_or_refused(lambda: case.read(run), str(run), capsys)
        path.write_bytes(before)
    case.read(run) if kind != "lock" else None  # as it was, it is read
    count_cases(len(found))


TOML_ODD = {
    **{name: text for name, text in ODD.items() if name not in ("nothing", "a name twice", "half a pair", "an object")},
    "infinite": "inf",
    "not a number": "-nan",
    "a table": "{a = 1, b = {c = []}}",
    "a date": "1979-05-27T07:32:00Z",
    "a text of lines": '"""a\n\u202e\n"""',
    "broken": "[1, ",
}
SHORT_TOML_ODD = ("a number as text", "a list of lists", "a date", "a large number")


@pytest.mark.short(*SHORT_TOML_ODD)
@pytest.mark.parametrize("odd", TOML_ODD)
def test_any_value_in_any_place_of_a_config(run, capsys, count_cases, odd):
    path = run / "config.toml"
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        name = line.partition(" = ")[0]
        if name != line:
            changed = f"{name} = {TOML_ODD[odd]}"
            path.write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]), encoding="utf-8")
            is_read_or_refused(lambda: fd.load_config(path), "", capsys)
    count_cases(len(lines))


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("num_examples", [5, pytest.param(200, marks=pytest.mark.full)])
def test_anything_in_place_of_a_file(run, capsys, kind, num_examples):
    path = run / FILES[kind].name

    @settings(deadline=None, max_examples=num_examples, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=99) | ANY_VALUE.map(lambda value: json.dumps(value).encode() + b"\n"))
    def is_told(content):
        path.write_bytes(content)
        is_read_or_refused(lambda: FILES[kind].read(run), "", capsys)
        path.unlink()
        path.mkdir()
        is_read_or_refused(lambda: FILES[kind].read(run), "", capsys)
        path.rmdir()

    is_told()


@pytest.mark.parametrize("num_examples", [10, pytest.param(500, marks=pytest.mark.full)])
def test_anything_as_a_text(tmp_path, capsys, num_examples):
    path = tmp_path / "text.txt"

    @settings(deadline=None, max_examples=num_examples, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def is_told(content):
        path.write_bytes(content)
        is_read_or_refused(lambda: read_text(str(path)), str(path), capsys)

    is_told()


# A value for each kind of file that once ended a command with a traceback, or would.
COMMANDS = {
    "a step as text": ("metrics.jsonl", '"step": 2,', '"step": "2",'),
    "a loss of 1e400": ("metrics.jsonl", '"train_loss": ', '"train_loss": 1e400, "was": '),
    "a deep line": ("metrics.jsonl", '"train_loss": ', f'"deep": {DEEP}, "was": '),
    "no bytes": ("corpus/corpus.json", r'"bytes": \d+', '"bytes": 0'),
}


@pytest.mark.short("a step as text", "no bytes")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_a_message(run, trained, capsys, name):
    path, before, after = COMMANDS[name]
    text = (run / path).read_text()
    assert re.search(before, text)
    (run / path).write_text(re.sub(before, after, text, count=1))
    if path == "corpus/corpus.json":
        shutil.rmtree(run / "checkpoints")  # whose manifest would tell that it has changed
    assert main([*trained[1], f"--run.folder={run}", "--training.num-steps=20"]) == 1
    _, error = capsys.readouterr()
    assert error.startswith(f"fault: {run / path}: ") and len(error.splitlines()) <= 2, error
    assert main(["verify", str(run)]) == 1
    assert "Traceback" not in capsys.readouterr().err
