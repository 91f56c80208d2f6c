"""A corpus on disk: damage to its tokens or to corpus.json is detected."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flax_decoder.data.corpus import Corpus, load_corpus, save_corpus
from flax_decoder.errors import FaultError

pytestmark = pytest.mark.fault("Damaged corpus")

ARRAYS = ("train.npy", "validation.npy")
FOLDER = Path("corpus")


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A saved corpus of a few hundred tokens, in the current folder."""
    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 2**16, 331, np.uint16)
    corpus = Corpus(tokens[:301], tokens[301:], 301, 30, "hamlet.txt", "f" * 64)
    save_corpus(corpus, FOLDER)
    return corpus


def refusal() -> str:
    """The message of the FaultError that loading the corpus raises."""
    with pytest.raises(FaultError) as caught:
        load_corpus(FOLDER)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ARRAYS)
def test_every_flipped_bit_of_the_tokens_is_seen(name: str, every: int, count_cases: Callable[[int], None]) -> None:
    path = FOLDER / name
    content = path.read_bytes()
    bits = range(0, 8 * len(content), every)
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        error = refusal()
        assert error.startswith(f"{path}: is missing or damaged: its SHA-256 is ") and "corpus.json says" in error
    path.write_bytes(content)
    load_corpus(FOLDER)
    count_cases(len(bits))


@pytest.mark.parametrize("name", [*ARRAYS, "corpus.json"])
def test_what_is_not_the_whole_file_is_refused(name: str, count_cases: Callable[[int], None]) -> None:
    path = FOLDER / name
    content = path.read_bytes()
    other = (FOLDER / ("train.npy" if name != "train.npy" else "validation.npy")).read_bytes()
    damages = {
        "cut in half": content[: len(content) // 2],
        "cut by a byte": content[:-1],
        "empty": b"",
        "zeros": bytes(len(content)),
        "zeros at the end": content[:-20] + bytes(20),
        "longer": content + b"\0",
        "another": other,
        "pickled": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch was_here\x85R.",
        "an archive": b"PK\x03\x04" + content,
    }
    for damage in damages.values():
        path.write_bytes(damage)
        assert refusal().startswith(f"{path}: is missing or damaged")
    for change in (lambda: None, lambda: os.mkfifo(path), lambda: path.mkdir()):
        path.rmdir() if path.is_dir() else path.unlink()
        change()
        assert refusal().startswith(f"{path}: is missing or damaged")
        path.touch() if not path.exists() else None
    assert os.listdir() == ["corpus"]
    count_cases(len(damages) + 3)


def test_a_corpus_json_with_other_fields_is_refused(count_cases: Callable[[int], None]) -> None:
    path = FOLDER / "corpus.json"
    facts = json.loads(path.read_text())
    cases = {name: {other: value for other, value in facts.items() if other != name} for name in facts}
    cases |= {
        "new": facts | {"new": 1},
        "train_tokens": facts | {"train_tokens": "301"},
        "source": facts | {"source": 1},
    }
    for name, changed in cases.items():
        path.write_text(json.dumps(changed))
        assert f"'{name}': missing, unknown or of the wrong type" in refusal()
    contents = {
        "[]": "must hold a JSON object",
        "[" * 100_000: "damaged",
        json.dumps(facts)[:-1] + ', "source": "b"}': "has the name 'source' twice",
        json.dumps(facts | {"train_tokens": True}): "'train_tokens'",
        " " * 1_000_001: "over the limit of 1,000,000",
        "\ufeff" + json.dumps(facts): "damaged",
    }
    for content, reason in contents.items():
        path.write_text(content)
        error = refusal()
        assert error.startswith(f"{path}: is missing or damaged") and reason in error
    path.write_text(json.dumps(facts | {"train_tokens": 300}))
    assert refusal().startswith("corpus/train.npy: holds uint16 (301,), but corpus.json says 300 tokens")
    count_cases(len(cases) + len(contents) + 1)


def test_a_made_up_array_is_refused(corpus: Corpus, count_cases: Callable[[int], None]) -> None:
    """A hash does not show who wrote a file: even with the right hash it is parsed with care."""
    facts = json.loads((FOLDER / "corpus.json").read_text())
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (301,), }"
    contents = {
        "floats": _npy(b"{'descr': '<f2', 'fortran_order': False, 'shape': (301,), }") + bytes(602),
        "objects": _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (301,), }") + b"\x80\x04N.",
        "two axes": _npy(b"{'descr': '<u2', 'fortran_order': False, 'shape': (7, 43), }") + bytes(602),
        "more than there is": _npy(header.replace(b"301", b"3010")) + bytes(602),
        "more than there can be": _npy(header.replace(b"301", b"9" * 30)) + bytes(602),
        "a negative size": _npy(header.replace(b"301", b"-1")) + bytes(602),
        "no header": _npy(b"") + bytes(602),
        "a program": _npy(b"__import__('os').system('touch was_here')") + bytes(602),
        "a header without end": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + header,
        "a deep header": _npy(b"(" * 9000),
        "pickled": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch was_here\x85R.",
        "an archive": b"PK\x03\x04" + bytes(600),
    }
    for content in contents.values():
        (FOLDER / "train.npy").write_bytes(content)
        facts["train_sha256"] = hashlib.sha256(content).hexdigest()
        (FOLDER / "corpus.json").write_text(json.dumps(facts))
        assert refusal().startswith("corpus/train.npy: ")
    assert os.listdir() == ["corpus"]
    count_cases(len(contents))


def _npy(header: bytes) -> bytes:
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_random_damage_to_corpus_json_is_refused_or_changes_nothing_of_the_tokens(
    corpus: Corpus, count_cases: Callable[[int], None]
) -> None:
    """Only FaultError is raised; the file as a whole is hashed in the manifests of checkpoints."""
    path = FOLDER / "corpus.json"
    content = path.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            loaded = load_corpus(FOLDER)
        except FaultError:
            continue
        np.testing.assert_array_equal(loaded.train_tokens, corpus.train_tokens)
        np.testing.assert_array_equal(loaded.validation_tokens, corpus.validation_tokens)
    count_cases(300)
