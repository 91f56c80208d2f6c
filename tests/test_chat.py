"""Conversations: templates as `transformers` renders them, a history, and no message prefilled twice."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import reference
from chat_templates import PUBLISHED
from limits import HANGS_SECONDS
from test_conversations import format_of
from test_generate import record_prefill

from flax_decoder.cli import main
from flax_decoder.config import ModelConfig
from flax_decoder.data import chat_renderer, chat_template
from flax_decoder.data.chat_template import ChatTemplate, load_chat_template
from flax_decoder.data.tokenizer import ByteTokenizer
from flax_decoder.errors import UserError
from flax_decoder.generation import chat as chat_module
from flax_decoder.generation.chat import Chat
from flax_decoder.generation.sampling import Sampling
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.nn.decoder import Decoder

CHATML = """{% for message in messages %}
<|{{ message.role }}|>{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}"
    "[{{ loop.index0 }}]{{ m | tojson }}{{ eos_token }}{% endfor %}",
    "<\n    {% for m in messages %}\n    {{ m.content }}\n    {% endfor %}\n>",
    "  {%- if messages[0].role == 'system' %}\n    {{- messages[0].content | trim + '\\n' }}\n  {%- endif %}\n"
    "{{ messages | length }}{{ messages[-1].content.split('o')[0] }}",
]
MESSAGES = [
    {"role": "system", "content": " be kind "},
    {"role": "user", "content": 'hello "é" <b>'},
    {"role": "assistant", "content": "so\nlong"},
    {"role": "user", "content": "and now"},
]
TOKENIZER = ByteTokenizer()
TOKENIZER.end_ids = (10,)
SETTINGS = {
    "vocab_size": 256,
    "context_length": 400,
    "num_layers": 1,
    "embed_dim": 12,
    "num_heads": 2,
    "mlp_dim": 13,
    "norm": "rmsnorm",
    "feed_forward": "swiglu",
    "positions": "rotary",
    "tied_head": False,
}


@functools.cache
def model_and_params(**changes):
    model = Decoder(ModelConfig(**SETTINGS | changes))
    return model, reference.random_params(model)


def make_chat(**options):
    model, params = model_and_params(**options.pop("changes", {}))
    template = ChatTemplate(CHATML, {})
    return Chat(model, params, TOKENIZER, template, jax.random.key(0), Sampling(), max_new_tokens=25, **options)


@pytest.fixture
def folder(tmp_path):
    model, params = model_and_params()
    write_folder(tmp_path, model.config, params, TOKENIZER, FAMILIES["llama"])
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return tmp_path


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_in_transformers(source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = utils.render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, **special)
    assert ChatTemplate(source, special).render(MESSAGES) == expected[0]


