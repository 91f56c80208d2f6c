"""What the README and the pages of the docs show works: Python runs, commands parse and, where cheap, run.

The blocks of a page run in order, with one namespace a page, in a folder with `configs/`, a text `my_text.txt` and
`runs/default`, a run of the default model that has learned for a few steps. A block that cannot run here says why in
its title, as in ```` ```python title="needs a TPU" ````: it is compiled only, but run where what it needs is PyTorch
and that is there. A title that is a path says that the block is quoted from that file: it must stand there.
"""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from flax_decoder import cli
from flax_decoder.errors import UserError
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.parallel.mesh import mesh_sizes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# These only read a run folder, or write a file beside it, in a second or so.
CHEAP = {"generate", "eval", "verify", "convert", "lens"}
# Of these, the ones with programs of their own to compile: with --full, as test_cli.py has them anyway.
COMPILED = {"generate", "lens"}
# What a command may begin with whose arguments are not ours to check.
OTHERS = {"python3", "source", "ruff", "mypy", "mkdocs"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r'^( *)```(\w*)(?: title="([^"\n]+)")?\n(.*?)^\1```$', text, re.DOTALL | re.MULTILINE)
    blocks = [Block(m[2], m[3] or "", textwrap.dedent(m[4]), text.count("\n", 0, m.start()) + 2) for m in fences]
    # Whatever else begins with a fence has a misspelt attribute, and would not be looked at.
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page.name}: a fence that is not known"
    return blocks


def blocks(language: str) -> list[tuple[Path, Block]]:
    return [(page, block) for page in PAGES for block in blocks_of(page) if block.language == language]


