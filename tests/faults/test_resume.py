"""Resuming with other settings or on other devices, and many saves."""

import gc
import json
import math
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
from run_state import snapshot
from tiny_run import SETTINGS

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import fields_of, fixed_fields
from flax_decoder.parallel.mesh import mesh_of
from flax_decoder.training.checkpoint import Checkpoints, restore_state, saved_steps
from flax_decoder.training.step import state_shardings

# Other values of fields for which `other_value` cannot derive one.
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
    "model.rotary_pattern": [True, False],
    "model.attention_scale": 0.5,
    "model.attention_soft_cap": 20.0,
    "model.logit_soft_cap": 20.0,
    "model.rotary_magnitude": 1.5,
    "model.rotary_query_scaling": 0.5,
    "model.rotary_short_factors": [1.5] * 4,
    "model.rotary_long_factors": [2.5] * 4,
    "data.tokenizer": "byte",
    "data.text_field": "body",
    "optimizer.warmup_steps": 3,
    "lora.rank": 3,
    "lora.targets": ["query"],
    "training.accumulation_steps": 2,
    "training.skip_spikes": 3.0,
}
# Other settings that some of them require, or without which they count for nothing.
WITH = {
    "model.rotary_window_base": {"model.positions": "rotary", "model.window": 4},
    "model.window_pattern": {"model.window": 4, "model.num_layers": 2},
    "model.rotary_pattern": {"model.positions": "rotary", "model.num_layers": 2},
    "model.rotary_scaling_factor": {"model.rotary_scaling": "linear"},
    "model.rotary_magnitude": {"model.rotary_scaling": "yarn"},
    "model.rotary_truncate": {"model.rotary_scaling": "yarn"},
    "model.rotary_short_factors": {"model.rotary_scaling": "longrope", "model.rotary_long_factors": [2.5] * 4},
    "model.rotary_long_factors": {"model.rotary_scaling": "longrope", "model.rotary_short_factors": [1.5] * 4},
    "model.shared_norm": {"model.parallel_residual": True},
    "model.qk_norm_position": {"model.qk_norm": "head"},
    "model.qk_norm_kind": {"model.qk_norm": "head"},
    "model.qk_norm_bias": {"model.qk_norm": "head", "model.qk_norm_kind": "layernorm"},
    "data.bpe_vocab_size": {"data.tokenizer": "bpe"},
    "data.bpe_train_bytes": {"data.tokenizer": "bpe"},
    "model.rotary_low_frequency_factor": {"model.rotary_scaling": "llama3"},
    "model.rotary_high_frequency_factor": {"model.rotary_scaling": "llama3"},
    "model.rotary_original_context": {"model.rotary_scaling": "llama3"},
    "optimizer.muon_learning_rate": {"optimizer.name": "muon"},
    "optimizer.muon_momentum": {"optimizer.name": "muon"},
    "optimizer.decay_fraction": {"optimizer.schedule": "wsd"},
    **{f"lora.{name}": {"lora.rank": 3} for name in ("alpha", "rank_stabilised", "dropout", "targets")},
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
@pytest.mark.short("1", "8")
@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_other_devices(tmp_path, num_devices):
    config = fd.load_config(None, {**SETTINGS, "model.vocab_size": 24, "training.batch_size": 24})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), state)

    state = state.replace(step=jnp.asarray(3, jnp.int32))

    def place(state, **sizes):
        mesh = mesh_of(jax.devices()[: math.prod(sizes.values())], **sizes)
        return jax.device_put(state, state_shardings(mesh, state))

    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(place(state, fsdp=2, tensor=2), None)
    meshes = {1: {"data": 1}, 2: {"tensor": 2}, 3: {"data": 3}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}
    target = place(jax.tree.map(jnp.zeros_like, state), **meshes[num_devices])
    restored = restore_state(tmp_path, 3, target)
    for one, other, like in zip(*map(jax.tree.leaves, (restored, state, target)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == like.sharding and one.dtype == other.dtype


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def held():
    """Numbers of open files, threads, arrays and Python objects of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(jax.live_arrays()), len(gc.get_objects())


@pytest.mark.fault("a thousand saves and prunes")
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("num_saves", [30, pytest.param(1000, marks=pytest.mark.full)])
def test_a_thousand_saves(tmp_path, count_cases, num_saves):
    """Counting open files, threads, arrays and objects shows a leak after few saves."""
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
