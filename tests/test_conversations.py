"""Conversations as data: which tokens are learned, and what is refused."""

import functools
import io
import itertools
import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from chat_templates import PUBLISHED

import flax_decoder as fd
from flax_decoder.data import chat_template, conversations
from flax_decoder.data.chat_template import ChatTemplate
from flax_decoder.data.conversations import (
    encode_example,
    encode_examples,
    example_of,
    prompt_tokens,
    read_examples,
    turn_ends,
)
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, make_tokenizer
from flax_decoder.data.windows import example_rows, make_windows
from flax_decoder.errors import UserError
from flax_decoder.generation.chat import Chat
from flax_decoder.generation.sampling import Sampling


def talk(*contents, system=None):
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *messages]


# Special tokens of each format: bos_token, eos_token, then others; the last one is what somebody types.
SPECIAL = {
    "chatml": ["<s>", "<|im_end|>", "<|im_start|>", "<|im_end|>"],
    "llama-2": ["<s>", "</s>"],
    "llama-3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi-3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": ["<s>", "</s>"],
    "smollm3": ["<s>", "</s>"],
}
TALKS = {
    "system": talk("hello", "hi there", system="be kind"),
    "turns": talk("one", "1", "two", "2"),
    "empty": talk("hello", ""),
    "unicode": talk("é \U0001f996?", "鱘 ñ\n\U0001f996"),
    "special": talk("say X twice", "X, X."),  # X: a special token as somebody types it
}
# The whole text. What is learned is in [[ ]], special tokens that are text have a ~ in them.
TRUTH = {
    "chatml": {
        "system": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[hi there<|im_end|>]]\n",
        "turns": "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n[[1<|im_end|>]]\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n[[2<|im_end|>]]\n",
        "empty": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[<|im_end|>]]\n",
        "unicode": "<|im_start|>user\né \U0001f996?<|im_end|>\n<|im_start|>assistant\n[[鱘 ñ\n\U0001f996<|im_end|>]]\n",
        "special": "<|im_start|>user\nsay <~|im_end|> twice<|im_end|>\n<|im_start|>assistant\n"
        "[[<~|im_end|>, <~|im_end|>.<|im_end|>]]\n",
    },
    "llama-2": {
        "system": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST][[ hi there </s>]]",
        "turns": "<s>[INST] one [/INST][[ 1 </s>]]<s>[INST] two [/INST][[ 2 </s>]]",
        "empty": "<s>[INST] hello [/INST][[  </s>]]",
        "unicode": "<s>[INST] é \U0001f996? [/INST][[ 鱘 ñ\n\U0001f996 </s>]]",
        "special": "<s>[INST] say <~/s> twice [/INST][[ <~/s>, <~/s>. </s>]]",
    },
    "llama-3": {
        "system": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[hi there<|eot_id|>]]",
        "turns": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[1<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[2<|eot_id|>]]",
        "empty": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[<|eot_id|>]]",
        "unicode": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\né \U0001f996?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[鱘 ñ\n\U0001f996<|eot_id|>]]",
        "special": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsay <~|eot_id|> twice<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[<~|eot_id|>, <~|eot_id|>.<|eot_id|>]]",
    },
    "mistral": {
        "system": None,  # the template refuses it
        "turns": "<s>[INST] one [/INST][[1</s>]][INST] two [/INST][[2</s>]]",
        "empty": "<s>[INST] hello [/INST][[</s>]]",
        "unicode": "<s>[INST] é \U0001f996? [/INST][[鱘 ñ\n\U0001f996</s>]]",
        "special": "<s>[INST] say <~/s> twice [/INST][[<~/s>, <~/s>.</s>]]",
    },
    "gemma": {
        "system": None,
        "turns": "<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n[[1<end_of_turn>]]\n"
        "<start_of_turn>user\ntwo<end_of_turn>\n<start_of_turn>model\n[[2<end_of_turn>]]\n",
        "empty": "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n[[<end_of_turn>]]\n",
        "unicode": "<bos><start_of_turn>user\né \U0001f996?<end_of_turn>\n"
        "<start_of_turn>model\n[[鱘 ñ\n\U0001f996<end_of_turn>]]\n",
        "special": "<bos><start_of_turn>user\nsay <~end_of_turn> twice<end_of_turn>\n"
        "<start_of_turn>model\n[[<~end_of_turn>, <~end_of_turn>.<end_of_turn>]]\n",
    },
    "phi-3": {
        "system": "<|system|>\nbe kind<|end|>\n<|user|>\nhello<|end|>\n"
        "<|assistant|>\n[[hi there<|end|>]]\n<|endoftext|>",
        "turns": "<|user|>\none<|end|>\n<|assistant|>\n[[1<|end|>]]\n"
        "<|user|>\ntwo<|end|>\n<|assistant|>\n[[2<|end|>]]\n<|endoftext|>",
        "empty": "<|user|>\nhello<|end|>\n<|assistant|>\n[[<|end|>]]\n<|endoftext|>",
        "unicode": "<|user|>\né \U0001f996?<|end|>\n<|assistant|>\n[[鱘 ñ\n\U0001f996<|end|>]]\n<|endoftext|>",
        "special": "<|user|>\nsay <~|end|> twice<|end|>\n<|assistant|>\n[[<~|end|>, <~|end|>.<|end|>]]\n<|endoftext|>",
    },
    "zephyr": {
        "system": "<|system|>\nbe kind</s>\n<|user|>\nhello</s>\n<|assistant|>\n[[hi there</s>]]\n",
        "turns": "<|user|>\none</s>\n<|assistant|>\n[[1</s>]]\n<|user|>\ntwo</s>\n<|assistant|>\n[[2</s>]]\n",
        "empty": "<|user|>\nhello</s>\n<|assistant|>\n[[</s>]]\n",
        "unicode": "<|user|>\né \U0001f996?</s>\n<|assistant|>\n[[鱘 ñ\n\U0001f996</s>]]\n",
        "special": "<|user|>\nsay <~/s> twice</s>\n<|assistant|>\n[[<~/s>, <~/s>.</s>]]\n",
    },
    "smollm3": {  # has {% generation %}
        "system": "system: be kinduser: hello[[hi there</s>]]1",
        "turns": "user: one[[1</s>]]user: two[[2</s>]]1",
        "empty": "user: hello[[</s>]]1",
        "unicode": "user: é \U0001f996?[[鱘 ñ\n\U0001f996</s>]]1",
        "special": "user: say <~/s> twice[[<~/s>, <~/s>.</s>]]1",
    },
}


