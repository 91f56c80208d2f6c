"""nanoGPT's ckpt.pt is a model like any other: loaded, generated from, compared, converted to a run and back."""

import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402
import jax
import numpy as np
import optax
import plain_gpt

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config_file import to_toml
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer
from flax_decoder.loading import convert
from flax_decoder.training.checkpoint import Checkpoints

TOKENS_BT = np.array([[0, 3, 1, 4, 2, 2, 0, 1, 3, 4, 0], [1, 1, 0, 2, 4, 3, 3, 0, 2, 1, 4]])


def save(path, **changes):
    """Saves a checkpoint whose content or settings are changed; returns the module."""
    model, model_args = plain_gpt.make_gpt(bias=changes.pop("bias", True))
    content = plain_gpt.checkpoint(model, model_args) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ckpt.pt and the text of its tokens, a to e."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_bytes(b"abcd\r\n" * 30)
    save(tmp_path / "ckpt.pt")
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_logits_are_those_of_pytorch(bias, tmp_path):
    module = save(tmp_path / "ckpt.pt", bias=bias)
    model, params, tokenizer = fd.load(tmp_path / "ckpt.pt")
    assert tokenizer is None and model.config.norm_bias == model.config.mlp_bias == bias
    with torch.no_grad():
        expected_BTV = module(torch.tensor(TOKENS_BT)).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS_BT), expected_BTV, atol=2e-6)


@pytest.mark.full
def test_the_mask_in_old_checkpoints_is_no_weight(tmp_path):
    model, model_args = plain_gpt.make_gpt()
    content = plain_gpt.checkpoint(model, model_args)
    content["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 11, 11)
    torch.save(content, tmp_path / "ckpt.pt")
    fd.load(tmp_path / "ckpt.pt")


def test_the_characters_of_a_text_are_numbered_as_by_nanogpt(here):
    text = (here / "input.txt").read_text()  # as its prepare.py reads it: \r\n becomes \n
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    tokenizer = fd.load("ckpt.pt", tokenizer="char:input.txt")[2]
    assert tokenizer.encode(text) == [numbers[character] for character in text]


def test_the_tokenizer_may_be_a_file_or_a_folder(here):
    (here / "tokenizer.json").write_text(CharTokenizer("abcde").to_json())
    for name in ("tokenizer.json", str(here)):
        assert fd.load("ckpt.pt", tokenizer=name)[2].decode([4, 0]) == "ea"
    (here / "tokenizer.json").write_text(CharTokenizer("abc").to_json())  # the model is padded
    assert fd.load("ckpt.pt", tokenizer=name)[2].vocab_size == 3


TOKENIZERS = {
    "none": (None, "has no tokenizer; say which: --tokenizer char:FILE"),
    "too many": ("char:other.txt", "has 6 tokens, but the model has 5"),
    "too few": ("char:few.txt", "has 2 tokens, but the model has 5"),
    "bytes": ("byte.json", "has 256 tokens, but the model has 5"),
    "absent": ("input", "there is no such file; give char:FILE"),
    "absent text": ("char:absent.txt", "absent.txt: there is no such file"),
    "no tokenizer": ("empty", "has no tokenizer.json"),
}


@pytest.mark.short("none", "too many")
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(kind, here, refused):
    (here / "other.txt").write_text("abcdef")
    (here / "few.txt").write_text("ab")
    (here / "byte.json").write_text(ByteTokenizer().to_json())
    (here / "empty").mkdir()
    name, part = TOKENIZERS[kind]
    arguments = [] if name is None else ["--tokenizer", name]
    assert part in refused("generate", "ckpt.pt", "--prompt", "ab", *arguments)
    assert part in refused("convert", "ckpt.pt", "run", *arguments)


@pytest.mark.full
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "ckpt.pt", "--prompt", "ab", "--max-new-tokens", "3"],
        ["eval", "ckpt.pt", "text.txt"],
        ["lens", "ckpt.pt", "--prompt", "abcd", "--out", "lens.html"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_take_a_checkpoint(arguments, here, capsys):
    (here / "text.txt").write_text("abcd\ndcba\n")
    assert main([*arguments, "--tokenizer", "char:input.txt"]) == 0
    assert capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_the_ledger_holds(bias, tmp_path, capsys):
    save(tmp_path / "ckpt.pt", bias=bias)
    assert main(["compare", str(tmp_path / "ckpt.pt"), "--steps", "0" if bias else "3"]) == 0


def test_a_round_trip_gives_the_same_bits(here):
    assert main(["convert", "ckpt.pt", "run", "--tokenizer", "char:input.txt"]) == 0
    model, params, tokenizer = fd.load("run")
    assert tokenizer.decode([0, 4]) == "\nd"
    assert main(["convert", "run", "again.pt", "--to", "nanogpt"]) == 0
    before, again = (torch.load(name, weights_only=True) for name in ("ckpt.pt", "again.pt"))
    assert again["model_args"] == before["model_args"]
    module = plain_gpt.PlainGPT(**again["model_args"])
    module.load_state_dict(again["model"])  # strict: all names, no others
    for name, tensor in before["model"].items():
        torch.testing.assert_close(again["model"][name.removeprefix("_orig_mod.")], tensor, rtol=0, atol=0)
    jax.tree.map(np.testing.assert_array_equal, fd.load("again.pt")[1], params)
    assert fd.load("again.pt")[0].config == model.config


def trained_run(folder, name="adamw", **model):
    """A run after one step: its config, and the state."""
    folder.mkdir()
    sizes = {"vocab_size": 5, "context_length": 11, "num_layers": 1, "embed_dim": 14, "num_heads": 2} | model
    changes = {f"model.{field}": value for field, value in sizes.items()} | {"optimizer.name": name}
    config = fd.load_config(None, {**changes, "data.path": "letters/input.txt"})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(3))
    state = state.apply_gradients(grads=jax.tree.map(lambda leaf: leaf + 0.5, state.params))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "tokenizer.json").write_text(CharTokenizer("abcde").to_json())
    with Checkpoints(folder, keep_newest=1) as checkpoints:
        checkpoints.save(state, 1.25)
    return config, state


