"""Too little memory: a line with what was asked for and what there is, and one with what to change first."""

import types

import jax
import numpy as np
import pytest

from flax_decoder import cli
from flax_decoder.config_file import load_config
from flax_decoder.training.out_of_memory import describe_shortage, is_out_of_memory, smaller_settings


def numpy_error():
    with pytest.raises(MemoryError) as caught:
        np.zeros((10**7, 10**7))
    return caught.value


def xla_error():  # more than any address space, so that no system promises it
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda: jax.numpy.zeros(10**15, jax.numpy.float32))().block_until_ready()
    return caught.value


def jax_error(message):
    return lambda: jax.errors.JaxRuntimeError(message)


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (xla_error, "4,000,000.0 GB"),
        (numpy_error, "800,444.5 GB"),  # of 728 TiB
        (MemoryError, "more"),
        (jax_error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."), "68.7 GB"),
        (jax_error("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.50G of 1.75G hbm."), "2.7 GB"),
        (jax_error("INTERNAL: cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "more"),
    ],
)
def test_what_was_asked_for_and_what_there_is(make, asked):
    error = make()
    assert is_out_of_memory(error)
    assert describe_shortage(error).startswith(f"out of memory: {asked} were asked for at once, and this machine has ")


def test_a_device_says_what_it_has(monkeypatch):
    device = types.SimpleNamespace(
        device_kind="H100", memory_stats=lambda: {"bytes_limit": 80e9, "bytes_in_use": 12.34e9}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert describe_shortage(MemoryError()).endswith("a H100 has 80.0 GB, of which 12.3 are in use")


@pytest.mark.parametrize("error", [RuntimeError("memory"), jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shape")])
def test_other_errors_are_no_shortage(error):
    assert not is_out_of_memory(error)


PARTS, HALF = "--training.accumulation-steps 2 (the same result)", "--training.batch-size 3"
CHUNKS, DOTS, FULL = "--training.loss-chunk-tokens 1024", "--model.remat dots", "--model.remat full"
DTYPE, SPLIT, SMALLER = "--model.dtype bfloat16", "--mesh.fsdp -1", "a smaller model"
IN_CHUNKS = {"training.loss_chunk_tokens": 512}


@pytest.mark.parametrize(
    ("changes", "num_devices", "settings"),
    [
        ({}, 1, [PARTS, DOTS, CHUNKS, DTYPE, SMALLER]),
        (
            {"training.batch_size": 6, "training.accumulation_steps": 2, "model.remat": "dots"} | IN_CHUNKS,
            1,
            [HALF, FULL, DTYPE, SMALLER],
        ),
        ({"model.dtype": "bfloat16", "training.loss_chunk_tokens": 0}, 8, [PARTS, DOTS, CHUNKS, SPLIT, SMALLER]),
        (
            {"training.rows_per_device": 5} | IN_CHUNKS,
            1,
            ["--training.rows-per-device 2 (the same result)", DOTS, DTYPE, SMALLER],
        ),
        ({"training.rows_per_device": 1} | IN_CHUNKS, 1, [DOTS, DTYPE, SMALLER]),
        ({"training.batch_size": 1, "model.remat": "full", "mesh.fsdp": -1} | IN_CHUNKS, 8, [DTYPE, SMALLER]),
    ],
)
def test_the_cheapest_change_comes_first(changes, num_devices, settings):
    assert smaller_settings(load_config(None, changes), num_devices) == settings


@pytest.mark.parametrize("command", ["train", "doctor", "generate x --prompt a"])
def test_a_command_without_enough_memory_ends_in_two_lines(monkeypatch, capsys, tmp_path, command):
    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3000000000000 bytes.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flax_decoder.training.loop.train", fail)
    monkeypatch.setattr("flax_decoder.planning.doctor.examine", fail)
    monkeypatch.setattr("flax_decoder.loading.load", fail)
    words = command.split()
    assert cli.main([*words, "--training.batch-size=8"] if words[0] in ("train", "doctor") else words) == 1
    shortage, change = capsys.readouterr().err.splitlines()
    assert shortage.startswith("fault: out of memory: 3,000.0 GB were asked for at once") and shortage.endswith(";")
    if words[0] == "generate":
        assert "fewer samples" in change
    else:
        assert change.startswith("in this order: --training.accumulation-steps 2 (the same result), --model.remat dots")
        assert change.endswith("; flax-decoder plan says what fits") and ("--run.folder" in change) == (
            command == "train"
        )


def test_an_error_of_another_kind_stays_as_it_is(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flax_decoder.training.loop.train", fail)
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(["train"])