def make_library(special):
    """Byte-level BPE with the merges of a small text, and special tokens."""
    text = "hello, hi there: be kind, say one or two twice; user, assistant, system\n\n" * 4
    library = tokenizers.Tokenizer.from_str(make_tokenizer("bpe", text, 300).to_json())
    library.add_special_tokens(special)
    return library


@functools.cache
def format_of(name):
    """A tokenizer and a template."""
    special = SPECIAL[name]
    names = dict(zip(("bos_token", "eos_token"), special, strict=False))
    return SubwordTokenizer(make_library(special)), ChatTemplate(PUBLISHED[name], names, name)


def example(messages, source="talks.jsonl, line 3"):
    return example_of({"messages": messages}, source)


def learned_parts(tokenizer, ids, is_learned):
    """The texts of the stretches of tokens that are learned."""
    runs = itertools.groupby(zip(ids, is_learned, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([id for id, _ in run]) for learns, run in runs if learns]


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", TRUTH)
def test_what_the_assistant_says_is_learned(name, kind):
    tokenizer, template = format_of(name)
    messages = [message | {"content": message["content"].replace("X", SPECIAL[name][-1])} for message in TALKS[kind]]
    truth = TRUTH[name][kind]
    if truth is None:
        with pytest.raises(UserError, match=r"^talks.jsonl, line 3: .*refuses these messages: "):
            encode_example(example(messages), tokenizer, template)
        return
    ids, is_learned = encode_example(example(messages), tokenizer, template)
    assert tokenizer.decode(ids) == re.sub(r"\[\[|\]\]|~", "", truth)
    assert learned_parts(tokenizer, ids, is_learned) == re.findall(r"\[\[(.*?)\]\]", truth.replace("~", ""), re.DOTALL)
    written = re.findall("|".join(map(re.escape, SPECIAL[name])), truth)
    special_ids = [tokenizer.token_id(token) for token in SPECIAL[name]]
    assert [id for id in ids if id in special_ids] == [tokenizer.token_id(token) for token in written]
    # What the model is asked for is what it has learned to continue.
    first = is_learned.index(True)
    if "generation" not in PUBLISHED[name]:
        assert prompt_tokens(messages[: 1 + (kind == "system")], tokenizer, template) == ids[:first]


MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in TALKS if kind != "special"])
@pytest.mark.parametrize("name", ["smollm3", "chatml"])
def test_marks_mean_what_they_mean_to_transformers(name, kind):
    transformers = pytest.importorskip("transformers")
    source = PUBLISHED[name] if name == "smollm3" else MARKED_CHATML
    special = dict(zip(("bos_token", "eos_token"), SPECIAL[name], strict=False))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=make_library(SPECIAL[name]), **special)
    found = theirs.apply_chat_template(
        TALKS[kind], chat_template=source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, is_learned = encode_example(example(TALKS[kind]), format_of(name)[0], ChatTemplate(source, special))
    assert ids == found["input_ids"] and is_learned == [bool(mask) for mask in found["assistant_masks"]]
    assert any(is_learned) and not all(is_learned)


def test_marks_and_prefixes_agree():
    tokenizer, template = format_of("chatml")
    marked = ChatTemplate(MARKED_CHATML, {})
    for messages in TALKS.values():
        assert encode_example(example(messages), tokenizer, template) == encode_example(
            example(messages), tokenizer, marked
        )


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("phi-3", "<|end|>"), ("llama-2", "</s>")]
)
def test_what_ends_an_answer_is_known(name, end):
    tokenizer, template = format_of(name)
    examples = [example(TALKS["turns"]), example(TALKS["empty"])]
    found = encode_examples(examples, tokenizer, template, context_length=64)
    assert turn_ends(found, tokenizer) == (tokenizer.token_id(end),)
    assert turn_ends(encode_examples(examples[:1], tokenizer, template, context_length=10**6), ByteTokenizer()) == ()


