"""A run that is asked to go on with other settings, from other devices, or a thousand times."""

import gc
import json
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import HERE, SETTINGS, command, write_text_file

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import fields_of, fixed_fields
from flax_decoder.parallel.mesh import make_mesh
from flax_decoder.training.checkpoint import Checkpoints, restore_state, saved_steps
from flax_decoder.training.step import state_shardings

# Values of fields for which the next choice, the opposite, or a little more than what is saved will not do.
OTHERS = {
    "model.vocab_size": 24,
    "model.num_kv_heads": 1,
    "model.head_dim": 4,
    "model.mlp_dim": 24,
    "model.num_heads": 4,
    "model.embed_dim": 20,
    "model.rotary_window_base": 5000.0,
    "model.window": 4,
    "model.window_pattern": [True, False],
    "model.attention_scale": 0.5,
    "model.attention_soft_cap": 20.0,
    "model.logit_soft_cap": 20.0,
    "data.tokenizer": "byte",
    "optimizer.warmup_steps": 3,
    "training.accumulation_steps": 2,
    "training.skip_spikes": 3.0,
}
# What some need beside them, to make sense at all.
WITH = {
    "model.rotary_window_base": {"model.positions": "rotary", "model.window": 4},
    "model.window_pattern": {"model.window": 4, "model.num_layers": 2},
}
GUARDED = [f"{section}.{name}" for section, name in fixed_fields()]


def other_value(name, saved):
    if name in OTHERS:
        return OTHERS[name]
    section, field = name.split(".")
    annotation = fields_of(section)[field].annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != saved)
    if isinstance(saved, bool):
        return not saved
    if isinstance(saved, int):
        return saved + 1
    return saved / 2 if saved else 0.25


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of which every field is known, and its arguments."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", *command(folder / "run", write_text_file(folder), **HERE)[2:]]
    assert main(arguments) == 0
    return folder / "run", arguments


def snapshot(folder):
    return {str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.fault("another setting on resume, each field")
@pytest.mark.parametrize("name", GUARDED)
def test_each_field_is_guarded(trained, capsys, name):
    run, arguments = trained
    section, field = name.split(".")
    saved = getattr(getattr(fd.load_config(run / "config.toml"), section), field)
    asked = other_value(name, saved)
    changes = {"training.num_steps": 20, name: asked} | WITH.get(name, {})
    before = snapshot(run)
    capsys.readouterr()
    words = [f"--{other}={value if isinstance(value, str) else json.dumps(value)}" for other, value in changes.items()]
    assert main([*arguments, *words]) == 2
    error = capsys.readouterr().err
    shown = tuple(asked) if isinstance(asked, list) else asked
    rows = [line.split() for line in error.splitlines()]
    assert f"{name}: saved {saved}, asked {shown}".split() in rows, error
    assert f"error: {run}: holds a run with other settings" in error and "--run.folder" in error
    assert snapshot(run) == before


@pytest.mark.fault("saved on 4 devices, restored on 1, 2, 3, 8")
@pytest.mark.short("1", "3")
@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_other_devices(tmp_path, num_devices):
    config = fd.load_config(None, {**SETTINGS, "model.vocab_size": 24, "training.batch_size": 24})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), state)

    def place(state, axis, count):
        sized = fd.load_config(None, {"model.vocab_size": 24, "training.batch_size": 24, f"mesh.{axis}": count})
        return jax.device_put(state, state_shardings(make_mesh(sized, jax.devices()[:count]), state))

    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(place(state.replace(step=jnp.asarray(3, jnp.int32)), "fsdp", 4), None)
    axis = "data" if num_devices == 3 else "fsdp"
    target = place(jax.tree.map(jnp.zeros_like, state), axis, num_devices)
    restored = restore_state(tmp_path, 3, target)
    for one, other, there in zip(*map(jax.tree.leaves, (restored.params, state.params, target.params)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == there.sharding


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def held():
    """How many of each kind of thing this process has: files that are open, threads, arrays, and Python's objects."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(jax.live_arrays()), len(gc.get_objects())


@pytest.mark.fault("a thousand saves and prunes")
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("num_saves", [30, pytest.param(1000, marks=pytest.mark.full)])
def test_a_thousand_saves(tmp_path, count_cases, num_saves):
    """A leak shows in a few saves too, where what is held is counted and not measured."""
    config = fd.load_config(None, {**SETTINGS, "model.vocab_size": 24})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    warm, best = num_saves // 5, 3 * num_saves // 10
    counts, memory = [], []
    with Checkpoints(tmp_path, keep_newest=2) as checkpoints:
        for step in range(1, num_saves + 1):
            checkpoints.save(state.replace(step=jnp.asarray(step, jnp.int32)), abs(step - best) + 1.0)
            if step in (warm, num_saves):
                checkpoints.wait()
                counts.append(held())
                memory.append(resident_bytes())
    (files, threads, arrays, objects), after = counts
    assert after[0] <= files and after[1] <= threads and after[2] <= arrays
    assert after[3] < objects + (num_saves - warm)  # not one for each save
    assert memory[1] < 1.05 * memory[0]
    kept = [best, num_saves - 1, num_saves]
    assert saved_steps(tmp_path) == kept
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(map(str, kept))
    count_cases(num_saves)
