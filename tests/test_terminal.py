"""Control characters of prompts, answers and names reach a pipe, and never a terminal; through a real one."""

import io
import os
import pty
import subprocess
import sys

import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.interop.families import FAMILIES
from flax_decoder.interop.hugging_face import write_folder
from flax_decoder.nn.decoder import Decoder
from flax_decoder.terminal import say

CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
ATTACK = "a\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\r"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\x0d"
TEXT = "é 日本 \U0001f600 \u200d\ttab"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_all_controls_but_newline_and_tab_are_shown():
    terminal, pipe = Terminal(), io.StringIO()
    say(CONTROLS + TEXT, file=terminal)
    say(CONTROLS + TEXT, file=pipe)
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


def on_a_terminal(*arguments, typed=b""):
    """What a command writes where both of its outputs are a terminal, as the terminal gets it."""
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flax_decoder", *map(str, arguments)],
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
    return process.wait(timeout=60), received.decode().replace("\r\n", "\n")  # as a terminal ends its lines


def through_a_pipe(*arguments, typed=b""):
    command = [sys.executable, "-m", "flax_decoder", *map(str, arguments)]
    result = subprocess.run(command, input=typed, capture_output=True, timeout=60, check=False)
    return result.returncode, (result.stdout + result.stderr).decode()


def has_controls(text):
    return any(character in CONTROLS.replace("\n", "").replace("\t", "") for character in text)


GENERATE = ("--prompt", ATTACK, "--max-new-tokens", 200, "--temperature", 2)


def test_prompts_and_generated_text_are_shown(folder):
    code, raw = through_a_pipe("generate", folder, *GENERATE, "--num-samples", 2)
    assert code == 0 and raw.startswith(ATTACK) and has_controls(raw.replace(ATTACK, ""))
    code, shown = on_a_terminal("generate", folder, *GENERATE, "--num-samples", 2)
    assert code == 0 and shown.startswith(SHOWN) and f"\n\n{SHOWN}" in shown and not has_controls(shown)
    for code_point in range(0xA0):
        if has_controls(chr(code_point)):
            raw = raw.replace(chr(code_point), f"\\x{code_point:02x}")
    assert raw == shown


def test_answers_are_shown(folder):
    chat = ("chat", folder, "--max-new-tokens", 100, "--temperature", 2)
    code, raw = through_a_pipe(*chat, typed=b"a\n")
    assert code == 0 and has_controls(raw)
    code, shown = on_a_terminal(*chat, typed=b"a\n")
    assert code == 0 and r"\x1b" in shown and not has_controls(shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", f"/nowhere/{ATTACK}", "--prompt", "a"),
        ("eval", "/nowhere", f"/nowhere/{ATTACK}"),
        ("train", "--data.path", f"/nowhere/{ATTACK}"),
        ("train", f"--{ATTACK}", "1"),
        ("lens" + ATTACK,),
    ],
)
def test_messages_that_quote_the_user_are_shown(arguments):
    code, shown = on_a_terminal(*arguments)
    assert code == 2 and r"\x1b" in shown and not has_controls(shown)


def test_messages_that_quote_a_file_are_shown(tmp_path):
    (tmp_path / f"{ATTACK}.safetensors").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[2J"}')
    code, shown = on_a_terminal("eval", tmp_path, __file__)
    assert code == 2 and r"\x1b" in shown and not has_controls(shown)