def commands_of(text: str) -> list[list[str]]:
    """The commands of a block of shell, each as its words."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "|", ";"):
                found += [command] if command else []
                command = []
            elif command or not re.match(r"\w+=", word):  # variables may stand in front
                command.append(word)
    return found


def of_ours(command: list[str]) -> list[str] | None:
    """The arguments of `flax-decoder`, which `train.py` shares; None for other commands."""
    if command[:2] == ["python", "train.py"]:
        return ["train", *command[2:]]
    return command[1:] if command[0] == "flax-decoder" else None


ALL_COMMANDS = list(dict.fromkeys(tuple(c) for _, block in blocks("bash") for c in commands_of(block.text)))


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_commands_parse(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ours = of_ours(list(command))
    if ours is not None:
        options = cli.build_parser().parse_args(ours)  # UserError for what it does not know
        if hasattr(options, "config") and not hasattr(options, "run.start_from"):  # which reads that run
            cli._config_of(options)  # UserError for a wrong value
    elif command[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", " ".join(command))))
        assert command[1] == "install" and set(named) <= set(project["optional-dependencies"])
    elif command[0] == "python":
        script = (ROOT / command[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in command[2:] if word.startswith("--"))
    elif command[0] == "pytest":
        assert all((ROOT / word).exists() for word in command[1:] if not word.startswith("-"))
    else:
        assert command[0] in OTHERS


# Those of text blocks stand behind a launcher.
TRAINING = {
    tuple(command[command.index("train.py") + 1 :])
    for language in ("bash", "text")
    for _, block in blocks(language)
    for command in (commands_of(block.text) if "python train.py" in block.text else [])
    if "train.py" in command and "CONFIG.toml" not in command and "--run.start-from" not in command
} | {(str(path.relative_to(ROOT)),) for path in (ROOT / "configs").glob("*.toml")}
# Every device of 8, 16 and 32 has its part of what is meant for many; the rest uses fewer, and says so at its start.
FOR_MANY = ("gpt2_124m", "shakespeare_char.toml", "--mesh.context 8")


@pytest.mark.parametrize("num_devices", [8, 16, 32])
@pytest.mark.parametrize("command", sorted(TRAINING), ids=" ".join)
def test_a_training_uses_all_devices_or_is_refused_or_has_too_few_rows(
    command: tuple[str, ...], num_devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = cli._config_of(cli.build_parser().parse_args(["train", *command]))
    config = dataclasses.replace(config, model=config.model.with_vocab_size(256))
    try:
        sizes = mesh_sizes(config, num_devices)
    except UserError as error:
        assert re.search("devices are more than|set it to", str(error))
        assert not any(word in " ".join(command) for word in FOR_MANY)
        return
    used, rows = math.prod(sizes.values()), config.training.batch_size
    assert used == num_devices or rows % num_devices != 0
    assert used == num_devices or not any(word in " ".join(command) for word in FOR_MANY)
    assert (rows // (sizes["data"] * sizes["fsdp"])) % config.training.num_parts(sizes["data"] * sizes["fsdp"]) == 0


@pytest.mark.full
@pytest.mark.parametrize(
    ("num_devices", "mesh"), [(8, []), (16, ["--mesh.fsdp", "-1"]), (32, ["--mesh.fsdp", "8", "--mesh.tensor", "2"])]
)
def test_the_gpt2_config_trains_on_many_devices(num_devices: int, mesh: list[str], tmp_path: Path) -> None:
    """Small, in a process that simulates so many devices."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question:\n" * 100)
    small = {"model.num-layers": 1, "model.embed-dim": 96, "model.num-heads": 2, "model.context-length": 8}
    small |= {"model.vocab-size": 258, "data.tokenizer": "byte", "data.path": "text.txt", "training.num-steps": 2}
    small |= {"lens.every": 0, "training.eval-batches": 1}
    small |= {"training.sample-tokens": 5, "run.folder": "run", "optimizer.warmup-steps": 1}
    arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "gpt2_124m.toml", *arguments, *mesh]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"on {num_devices} devices (cpu)" in done.stdout


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run folder of the default model, after a few steps."""
    folder = tmp_path_factory.mktemp("pages") / "runs/default"
    few = {"training.num-steps": 20, "training.eval-batches": 1, "training.sample-tokens": 10}
    if not request.config.getoption("--full"):
        # Its layers and heads, in programs of a quarter of the size.
        few |= {"training.num-steps": 4, "model.scan-layers": "true", "model.embed-dim": 32}
    arguments = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--run.folder", str(folder), *arguments]) == 0
    return folder


RUNNING = [page for page in PAGES if any(block.language in ("python", "bash") for block in blocks_of(page))]


@pytest.mark.short("README.md", "add_a_family.md", "many_processes.md", "plan.md", "reliability.md")
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_a_page_runs(
    page: Path,
    default_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    if not request.config.getoption("--full"):  # layers that are alike are compiled once
        tiny = (tmp_path / "configs/tiny.toml").read_text(encoding="utf-8")
        (tmp_path / "configs/tiny.toml").write_text(tiny.replace("[model]\n", "[model]\nscan_layers = true\n"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/default").symlink_to(default_run)
    (tmp_path / "my_text.txt").write_text("The text of the function.\n" * 20)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    # What a page registers is there for that page only.
    known = set(FAMILIES)
    request.addfinalizer(lambda: [FAMILIES.pop(name) for name in FAMILIES.keys() - known])
    for block in blocks_of(page):
        if block.language == "bash":
            for command in commands_of(block.text):
                run_where_cheap(command, CHEAP if request.config.getoption("--full") else CHEAP - COMPILED)
        elif block.language == "python" and not is_quoted(block):
            # Line numbers of the page, so that a traceback leads to it.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            # As users have it; the tests of the package are stricter.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                if can_run(block):
                    exec(code, names)


def run_where_cheap(command: list[str], cheap: set[str]) -> None:
    arguments = of_ours(command)
    if arguments is None or arguments[0] not in cheap:
        return
    options = cli.build_parser().parse_args(arguments)
    needed = {getattr(options, name, None) for name in ("path", "file", "source", "draft")}
    needs_torch = getattr(options, "to", None) == "nanogpt" or any(str(path).endswith(".pt") for path in needed)
    if needs_torch and importlib.util.find_spec("torch") is None:
        return
    if all(Path(path).exists() for path in needed if path is not None):
        assert cli.main(arguments) == 0, command


def is_quoted(block: Block) -> bool:
    return "/" in block.title or block.title.endswith(".py")


def can_run(block: Block) -> bool:
    assert not block.title or block.title.startswith("needs "), f"title {block.title!r}: is no path, and no need"
    if block.title == "needs PyTorch":
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return not block.title


QUOTED = [(page, block) for page, block in blocks("python") + blocks("toml") if is_quoted(block)]


@pytest.mark.parametrize(("page", "block"), QUOTED, ids=[f"{page.name}:{block.line}" for page, block in QUOTED])
def test_what_is_quoted_stands_in_its_file(page: Path, block: Block) -> None:
    rest = [line.strip() for line in (ROOT / block.title).read_text(encoding="utf-8").splitlines()]
    for part in re.split(r"^ *(?:# )?\.\.\.\n", block.text, flags=re.MULTILINE):
        lines = [line.strip() for line in part.strip("\n").splitlines()]
        places = [i for i in range(len(rest)) if rest[i : i + len(lines)] == lines]
        assert places, f"{page.name}: not in {block.title}, or not in this order:\n{part}"
        rest = rest[places[0] + len(lines) :]


def test_the_set_up_commands_stand_on_top() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    train, test = "pip install -e . && python train.py", 'pip install -e ".[test]" && pytest'
    assert readme.index(train) < readme.index(test) < readme.index("## ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])(?:configs|benchmarks|flax_decoder|docs|tests)/[\w./]*\w", text)
    for path in set(named):
        assert (ROOT / path).exists(), path


def test_commands_are_cut_as_a_shell_does() -> None:
    text = 'A=1 one "two words" && three \\\n  four # five\nsix | seven'
    assert commands_of(text) == [["one", "two words"], ["three", "four"], ["six"], ["seven"]]
