"""What the README shows works: its Python runs, its commands parse, its paths exist."""

import re
import shlex
from pathlib import Path

import pytest

from flax_decoder.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["weights_LBKGTS"].shape == (3, 8, 4, 1, 7, 7)
    for page in ("generation.md", "many_devices.md"):  # compare.md needs PyTorch: test_ledger
        for block in blocks("python", (ROOT / "docs" / page).read_text(encoding="utf-8")):
            exec(compile(block, page, "exec"), names)


def commands() -> list[list[str]]:
    texts = [block for page in PAGES for block in blocks("bash", page)]
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    return [line for line in lines if line and line[0] != "pip"]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command: list[str]) -> None:
    if command[:2] == ["python", "train.py"]:
        command = ["flax-decoder", "train", *command[2:]]
    assert command[0] == "flax-decoder"
    build_parser().parse_args(command[1:])  # raises UserError for what it does not know


def test_paths_exist() -> None:
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    named = re.findall(r"\b(?:configs|benchmarks|flax_decoder|docs)/[\w./]*\w", README)
    assert linked and named
    for path in {*linked, *named}:
        assert (ROOT / path).exists(), path


def test_the_set_up_commands_stand_on_top() -> None:
    train, test = "pip install -e . && python train.py", 'pip install -e ".[test]" && pytest'
    assert README.index(train) < README.index(test) < README.index("## ")