# --- What cannot be told is refused ---

MERGED = {"a": 0, ":": 1, " ": 2, ": ": 3}

UNCLEAR = {
    "later turns change an answer": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '?' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "message 2: an answer is not the same once messages follow it",
    ),
    "another prompt": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}",
        "message 2: the prompt of an answer is not how the conversation with it begins",
    ),
    "no prompt": (
        "{% for m in messages %}</s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}",
        "message 2: the prompt of an answer is not how the conversation with it begins",
    ),
    "marks in a filter": (
        "{% for m in messages %}{% filter trim %}{% generation %} {{ m.content }} {% endgeneration %}{% endfilter %}"
        "{% endfor %}",
        "its text depends on its {% generation %} marks",
    ),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_a_template_that_does_not_tell_is_refused(kind):
    source, message = UNCLEAR[kind]
    with pytest.raises(UserError, match=r"^talks.jsonl, line 3: mine: ") as error:
        encode_example(
            example(talk("one", "first", "two", "second")), format_of("mistral")[0], ChatTemplate(source, {}, "mine")
        )
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_token_that_an_answer_ends_in_is_learned():
    tokenizer = SubwordTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(MERGED, [(":", " ")])))
    marked = "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %} "
    ids, is_learned = encode_example(example(talk("", "a:")), tokenizer, ChatTemplate(marked + "a{% endfor %}", {}))
    assert (ids, is_learned) == ([2, 0, 0, 3, 0], [False, False, True, True, False])


