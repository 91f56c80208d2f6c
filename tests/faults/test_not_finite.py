"""NaN and infinities in a gradient, the loss or a parameter at one step of a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import SETTINGS

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.training import step as step_module
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.step import TrainState

ROW = "NaN, ±Inf in gradient, loss, param"
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NUM_STEPS = 6
QUICK = {"training.num_steps": NUM_STEPS, "training.save_every": 2, "training.eval_every": 6, "training.log_every": 1}
# Step, tensor, and settings of the run.
VARIANTS = [
    (3, "embedding", {}),
    (6, "final_norm.scale", {"mesh.fsdp": 2, "mesh.tensor": 2, "model.vocab_size": 32}),
    (1, "layers.attention.query.kernel", {"optimizer.name": "muon"}),
    (4, "layers.attention.value.kernel", {"training.accumulation_steps": 2, "model.num_layers": 2}),
    (6, "layers.feed_forward.up.kernel", {"model.scan_layers": True, "model.num_layers": 2}),
    (5, "layers.attention.key.kernel", {"model.dropout": 0.2, "training.seed": 3}),
    (2, "layers.attention.out.kernel", {"optimizer.moments_dtype": "bfloat16"}),
    (5, "layers.feed_forward.gate.kernel", {"model.feed_forward": "swiglu", "optimizer.schedule": "wsd"}),
    (4, "head", {"model.tied_head": False, "optimizer.clip_norm": 0.0}),
    (3, "layers.feed_forward.down.kernel", {"model.norm": "rmsnorm", "model.positions": "rotary"}),
    (3, "embedding", {"mesh.data": 1, "lens.every": 0}),
]
KINDS = [(place, bad) for place in ("gradient", "loss", "param") for bad in BAD]
# In the short suite, in the smallest run, a gradient and a parameter (a loss: test_step.py); all of these with --full.
SHORT = [("gradient", "nan", 10)]
CASES = [
    pytest.param(*case, marks=() if case in SHORT else pytest.mark.full)
    for case in ((*kind, variant) for kind in KINDS for variant in range(len(VARIANTS)))
]


def train(folder, text, changes):
    settings = SETTINGS | QUICK | {"training.sample_tokens": 0} | changes | {"data.path": text, "run.folder": folder}
    return main(["train", *(f"--{name}={str(value).lower()}" for name, value in settings.items())])


def poison(monkeypatch, place, bad, step, name):
    """Puts a bad number into one element at a step, counted from 1."""

    def put(tree, when):
        def change(path, leaf):
            if ".".join(part.key for part in path) != name:
                return leaf
            first = (0,) * leaf.ndim
            return leaf.at[first].set(jnp.where(when, jnp.asarray(bad, leaf.dtype), leaf[first]))

        return jax.tree.map_with_path(change, tree)

    accumulate, apply_gradients = step_module.accumulate, TrainState.apply_gradients

    def poisoned_sums(state, batch, rng):
        sums, gradients = accumulate(state, batch, rng)
        now = state.step == step - 1
        if place == "gradient":
            return sums, put(gradients, now)
        return sums | {"loss": jnp.where(now, jnp.asarray(bad, sums["loss"].dtype), sums["loss"])}, gradients

    def poisoned_update(state, **arguments):
        after = apply_gradients(state, **arguments)
        return after.replace(params=put(after.params, after.step == step))

    if place == "param":
        monkeypatch.setattr(TrainState, "apply_gradients", poisoned_update)
    else:
        monkeypatch.setattr(step_module, "accumulate", poisoned_sums)


_ends = {}


def end_of(variant, skips, text, tmp_path_factory):
    """An uninterrupted run, with or without the variant's step skipped."""
    if (variant, skips) not in _ends:
        folder = tmp_path_factory.mktemp("finished") / "run"
        step, name, changes = VARIANTS[variant]
        with pytest.MonkeyPatch.context() as patch:
            if skips:
                poison(patch, "gradient", math.nan, step, name)
            assert train(folder, text, changes | {"training.nan": "skip"}) == 0
        _ends[variant, skips] = folder
    return _ends[variant, skips]


def without_times(folder):
    return [
        {name: value for name, value in row.items() if name not in ("tokens_per_second", "seconds")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def assert_equal_params(folder, other, step):
    """Asserts equal and finite parameters."""
    ones, others = (fd.load(run, step=step)[1] for run in (folder, other))
    jax.tree.map(np.testing.assert_array_equal, ones, others)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ones))


@pytest.mark.fault(ROW)
@pytest.mark.parametrize(("place", "bad", "variant"), CASES)
def test_a_number_that_is_not_finite_never_gets_into_a_checkpoint(
    place, bad, variant, text, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    step, name, changes = VARIANTS[variant]
    expected = end_of(variant, place != "param", text, tmp_path_factory)
    folder = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        poison(patch, place, BAD[bad], step, name)
        assert train(folder, text, changes) == 1
        error = capsys.readouterr().err
        # Parameters are checked when a step fails or a checkpoint is due.
        seen = step if step % 2 == 0 or step == NUM_STEPS else step + 1
        message = {
            "gradient": f"fault: step {step}: the gradient of {name} is not finite",
            "loss": f"fault: step {step}: the loss is {bad},",
            "param": f"fault: the parameter {name} is not finite after step {seen}, so this step is not saved",
        }[place]
        assert error.startswith(message) and error.count("\n") == 2 and "Traceback" not in error
        # Earlier checkpoints are valid and are used.
        before = [saved for saved in range(2, step, 2)][-2:]
        assert saved_steps(folder) == before
        assert not before or main(["verify", str(folder)]) == 0
        if place == "param":
            patch.undo()  # the fault does not recur
        files = {path: path.read_bytes() for path in folder.glob("checkpoints/**/*") if path.is_file()}
        assert train(folder, text, changes | {"training.nan": "skip", "training.keep_newest": 9}) == 0
    assert all(path.read_bytes() == content for path, content in files.items())
    assert without_times(folder) == without_times(expected)
    assert_equal_params(folder, expected, NUM_STEPS)
    assert without_times(folder)[-1]["skipped_steps"] == (place != "param")
