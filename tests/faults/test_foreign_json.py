"""Malicious config.json, tokenizer.json and the like: refused by name, at little cost."""

import base64
import copy
import json

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from model_folder import INDEX, WEIGHTS, bounded, change, fuzzed, make_folder, refusal

import flax_decoder as fd
from flax_decoder.data import tokenizer as data_tokenizer
from flax_decoder.data.chat_template import load_chat_template
from flax_decoder.data.tokenizer import ByteTokenizer, SubwordTokenizer, make_tokenizer, parse_tokenizer
from flax_decoder.data.tokenizer_growth import growth_of

SETTINGS_ROW = pytest.mark.fault("config.json")
TOKENIZER_ROW = pytest.mark.fault("tokenizer.json")
FUZZ = pytest.mark.fault("JSON, fuzzed")

# Invalid JSON for any file.
BROKEN = {
    "nothing": (lambda: b"", "is not valid JSON"),
    "no end": (lambda: b'{"a": [', "is not valid JSON"),
    "a list": (lambda: b"[1]", "must hold a JSON object"),
    "a name twice": (lambda: b'{"model_type": "gpt2", "model_type": "llama"}', "has the name 'model_type' twice"),
    "no UTF-8": (lambda: b'{"a": "\xff"}', "is not valid JSON"),
    "UTF-16": (lambda: '{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    "a byte order mark": (lambda: b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
    "NaN": (lambda: b'{"a": NaN}', "has the number 'NaN'"),
    "minus infinity": (lambda: b'{"a": [-Infinity]}', "has the number '-Infinity'"),
    "1e999": (lambda: b'{"a": 1e999}', "has the number '1e999'"),
    "5,000 digits": (lambda: b'{"a": ' + b"7" * 5000 + b"}", "is not valid JSON"),
    "half a surrogate pair": (lambda: b'{"a": "\\uDFFF"}', "surrogates not allowed"),
    "depth of 100,000": (lambda: b"[" * 100_000, "levels deep"),
    "depth of 33": (lambda: b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "levels deep"),
    "100 MB of lists": (lambda: b'{"a": [' + b"[]," * 33_000_000 + b"[]]}", "over the limit of"),
    "100 MB of spaces": (lambda: b"{" + b" " * 100_000_000 + b"}", "over the limit of"),
}
FILES = ["config.json", "generation_config.json", "tokenizer.json", INDEX]
# All are read by the same function; for each file, a few kinds show that it is.
SHORT = [f"{name}-{kind}" for name in FILES for kind in ("a name twice", "depth of 33", "100 MB of spaces")]


@SETTINGS_ROW
@pytest.mark.short(*SHORT, *(f"config.json-{kind}" for kind in BROKEN))
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_json_that_means_nothing_or_too_much_is_refused(name, kind, tmp_path):
    content, part = BROKEN[kind]
    folder = make_folder(tmp_path / "model")
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content())
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: ") and part in message


@SETTINGS_ROW
@pytest.mark.parametrize("kind", BROKEN)
def test_the_same_for_the_settings_of_a_chat(kind, tmp_path):
    content, part = BROKEN[kind]
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(content())
    with bounded(), pytest.raises(fd.UserError) as caught:
        load_chat_template(tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and part in str(caught.value)


@SETTINGS_ROW
@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "auto_map names Python code"),
        ({"model_type": "evil" * 10_000}, "model_type = 'evil"),
        ({"hidden_act": "x\n\x1b[2J\n" * 1000}, "hidden_act = 'x\\n\\x1b[2J"),
        ({"rope" + "_more" * 99: 1}, "is not known for llama"),
        ({"more" * 126: 1}, "is too long or cannot be printed"),
        ({"a\nb": 1}, "is too long or cannot be printed"),
        ({"vocab_size": True}, "vocab_size = True must be a positive whole number"),
        ({"vocab_size": -(10**30)}, "must be a positive whole number"),
        ({"hidden_size": 10**4000}, "is more than 2,147,483,647"),
        ({"max_position_embeddings": 2**31}, "is more than 2,147,483,647"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "base"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type = ['linear']"),
        ({"rope_scaling": {"x": [{}] * 1000}}, "x = [{}, {}"),
        ({"num_hidden_layers": 10_001}, "is more than 10,000"),
    ],
)
def test_settings_that_ask_for_the_absurd_are_refused(fields, part, tmp_path):
    folder = make_folder(tmp_path / "model")
    change(folder / "config.json", **fields)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ") and part in message


# --- tokenizer.json ---

TEXT = "the cat sat on the mat; the cat sat again\n\nand again " * 5
BPE = json.loads(make_tokenizer("bpe", TEXT, 280).to_json())


