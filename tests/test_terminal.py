"""Control characters of prompts, answers and names reach a pipe, and never a terminal; through a real one."""

import ast
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
from limits import HANGS_SECONDS

import flax_decoder
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.io.terminal import print_escaped
from flax_decoder.nn.decoder import Decoder

CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
ATTACK = "a\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\r"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\x0d"
TEXT = "é 日本 \U0001f600 \u200d\ttab"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_all_controls_but_newline_and_tab_are_shown():
    terminal, pipe = Terminal(), io.StringIO()
    print_escaped(CONTROLS + TEXT, file=terminal)
    print_escaped(CONTROLS + TEXT, file=pipe)
    assert pipe.getvalue() == CONTROLS + TEXT + "\n"
    shown = terminal.getvalue()
    assert shown.endswith(TEXT + "\n") and shown.startswith(r"\x00\x01") and r"\x1b" in shown and r"\x9f" in shown
    assert [character for character in shown if character in CONTROLS] == ["\t", "\n", "\t", "\n"]
    assert shown.count("\\x") == 63


def test_text_that_is_turned_around_or_broken_is_shown():
    turning = "\u202a\u202e\u2066\u2069\u2028\u2029"
    terminal, pipe = Terminal(), io.StringIO()
    for file in (terminal, pipe):
        print_escaped(f"{turning} \u05d0\u200f", end="", file=file)
    assert terminal.getvalue() == r"\u202a\u202e\u2066\u2069\u2028\u2029" + " \u05d0\u200f"
    assert pipe.getvalue() == f"{turning} \u05d0\u200f"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that writes control characters at random, as it knows little else."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = CharTokenizer(ATTACK + "\n")
    settings = {"vocab_size": tokenizer.vocab_size, "num_layers": 1, "embed_dim": 12, "num_heads": 2}
    settings |= {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rotary", "tied_head": False}
    model = Decoder(ModelConfig(**settings))
    write_folder(path, model.config, reference.random_params(model), tokenizer, FAMILIES["llama"])
    (path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return path


# Runs each command in turn, which saves starting Python and JAX for each, and says with which code each ended.
RUN_ALL = """
import json, sys
from flax_decoder.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    print(f"== {code} ==", flush=True)
"""


def on_a_terminal(*commands, typed=b""):
    """The code of each command where both outputs are a terminal, and what it writes, as the terminal gets it."""
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    process.stdin.write(typed)
    process.stdin.close()
    received = b""
    try:
        while part := os.read(control, 4096):
            received += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(control)
    assert process.wait(timeout=HANGS_SECONDS) == 0, received
    shown = received.decode().replace("\r\n", "\n")  # as a terminal ends its lines
    *parts, nothing = re.split(r"== (\d+) ==\n", shown)
    assert nothing == ""
    return dict(zip(commands, zip(map(int, parts[1::2]), parts[::2], strict=True), strict=True))


def has_controls(text):
    return any(character in CONTROLS.replace("\n", "").replace("\t", "") for character in text)


QUOTING = [
    ("generate", f"/nowhere/{ATTACK}", "--prompt", "a"),
    ("eval", "/nowhere", f"/nowhere/{ATTACK}"),
    ("train", "--data.path", f"/nowhere/{ATTACK}"),
    ("train", f"--{ATTACK}", "1"),
    ("lens" + ATTACK,),
]


def test_no_command_prints_a_control_character(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[2J"}')
    sampling = ("--max-new-tokens", "200", "--temperature", "2")
    generate = ("generate", str(folder), "--prompt", ATTACK, *sampling, "--num-samples", "2")
    chat = ("chat", str(folder), *sampling)
    quoting = [*QUOTING, ("eval", str(tmp_path), __file__)]
    printed = on_a_terminal(generate, chat, *quoting, typed=b"a\n")
    for command, (code, text) in printed.items():
        assert code == (2 if command in quoting else 0)
        assert r"\x1b" in text and not has_controls(text), command
    text = printed[generate][1]
    assert text.startswith(SHOWN) and f"\n\n{SHOWN}" in text and r"\x1b" in text.replace(SHOWN, "")


def bare_prints(source):
    """Lines that print more than constants and numbers without escaping it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if (name == "print" and not all(map(is_harmless, node.args))) or name in (
            "sys.stdout.write",
            "sys.stderr.write",
        ):
            yield node.lineno


def is_harmless(value):
    """Whether an expression is a text that is written here, but for numbers: a text has no number format."""
    if isinstance(value, ast.JoinedStr):
        return all(map(is_harmless, value.values))
    if isinstance(value, ast.FormattedValue):
        kind = "" if value.format_spec is None else ast.unparse(value.format_spec)
        return value.conversion == -1 and re.search(r"[deg%f,]'$", kind) is not None
    return isinstance(value, ast.Constant)


PRINTS = [
    ("print('a', 1)", []),
    ("print(f'{n:,} {x:.4f} {n:d}', file=sys.stderr)", []),
    ("print(f'{name}')", [1]),
    ("print(f'{name!r:d}')", [1]),
    ("print(f'{name:>5}')", [1]),
    ("print(name)", [1]),
    ("print(*names)", [1]),
    ("sys.stdout.write(name)", [1]),
    ("print_escaped(name)", []),
]


@pytest.mark.parametrize(("source", "lines"), PRINTS)
def test_what_is_a_bare_print(source, lines):
    assert [*bare_prints(source)] == lines


def test_nothing_but_constants_and_numbers_is_printed_unescaped():
    """Everything else may come from a file, with codes that a terminal obeys."""
    package = Path(flax_decoder.__file__).parent
    found = {path.relative_to(package).as_posix(): [*bare_prints(path.read_text())] for path in package.rglob("*.py")}
    # `print_escaped` itself prints.
    assert [name for name, lines in found.items() if len(lines) != (name == "io/terminal.py")] == []
