import dataclasses
import shutil

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.config_file import to_toml
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with what loading needs, made without training, and the params of its two checkpoints."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), CharTokenizer("abc")
    sizes = {"vocab_size": 5, "context_length": 4, "num_layers": 1, "embed_dim": 16, "num_heads": 2}
    config = fd.load_config(None, {f"model.{name}": value for name, value in sizes.items()})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(3))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "metrics.jsonl").write_text('{"step": 1, "val_loss": 1.0}\n{"step": 2, "val_loss": 2.0}\n')
    checkpoints, params = Checkpoints(folder, keep_newest=2), {}
    for step in (1, 2):
        state = state.replace(step=step, params=jax.tree.map(lambda leaf: leaf * 2 + 1, state.params))
        checkpoints.save(state, float(step))
        params[step] = state.params
    checkpoints.close()
    return folder, params, config


@pytest.mark.parametrize(
    ("choice", "step"), [({}, 2), ({"step": "best"}, 1), ({"step": 1}, 1), ({"step": "latest"}, 2)]
)
def test_a_run_is_loaded(run, choice, step):
    folder, params, config = run
    model, loaded, tokenizer = fd.load(str(folder), **choice)
    jax.tree.map(np.testing.assert_array_equal, loaded, params[step])
    assert model.config == config.model
    assert tokenizer.decode(tokenizer.encode("cab")) == "cab"
    tokens_BT = np.array([tokenizer.encode("cab")])
    logits_BTV = jax.jit(lambda params: model.apply({"params": params}, tokens_BT))(loaded)
    assert logits_BTV.shape == (1, 3, 5)


def test_a_run_trained_with_a_kernel_of_other_devices_is_loaded(run, tmp_path):
    """Attention by cuDNN gives the numbers of any other: a run from a GPU is evaluated here too."""
    shutil.copytree(run[0], tmp_path / "run")
    trained = dataclasses.replace(run[2].model, attention="cudnn", dtype="bfloat16")
    (tmp_path / "run" / "config.toml").write_text(to_toml(dataclasses.replace(run[2], model=trained)))
    model = fd.load(tmp_path / "run")[0]
    assert model.config == dataclasses.replace(trained, attention="auto")


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(fd.UserError, match="no such folder"):
        fd.load(tmp_path / "missing")
    with pytest.raises(fd.UserError, match=r"no config\.toml"):
        fd.load(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(fd.UserError, match="has no checkpoint"):
        fd.load(tmp_path)
    with pytest.raises(fd.UserError, match="no checkpoint of step 7; there are 1, 2"):
        fd.load(run[0], step=7)


def test_a_step_may_be_a_number_of_numpy_or_jax(run):
    folder, params, _ = run
    for step in (np.int64(1), jax.numpy.int32(1)):
        jax.tree.map(np.testing.assert_array_equal, fd.load(folder, step=step)[1], params[1])


@pytest.mark.parametrize("step", ["newest", "1", None, 1.0, True, -1, [1]])
def test_what_is_no_step_is_refused(run, step):
    """Else it would be the newest, without a word."""
    with pytest.raises(fd.UserError, match=r"step = .* must be"):
        fd.load(run[0], step=step)
