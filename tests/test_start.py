"""A run starts from a trained model: its weights, settings and tokenizer, and a loss before the first step."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.data.chat_template import load_chat_template
from flax_decoder.loading import convert
from flax_decoder.training import loop
from flax_decoder.training.metrics import read_metrics

SIZES = ["--model.num-layers=1", "--model.embed-dim=16", "--model.num-heads=2", "--model.context-length=16"]
QUICK = ["--training.sample-tokens=0", "--mesh.data=1", "--lens.every=0", "--training.batch-size=2"]
TUNE = ["train", *QUICK, "--training.num-steps=3", "--run.folder=tuned", "--model.dropout=0.1"]


def train_and_convert(folder):
    """A run, the same as a Hugging Face folder, its text, and another one of the same characters."""
    (folder / "other.txt").write_text("question not the that, or be be to To:\n" * 40)
    (folder / "input.txt").write_text("To be, or not to be, that is the question:\n" * 40)
    paths = [f"--run.folder={folder / 'run'}", f"--data.path={folder / 'input.txt'}"]
    assert main(["train", *SIZES, *QUICK, *paths, "--training.num-steps=4"]) == 0
    convert(folder / "run", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_and_convert(tmp_path_factory.mktemp("start"))


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def params_of(folder, step="latest"):
    return jax.tree.map(np.asarray, fd.load(folder, step=step)[1])


@pytest.mark.full
@pytest.mark.parametrize("source", ["run", "hf"])
def test_a_run_starts_from_a_trained_model(source, here, monkeypatch, capsys):
    first = []
    monkeypatch.setattr(
        loop, "run_steps", lambda *a, before=loop.run_steps: first.append(jax.device_get(a[3].params)) or before(*a)
    )
    assert main([*TUNE, "--data.path=other.txt", f"--run.start-from={source}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, first[0], params_of(source))
    row, *_ = read_metrics(Path("tuned/metrics.jsonl"))
    assert row["step"] == 0 and row["val_loss"] > 0 and "train_loss" not in row
    assert f"validation {row['val_loss']:.4f} before the first step" in capsys.readouterr().out
    record = json.loads(Path("tuned/start_from.json").read_text())
    assert record["path"] == str(here / source) and all(len(value) == 64 for value in record["sha256"].values())
    saved = fd.load_config("tuned/config.toml")
    assert saved.model.num_layers == 1 and saved.model.dropout == 0.1 and saved.run.start_from == str(here / source)
    assert fd.load("tuned")[2].to_json() == fd.load(source)[2].to_json()
    # The folder is enough from here on.
    shutil.rmtree(source)
    moved = [*TUNE, "--data.path=other.txt", f"--run.start-from={source}", "--training.num-steps=5"]
    assert main(moved) == 0
    assert main(["train", "tuned/config.toml", "--training.num-steps=6"]) == 0
    assert read_metrics(Path("tuned/metrics.jsonl"))[-1]["step"] == 6
    assert main(["verify", "tuned"]) == 0


REFUSED = {
    "another model": (["--model.num-layers=2"], "model.num_layers: 1 there, 2 asked"),
    "more positions": (["--model.context-length=32"], "model.context_length: 16 there, 32 asked"),
    "tokenizer": (["--data.tokenizer=byte"], "has its own tokenizer; leave out data.tokenizer = byte"),
    "nothing there": (["--run.start-from=nowhere"], "nowhere: there is no such folder"),
    "another run": (["--run.folder=run"], "run: has a run that began elsewhere"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_contradicts_is_refused(kind, here, refused):
    changes, message = REFUSED[kind]
    assert message in refused(*TUNE, "--data.path=other.txt", "--run.start-from=run", *changes)


def test_a_run_killed_before_its_first_checkpoint_does_not_start_from_random_weights(here, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    Path("run/chat_template.jinja").write_text("{{ messages[0].content }}")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_steps", killed)
        assert main([*TUNE, "--data.path=other.txt", "--run.start-from=run"]) == 130
    assert main([*TUNE, *SIZES, "--data.path=other.txt"]) == 2
    assert "give --run.start-from again" in capsys.readouterr().err
    assert main([*TUNE, "--data.path=other.txt", "--run.start-from=run"]) == 0
    assert [row["step"] for row in read_metrics(Path("tuned/metrics.jsonl"))].count(0) == 1
    assert load_chat_template(Path("tuned")).render([{"content": "a"}]) == "a"  # it still chats


SHAPE = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OF_LLAMA = {
    **SHAPE,
    **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    **{"intermediate_size": 37, "max_position_embeddings": 16, "tie_word_embeddings": True},
}
SHAPES = {
    "gpt2": {**SHAPE, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16},
    "llama": OF_LLAMA,
    "qwen3": OF_LLAMA,
    "gemma3_text": OF_LLAMA | {"sliding_window": 5, "query_pre_attn_scalar": 10},
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SHAPES)
def test_ten_steps_from_a_folder_are_those_of_a_loop_in_pytorch(family, tmp_path):
    """With a loss on some tokens only, as of conversations, and another number of them in each batch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(family, **SHAPES[family])
    theirs = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    theirs.save_pretrained(tmp_path / "start")
    model, params, _ = fd.load(tmp_path / "start")
    rules = {"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    config = fd.load_config(None, {f"optimizer.{name}": value for name, value in rules.items()}, start=model.config)
    state = fd.init_state(model, config, rng=jax.random.key(0), params=params)
    step = jax.jit(fd.train_step)
    theirs.eval()  # without dropout
    matrices, others = ([p for p in theirs.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-4, (0.9, 0.99), 1e-8)
    rng = np.random.default_rng(1)
    for _ in range(10):
        tokens_BT = rng.integers(0, 256, (4, 14)).astype(np.int32)
        mask_BT = (rng.random((4, 13)) < rng.random((4, 1))).astype(np.float32)
        labels_BT = np.where(mask_BT > 0, tokens_BT[:, 1:], -100)
        logits = theirs(torch.tensor(tokens_BT[:, :-1])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels_BT).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, metrics = step(state, {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:], "mask": mask_BT})
        np.testing.assert_allclose(float(metrics["loss"]), loss.item(), atol=1e-5)
    theirs.save_pretrained(tmp_path / "end")
    moved = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), params, state.params)
    assert max(jax.tree.leaves(moved)) > 5e-4
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), state.params, fd.load(tmp_path / "end")[1]
    )