@pytest.mark.full
@pytest.mark.parametrize("model", [{}, {"mlp_bias": True}], ids=["no biases", "some biases"])
def test_nanogpt_goes_on_where_a_run_stands(model, here):
    """Biases that only nanoGPT has are zeros, and so are their moments."""
    _, state = trained_run(here / "run", **model)
    assert main(["convert", "run", "out.pt", "--to", "nanogpt"]) == 0
    content = torch.load("out.pt", weights_only=True)
    assert content["iter_num"] == 1 and content["best_val_loss"] == 1.25
    assert content["config"]["learning_rate"] == 1e-3 and content["config"]["dataset"] == "letters"
    assert content["model_args"]["bias"] == bool(model)
    module = plain_gpt.PlainGPT(**content["model_args"])
    module.load_state_dict(content["model"])
    optimizer = plain_gpt.make_optimizer(module)
    optimizer.load_state_dict(content["optimizer"])
    weight = module.transformer["h"][0].mlp["c_fc"].weight
    row = optimizer.state[weight]
    up_DF = optax.tree.get(state.opt_state, "mu")["layers"]["feed_forward"]["up"]["kernel"][0]
    np.testing.assert_array_equal(row["exp_avg"].numpy(), up_DF.T)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in module.parameters())
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[1]["weight_decay"] == 0.0
    if model:
        assert not optimizer.state[module.transformer["ln_f"].bias]["exp_avg"].any()


@pytest.mark.full
def test_what_has_no_adamw_starts_a_new_one(here):
    trained_run(here / "run", name="muon")
    convert("run", "out.pt", to="nanogpt")
    assert torch.load("out.pt", weights_only=True)["optimizer"]["state"] == {}
    convert("ckpt.pt", "converted", tokenizer="char:input.txt")
    convert("converted", "again.pt", to="nanogpt")
    assert torch.load("again.pt", weights_only=True)["optimizer"]["state"] == {}


