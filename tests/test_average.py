import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_decoder as fd
from flax_decoder.parallel.mesh import mesh_of
from flax_decoder.training import loop
from flax_decoder.training.average import Average, keep_average, swapped
from flax_decoder.training.checkpoint import Checkpoints, restore_state
from flax_decoder.training.metrics import read_metrics

DECAY = 0.15
SETTINGS = {
    "model.vocab_size": 11,
    "model.context_length": 5,
    "model.num_layers": 1,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "optimizer.warmup_steps": 0,
    "training.batch_size": 2,
}


def make_state(decay, mesh=None, **changes):
    config = fd.load_config(None, SETTINGS | {"optimizer.ema_decay": decay} | changes)
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)


def after_steps(decay):
    """The states before each of three updates and after the last, with random gradients."""
    states, rng = [make_state(decay)], np.random.default_rng(0)
    update = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), states[0].params)
        states.append(update(states[-1], gradients))
    return states


@pytest.fixture(scope="module")
def steps():
    return after_steps(DECAY)


@pytest.mark.full
def test_the_weights_themselves_are_those_without_an_average(steps):
    for one, other in zip(steps, after_steps(0.0), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_the_average_is_that_of_numpy(steps):
    expected = jax.tree.map(np.asarray, steps[0].params)
    for past, state in zip((0.1, DECAY, DECAY), steps[1:], strict=True):
        expected = jax.tree.map(lambda mean, new, past=past: past * mean + (1 - past) * new, expected, state.params)
        found = swapped(state).params
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-8), found, expected)
        assert not np.array_equal(found["embedding"], state.params["embedding"])


def test_swapped_is_the_same_state_where_there_is_no_average(steps):
    assert jax.tree.all(jax.tree.map(np.array_equal, swapped(swapped(steps[1])), steps[1]))
    for tx in (optax.sgd(1.0), optax.adamw(1.0)):
        own = fd.TrainState.create(apply_fn=None, params=steps[0].params, tx=tx)
        assert swapped(own) is own


def test_a_checkpoint_has_the_average_for_others_and_the_weights_for_itself(steps, tmp_path):
    state = steps[-1]
    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(state, None)
    restored = restore_state(tmp_path, 3, jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    arrays = json.loads((tmp_path / "checkpoints" / "3" / "manifest.json").read_text())["arrays"]
    assert arrays["params"].keys() == {name[len("3.params.") :] for name in arrays["optimizer"] if ".params." in name}


@pytest.mark.full
def test_a_run_evaluates_and_gives_its_average(tmp_path, capsys):
    run, text = tmp_path / "run", tmp_path / "input.txt"
    text.write_text("To be, or not to be, that is the question. " * 9)
    rules = {name: value for name, value in SETTINGS.items() if name != "model.vocab_size"}
    rules |= {"data.path": str(text), "run.folder": str(run), "optimizer.ema_decay": 0.9, "training.num_steps": 2}
    config = fd.load_config(None, rules | {"training.sample_tokens": 0, "lens.every": 0})
    assert loop.train(config, run) == 0
    assert "is the average of the weights (optimizer.ema_decay)" in capsys.readouterr().out
    (row,) = (row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row)
    assert row["val_of_average"] == 1
    model, params, _ = fd.load(run)
    state = fd.init_state(model, fd.load_config(run / "config.toml"), rng=jax.random.key(0))
    state = restore_state(run, 2, state)
    jax.tree.map(np.testing.assert_array_equal, params, swapped(state).params)
    assert not np.array_equal(params["embedding"], state.params["embedding"])


@pytest.mark.full
def test_bfloat16_weights_have_an_average_in_float32():
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    state = keep_average(0.999).init(params)
    assert state.params["x"].dtype == jnp.float32


@pytest.mark.full
def test_an_average_is_split_as_its_weights_are(steps):
    mesh = mesh_of(jax.devices()[:2], fsdp=2)
    state = make_state(DECAY, mesh, **{"mesh.fsdp": 2})
    average = state.opt_state[-1]
    assert isinstance(average, Average)
    jax.tree.map(lambda one, other: one.sharding == other.sharding or pytest.fail(), average.params, state.params)
