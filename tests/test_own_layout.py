"""Weights of somebody's own module become a run, by a TOML file with settings and names."""

import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402
import jax
import numpy as np
import plain_gpt

import flax_decoder as fd
from flax_decoder.cli import main

TOML = """
[model]
vocab_size = 5
context_length = 11
num_layers = 2
embed_dim = 14
num_heads = 2
tied_head = true

[names]
"transformer.wte.weight" = "embedding"
"transformer.wpe.weight" = "positions"
"transformer.h.{}.ln_1.weight" = "layers/attention_norm/scale"
"transformer.h.{}.ln_2.weight" = "layers/feed_forward_norm/scale"
"transformer.h.{}.attn.c_attn.weight" = [
    "layers/attention/query/kernel", "layers/attention/key/kernel", "layers/attention/value/kernel",
]
"transformer.h.{}.attn.c_proj.weight" = "layers/attention/out/kernel"
"transformer.h.{}.mlp.c_fc.weight" = "layers/feed_forward/up/kernel"
"transformer.h.{}.mlp.c_proj.weight" = "layers/feed_forward/down/kernel"
"transformer.ln_f.weight" = "final_norm/scale"
"lm_head.weight" = "head"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, _ = plain_gpt.make_gpt(bias=False)
    state_dict = module.state_dict()
    name = "transformer.wpe.weight"
    torch.save({"state_dict": state_dict | {name: state_dict[name][None]}, "epoch": 3}, "mine.pt")  # (1, T, D)
    (tmp_path / "names.toml").write_text(TOML)
    (tmp_path / "input.txt").write_text("abcd\n")
    return module


def test_a_module_becomes_a_run(here):
    arguments = ["--names", "names.toml", "--tokenizer", "char:input.txt"]
    assert main(["convert", "mine.pt", "run", *arguments]) == 0
    model, params, _ = fd.load("run")
    tokens_BT = np.array([[0, 3, 1, 4, 2, 2, 0]])
    with torch.no_grad():
        expected_BTV = here(torch.tensor(tokens_BT)).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens_BT), expected_BTV, atol=2e-6)


REFUSED = {
    "no file": (None, "names.toml: cannot be read"),
    "no table": ("[names]\n", "has no table [model]"),
    "no toml": ("[names", "is not TOML"),
    "setting": (TOML.replace("num_heads", "num_head"), "there is no setting model.num_head"),
    "size": (TOML.replace("embed_dim = 14", "embed_dim = 10000000"), "ask for at least"),
    "no size": (TOML.replace("vocab_size = 5", ""), "model.vocab_size is missing"),
    "left": (TOML.replace('"transformer.ln_f.weight"', '# "'), "has no counterpart for"),
    "wrong name": (TOML.replace("ln_f.weight", "norm.weight"), "there is no tensor transformer.norm.weight"),
    "wrong shape": (TOML.replace('"layers/feed_forward/down/kernel"', "[]"), "has no counterpart for"),
}


@pytest.mark.short("left", "size")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_description_that_does_not_fit_is_refused(kind, here, tmp_path, refused):
    content, part = REFUSED[kind]
    (tmp_path / "names.toml").unlink()
    if content is not None:
        (tmp_path / "names.toml").write_text(content)
    message = refused("convert", "mine.pt", "run", "--names", "names.toml", "--tokenizer", "char:input.txt")
    assert part in message and message.startswith("names.toml: ")


def test_without_a_description_the_message_says_how_to_give_one(here, tmp_path, refused):
    assert "--names FILE.toml" in refused("convert", "mine.pt", "run")
    (tmp_path / "folder").mkdir()
    assert "leave out --names" in refused("convert", "folder", "run", "--names", "names.toml")