REFUSED = {
    "no settings": ({"model_args": None}, "has no model_args"),
    "list": ({"model_args": [1]}, "model_args = [1] must be a table"),
    "missing": ({"n_layer": None}, "model_args: n_layer is missing"),
    "negative": ({"n_head": -2}, "n_head = -2 must be a positive whole number"),
    "type": ({"n_embd": "14"}, "n_embd = '14' must be a positive whole number"),
    "bool": ({"bias": 3}, "bias = 3"),
    "huge": ({"n_embd": 2**24, "n_head": 2}, "ask for at least"),
    "layers": ({"n_layer": 9999}, "n_layer ask for at least 9,999 tensors"),
    "heads": ({"n_head": 3}, "is not a multiple of"),
    "unknown": ({"n_kv_head": 1}, "n_kv_head = 1 is not known for nanogpt"),
    "shape": ({"block_size": 12}, "has the shape (11, 14), but its settings ask for (12, 14)"),
    "bias": ({"bias": False}, "is not part of nanogpt with these settings"),
}


@pytest.mark.short("missing", "shape")
@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_do_not_fit_are_refused(kind, tmp_path, refused):
    changes, part = REFUSED[kind]
    if "model_args" not in changes:
        changed = plain_gpt.MODEL_ARGS | changes
        changes = {"model_args": {name: value for name, value in changed.items() if value is not None}}
    save(tmp_path / "ckpt.pt", **changes)
    message = refused("convert", "ckpt.pt", "run")
    assert part in message and message.startswith("ckpt.pt: ")


def with_tensor(name, tensor):
    model, _ = plain_gpt.make_gpt()
    state_dict = model.state_dict() | {name: tensor}
    return {"model": {name: value for name, value in state_dict.items() if value is not None}}


TENSORS = {
    "missing": ("transformer.h.1.mlp.c_fc.weight", None, "transformer.h.1.mlp.c_fc.weight is missing"),
    "extra": ("transformer.h.1.mlp.c_gate.weight", torch.ones(2), "is not part of nanogpt"),
    "nan": ("transformer.ln_f.bias", torch.full((14,), float("nan")), "ln_f.bias holds nan at [0]"),
    "head": ("lm_head.weight", torch.ones(5, 14), "lm_head.weight differs from transformer.wte.weight"),
    "integers": ("transformer.ln_f.bias", torch.ones(14, dtype=torch.int32), "ln_f.bias is int32"),
}


@pytest.mark.short("nan")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_are_refused(kind, tmp_path, refused):
    name, tensor, part = TENSORS[kind]
    save(tmp_path / "ckpt.pt", **with_tensor(name, tensor))
    assert part in refused("convert", "ckpt.pt", "run")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"positions": "rotary"}, "positions = 'rotary'"),
        ({"num_kv_heads": 1}, "num_kv_heads = 1"),
        ({"tied_head": False}, "tied_head = False"),
        ({"mlp_dim": 13}, "mlp_dim = 13"),
        ({"feed_forward": "gelu_tanh"}, "feed_forward = 'gelu_tanh'"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm'"),
        ({"final_norm": False}, "final_norm = False"),
        ({"head_bias": True}, "head_bias = True"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon = 1e-06"),
    ],
)
def test_a_model_that_nanogpt_cannot_express_is_refused(settings, part):
    from flax_decoder.huggingface.choice import require_expressible
    from flax_decoder.huggingface.families import NANOGPT

    config = fd.ModelConfig(vocab_size=5, context_length=11, embed_dim=16, num_heads=2, **settings)
    with pytest.raises(fd.UserError, match="run: nanogpt cannot express this model; obstacles: ") as caught:
        require_expressible(config, NANOGPT, "run")
    assert part in str(caught.value)


def test_convert_overwrites_nothing_and_says_which_options_do_not_fit(here, refused):
    convert("ckpt.pt", "run", tokenizer="char:input.txt")
    assert "input.txt: exists; give a new file" in refused("convert", "run", "input.txt", "--to", "nanogpt")
    assert "--to gpt is not known" in refused("convert", "run", "new", "--to", "gpt")
    assert "leave out --to" in refused("convert", "ckpt.pt", "new", "--to", "nanogpt")
    assert "give one of them" in refused("convert", "run", "new", "--to", "nanogpt", "--model-type", "gpt2")
    assert "has its own tokenizer.json" in refused("convert", "run", "new", "--tokenizer", "char:input.txt")
    assert "leave out --step" in refused("eval", "ckpt.pt", "input.txt", "--step", "3")
    assert "in a folder that exists" in refused("convert", "run", "absent/new.pt", "--to", "nanogpt")