def changed(**fields):
    return json.dumps(BPE | fields).encode()


def with_model(**fields):
    return changed(model=BPE["model"] | fields)


def added(content="<s>", id=280):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return [{"id": id, "content": content, "special": True, **flags}]


HOSTILE_TOKENIZERS = {
    "no model": lambda: json.dumps({name: value for name, value in BPE.items() if name != "model"}).encode(),
    "unknown model": lambda: with_model(type="Evil"),
    "model of another kind": lambda: with_model(type="Unigram"),
    "a token twice": lambda: with_model().replace(b'"vocab": {', b'"vocab": {"the": 1, "the": 2, '),
    "negative id": lambda: with_model(vocab={"a": -1}),
    "id that is a float": lambda: with_model(vocab={"a": 0.5}),
    "id over 2^32": lambda: with_model(vocab={"a": 2**32}),
    "id of 4 billion": lambda: with_model(vocab={"a": 2**32 - 1}, merges=[]),
    "added id of 4 billion": lambda: changed(added_tokens=added(id=2**32 - 2)),
    "no vocabulary": lambda: with_model(vocab={}, merges=[]),
    "merge of unknown tokens": lambda: with_model(merges=[["no", "such"]]),
    "merge of three": lambda: with_model(merges=["a b c"]),
    "a prefix longer than its tokens": lambda: with_model(continuing_subword_prefix="e" * 99),
    "broken regular expression": lambda: changed(
        normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "broken precompiled map": lambda: changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "template of unknown tokens": lambda: changed(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "Unigram without its unknown token": lambda: changed(
        model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]], "byte_fallback": False}
    ),
    "deep normalizers": lambda: changed(normalizer=_nested(40)),
    "a million names": lambda: b'{"model": {' + b'"a":0,' * 2_000_000 + b'"b":0}}',
    "a million objects": lambda: b'{"model": [' + b"{}," * 5_000_000 + b"{}]}",
    "39 MB of texts": lambda: b'{"model": [' + b'"ab",' * 7_800_000 + b'""]}',
}


def steps(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def precompiled(*texts):
    """A map as sentencepiece writes it, with an empty table."""
    content = bytes(4) + b"".join(text + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def template(*pieces, ids=()):
    token = {"id": "a", "ids": list(ids), "tokens": ["a"] * len(ids)}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": {"a": token}}


# What is not known to lengthen is 1: space around the text, normal forms, case.
SPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
NORMALIZERS = {
    "Llama": (steps({"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")), 12),
    "Gemma": (replace(" ", "\u2581"), 3),
    "ALBERT": (steps(replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "Lowercase"}), 1),
    "CLIP": (steps({"type": "NFC"}, replace(r"\s+", " ", "Regex"), {"type": "Lowercase"}), 3),
    "shorter": (steps(replace("abc", "d"), replace("a", "")), 1),
    "longer": (steps(replace("a", "bb"), replace("bb", "aaa"), replace("b", "cccc")), 2 * 2 * 4),
    "no type": ({"normalizers": [{"pattern": {"String": "a"}, "content": "bbb"}]}, 3),
    "before each": (replace("", "bbb", "Regex"), 7),
}


@TOKENIZER_ROW
@pytest.mark.parametrize("name", NORMALIZERS)
def test_no_text_grows_more_than_said(name):
    normalizer, growth = NORMALIZERS[name]
    tokenizer = json.loads(changed(normalizer=normalizer, pre_tokenizer=None))
    assert growth_of(tokenizer, "x") == growth
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    for text in ("a", "aaaa", "``", "a b c", "abcabc", " " * 9, "abba''"):
        assert len(library.normalizer.normalize_str(text).encode()) <= growth * len(text)
    assert growth_of(json.loads(changed(normalizer=normalizer, pre_tokenizer=SPACE)), "x") == 5 * growth


def _nested(depth):
    normalizer = {"type": "NFC"}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return normalizer


@TOKENIZER_ROW
@pytest.mark.parametrize("kind", HOSTILE_TOKENIZERS)
def test_a_tokenizer_made_to_do_harm_is_refused(kind, tmp_path):
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(HOSTILE_TOKENIZERS[kind]())
    assert str(folder / "tokenizer.json") in refusal(folder)


# A kilobyte to two megabytes, all of which the library would take; the first would end the process.
GROWING = {
    "nine lengthening steps": lambda: changed(normalizer=steps(*[replace("a", "a" * 20)] * 9)),
    "the same without their types": lambda: changed(
        normalizer={"normalizers": [{"pattern": {"String": "a"}, "content": "a" * 20}] * 9}
    ),
    "the same without names": lambda: changed(normalizer=steps(*[[{"String": "a"}, "a" * 20]] * 9)),
    "a letter before each": lambda: changed(normalizer=steps(*[replace("", "a", kind="Regex")] * 40)),
    "a long beginning of each word": lambda: changed(normalizer={"type": "Prepend", "prepend": "a" * 500}),
    "bytes of bytes": lambda: changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [BPE["pre_tokenizer"]] * 40}),
    "spaces between all letters": lambda: changed(
        decoder={"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 40}
    ),
    "a long map of characters": lambda: changed(normalizer=precompiled(b"a" * 500)),
    "a thousand copies of a text": lambda: changed(
        post_processor=template(*[{"Sequence": {"id": "A", "type_id": 0}}] * 1000)
    ),
    "a million start tokens": lambda: changed(
        post_processor=template(*[{"SpecialToken": {"id": "a", "type_id": 0}}] * 50, ids=[0] * 20_000)
    ),
    "long added tokens": lambda: changed(
        normalizer=replace("a", "a" * 300),
        added_tokens=[entry for i in range(5) for entry in added(f"{i}" + "a" * 99_000, 280 + i)],
    ),
    "a token of a megabyte": lambda: with_model(vocab=BPE["model"]["vocab"] | {"a" * 1_000_000: 280}),
}


