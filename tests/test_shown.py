"""A state, a model and a config show themselves shortly, and stay the trees that they are."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_decoder as fd
from flax_decoder.config import Config, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from flax_decoder.config_file import load_config

SIZES = {"model.vocab_size": 11, "model.context_length": 5, "model.num_layers": 1, "model.embed_dim": 6}
CONFIG = load_config(None, SIZES | {"model.num_heads": 2, "training.seed": 7})
MODEL = fd.Decoder(CONFIG.model)


@pytest.fixture(scope="module")
def state():
    return fd.init_state(MODEL, CONFIG, rng=jax.random.key(0))


def test_a_state_shows_itself_in_a_line(state):
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert repr(state) == str(state) == (
        f"TrainState(step=0, params={num_params:,} of float32, "
        f"optimizer=Adam: {2 * num_params + 2:,} of float32 and int32, seed=7)"
    )  # fmt: skip
    assert repr(state.replace(z_loss=0.5, accumulation_steps=2)).endswith("seed=7, accumulation_steps=2, z_loss=0.5)")
    plain = fd.TrainState.create(apply_fn=MODEL.apply, params=state.params, tx=optax.sgd(0.1))
    assert "optimizer=None: 0, seed=0" in repr(plain)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda state: jax.eval_shape(lambda: state), "step=int32[], params="),
        (lambda state: jax.tree.map(lambda leaf: leaf.sharding, state), "step=SingleDeviceSharding, params="),
        (lambda state: jax.tree.map(lambda leaf: None, state), "step=NoneType, params=0"),
        (lambda state: jax.tree.map(lambda leaf: np.stack([leaf] * 2), state), "step=int32[2], params="),
        (lambda state: state.replace(step=5), "step=int, params="),
        (lambda state: jax.tree.map(lambda leaf: True, state), " x bool"),
    ],
)
def test_a_tree_of_the_same_structure_shows_itself_too(state, make, part):
    shown = repr(make(state))
    assert part in shown and len(shown) < 200


def test_a_traced_and_a_donated_state_show_themselves(state):
    shown = []
    jax.jit(lambda state: shown.append(repr(state)) or state.step)(state)
    assert "step=int32[], params=" in shown[0]
    copied = copy.deepcopy(state)
    copied.step.delete()
    assert "step=int32[], params=" in repr(copied)


def test_the_name_of_another_optimizer_is_shown():
    config = load_config(None, SIZES | {"model.num_heads": 2, "optimizer.name": "muon"})
    state = jax.eval_shape(lambda: fd.init_state(MODEL, config, rng=jax.random.key(0)))
    assert "optimizer=Adam + Muon: " in repr(state)


def test_how_it_is_shown_changes_no_tree(state):
    leaves, structure = jax.tree.flatten(state)
    assert jax.tree.unflatten(structure, leaves).params is not state.params and structure.num_leaves == len(leaves)
    assert jax.tree.structure(copy.deepcopy(state)) == structure
    parts = pickle.loads(pickle.dumps((state.step, state.params, state.opt_state)))
    restored = state.replace(**dict(zip(("step", "params", "opt_state"), parts, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    with pytest.raises(ValueError, match="embedding"):  # the leaf is named, as before
        jax.tree.map(jnp.add, state.params, {name: leaf for name, leaf in state.params.items() if name != "embedding"})


@pytest.mark.parametrize(
    "config",
    [Config(), CONFIG, ModelConfig(window=3, window_pattern=(True, False)), OptimizerConfig(schedule="wsd")],
)
def test_a_config_shows_the_call_that_makes_it(config):
    names = {kind.__name__: kind for kind in (Config, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig)}
    again = eval(repr(config), names)
    assert again == config and hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_only_what_differs_from_the_defaults_is_shown():
    assert repr(Config()) == "Config()"
    assert repr(Config(training=TrainingConfig(seed=3))) == "Config(training=TrainingConfig(seed=3))"
    assert len(repr(MODEL).splitlines()) == 5 and "ModelConfig(vocab_size=11, " in repr(MODEL)
