import dataclasses
import itertools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from job import TEXT, dotted

from flax_decoder.cli import main
from flax_decoder.config_file import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.planning import doctor
from flax_decoder.training.checkpoint import Checkpoints
from flax_decoder.training.step import init_state

SIZES = {
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "training.batch_size": 4,
    "mesh.data": 1,
}
V = 23
CHECKS = ["versions", "processor", "memory", "devices", "text", "disk", "model"]
CHECKS += ["first loss", "learning", "no leak", "checkpoint"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """An empty folder, and no limit of time: tests must not depend on the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MAX_SECONDS", math.inf)


@pytest.fixture(scope="module")
def config():
    return doctor.memorizing(load_config(None, SIZES), V)


@pytest.fixture(scope="module")
def first_state(config):
    return init_state(Decoder(config.model), config, rng=jax.random.key(0))


@pytest.fixture
def state(first_state):
    """A copy: training donates the arrays of a state."""
    return jax.tree.map(jnp.copy, first_state)


@pytest.fixture
def batch():
    tokens = np.random.default_rng(0).integers(0, V, (4, 9), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def command(**changes):
    Path("hamlet.txt").write_text(TEXT)
    values = SIZES | {"data.path": "hamlet.txt"} | dotted(changes)
    return ["doctor", *(f"--{name}={value}" for name, value in values.items())]


@pytest.mark.short("adamw")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sound_model_passes_every_check(capsys, optimizer):
    assert main(command(optimizer__name=optimizer, model__dropout=0.5, run__folder="runs/x")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line[:12].strip() for line in lines] == CHECKS
    assert {line[:12].strip() for line in lines if line[14:21].strip() != "ok"} == {"devices"}  # one of eight is used
    assert "hamlet.txt: 612 tokens" in lines[CHECKS.index("text")]
    assert os.listdir() == ["hamlet.txt"]


def test_a_failed_check_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "MAX_STEPS", 11)
    assert main(command()) == 1
    out = capsys.readouterr().out
    assert "learning      FAILED   4 sequences of 8 tokens by heart: loss 3." in out
    assert "\n" + " " * 21 + "-> the gradient" in out
    assert out.count("FAILED") == 1 and "checkpoint    ok" in out  # the later checks still run


@pytest.mark.parametrize("changes", [{"data__path": "nowhere.txt"}, {"mesh__data": 99}])
def test_a_user_error_is_exit_code_2(capsys, changes):
    assert main(command(**changes)) == 2
    assert str(*changes.values()) in capsys.readouterr().err
    assert os.listdir() == ["hamlet.txt"]


@pytest.mark.parametrize(
    ("scale", "status"), [(1.0, "ok"), (0.0, "ok"), (100.0, "warning"), (math.inf, "FAILED"), (math.nan, "FAILED")]
)
def test_the_first_loss(state, config, scale, status):
    scaled = state.replace(params=jax.tree.map(lambda leaf: leaf * scale, state.params))
    finding = doctor.check_first_loss(scaled, config.model)
    assert finding.status == status and "ln V = 3.135 for 23 tokens" in finding.detail
    wrong_v = dataclasses.replace(config.model, vocab_size=2 * V)  # a loss below that of knowing nothing
    assert status != "ok" or doctor.check_first_loss(scaled, wrong_v).status == "FAILED"


@pytest.mark.parametrize("limit", [{"MEMORIZED": 1e-9, "MAX_STEPS": 60}, {"MAX_SECONDS": 0.0}], ids=["steps", "time"])
def test_a_model_that_learns_too_slowly_is_a_warning(state, batch, monkeypatch, limit):
    for name, value in limit.items():
        monkeypatch.setattr(doctor, name, value)
    finding = doctor.check_learning(state, batch)[1]
    assert finding.status == "warning" and f"in {limit.get('MAX_STEPS', 2)} steps" in finding.detail
    assert ("this machine" in finding.advice) == ("MAX_SECONDS" in limit)


def test_a_slow_machine_is_not_held_against_the_model(state, batch, monkeypatch, capsys):
    clock = itertools.count(step=1.0)  # a second between two looks at it
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(doctor, "MAX_SECONDS", 9.0)
    for tx in (state.tx, optax.set_to_zero()):
        slow = jax.tree.map(jnp.copy, state.replace(tx=tx, opt_state=tx.init(state.params)))
        finding = doctor.check_learning(slow, batch, seconds=3.0)[1]
        assert finding.status == "warning" and "too few steps to tell: this machine" in finding.advice
    monkeypatch.setattr(doctor, "MIN_STEPS", 2)
    finding = doctor.check_learning(jax.tree.map(jnp.copy, state), batch)[1]
    assert finding.status == "warning" and "no fault" in finding.advice
    monkeypatch.setattr(doctor, "SKIP_SECONDS", 1.0)
    assert main(command()) == 0
    *_, leak, _, checkpoint, _ = capsys.readouterr().out.splitlines()
    assert leak.startswith("no leak       warning  left out, as ") and checkpoint.startswith("checkpoint    warning")


@pytest.mark.short("no update")
@pytest.mark.parametrize(
    "tx", [optax.set_to_zero(), optax.sgd(-0.01), optax.sgd(jnp.nan)], ids=["no update", "uphill", "no number"]
)
def test_a_model_that_does_not_learn_fails(state, batch, monkeypatch, tx):
    monkeypatch.setattr(doctor, "MAX_STEPS", 20)
    broken = state.replace(tx=tx, opt_state=tx.init(state.params))
    assert doctor.check_learning(broken, batch)[1].status == "FAILED"


@pytest.mark.short("1.0-7", "1e-06-3", "nan-1")
@pytest.mark.parametrize("distance", [1, 3, 7])
@pytest.mark.parametrize("amount", [1.0, 1e-6, float("nan")])
def test_the_smallest_leak_fails(state, batch, amount, distance):
    def leaky(variables, tokens_BT):
        later_BT = jnp.roll(tokens_BT, -distance, axis=1).at[:, -distance:].set(0)
        return state.apply_fn(variables, tokens_BT) + amount * jax.nn.one_hot(later_BT, V)

    finding = doctor.check_no_leak(state.replace(apply_fn=leaky), batch["inputs"][:1])
    assert finding.status == "FAILED" and "later tokens" in finding.advice


def test_a_model_that_does_not_read_its_tokens_fails(state, batch):
    blind = state.replace(apply_fn=lambda variables, tokens_BT: state.apply_fn(variables, jnp.zeros_like(tokens_BT)))
    finding = doctor.check_no_leak(blind, batch["inputs"][:1])
    assert finding.status == "FAILED" and "does not read" in finding.advice


def test_attention_without_its_mask_fails(state, batch, monkeypatch):
    finding = doctor.check_no_leak(state, batch["inputs"][:1])
    assert finding.status == "ok" and "1, 4, 7" in finding.detail
    visible_BTS = MaskSpec.visible_BTS
    monkeypatch.setattr(MaskSpec, "visible_BTS", lambda mask: visible_BTS(mask) | True)
    jax.clear_caches()
    assert doctor.check_no_leak(state, batch["inputs"][:1]).status == "FAILED"
    jax.clear_caches()


def test_a_bit_flipped_on_the_disk_fails(state, tmp_path, monkeypatch):
    close = Checkpoints.close

    def close_and_flip(self):
        close(self)
        files = [path for path in tmp_path.rglob("params/**/*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)

    monkeypatch.setattr(Checkpoints, "close", close_and_flip)
    assert doctor.check_checkpoint(state, tmp_path).status == "FAILED"
    assert list(tmp_path.iterdir()) == []


def test_a_bit_flipped_in_memory_fails(state, tmp_path, monkeypatch):
    restore = doctor.restore_state

    def flip(folder, step, like):
        restored = restore(folder, step, like)
        embedding_VD = restored.params["embedding"].at[0, 0].add(1e-7)
        return restored.replace(params=restored.params | {"embedding": embedding_VD})

    monkeypatch.setattr(doctor, "restore_state", flip)
    finding = doctor.check_checkpoint(state, tmp_path)
    assert finding.status == "FAILED" and finding.detail.startswith("1 of ")


def test_a_full_disk_fails(state, tmp_path, monkeypatch):
    def fail(self, state, val_loss):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    finding = doctor.check_checkpoint(state, tmp_path)
    assert finding.status == "FAILED" and "No space left" in finding.detail


def test_the_disk_must_be_writable_and_have_room(tmp_path, monkeypatch):
    assert doctor.check_disk(tmp_path, 1000, 2).status == "ok"
    assert doctor.check_disk(tmp_path, 10**18, 2).status == "FAILED"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable" in doctor.check_disk(tmp_path, 1000, 2).detail


def test_a_model_too_large_for_one_device_is_left_out(capsys):
    large = {"model__num_layers": 900, "model__embed_dim": 8192, "model__scan_layers": "true"}
    assert main(command(run__folder="a/b", **large)) == 1
    out = capsys.readouterr().out
    assert f"disk          FAILED   {Path.cwd()}: " in out  # where the folder of the run would be made
    assert "too much to check it on one device" in out and "--model.num-layers 2" in out
    assert "first loss" not in out


def test_all_devices_in_use_is_ok(config):
    mesh = dataclasses.replace(config.mesh, data=8)
    training = dataclasses.replace(config.training, batch_size=8)
    assert doctor.check_devices(dataclasses.replace(config, mesh=mesh, training=training)).status == "ok"


@pytest.mark.parametrize(
    ("jaxlib", "backend", "status"),
    [
        ("0.10.1", "gpu", "ok"),
        ("0.10.2", "gpu", "warning"),
        ("0.11.0", "gpu", "warning"),
        ("0.11.0", "cpu", "ok"),
        ("0.11.1", "gpu", "ok"),
        ("0.12.0.dev1", "gpu", "ok"),
    ],
)
def test_a_jaxlib_that_is_slow_on_gpus_is_a_warning_there(jaxlib, backend, status):
    finding = doctor.check_versions(jaxlib, backend)
    assert finding.status == status and ("jax[cuda13]>=0.11.1" in str(finding)) == (status == "warning")