@TOKENIZER_ROW
@pytest.mark.parametrize("kind", GROWING)
def test_a_tokenizer_that_lengthens_without_end_is_refused(kind, monkeypatch):
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", None)
    with pytest.raises(fd.UserError, match=r"^x: .* (it is damaged or malicious|get it again)$"):
        parse_tokenizer(GROWING[kind](), "x")


@TOKENIZER_ROW
def test_a_text_that_would_grow_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(data_tokenizer, "_MAX_NORMALIZED_BYTES", 1000)
    tokenizer = parse_tokenizer(changed(normalizer=replace("a", "a" * 90), pre_tokenizer=None), "x")
    assert len(tokenizer.encode_prompt("b" * 11)) == 11
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        with pytest.raises(fd.UserError, match=r"a text of 12 .* give at most 11"):
            encode("b" * 12)


@TOKENIZER_ROW
def test_padding_to_a_trillion_tokens_does_not_matter():
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    with bounded():
        assert len(parse_tokenizer(changed(padding=padding), "x").encode("the cat")) < 8


@TOKENIZER_ROW
def test_a_text_that_makes_the_library_panic_is_a_users_error(monkeypatch):
    """A panic of its Rust code is a BaseException of this name, which no `except Exception` catches."""

    class PanicException(BaseException):
        pass

    def panic(*arguments, **options):
        raise PanicException("index out of bounds")

    tokenizer = parse_tokenizer(changed(), "x")
    assert isinstance(tokenizer, SubwordTokenizer)
    tokenizer._tokenizer = type("Library", (), {"encode_batch_fast": panic, "decode": panic})()
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.encode_prompt("a"), lambda: tokenizer.decode([0])):
        with pytest.raises(fd.UserError, match="index out of bounds"):
            use()


@TOKENIZER_ROW
@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 3},
        {"chat_template": [3, None, {"name": "default"}]},
        {"chat_template": [{"name": "default", "template": ["x"]}]},
        {"chat_template": "{% if x %}" * 500},
        {"chat_template": "{{ " + "(" * 500 + ")" * 500 + " }}"},
        {"chat_template": "{{ bos_token + 1 }}", "bos_token": {"content": ["x"]}},
    ],
)
def test_a_chat_template_that_is_none_is_refused(config, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with bounded(), pytest.raises(fd.UserError):
        load_chat_template(tmp_path).render([])


# --- Fuzzing ---

_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 14, 20, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400]),
    st.sampled_from([0.0, -0.5, 1e-300, 1e300, 1.5, "", "a", "\0", "😀", "llama", "gpt2", "silu", "linear", "\ud83d"]),
    st.sampled_from(["BPE", "WordPiece", "Unigram", "WordLevel", "ByteLevel", "Metaspace", "Sequence", "Fuse", "NFC"]),
    st.sampled_from([[], {}, [[]], [0], {"a": 0}, {"type": "llama3"}, ["full_attention"] * 2, {"rope_type": "linear"}]),
)


ODD = _ODD.map(copy.deepcopy)  # examples are mutated


