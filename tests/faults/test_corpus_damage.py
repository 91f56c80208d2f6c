"""A corpus on disk: damage to its tokens or to corpus.json is detected."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.splits import Corpus
from flax_decoder.errors import FaultError

pytestmark = pytest.mark.fault("Damaged corpus")

ARRAYS = ("train-00000.bin", "validation-00000.bin", "train-00000.starts.bin")
FOLDER = Path("corpus")


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A saved corpus of a few hundred tokens, in the current folder."""
    monkeypatch.chdir(tmp_path)
    text = "".join(map(chr, np.random.default_rng(0).integers(33, 127, 331)))
    Path("hamlet.jsonl").write_text("".join(json.dumps({"text": text[i : i + 30]}) + "\n" for i in range(0, 331, 30)))
    FOLDER.mkdir()
    return prepare_corpus(DataConfig(path="hamlet.jsonl"), FOLDER)[1]


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
    other = (FOLDER / ("train-00000.bin" if name != "train-00000.bin" else "validation-00000.bin")).read_bytes()
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
    assert sorted(os.listdir()) == ["corpus", "hamlet.jsonl"]
    count_cases(len(damages) + 3)


def test_a_corpus_json_with_other_fields_is_refused(count_cases: Callable[[int], None]) -> None:
    path = FOLDER / "corpus.json"
    facts = json.loads(path.read_text())
    cases = {name: {other: value for other, value in facts.items() if other != name} for name in facts}
    cases |= {
        "new": facts | {"new": 1},
        "item_bytes": facts | {"item_bytes": "2"},
        "source": facts | {"source": 1},
        "bytes": facts | {"train": {"shards": facts["train"]["shards"]}},
        "tokens": facts | {"train": facts["train"] | {"shards": [facts["train"]["shards"][0] | {"tokens": True}]}},
    }
    for name, changed in cases.items():
        path.write_text(json.dumps(changed))
        assert f"'{name}': missing, unknown or of the wrong type" in refusal()
    contents = {
        "[]": "must hold a JSON object",
        "[" * 100_000: "damaged",
        json.dumps(facts)[:-1] + ', "source": "b"}': "has the name 'source' twice",
        json.dumps(facts | {"format": True}): "'format'",
        json.dumps(facts | {"format": 3}): "its format 3 is not known",
        json.dumps(facts | {"train": {"bytes": 1, "shards": []}}): "its train split is empty",
        json.dumps(facts).replace("train-00000", "../../x"): "its shard 0 is called",
        json.dumps(facts).replace('"tokens": ', '"tokens": -'): "must be at least 0",
        " " * 5_000_001: "over the limit of 5,000,000",
        "\ufeff" + json.dumps(facts): "damaged",
    }
    for content, reason in contents.items():
        path.write_text(content)
        error = refusal()
        assert error.startswith(f"{path}: is missing or damaged") and reason in error
    tokens = facts["train"]["shards"][0]["tokens"]
    path.write_text(json.dumps(facts).replace(f'"tokens": {tokens}', f'"tokens": {tokens - 1}'))
    assert refusal().startswith(f"corpus/train-00000.bin: is missing or damaged: it has {2 * tokens} bytes, but ")
    count_cases(len(cases) + len(contents) + 1)


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
        np.testing.assert_array_equal(loaded.train.tokens, corpus.train.tokens)
        np.testing.assert_array_equal(loaded.validation.tokens, corpus.validation.tokens)
    count_cases(300)
