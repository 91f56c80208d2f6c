import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job import TEXT, dotted, train_here

import flax_decoder as fd
from flax_decoder.errors import FaultError
from flax_decoder.parallel.mesh import mesh_of
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.non_finite import check_finite, explain, first_non_finite, skip_batch

RULES = {
    "model.vocab_size": 40,
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "training.num_steps": 8,
    "training.batch_size": 2,
    "training.save_every": 2,
    "training.log_every": 1,
    "training.sample_tokens": 0,
}


def make_state(mesh=None, **changes):
    config = fd.load_config(None, RULES | dotted(changes))
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh), config.training


def with_number(tree, name, number):
    """The tree with the last element of one leaf replaced."""

    def change(path, leaf):
        words = [str(getattr(part, "name", getattr(part, "key", ""))) for part in path]
        return leaf.at[(-1,) * leaf.ndim].set(number) if ".".join(filter(None, words)) == name else leaf

    changed = jax.tree.map_with_path(change, tree)
    assert any(one is not other for one, other in zip(jax.tree.leaves(changed), jax.tree.leaves(tree), strict=True))
    return changed


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_tensor_is_named(bad, spread):
    state, _ = make_state(mesh_of(jax.devices(), fsdp=4, tensor=2) if spread else None)
    assert first_non_finite(state) is None
    name = "layers.attention.key.kernel"
    params = with_number(with_number(state.params, name, bad), "positions", bad)
    assert first_non_finite(state.replace(params=params)) == f"the parameter {name}"
    optimizer = with_number(state.opt_state, f"nu.{name}", bad)
    assert first_non_finite(state.replace(opt_state=optimizer)) == f"the optimizer's nu.{name}"
    with pytest.raises(FaultError, match=r"the optimizer's nu\.layers.*not finite after step 0.*not saved"):
        check_finite(state.replace(opt_state=optimizer))


def test_a_state_that_knows_no_loss_yet_is_not_bad():
    assert first_non_finite(make_state(training__skip_spikes=2.0)[0]) is None


def test_large_numbers_are_not_bad():
    """Their sum is infinite."""
    state, _ = make_state()
    large = state.replace(params=jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), state.params))
    assert first_non_finite(large) is None
    check_finite(large)


def make_batch():
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9), np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def test_a_fault_that_does_not_come_again_is_told_as_such():
    state, _ = make_state()
    state = state.replace(step=state.step + 1)
    assert explain(state, 1, make_batch()).endswith("but are when computed again: this device or its memory is faulty")
    # Read one step behind, a step may be explained after another one.
    later = state.replace(step=state.step + 1)
    assert explain(later, 1, make_batch()).endswith("again: the step after it has changed the parameters")


@pytest.mark.parametrize(("nan", "skipped", "stops"), [("stop", 1, True), ("skip", 3, False), ("skip", 4, True)])
def test_when_a_run_stops(nan, skipped, stops):
    state, training = make_state(training__nan=nan, training__skip_limit=3)
    state = state.replace(step=state.step + 7)
    batch = make_batch() | {"mask": np.full((2, 8), np.nan, np.float32)}
    metrics = {"loss": np.float32(np.nan), "gradient_norm": np.float32(np.nan)}
    if stops:
        with pytest.raises(FaultError, match=r"^step 7: the loss is nan") as error:
            skip_batch(training, state, 7, batch, metrics, skipped)
        assert ("--training.nan skip" in str(error.value)) == (nan == "stop")
        assert ("4 batches were skipped, more than training.skip_limit = 3" in str(error.value)) == (nan == "skip")
    else:
        told = skip_batch(training, state, 7, batch, metrics, skipped)
        assert told == "step 7: the loss is nan: its batch is skipped (3 so far, at most 3)"
    # A spike is not a fault, but counts toward the limit.
    spike = {"loss": np.float32(93), "gradient_norm": np.float32(1)}
    assert skip_batch(training, state, 7, batch, spike, 3).startswith("step 7: the loss of 93 is a spike")
    with pytest.raises(FaultError, match="4 batches were skipped"):
        skip_batch(training, state, 7, batch, spike, 4)
    # A non-finite state is a fault, whatever is allowed.
    broken = state.replace(params=with_number(state.params, "embedding", np.nan))
    with pytest.raises(FaultError, match="the parameter embedding is not finite after step 7"):
        skip_batch(training, broken, 7, batch, metrics, 1)


def run(folder, **changes):
    (folder.parent / "text.txt").write_text(TEXT)
    return train_here(folder, folder.parent / "text.txt", RULES, **changes)


def rows_of(folder):
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.full
def test_spikes_are_the_same_ones_in_a_run_that_was_continued(tmp_path, capsys):
    """The factor is so close to 1 that ordinary batches are spikes, depending on the last bits of the running mean."""
    settings = {"training__skip_spikes": 1.0005, "training__num_steps": 20, "optimizer__learning_rate": 1e-7}
    settings |= {"optimizer__warmup_steps": 0, "optimizer__schedule": "linear"}
    assert run(tmp_path / "whole", **settings) == 0
    rows = rows_of(tmp_path / "whole")
    steps = [int(step) for step in re.findall(r"step (\d+): the loss of \S+ is a spike", capsys.readouterr().out)]
    assert rows[-1]["skipped_steps"] == len(steps) > 1 and steps[-1] > 6
    assert [row["step"] for row in rows if row["train_loss"] == "unknown"] == steps
    # The schedule counts applied updates, not steps.
    rates = [row["learning_rate"] for row in rows]
    assert all((rates[step - 1] == rates[step - 2]) == (step in steps) for step in range(2, 21))
    with pytest.raises(FaultError, match=r"skipped, more than training.skip_limit = 1"):
        run(tmp_path / "cut", **settings, training__skip_limit=1)
    assert run(tmp_path / "cut", **settings) == 0
    assert "continuing" in capsys.readouterr().out
    assert rows_of(tmp_path / "cut") == rows
    whole, cut = (fd.load(tmp_path / name)[1] for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
