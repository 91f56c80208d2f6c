"""Control characters of prompts, answers and names reach a pipe, and never a terminal; through a real one."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import reference
from limits import HANGS_SECONDS

from flax_decoder.cli import main
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


def words(arguments):
    return tuple(map(str, arguments))


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


def through_a_pipe(capfdbinary, *arguments):
    """What a command writes where its output is none."""
    capfdbinary.readouterr()
    code = main(arguments)
    output, errors = capfdbinary.readouterr()
    return code, (output + errors).decode()


def has_controls(text):
    return any(character in CONTROLS.replace("\n", "").replace("\t", "") for character in text)


GENERATE = ("--prompt", ATTACK, "--max-new-tokens", 200, "--temperature", 2, "--num-samples", 2)
CHAT = ("--max-new-tokens", 100, "--temperature", 2)
QUOTING = [
    ("generate", f"/nowhere/{ATTACK}", "--prompt", "a"),
    ("eval", "/nowhere", f"/nowhere/{ATTACK}"),
    ("train", "--data.path", f"/nowhere/{ATTACK}"),
    ("train", f"--{ATTACK}", "1"),
    ("lens" + ATTACK,),
]


@pytest.fixture(scope="module")
def shown(folder):
    """What each command wrote on a terminal."""
    return on_a_terminal(words(("generate", folder, *GENERATE)), words(("chat", folder, *CHAT)), *QUOTING, typed=b"a\n")


def test_prompts_and_generated_text_are_shown(folder, shown, capfdbinary):
    command = words(("generate", folder, *GENERATE))
    code, raw = through_a_pipe(capfdbinary, *command)
    assert code == 0 and raw.startswith(ATTACK) and has_controls(raw.replace(ATTACK, ""))
    code, text = shown[command]
    assert code == 0 and text.startswith(SHOWN) and f"\n\n{SHOWN}" in text and not has_controls(text)
    for code_point in range(0xA0):
        if has_controls(chr(code_point)):
            raw = raw.replace(chr(code_point), f"\\x{code_point:02x}")
    assert raw == text


def test_answers_are_shown(folder, shown, capfdbinary, monkeypatch):
    command = words(("chat", folder, *CHAT))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    code, raw = through_a_pipe(capfdbinary, *command)
    assert code == 0 and has_controls(raw)
    code, text = shown[command]
    assert code == 0 and r"\x1b" in text and not has_controls(text)


@pytest.mark.parametrize("arguments", QUOTING)
def test_messages_that_quote_the_user_are_shown(arguments, shown):
    code, text = shown[arguments]
    assert code == 2 and r"\x1b" in text and not has_controls(text)


def test_messages_that_quote_a_file_are_shown(tmp_path):
    (tmp_path / f"{ATTACK}.safetensors").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[2J"}')
    ((code, text),) = on_a_terminal(words(("eval", tmp_path, __file__))).values()
    assert code == 2 and r"\x1b" in text and not has_controls(text)
