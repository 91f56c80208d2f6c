import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from flax_decoder.cli import main
from flax_decoder.config_file import load_config
from flax_decoder.planning import plan as plan_module
from flax_decoder.planning.plan import make_plan
from flax_decoder.training.hardware import CHIPS

SIZES = {
    "model.vocab_size": 64,
    "model.context_length": 16,
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "training.batch_size": 8,
}
ARGUMENTS = [f"--{name}={value}".replace("_", "-") for name, value in SIZES.items()]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))


def plan_of(changes=None):
    return make_plan(load_config(None, SIZES | (changes or {})), jax.devices())


def test_memory_of_a_split_state():
    memory = plan_of({"mesh.fsdp": 8}).memory
    matrices = 64 * 32 + 16 * 32 + 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32)
    vectors = 32 * (2 * 2 + 1)
    assert memory.params == 4 * (matrices / 8 + vectors)
    assert 0 <= memory.optimizer - 2 * memory.params <= 16  # counters
    assert memory.batch == 2 * 4 * 8 * 16 / 8
    assert memory.temporaries > 0 and memory.fits is None
    assert memory.total == memory.params + memory.optimizer + memory.batch + memory.temporaries + memory.program


def test_the_command_prints_a_plan_and_writes_it(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "--topology", "local", *ARGUMENTS, "--mesh.fsdp=8", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert found["tokens"] == 8 * 16 and found["topology"] == "local" and found["memory"]["fits"] is None
    assert found["sent_bytes"]["all-gather"] > 0 < found["paper_bytes"]["reduce-scatter"]
    assert found["flops"] > found["model_flops"] * 0.9 > 0
    for words in ("8 x cpu: fsdp 8", f"{found['parameters']:,} parameters", "on paper", "all-gather", "temporaries"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9:4"], "v9:4: unknown"),
        (["--topology", "local", "--mesh.fsdp", "3"], "mesh.fsdp"),
        (["--topology", "local", "--mesh.fsdp", "16"], "16"),
        (["--topology", "local", "--json", "nowhere/plan.json"], "--json nowhere/plan.json"),
        (["--topology", "local", "--data.tokenizer", "x.json", "--model.embed-dim", "32"], "--model.vocab-size"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, refused):
    assert words in refused("plan", *arguments)


def test_the_vocabulary_size_without_the_text():
    assert plan_module._vocab_size(load_config(None, {"data.tokenizer": "bpe", "data.bpe_vocab_size": 300})) == 300
    assert plan_module._vocab_size(load_config(None, {"model.vocab_size": 7})) == 7


@pytest.fixture
def small_chip(monkeypatch):
    """Puts CPUs into the table of chips, with a given memory."""

    def make(memory_bytes):
        chip = dataclasses.replace(CHIPS[0], name="cpu", memory_bytes=memory_bytes)
        monkeypatch.setattr(plan_module, "chip_of", lambda kind: chip)

    return make


def test_a_step_that_does_not_fit_comes_with_a_change_that_does(small_chip, capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["plan", *ARGUMENTS, "--model.num-layers=1", "--mesh.data=8", "--json", str(file)]
    small_chip(1e9)
    assert main(arguments) == 0
    fitting = json.loads(file.read_text())
    assert "fits" in capsys.readouterr().out and "change" not in fitting
    assert fitting["roofline"]["mfu_bound"] > 0
    small_chip(fitting["memory"]["total"] - 1000)
    assert main(arguments) == 1
    found = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "it fits with --" in printed
    assert found["changed"]["memory"]["total"] <= found["memory"]["capacity"] < found["memory"]["total"]
    small_chip(1000)
    assert main(arguments) == 1
    assert "larger chips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("Ran out of memory in memory space hbm. Used 2.50G of 1.75G hbm.", 2.5 * 2**30 - 100),
        ("the total memory required for HLO temporaries (456.64G) exceeds available HBM (15.75G).", 456.64 * 2**30),
    ],
)
def test_temporaries_from_an_out_of_memory_error(message, temporaries):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    assert plan_module._refused_temporaries(error, 100) == round(temporaries)
    with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
        plan_module._refused_temporaries(jax.errors.JaxRuntimeError("some other fault"), 100)


def test_a_step_too_big_to_compile_has_a_plan(small_chip, monkeypatch, capsys):
    small_chip(1e9)

    class Stage:
        def lower(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: HLO temporaries (4.00G) exceeds available HBM (1.00G)."
            )

        def trace(self, state, batch):
            self.jaxpr = jax.make_jaxpr(lambda: 0)()
            return self

    monkeypatch.setattr(plan_module.jax, "jit", lambda *arguments, **settings: Stage())
    made = plan_of()
    assert made.memory.temporaries == 2**32 and made.memory.fits is False
    assert made.sent_bytes is None and made.roofline is None and "does not fit" in str(made)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_compiler_gathers_and_scatters_parameters(tmp_path):
    """With matrices of realistic proportions, so that parameters dominate the traffic."""
    sizes = SIZES | {"model.embed_dim": 512, "model.context_length": 128, "model.dtype": "bfloat16"}
    sizes |= {"model.scan_layers": "true", "model.remat": "full", "model.positions": "rotary", "mesh.fsdp": 4}
    arguments = [f"--{name}={value}".replace("_", "-") for name, value in sizes.items()]
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "flax_decoder", "plan", "--topology", "v5p:2x2x1", "--json", str(file), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    sent, paper = found["sent_bytes"], found["paper_bytes"]
    assert found["memory"]["fits"] and "4 x TPU v5: fsdp 4" in result.stdout
    assert sent["reduce-scatter"] > 0.8 * paper["reduce-scatter"] and sent["all-gather"] > 0.8 * paper["all-gather"]
    assert sent["all-reduce"] < 0.1 * paper["reduce-scatter"] and sum(sent.values()) < 1.2 * sum(paper.values())
