"""Large files are read as small ones are, by a shorter way."""

import json

import pytest
import tokenizers

import flax_decoder as fd
from flax_decoder.data import large_tokenizer
from flax_decoder.data.tokenizer import parse_tokenizer

TEXT = 'the cat sat on the mat: "é" {日本} \\ and\n\non  it<end>the<start> '


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(large_tokenizer, "_MIN_BYTES", 0)


def library():
    """A tokenizer with tokens and parts of all kinds."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.decoder = tokenizers.decoders.ByteLevel()
    made.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<start>"], show_progress=False)
    made.train_from_iterator([TEXT * 4], trainer)
    made.add_tokens([tokenizers.AddedToken("the mat", normalized=True), tokenizers.AddedToken("on", lstrip=True)])
    made.add_special_tokens(["<end>"])
    made.add_tokens(['a "model": {'])
    start = ("<start>", made.token_to_id("<start>"))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<start> $A", special_tokens=[start])
    return made


@pytest.mark.parametrize("pretty", [False, True])
def test_a_large_file_is_read_as_a_small_one(pretty, monkeypatch):
    content = library().to_str(pretty=pretty)
    large = parse_tokenizer(content.encode(), "x")
    assert large_tokenizer.read_large(content.encode(), "x") is not None
    monkeypatch.undo()
    small = parse_tokenizer(content.encode(), "x")
    assert json.loads(large.to_json()) == json.loads(content) == json.loads(small.to_json())
    assert vars(large).keys() == vars(small).keys()
    for name in vars(small).keys() - {"_tokenizer"}:
        assert vars(large)[name] == vars(small)[name], name
    assert large.encode_prompt(TEXT) == small.encode_prompt(TEXT) == library().encode(TEXT).ids


def test_ids_may_have_gaps():
    for ids in ((0, 1, 7), (0, 7, 1), (4294967294, 0, 1)):
        vocab = dict(zip('ab"', ids, strict=True))
        content = json.dumps({"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode()
        assert large_tokenizer.read_large(content, "x")[3] == max(ids) + 1


BPE = '{"type": "BPE", "vocab": {"a": 0}, "merges": []'
LONG_TOKEN = '"model": {"type": "BPE"'
LONG = '"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "' + "a" * 999 + '"}'


@pytest.mark.parametrize(
    ("content", "part"),
    [
        # Parts that stand in the model as the search finds it, but not as a parser does.
        (f'{{"model": {BPE}}}, {LONG}, "more": {{"a": {{}}}}}}', "makes a text up to"),
        (f'{{"x": {{"model": {BPE}}}}}, {LONG}}}', "makes a text up to|has no model"),
        (f'{{{LONG_TOKEN}, "merges": [], "vocab": {{"{"a" * 200_000}": 0}}}}}}', "tokens that become 200,000"),
        (f'{{{LONG}, "model": {BPE}}}}}', "makes a text up to"),
        (f'{{"model": {BPE}}}, "model": {BPE}}}}}', "'model' twice"),
        (f'{{"added_tokens": [{{"id": 1, "content": "b"}}], "model": {BPE}}}}}', "cannot|can use|missing field"),
        (f'{{"decoder": 3, "model": {BPE}}}}}', "tokenizers library can use"),
        (f'{{"model": {BPE}, "dropout": 7e999}}}}', "is not finite"),
        (f'{{"model": {BPE}', "is not valid JSON"),
    ],
)
def test_nothing_passes_by_the_checks(content, part):
    with pytest.raises(fd.UserError, match=part):
        parse_tokenizer(content.encode(), "x")
