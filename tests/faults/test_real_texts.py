"""Texts as people have them, through every command: what is trained on them is resumed, read, shown and converted."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from run_state import losses

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.data.corpus import read_text

ROW = "Texts of people, every command"
SIZES = {"context-length": 16, "num-layers": 1, "embed-dim": 16, "num-heads": 2, "num-kv-heads": 1}
TRAINING = {"batch-size": 4, "eval-every": 3, "save-every": 3, "log-every": 1, "sample-tokens": 9}


def words(rng: random.Random, alphabet: str, count: int, longest: int = 9) -> list[str]:
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(count)]


def russian(rng: random.Random) -> dict[str, str]:
    sentences = [" ".join(words(rng, "абвгдежзиклмнопрстуфхцчшщъыьэюяё", 8)).capitalize() for _ in range(90)]
    return {"text.txt": "«" + "». — ".join(sentences) + "…»\n"}


def chinese_with_escapes(rng: random.Random) -> dict[str, str]:
    """As a terminal wrote it: colours, a bell, a line that is written over."""
    lines = (
        f"\x1b[3{rng.randint(0, 7)}m{''.join(chr(rng.randint(0x4E00, 0x4F00)) for _ in range(12))}\x1b[0m完成\x07\b\r"
        for _ in range(150)
    )
    return {"text.txt": "。\n".join(lines)}


def right_to_left_with_all_newlines(rng: random.Random) -> dict[str, str]:
    alphabet = "אבגדהוזחטיכלמנסעפצקרשת" + "ابتثجحخدذرزسش\u064e\u0651"
    lines = (
        "\u202b" + " ".join(words(rng, alphabet, 5)) + "\u202c 12" + rng.choice(["\n", "\r\n", "\r", "\u2028", "\x85"])
        for _ in range(90)
    )
    return {"text.txt": "".join(lines)}


def code(rng: random.Random) -> dict[str, str]:
    def module() -> str:
        names = words(rng, "abcdefgh_", 12)
        return "import os\n\n\n" + "".join(
            f"def f_{name}(x: int) -> str:\n\treturn f\"{{x}}\\n\" + r'\\d+{name}'  # {name}\n\n" for name in names
        )

    return {f"tree/{folder}{name}.py": module() for folder in ("", "a/", "a/b/") for name in ("one", "two")}


def markdown(rng: random.Random) -> dict[str, str]:
    def page() -> str:
        parts = (
            f"## {name}\n\n* **{name}** [{name}](../{name}.md#x) `a|b`\n\n| a | é |\n|---|---|\n| 1 | ½ |\n\n"
            for name in words(rng, "abcdefgh", 12)
        )
        return "---\ntitle: x\n---\n" + "".join(parts) + "```sh\n$ ls   \n```\n"

    return {f"tree/{folder}{name}.md": page() for folder in ("", "guide/", "guide/more/") for name in ("index", "use")}


def csv(rng: random.Random) -> dict[str, str]:
    rows = (f'{number};"{word}, ""{word}""";{rng.uniform(-9, 9):.3f};;\r\n' for number, word in rows_of(rng))
    return {"text.csv": "\ufeffid;name;value;;\r\n" + "".join(rows)}


def rows_of(rng: random.Random) -> Iterator[tuple[int, str]]:
    return enumerate(words(rng, "abcäöü", 150))


def log(rng: random.Random) -> dict[str, str]:
    lines = (
        f"2026-01-0{rng.randint(1, 9)}T12:00:{number % 60:02}Z {rng.choice(['INFO', 'ERROR'])} [{word}] 0x{number:08x}"
        + "\tstack:\n" * (number % 7 == 0)
        for number, word in rows_of(rng)
    )
    return {"text.log": "\n".join(lines)}


def subtitles(rng: random.Random) -> dict[str, str]:
    lines = (
        f"{number}\r\n00:00:{number % 60:02},000 --> 00:00:{number % 60:02},900\r\n<i>- {word}?</i>\r\n♪ {word} ♪\r\n"
        for number, word in rows_of(rng)
    )
    return {"text.srt": "\ufeff" + "\r\n".join(lines)}