def test_an_answer_that_the_tokenizer_joins_with_its_prompt_is_refused():
    tokenizer = SubwordTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(MERGED, [(":", " ")])))
    pair = example_of({"prompt": "a:", "completion": " a"}, "line 7")
    with pytest.raises(
        UserError, match=r"^line 7: the tokenizer joins the end of a prompt with the start of its answer"
    ):
        encode_example(pair, tokenizer, None)
    ids, is_learned = encode_example(example_of({"prompt": "a: ", "completion": "a"}, ""), tokenizer, None)
    assert (ids, is_learned) == ([0, 3, 0], [False, False, True])


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_tokenizer_without_special_tokens_has_them_as_text(kind):
    source = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}a: {% endif %}"
    tokenizer = ByteTokenizer() if kind == "byte" else CharTokenizer("\n :</>abcsu\U0001f996")
    ids, is_learned = encode_example(
        example(talk("a</s>", "b</s>\U0001f996", "c", "")), tokenizer, ChatTemplate(source, {"eos_token": "</s>"})
    )
    assert tokenizer.decode(ids) == "u: a</s>\na: b</s>\U0001f996\nu: c\na: \n"
    assert learned_parts(tokenizer, ids, is_learned) == ["b</s>\U0001f996\n", "\n"]


def test_a_prompt_and_its_completion():
    tokenizer, template = format_of("llama-2")
    pair = example_of({"prompt": "hello", "completion": "hi </s> there"}, "")
    assert encode_example(pair, tokenizer, template) == encode_example(
        example(talk("hello", "hi </s> there")), tokenizer, template
    )
    # Without a template it is text as it stands.
    ids, is_learned = encode_example(pair, tokenizer, None)
    assert tokenizer.decode(ids) == "hellohi </s> there</s>" and ids.count(tokenizer.end_ids[0]) == 2
    assert learned_parts(tokenizer, ids, is_learned) == ["hi </s> there</s>"]
    with pytest.raises(
        UserError, match=r"^talks.jsonl, line 3: is a conversation, but the model has no chat template;\n"
    ):
        encode_example(example(talk("a", "b")), tokenizer, None)


# --- Lines ---


def read(content, name="talks.jsonl"):
    return list(read_examples(io.BytesIO(content.encode()), name))