def _nodes(value):
    """All lists and objects in a document."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _nodes(inner)


def mutated(draw, document, names):
    """The document with some values changed, added or removed, as bytes, sometimes with one byte changed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        nodes = [node for node in _nodes(document) if len(node) < 100]  # not the vocabulary most of the time
        node = draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(["set", "set", "set", "add", "lose"]))
        if isinstance(node, dict):
            known = st.sampled_from([*node, draw(st.sampled_from(names))])
            name = draw(known)
            if kind == "lose":
                node.pop(name, None)
            else:
                node[name] = draw(ODD)
        elif kind == "lose" and node:
            node.pop(draw(st.integers(0, len(node) - 1)))
        else:
            node.insert(draw(st.integers(0, len(node))), draw(ODD))
    content = bytearray(json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 4)) == 0:
        content[draw(st.integers(0, len(content) - 1))] = draw(st.sampled_from(b'\0 "[]{},:019-e.\\u\xff'))
    return bytes(content)


SETTING_NAMES = ["model_type", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "attention_bias"]
SETTING_NAMES += ["mlp_bias", "tie_word_embeddings", "auto_map", "architectures", "eos_token_id", "head_dim"]
PARTS = {
    "normalizer": [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "_"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "x"},
    ],
    "pre_tokenizer": [
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": "(?:a|b)*c"}, "behavior": "Removed", "invert": True},
        {"type": "Digits", "individual_digits": True},
    ],
    "post_processor": [
        {"type": "RobertaProcessing", "sep": ["a", 2], "cls": ["b", 0], "trim_offsets": True, "add_prefix_space": True}
    ],
    "decoder": [
        {"type": "Strip", "content": " ", "start": 10**6, "stop": 1},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"String": "t"}, "content": " "},
    ],
    "model": [
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["t", -2.0]], "byte_fallback": True},
        {
            "type": "WordPiece",
            "unk_token": "a",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0, "##b": 1},
        },
        {"type": "WordLevel", "vocab": {"a": 0, "t": 1}, "unk_token": "a"},
    ],
    "added_tokens": [added("<s>", 280), added("", 0), added("the", 281)],
}


@st.composite
def mutated_settings(draw):
    return mutated(draw, CONFIG, SETTING_NAMES)


@st.composite
def mutated_tokenizers(draw):
    document = dict(BPE)
    for part in draw(st.lists(st.sampled_from(sorted(PARTS)), unique=True, max_size=3)):
        document[part] = draw(st.sampled_from(PARTS[part]))
    if draw(st.integers(0, 3)) == 0:
        return json.dumps(document).encode()
    return mutated(draw, document, ["type", *PARTS])


CONFIG: dict = {}


@pytest.fixture
def folder(tmp_path):
    folder = make_folder(tmp_path / "model")
    CONFIG.update(json.loads((folder / "config.json").read_text()))
    return folder


@FUZZ
@pytest.mark.filterwarnings("ignore::flax_decoder.errors.FolderWarning")
@pytest.mark.parametrize(
    "num_examples", [60, *(pytest.param(number, marks=pytest.mark.full) for number in (600, 8_000))]
)
def test_settings_are_refused_or_the_weights_are_the_same(num_examples, folder, count_cases):
    expected, accepted, cases = fd.load(folder)[1], 0, 0

    @fuzzed(num_examples)
    @given(mutated_settings())
    def run(content):
        nonlocal accepted, cases
        cases += 1
        (folder / "config.json").write_bytes(content)
        with bounded(counts_calls=False):
            try:
                params = fd.load(folder)[1]
            except fd.UserError as error:
                assert str(folder) in str(error) and len(str(error)) < 1500
                return
        accepted += 1
        jax.tree.map(np.testing.assert_array_equal, params, expected)

    run()
    assert 0 < accepted < cases
    count_cases(cases)


@FUZZ
@pytest.mark.parametrize(
    "num_examples", [200, *(pytest.param(number, marks=pytest.mark.full) for number in (3_000, 40_000))]
)
def test_tokenizers_are_refused_or_work(num_examples, count_cases):
    accepted = cases = 0

    @fuzzed(num_examples)
    @given(mutated_tokenizers())
    def run(content):
        nonlocal accepted, cases
        cases += 1
        with bounded():
            try:
                tokenizer = parse_tokenizer(content, "x")
                for text in ("the cat sat", "a\0\U0001f600 b-c", ""):
                    ids = tokenizer.encode(text)
                    assert all(0 <= id < tokenizer.vocab_size for id in [*ids, *tokenizer.encode_prompt(text)])
                    tokenizer.decode(ids)
            except fd.UserError:
                return
        accepted += 1
        assert not isinstance(tokenizer, ByteTokenizer)

    run()
    assert 0 < accepted < cases
    count_cases(cases)