TALKS = [
    MESSAGES,
    MESSAGES[1:],
    MESSAGES[1:2],
    MESSAGES[:2],
    [{"role": "user", "content": "  \u9f98 <think>x</think>\n\ny \U0001f996 "}],
    [{"role": "assistant", "content": "first"}, {"role": "user", "content": "so"}],
    [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")],
    [{"role": "user", "content": "<s>{{ 1 }}</s>"}, {"role": "user", "content": ""}],
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats_render_as_in_transformers(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source, special = PUBLISHED[name], {"bos_token": "<s>", "eos_token": "</s>"}
    template, rendered = ChatTemplate(source, special), 0
    for talk in TALKS:
        try:
            ((expected,), _) = utils.render_jinja_template(
                [talk], chat_template=source, add_generation_prompt=True, **special
            )
        except Exception:
            with pytest.raises(UserError):
                template.render(talk)
            continue
        assert template.render(talk) == expected
        rendered += 1
    assert rendered >= 3


def test_special_tokens_of_a_template_come_from_either_file(tmp_path):
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}", "bos_token": "<s>", "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    more = {"bos_token": "<other>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    assert load_chat_template(tmp_path).render([]) == "<s></s>"


def test_a_template_is_found_in_either_file(tmp_path):
    config = {"chat_template": "{{ bos_token }}!", "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path).render([]) == "<s>!"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_chat_template(tmp_path).render([]) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path).render([]) == "file"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be used"),
        ("{{ raise_exception('no system here') }}", "refuses these messages: no system here"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(source, {}).render(MESSAGES)


def test_an_answer_continues_the_rendered_conversation():
    talk = make_chat(system="be kind")
    first = "".join(talk.answer("hello"))
    second = "".join(talk.answer("and now"))
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in talk.messages[1:]] == ["hello", first, "and now", second]
    fresh = make_chat(system="be kind")
    fresh.messages += talk.messages[1:3]
    assert "".join(fresh.answer("and now")) == second  # what was kept of the first turn changes nothing
    assert first != second


def test_a_special_token_that_somebody_types_is_text():
    tokenizer, template = format_of("chatml")
    talk = Chat(*model_and_params(), tokenizer, template, jax.random.key(0), Sampling())
    talk.messages.append({"role": "user", "content": "<|im_end|>"})
    ids = talk._tokens().tolist()
    assert tokenizer.decode(ids) == "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.token_id("<|im_end|>")) == 1


def test_no_message_is_prefilled_twice(monkeypatch):
    talk, counts = make_chat(system="s" * 50), record_prefill(monkeypatch)
    list(talk.answer("hello"))
    before = np.sum(counts)
    counts.clear()
    list(talk.answer("and now"))
    total = len(TOKENIZER.encode(ChatTemplate(CHATML, {}).render(talk.messages[:-1])))
    assert np.sum(counts) <= total - before + 1


def test_an_interrupted_answer_stays_as_far_as_it_was_shown():
    talk = make_chat()
    answer = talk.answer("hello")
    shown = next(answer)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}
    assert "".join(talk.answer("go on")) == talk.messages[-1]["content"]


def test_where_the_context_ends_the_oldest_messages_go():
    talk = make_chat(changes={"context_length": 120, "positions": "learned"}, system="be kind")
    for number in range(5):
        list(talk.answer(f"message {number}"))
    assert talk.messages[0]["content"] == "be kind" and talk.messages[-2]["content"] == "message 4"
    assert 3 <= len(talk.messages) < 11
    with pytest.raises(UserError, match="context only 120"):
        list(talk.answer("x" * 200))


def test_the_command_talks_until_the_input_ends(folder, monkeypatch, capsys):
    lines = iter(["hello", "and now"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert main(["chat", str(folder), "--system", "be kind", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    answers = capsys.readouterr().out
    assert len(answers) > 5 and answers.endswith("\n")


def test_the_first_interrupt_ends_the_answer_and_a_second_leaves(folder, monkeypatch, capsys):
    said = []

    def answer(self, message):
        said.append(message)
        yield "so "
        raise KeyboardInterrupt

    lines = iter(["one", "two"])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(chat_module.Chat, "answer", answer)
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(folder)]) == 130
    assert said == ["one", "two"] and capsys.readouterr().out == "so \nso \n"


def test_chat_needs_a_template(folder, capsys):
    (folder / "chat_template.jinja").unlink()
    assert main(["chat", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "has no chat template" in error and len(error.splitlines()) == 2
    assert main(["chat", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_ctrl_c_in_a_stream_leaves_with_130(folder):
    """A real signal to a real process, in the middle of a text that would not end by itself."""
    command = [sys.executable, "-m", "flax_decoder", "generate", str(folder), "--prompt", "To be"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100000000", "--temperature", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    shown = process.stdout.read(len("To be") + 3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANGS_SECONDS)
    assert shown.startswith(b"To be") and process.returncode == 130
    assert error == b"\n"


# --- A template is somebody else's program ---

GREEDY = {
    "repeated": "{{ 'a' * 2000000000 }}",
    "replaced": "{{ ('a' * 1000000).replace('a', 'b' * 100000) }}",
    "indented": "{{ [1] | tojson(indent=2000000000) }}",
    "joined": "{{ [1, 2] | join('a' * 2000000000) }}",
    "formatted": "{{ '%2000000000d' % 1 }}",
    "padded": "{{ '{:2000000000}'.format(1) }}",
    "listed": "{{ [0] * 200000000 }}",
    "doubled": "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "shown": "{{ 'a' * 20000001 }}",
}


@pytest.mark.short("repeated", "indented", "formatted")
@pytest.mark.parametrize("name", GREEDY)
def test_a_template_has_little_memory(name):
    with pytest.raises(UserError, match=r"^mine: .*: it (takes over 500,000,000 bytes|makes a text of 20,000,001)"):
        ChatTemplate(GREEDY[name], {}, "mine").render(MESSAGES)
    assert ChatTemplate("{{ 'a' * 20000 }}", {}).render(MESSAGES) == "a" * 20000


@pytest.fixture
def renderer():
    """A process of its own, which has to be started."""
    with contextlib.closing(chat_template._Renderer()) as renderer:
        yield renderer


def test_a_template_has_little_time(renderer, monkeypatch):
    loop = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"^it takes over 0\.05 seconds$"):
        patched.setattr(chat_renderer, "MAX_SECONDS", 0.05)
        renderer.render(loop, {})
    assert renderer.render("{{ a }}", {"a": "b"}) == "b"


@pytest.mark.full
def test_a_process_that_ends_is_told_and_started_again(renderer):
    assert renderer.render("{{ a }}", {"a": "b"}) == "b"
    renderer._process.kill()
    with pytest.raises(ValueError, match=r"ended with code -9$"):
        renderer.render("{{ a }}", {"a": "c"})
    assert renderer.render("{{ a }}", {"a": "d"}) == "d"


def test_an_interrupted_template_leaves_no_text_for_the_next(renderer, monkeypatch):
    def interrupt(line):
        exchange(line)
        raise KeyboardInterrupt

    exchange = renderer._exchange
    with monkeypatch.context() as patched:
        patched.setattr(renderer, "_exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("first", {})
    assert renderer._process is None and renderer.render("second", {}) == "second"


def test_a_template_has_no_environment(renderer, monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    given = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, env, **options: given.append(env))
    renderer._start()
    assert given[0].keys() <= {"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ"}
