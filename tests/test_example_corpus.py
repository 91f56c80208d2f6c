"""Conversations as the data of a run: found, kept on disk, arranged in rows, and learned by command."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
from chat_templates import PUBLISHED
from test_conversations import SPECIAL, TRUTH, learned_parts, make_library, talk

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import DataConfig, ModelConfig
from flax_decoder.data import plan
from flax_decoder.data.corpus import make_plans, prepare_corpus
from flax_decoder.data.plan import has_examples
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.tokenizer import SubwordTokenizer
from flax_decoder.errors import BrokenError, UserError
from flax_decoder.huggingface.choice import choose_family
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.training.metrics import read_metrics

T = 48
TALK = {"messages": talk("hello", "hi there")}
PAIR = {"prompt": "say one", "completion": "one"}
WORDS = ("one", "two", "hello", "user")
TALKS = [{"messages": talk(f"say {word}", f"{word} {word}")} for word in WORDS * 5]
QUICK = ["--training.sample-tokens=0", "--mesh.data=1", "--lens.every=0", "--training.batch-size=4"]
TUNE = ["train", *QUICK, "--run.start-from=model", "--run.folder=tuned", "--data.path=talks.jsonl"]


def write_lines(path, documents):
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    Path(path).write_bytes(gzip.compress(lines) if str(path).endswith(".gz") else lines)
    return str(path)


def make_model(folder, template="chatml"):
    """A folder of Hugging Face with an untrained model that chats."""
    tokenizer = SubwordTokenizer(make_library(SPECIAL[template]))
    sizes = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "mlp_dim": 40, "context_length": T}
    kinds = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rotary", "tied_head": False}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **kinds)
    params = reference.random_params(fd.Decoder(config), stddev=0.1)
    names = dict(zip(("bos_token", "eos_token"), SPECIAL[template], strict=False))
    files = {
        "chat_template.jinja": PUBLISHED[template],
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}),
        "special_tokens_map.json": json.dumps(names),
        "generation_config.json": json.dumps({"eos_token_id": [tokenizer.token_id(names["eos_token"])], "top_k": 3}),
    }
    kept = {name: text.encode() for name, text in files.items()}
    Path(folder).mkdir()
    write_folder(Path(folder), config, params, tokenizer, choose_family(config, "model", "llama"), kept=kept)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_model(folder / "model")
    write_lines(folder / "talks.jsonl", TALKS)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with a chat model and conversations."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(path, name="chatml", tokenizer=None, **data):
    Path("corpus").mkdir()
    tokenizer = tokenizer or SubwordTokenizer(make_library(SPECIAL[name]))
    Path("own").mkdir()
    Path("own/chat_template.jinja").write_text(PUBLISHED[name])
    names = dict(zip(("bos_token", "eos_token"), SPECIAL[name], strict=False))
    Path("own/tokenizer_config.json").write_text(json.dumps(names))
    options = {"model_folder": Path("own"), "context_length": T}
    return prepare_corpus(DataConfig(path=path, **data), Path("corpus"), tokenizer, **options)


# --- What is a conversation ---

KINDS = {
    "messages": (TALK, {}, True),
    "more keys": (TALK | {"id": 1}, {}, True),  # then refused by name
    "pair": (PAIR, {}, True),
    "half a pair": ({"prompt": "a"}, {}, False),
    "text": ({"text": "a"}, {}, False),
    "text beside messages": (TALK | {"text": "a"}, {}, False),
    "the named text": (PAIR, {"text_field": "prompt"}, False),
    "a list": ([TALK], {}, False),
}


@pytest.mark.filterwarnings("ignore:a.txt. looks like lines of JSON")
@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_told_from_texts_by_their_first_line(kind, tmp_path, monkeypatch):
    document, settings, expected = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.JSONL.gz"):
        assert has_examples(DataConfig(path=write_lines(name, [document]), **settings)) is expected
    Path("c.jsonl").write_bytes(b"\xef\xbb\xbf\n \n" + Path("a.jsonl").read_bytes())
    assert has_examples(DataConfig(path="c.jsonl", **settings)) is expected
    assert has_examples(DataConfig(path="."), **{}) is expected or "text_field" in settings
    Path("a.txt").write_bytes(Path("a.jsonl").read_bytes())
    assert not has_examples(DataConfig(path="a.txt"))


# --- The corpus on disk ---


def test_what_is_learned_is_kept_with_the_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talks = [
        {"messages": talk("one", "1", "two", "2")},
        {"messages": talk("hello", "é")},
        {"messages": talk("a" * 99, "b")},
    ]
    talks.insert(1, {"messages": talk("hello", "hi " * 40)})
    tokenizer, corpus = prepare([write_lines("a.jsonl", talks[:2]), write_lines("b.jsonl.gz", talks[2:])], "gemma")
    assert corpus.train.has_examples and [
        len(split.document_starts) for split in (corpus.train, corpus.validation)
    ] == [2, 1]
    ids = np.concatenate([corpus.train.tokens, corpus.validation.tokens]).tolist()
    learned = np.concatenate([corpus.train.learned, corpus.validation.learned]).astype(bool).tolist()
    first, second = corpus.train.document_starts[1], len(corpus.train.tokens)
    assert tokenizer.decode(ids[:first]) == TRUTH["gemma"]["turns"].replace("[[", "").replace("]]", "")
    parts = learned_parts(tokenizer, ids, learned)
    assert parts[:2] == ["1<end_of_turn>", "2<end_of_turn>"] and parts[3:] == ["é<end_of_turn>"]
    assert second - first == T + 1 and parts[2].startswith("hi hi ")
    # Bits per byte are about the text of answers.
    assert corpus.validation.num_bytes == len("é".encode()) and corpus.validation.num_learned == 3
    assert corpus.train.num_bytes == 2 + len(parts[2])
    assert "2 files, 3 conversations, " in corpus.what_was_read
    assert "; 1 cut at their end, as" in corpus.what_was_read and "; 1 dropped, as none" in corpus.what_was_read
    # A turn ends with another token than a text; generation stops at both.
    assert tokenizer.end_ids == (tokenizer.token_id("<eos>"), tokenizer.token_id("<end_of_turn>"))

    for name in ("train-00000.learned.bin", "validation-00000.starts.bin"):
        path = Path("corpus", name)
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(BrokenError, match=f"{name}: is missing or damaged"):
            load_corpus("corpus")
        path.write_bytes(content)
    facts = json.loads(Path("corpus/corpus.json").read_text())
    del facts["validation"]["shards"][0]["learned_sha256"]
    Path("corpus/corpus.json").write_text(json.dumps(facts))
    with pytest.raises(BrokenError, match="only a part of it is of conversations"):
        load_corpus("corpus")


def test_a_path_is_listed_once_and_conversations_are_not_mixed_with_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = []
    list_files = plan.list_files
    monkeypatch.setattr(plan, "list_files", lambda paths: listed.append(paths) or list_files(paths))
    prepare(write_lines("talks.jsonl", TALKS))
    assert listed == [("talks.jsonl",)]
    Path("a.txt").write_text("text")
    with pytest.raises(UserError, match=r"^talks\.jsonl: has conversations, which are not mixed with texts"):
        make_plans(DataConfig(mixture=({"path": "a.txt"}, {"path": "talks.jsonl"}), tokenizer="byte"))


def test_rows_are_packed_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, corpus = prepare(write_lines("talks.jsonl", TALKS), validation_fraction=0.3)
    order = {"seed": 1, "step": 2, "batch_size": 3, "context_length": T}
    packed, plain = (corpus.arranged(DataConfig(packing=packing)) for packing in (True, False))
    assert (packed.train.has_segments, plain.train.has_segments) == (True, False)
    assert plain.train.epochs(28, T) == 2 and packed.train.epochs(28, T) == 4  # two to a row
    batch = packed.train.train_batch(**order)
    assert batch.keys() == {"inputs", "targets", "mask", "segments"}
    assert set(batch["segments"].max(axis=1).tolist()) <= {1, 2}  # padding is one more
    some = packed.train.train_batch(**order, rows=slice(1, 3))
    assert all(np.array_equal(array[1:], some[name]) for name, array in batch.items())
    assert plain.train.train_batch(**order).keys() == {"inputs", "targets", "mask"}  # no attention without documents
    for split in (packed.validation, plain.validation):
        batches = [*split.validation_batches(batch_size=4, context_length=T)]
        learned = sum(int(batch["mask"].sum()) for batch in batches)
        assert learned == split.num_learned and ("segments" in batches[0]) == split.has_segments


# --- By command ---

REFUSED = {
    "no JSON": ("{nope", [], "talks.jsonl, line 21: is not valid JSON"),
    "roles": ({"messages": talk("a")}, [], "talks.jsonl, line 21: the last message must be of the assistant"),
    "unknown key": (TALK | {"id": 1}, [], "talks.jsonl, line 21: has the unknown key 'id'"),
    "a text": ({"text": "a"}, [], "talks.jsonl, line 21: has the unknown key 'text'"),
    "the template": (TALK, ["model/chat_template.jinja"], "/chat_template.jinja: refuses these messages: no"),
    "too long": (None, ["long.jsonl"], "long.jsonl: no example is left of 1: within model.context_length = 48"),
    "nothing": (None, ["none.jsonl"], "none.jsonl: is empty"),
    "one": (None, ["one.jsonl"], "one.jsonl: has one example only"),
    "empty answers": (None, ["mute.jsonl"], "mute.jsonl: all answers for train are empty"),
    "others": (None, ["talks.jsonl", "a.txt"], "a.txt: is no file of conversations"),
}


@pytest.mark.short("no JSON", "the template", "too long", "one")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_learned_is_refused(kind, here, refused):
    line, files, message = REFUSED[kind]
    if line is not None:
        with Path("talks.jsonl").open("a") as file:
            file.write(line if isinstance(line, str) else json.dumps(line))
        for file in files:
            Path(file).write_text("{{ raise_exception('no') }}")
        told = refused(*TUNE)
        assert message in told and told.startswith("talks.jsonl, line ")
        return
    write_lines("long.jsonl", [{"messages": talk("a" * 200, "b")}])
    write_lines("one.jsonl", [TALK])
    write_lines("mute.jsonl", [{"messages": talk("a", "")}] * 3)
    write_lines("none.jsonl", [])
    Path("a.txt").write_text("a")
    assert message in refused(*TUNE, f"--data.path={files!r}")


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_without_a_template_there_are_no_conversations(command, here, refused):
    if command == "prepare":
        assert "which each run prepares for its own model" in refused("prepare", "talks.jsonl", "--out", "x")
    else:
        message = refused("train", *QUICK, "--run.folder=x", "--data.path=talks.jsonl", "--data.tokenizer=byte")
        assert "talks.jsonl, line 1: is a conversation, but the model has no chat template" in message


def raise_end():
    raise EOFError


@pytest.mark.full
@pytest.mark.parametrize("template", ["chatml", "gemma"])
def test_the_whole_round(template, here, capsys, monkeypatch):
    """Tuned by command, a model gives the answers that it was shown, and ends them, as a run and converted back."""
    shutil.rmtree("model")
    make_model("model", template)
    write_lines(
        "talks.jsonl", [{"messages": talk(f"say {w}", f"{w} {w}", "and", v)} for w in WORDS for v in WORDS] * 13
    )

    def run(*command):
        capsys.readouterr()
        assert main(command) == 0
        return capsys.readouterr().out

    before = json.loads(run("eval", "model", "talks.jsonl", "--json"))
    said = run(*TUNE, "--training.num-steps=150", "--optimizer.learning-rate=1e-2", "--data.validation-fraction=0.08")
    assert "208 conversations" in said and "tokens are learned" in said and "before the first step" in said
    after = json.loads(run("eval", "tuned", "talks.jsonl", "--json"))
    assert before["num_tokens"] == after["num_tokens"] and before["loss"] > 5 > 0.6 > after["loss"]
    assert all(line.startswith("ok") for line in run("verify", "tuned").splitlines())
    run("convert", "tuned", "back")
    names = ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"]
    for name in [*names, "generation_config.json"] if template == "chatml" else names:
        assert Path("back", name).read_bytes() == Path("model", name).read_bytes()
    for folder in ("tuned", "back"):
        typed = iter([f"say {word}" for word in ("one", "two")])
        monkeypatch.setattr("builtins.input", lambda _, typed=typed: next(typed, None) or raise_end())
        answers = run("chat", folder, "--temperature", "0", "--max-new-tokens", "12").splitlines()
        assert answers[0] == "one one"

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("back")
    tokens = transformers.AutoTokenizer.from_pretrained("back")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokens.apply_chat_template(talk("say two"), **options)
    written = theirs.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokens.decode(written, skip_special_tokens=True) == "two two" and len(written) < 12  # it stops


@pytest.mark.full
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_stopped_run_on_conversations_goes_on_with_the_same_losses(packing, here):
    steps = ["--training.log-every=1", "--training.num-steps=6", f"--data.packing={packing}", "--training.save-every=3"]
    assert main([*TUNE, *steps]) == 0
    assert main([*TUNE, *steps, "--run.folder=again"]) == 0
    shutil.rmtree("again/checkpoints/6")
    Path("talks.jsonl").unlink()  # the run has its tokens
    assert main([*TUNE, *steps, "--run.folder=again"]) == 0
    first, again = (
        [row.get("train_loss") for row in read_metrics(Path(name, "metrics.jsonl"))] for name in ("tuned", "again")
    )
    assert first == again and len(first) == 7
    other = "false" if packing == "true" else "true"
    assert main([*TUNE, *steps, f"--data.packing={other}"]) == 2


@pytest.mark.full
def test_rings_and_meshes_have_conversations_too(here):
    losses = {}
    for name, mesh in {"one": ["--mesh.data=1"], "ring": ["--mesh.data=2", "--mesh.context=2"]}.items():
        assert main([*TUNE, *mesh, f"--run.folder={name}", "--training.num-steps=3", "--training.log-every=1"]) == 0
        rows = read_metrics(Path(name, "metrics.jsonl"))
        losses[name] = [row["train_loss"] for row in rows if "train_loss" in row] + [rows[-1]["val_loss"]]
    np.testing.assert_allclose(losses["one"], losses["ring"], rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "model/tokenizer.json"])
def test_a_new_model_learns_prompts_and_completions_and_conversations(tokenizer, here):
    write_lines("pairs.jsonl", [PAIR] * 20)
    sizes = ["--model.num-layers=1", "--model.embed-dim=16", "--model.num-heads=2", f"--model.context-length={T}"]
    train = [
        "train",
        *QUICK,
        *sizes,
        "--training.num-steps=2",
        f"--data.tokenizer={tokenizer}",
        "--data.bpe-vocab-size=257",
    ]
    assert main([*train, "--data.path=pairs.jsonl", "--run.folder=a"]) == 0
    has_template = tokenizer.startswith("model")  # beside the tokenizer
    assert main([*train, "--data.path=talks.jsonl", "--run.folder=b"]) == (0 if has_template else 2)
    assert Path("b/chat_template.jinja").exists() == has_template