def line_of(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


GOOD = line_of(("user", "a"), ("assistant", "b"))
BAD_LINES = {
    "no JSON": ("{'messages': []}", "is not valid JSON"),
    "an array": (f"[{GOOD}]", "must hold a JSON object, not list; each line must be one JSON object: of an array, jq"),
    "unknown key": ('{"messages": [], "id": 1}', "has the unknown key 'id'; the keys of an example are"),
    "half a pair": ('{"prompt": "a"}', "has 'prompt'; the keys of an example are"),
    "no key": ("{}", "has no key; the keys"),
    "no text": ('{"prompt": "a", "completion": null}', "completion = None must be a text"),
    "no message": ('{"messages": []}', "messages = [] must be a list of at least one message"),
    "message with a name": ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "message 1 is {"),
    "content in parts": (
        '{"messages": [{"role": "user", "content": []}]}',
        "the content of message 1 = [] must be a text",
    ),
    "unknown role": (line_of(("tool", "a")), "message 1 has the role 'tool', but it is the turn of \"user\""),
    "assistant first": (line_of(("assistant", "a")), "message 1 has the role 'assistant'"),
    "system later": (line_of(("user", "a"), ("system", "b")), "message 2 has the role 'system'"),
    "twice": (line_of(("system", "s"), ("user", "a"), ("user", "b")), "message 3 has the role 'user'"),
    "no answer": (line_of(("user", "a")), "the last message must be of the assistant"),
    "role that is no text": ('{"messages": [{"role": [], "content": "a"}]}', "message 1 has the role []"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "completion": "b"}', "is not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_that_is_no_example_is_refused_with_its_number(kind):
    line, message = BAD_LINES[kind]
    with pytest.raises(UserError) as error:
        read(f"{GOOD}\n\n{line}\n")
    assert str(error.value).startswith("talks.jsonl, line 3: ") and message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_lines_are_read_one_by_one_and_bounded(monkeypatch):
    examples = read(f"\ufeff{GOOD}\r\n\n" + '{"completion": "d", "prompt": "c"}')
    assert [one.source for one in examples] == ["talks.jsonl, line 1", "talks.jsonl, line 3"]
    assert [one.is_prompt for one in examples] == [False, True]
    assert examples[1].messages == ({"role": "user", "content": "c"}, {"role": "assistant", "content": "d"})
    for content in ("", " \n\n"):
        with pytest.raises(UserError, match=r"^talks.jsonl: has no example; each line must be one JSON object"):
            read(content)
    monkeypatch.setattr(conversations, "LINE", conversations.Limits(100, 10_000))
    with pytest.raises(UserError, match=r"^talks.jsonl, line 2: has 101 bytes, over the limit of 100"):
        read(f"{GOOD}\n" + "x" * 10**6)


def test_what_is_cut_and_what_is_dropped_is_counted():
    tokenizer = ByteTokenizer()
    tokenizer.end_ids = (0,)
    pairs = [("ab", "cd"), ("abc", "defgh"), ("abcdefgh", "i"), ("", "a")]
    examples = [example_of({"prompt": prompt, "completion": text}, "") for prompt, text in pairs]
    found = encode_examples(iter(examples), tokenizer, None, context_length=6)
    assert (found.num_truncated, found.num_dropped) == (1, 1)
    assert found.tokens.tolist() == [*b"abcd\0abcdefga\0"] and found.ends.tolist() == [5, 12, 14]
    assert "".join("01"[int(learns)] for learns in found.learned) == "00111" + "0001111" + "11"
    assert (found.tokens.dtype, found.learned.dtype, found.ends.dtype) == (np.int32, np.bool_, np.int64)
    tokenizer.end_ids = ()
    alone, nothing = (example_of({"prompt": "", "completion": text}, "") for text in ("a", ""))
    assert encode_examples([alone, *examples, nothing], tokenizer, None, context_length=6).num_dropped == 4
    with pytest.raises(
        UserError,
        match=r"^the conversations: no example is left of 1: within model.context_length = 6 none",
    ):
        encode_examples(examples[2:3], tokenizer, None, context_length=6)


def test_one_process_renders_all(monkeypatch):
    starts = []
    monkeypatch.setattr(
        chat_template._Renderer,
        "_start",
        lambda self, start=chat_template._Renderer._start: starts.append(1) or start(self),
    )
    tokenizer, template = format_of("chatml")
    encode_examples([example(TALKS["turns"])] * 20, tokenizer, template, context_length=64)
    assert len(starts) <= 1


# --- The whole round ---


@pytest.mark.full
@pytest.mark.parametrize("packing", [True, False])
def test_a_model_learns_to_answer_and_to_end_its_answer(packing):
    tokenizer, template = SubwordTokenizer(make_library(SPECIAL["chatml"])), format_of("chatml")[1]
    talks = [
        talk("say one", "one"),
        talk("say two", "two twice", "and one", "one"),
        talk("hello", "hi there", system="s"),
    ]
    examples = encode_examples(map(example, talks), tokenizer, template, context_length=64)
    tokenizer.end_ids = turn_ends(examples, tokenizer)
    config = fd.load_config(
        None,
        {
            "model.vocab_size": tokenizer.vocab_size,
            "model.embed_dim": 48,
            "model.num_layers": 2,
            "model.positions": "rotary",
            "training.num_steps": 150,
            "optimizer.learning_rate": 5e-3,
        },
    )
    model = fd.Decoder(config.model)
    windows = make_windows(examples, context_length=64, packing=packing)
    state, step = fd.init_state(model, config, rng=jax.random.key(0)), jax.jit(fd.train_step)
    for number in range(150):
        rows = np.arange(3 * number, 3 * number + 3)
        state, metrics = step(state, example_rows(examples, windows, rows, seed=0, context_length=64))
    assert metrics["loss"] < 0.05
    for messages in talks:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        chat = Chat(
            model, state.params, tokenizer, template, jax.random.key(0), Sampling(temperature=0.0), system=system
        )
        said = [message["content"] for message in messages if message["role"] != "system"]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            assert "".join(chat.answer(question)) == answer