def emoji(rng: random.Random) -> dict[str, str]:
    parts = ("👩\u200d👩\u200d👧", "🏳️\u200d🌈", "e\u0301", "👍🏽", "ﬁ", "\u00a0", "🇫🇷", "lol", "\n")
    return {"text.txt": "".join(rng.choices(parts, k=900))}


TEXTS: dict[str, Callable[[random.Random], dict[str, str]]] = {
    "Russian": russian,
    "Chinese with escapes": chinese_with_escapes,
    "right to left, all newlines": right_to_left_with_all_newlines,
    "code": code,
    "Markdown": markdown,
    "CSV": csv,
    "log": log,
    "subtitles": subtitles,
    "emoji": emoji,
}


@pytest.fixture
def write_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the files of a text into the current folder; returns the `data.path` that names them."""
    monkeypatch.chdir(tmp_path)

    def write(name: str) -> str:
        files = TEXTS[name](random.Random(name))
        for path, content in files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content.encode())
        first = next(iter(files))
        return first if len(files) == 1 else f"tree/**/*{Path(first).suffix}"

    return write


def arguments(path: str, kind: str, folder: str, num_steps: int) -> list[str]:
    options = {f"model.{name}": value for name, value in SIZES.items()}
    options |= {f"training.{name}": value for name, value in TRAINING.items()}
    # The rate of a step does not depend on how many there are.
    options |= {"optimizer.schedule": "constant", "optimizer.warmup-steps": 0, "model.positions": "rotary"}
    options |= {"model.norm": "rmsnorm", "model.feed-forward": "swiglu", "mesh.data": 1, "lens.every": 3}
    options |= {"data.path": path, "data.tokenizer": kind, "data.bpe-vocab-size": 290}
    options |= {"run.folder": folder, "training.num-steps": num_steps}
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.fault(ROW)
@pytest.mark.full
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_run_of_it_is_the_same_when_it_is_resumed(write_text, name, kind):
    path = write_text(name)
    for folder, num_steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        assert main(arguments(path, kind, folder, num_steps)) == 0
    (_, params, _), (_, others, _) = fd.load("whole"), fd.load("parts")
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert losses(Path("whole")) == losses(Path("parts"))
    assert main(["verify", "parts"]) == 0


@pytest.mark.full
@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_run_of_it_answers(write_text, capsys, name, kind):
    path = write_text(name)
    assert main([*arguments(path, kind, "run", 1), "--lens.every=0", "--training.sample-tokens=0"]) == 0
    model, _, tokenizer = fd.load("run")
    text = read_text(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text and model.config.vocab_size == tokenizer.vocab_size
    prompt = text[40:45]
    capsys.readouterr()
    assert main(["generate", "run", f"--prompt={prompt}", "--max-new-tokens=9", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith(prompt)
    assert main(["eval", "run", path, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["bits_per_byte"] < 100


@pytest.mark.fault(ROW)
@pytest.mark.full
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_run_of_it_is_shown_and_converted_and_agrees_with_pytorch(write_text, capsys, name, kind):
    pytest.importorskip("transformers")
    path = write_text(name)
    assert main(arguments(path, kind, "run", 3)) == 0
    text = read_text(path)
    assert main(["lens", "run", f"--prompt={text[40:52]}", "--out=page.html"]) == 0
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!")
    assert main(["convert", "run", "exported"]) == 0
    assert main(["convert", "exported", "back"]) == 0
    _, params, tokenizer = fd.load("run")
    for folder in ("exported", "back"):
        _, others, other_tokenizer = fd.load(folder)
        jax.tree.map(np.testing.assert_array_equal, params, others)
        assert other_tokenizer.encode(text) == tokenizer.encode(text)
    assert main(["compare", "exported", "--steps=2"]) == 0, capsys.readouterr().out

    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained("exported")
    assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.decode(theirs(text)["input_ids"]) == text
