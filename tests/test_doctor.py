import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_decoder.cli import main
from flax_decoder.config_file import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.planning import doctor
from flax_decoder.training.checkpoint import Checkpoints
from flax_decoder.training.step import init_state

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 8
SIZES = {
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "training.batch_size": 4,
    "mesh.data": 1,
}
V = 23
CHECKS = [
    "versions",
    "processor",
    "memory",
    "devices",
    "text",
    "disk",
    "model",
    "first loss",
    "learning",
    "no leak",
    "checkpoint",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """And with as much time as it takes, on whatever machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MAX_SECONDS", math.inf)


@pytest.fixture(scope="module")
def config():
    return doctor.for_learning_by_heart(load_config(None, SIZES), V)


@pytest.fixture(scope="module")
def first_state(config):
    return init_state(Decoder(config.model), config, rng=jax.random.key(0))


@pytest.fixture
def state(first_state):
    """A copy: learning gives the arrays of a state away."""
    return jax.tree.map(jnp.copy, first_state)


@pytest.fixture
def batch():
    tokens = np.random.default_rng(0).integers(0, V, (4, 9), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def command(**changes):
    values = SIZES | {name.replace("__", "."): value for name, value in changes.items()}
    return ["doctor", *(f"--{name}={value}" for name, value in values.items())]


@pytest.mark.short("adamw")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sound_model_on_a_sound_machine(capsys, optimizer):
    Path("hamlet.txt").write_text(TEXT)
    arguments = command(data__path="hamlet.txt", optimizer__name=optimizer, model__dropout=0.5, run__folder="runs/x")
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines if not line.startswith(" ")] == CHECKS
    assert all(line[14:21].strip() == "ok" for line in lines if not line.startswith(" ") and line[:7] != "devices")
    assert "hamlet.txt: 612 tokens" in lines[[line[:4] for line in lines].index("text")]
    assert os.listdir() == ["hamlet.txt"]


def test_a_check_that_fails_is_exit_code_1(capsys, monkeypatch):
    Path("hamlet.txt").write_text(TEXT)
    monkeypatch.setattr(doctor, "MAX_STEPS", 11)
    assert main(command(data__path="hamlet.txt")) == 1
    out = capsys.readouterr().out
    assert (
        "learning      FAILED   4 sequences of 8 tokens by heart: loss 3." in out and "\n" + " " * 21 + "-> the " in out
    )
    assert out.count("FAILED") == 1 and "checkpoint    ok" in out  # the others are done all the same


def test_a_users_error_is_exit_code_2(capsys):
    assert main(command(data__path="nowhere.txt")) == 2
    assert main(command(mesh__data=99)) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert os.listdir() == []


def test_the_first_loss_is_that_of_knowing_nothing(state, config):
    finding = doctor.check_first_loss(state, config)
    assert finding.status == "ok" and "ln V = 3.135 for 23 tokens" in finding.what


def scaled(state, factor):
    return state.replace(params=jax.tree.map(lambda leaf: leaf * factor, state.params))


def test_wrong_weights_fail_the_first_loss(state, config):
    larger = scaled(state, 100.0)
    assert doctor.check_first_loss(larger, config).status == "FAILED"
    assert doctor.check_first_loss(scaled(state, jnp.nan), config).status == "FAILED"
    # A head that is biased to a few tokens, and a loss that is a mean over too many.
    apply = state.apply_fn
    biased = state.replace(
        apply_fn=lambda *args, **more: apply(*args, **more) + jnp.where(jnp.arange(V)[None, None] < 3, 5.0, 0.0)
    )
    assert doctor.check_first_loss(biased, config).status == "FAILED"


def test_a_far_start_is_a_warning(config):
    far = dataclasses.replace(config.model, init_stddev=1.0)
    config = dataclasses.replace(config, model=far)
    finding = doctor.check_first_loss(init_state(Decoder(far), config, rng=jax.random.key(0)), config)
    assert finding.status == "warning" and "--model.init-stddev" in finding.advice


def test_a_few_sequences_are_learned(state, batch):
    learned, finding = doctor.check_learning(state, batch)
    assert finding.status == "ok"
    assert 0 < int(learned.step) < doctor.MAX_STEPS


def test_a_model_that_learns_a_part_is_a_warning(state, batch, monkeypatch):
    monkeypatch.setattr(doctor, "LEARNED", 1e-9)
    monkeypatch.setattr(doctor, "MAX_STEPS", 60)
    finding = doctor.check_learning(state, batch)[1]
    assert finding.status == "warning" and "in 60 steps" in finding.what and "too small" in finding.advice


@pytest.mark.short("no update")
@pytest.mark.parametrize(
    "tx", [optax.set_to_zero(), optax.sgd(-0.01), optax.sgd(jnp.nan)], ids=["no update", "uphill", "no number"]
)
def test_a_model_that_does_not_learn_fails(state, batch, monkeypatch, tx):
    monkeypatch.setattr(doctor, "MAX_STEPS", 20)
    broken = state.replace(tx=tx, opt_state=tx.init(state.params))
    assert doctor.check_learning(broken, batch)[1].status == "FAILED"


def test_a_model_too_slow_to_learn_is_a_warning(state, batch, monkeypatch):
    monkeypatch.setattr(doctor, "MAX_SECONDS", 0.0)
    finding = doctor.check_learning(state, batch)[1]
    assert finding.status == "warning" and "in 2 steps" in finding.what and "--model.num-layers" in finding.advice


def leaking(amount, distance=1):
    """Logits that also hear a little of the token `distance` positions later."""

    def leak(apply):
        def leaky(variables, tokens_BT, **more):
            logits_BTV = apply(variables, tokens_BT, **more)
            later_BT = jnp.roll(tokens_BT, -distance, axis=1).at[:, -distance:].set(0)
            return logits_BTV + amount * jax.nn.one_hot(later_BT, V)

        return leaky

    return leak


def test_no_position_sees_a_later_one(state, batch):
    finding = doctor.check_no_leak(state, batch["inputs"][:1])
    assert finding.status == "ok" and "1, 4, 7" in finding.what


@pytest.mark.short("1.0-7", "1e-06-3", "nan-1")
@pytest.mark.parametrize("distance", [1, 3, 7])
@pytest.mark.parametrize("amount", [1.0, 1e-6, float("nan")])
def test_the_least_leak_fails(state, batch, amount, distance):
    leaky = state.replace(apply_fn=leaking(amount, distance)(state.apply_fn))
    finding = doctor.check_no_leak(leaky, batch["inputs"][:1])
    assert finding.status == "FAILED" and "later tokens" in finding.advice


def test_attention_without_its_mask_fails(state, batch, monkeypatch):
    from flax_decoder.nn.mask import MaskSpec

    assert doctor.check_no_leak(state, batch["inputs"][:1]).status == "ok"
    visible_BTS = MaskSpec.visible_BTS
    monkeypatch.setattr(MaskSpec, "visible_BTS", lambda mask: visible_BTS(mask) | True)
    jax.clear_caches()
    assert doctor.check_no_leak(state, batch["inputs"][:1]).status == "FAILED"
    jax.clear_caches()


def test_a_model_that_reads_nothing_fails(state, batch):
    apply = state.apply_fn
    blind = state.replace(apply_fn=lambda variables, tokens_BT: apply(variables, jnp.zeros_like(tokens_BT)))
    finding = doctor.check_no_leak(blind, batch["inputs"][:1])
    assert finding.status == "FAILED" and "does not read" in finding.advice


def other_of(config):
    return init_state(Decoder(config.model), config, rng=jax.random.key(1))


def test_a_state_comes_back(state, config, tmp_path):
    finding = doctor.check_checkpoint(state, other_of(config), tmp_path)
    assert finding.status == "ok" and f"{len(jax.tree.leaves(state))} arrays" in finding.what
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_on_the_disk_fails(state, config, tmp_path, monkeypatch):
    close = Checkpoints.close

    def close_and_flip(self):
        close(self)
        path = max(
            (path for path in tmp_path.rglob("params/**/*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr(Checkpoints, "close", close_and_flip)
    finding = doctor.check_checkpoint(state, other_of(config), tmp_path)
    assert finding.status == "FAILED" and finding.advice
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_on_the_way_back_fails(state, config, tmp_path, monkeypatch):
    restore = doctor.restore_state

    def flip(folder, step, like):
        state = restore(folder, step, like)
        return state.replace(params=jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-7), state.params))

    monkeypatch.setattr(doctor, "restore_state", flip)
    finding = doctor.check_checkpoint(state, other_of(config), tmp_path)
    assert finding.status == "FAILED" and "came back changed" in finding.what


def test_a_disk_that_fails_is_told(state, config, tmp_path, monkeypatch):
    def fail(self, state, val_loss):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    finding = doctor.check_checkpoint(state, other_of(config), tmp_path)
    assert finding.status == "FAILED" and "No space left" in finding.what


def test_the_disk_must_be_writable_and_have_room(tmp_path, monkeypatch):
    assert doctor.check_disk(tmp_path, 1000, 2).status == "ok"
    assert doctor.check_disk(tmp_path, 10**18, 2).status == "FAILED"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be written" in doctor.check_disk(tmp_path, 1000, 2).what


def test_a_model_that_is_too_large_is_left_out(capsys, monkeypatch):
    Path("hamlet.txt").write_text(TEXT)
    assert (
        main(command(data__path="hamlet.txt", model__num_layers=900, model__embed_dim=8192, model__scan_layers="true"))
        == 1
    )
    out = capsys.readouterr().out
    assert "disk          FAILED" in out
    assert "too much to check it on one device" in out and "--model.num-layers 2" in out
    assert "first loss" not in out


def test_idle_devices_are_a_warning(config):
    assert doctor.check_devices(config).status == "warning"  # one of eight
    everything = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=8))
    everything = dataclasses.replace(everything, training=dataclasses.replace(config.training, batch_size=8))
    assert doctor.check_devices(everything).status == "ok"


def test_the_nearest_folder_that_is_there(tmp_path):
    assert doctor.nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert doctor.nearest_folder(Path("a/b")) == tmp_path
    assert doctor.nearest_folder(tmp_path) == tmp_path
