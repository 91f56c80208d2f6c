"""A model as one file: the same logits for any batch and length, in a process without this package."""

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.errors import UserError
from flax_decoder.generation import export

ALONE = """
import sys
sys.modules["flax_decoder"] = None
import jax, numpy as np
exported = jax.export.deserialize(open("model.stablehlo", "rb").read())
np.save("logits.npy", exported.call(np.load("tokens.npy")))
"""


@functools.cache
def make():
    settings = {"model.num_layers": 2, "model.embed_dim": 16, "model.num_heads": 2, "model.context_length": 24}
    config = fd.load_config(
        overrides=settings | {"model.vocab_size": 31, "model.positions": "rotary", "model.window": 5}
    )
    model = fd.Decoder(config.model)
    return model, fd.init_state(model, config, rng=jax.random.key(0)).params


def test_a_file_has_the_logits_of_the_model(tmp_path):
    model, params = make()
    export.write_stablehlo(tmp_path / "model.stablehlo", model, params)
    exported = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for shape in ((1, 1), (3, 24)):
        tokens_BT = np.random.default_rng(0).integers(0, 31, shape).astype(np.int32)
        expected = jax.jit(model.apply)({"params": params}, tokens_BT)
        np.testing.assert_allclose(exported.call(tokens_BT), expected, rtol=1e-5, atol=1e-6)


def test_more_than_the_format_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"the parameters have .* bytes, but the format holds 1,000 at most"):
        export.write_stablehlo(tmp_path / "model.stablehlo", *make())
    assert not any(tmp_path.iterdir())


@pytest.mark.full
def test_a_run_is_exported_and_runs_without_this_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("To be, or not to be, that is the question:\n" * 40)
    sizes = ["--model.num-layers=1", "--model.embed-dim=16", "--model.num-heads=2", "--model.context-length=16"]
    assert main(["train", *sizes, "--training.num-steps=2", "--training.sample-tokens=0", "--mesh.data=1"]) == 0
    assert main(["export", "runs/default", "model.stablehlo"]) == 0
    before = (tmp_path / "model.stablehlo").read_bytes()
    capsys.readouterr()
    assert main(["export", "runs/default", "model.stablehlo"]) == 2
    assert "model.stablehlo: exists; give a new file" in capsys.readouterr().err
    assert (tmp_path / "model.stablehlo").read_bytes() == before
    model, params, tokenizer = fd.load("runs/default")
    tokens_BT = np.asarray([tokenizer.encode("To be, or")], np.int32)
    np.save("tokens.npy", tokens_BT)
    subprocess.run([sys.executable, "-c", ALONE], check=True)
    np.testing.assert_allclose(np.load("logits.npy"), model.apply({"params": params}, tokens_BT), rtol=1e-5, atol=1e-6)
