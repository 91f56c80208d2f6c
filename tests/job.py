"""Training jobs of several processes on this machine, for tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from limits import HANGS_SECONDS
from xla_flags import QUICK

import flax_decoder as fd
from flax_decoder.training import loop
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.metrics import read_metrics

TRAIN = Path(__file__).parent.parent / "train.py"
FAULTY = Path(__file__).parent / "faults" / "faulty_run.py"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 8
NUM_STEPS = 12
SETTINGS = {
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.vocab_size": 24,  # that of the text, 23, is not even
    "training.num_steps": NUM_STEPS,
    "training.batch_size": 4,
    "training.eval_every": 4,
    "training.save_every": 4,
    "training.log_every": 2,
    "training.sample_tokens": 5,
    "lens.every": 5,
    # So that losses do not depend on num_steps.
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
# Arguments of a run whose compiled programs several files share.
SMALL = [
    *("--model.context-length=8", "--model.num-layers=1", "--model.embed-dim=8", "--model.num-heads=2"),
    *("--training.num-steps=4", "--training.batch-size=2", "--training.sample-tokens=9"),
]
# Float32 sums in another order.
LOSS_TOLERANCE = 1e-5
# Short where a process is killed, else so long that a busy machine does not look like a dead process.
HEARTBEAT_SECONDS, PATIENT_SECONDS = 10, HANGS_SECONDS


def dotted(changes):
    """Overrides of a config from settings that are named section__field."""
    return {name.replace("__", "."): value for name, value in changes.items()}


def train_here(folder, text, settings=SETTINGS, **changes):
    """Trains in this process; `changes` to the settings are named section__field."""
    config = fd.load_config(None, settings | {"data.path": str(text), "run.folder": str(folder)} | dotted(changes))
    return loop.train(config, Path(folder))


class Job:
    """The processes of a training job on this machine.

    One of them, `victim`, can get a signal at a named point: see `fault`, the arguments of faulty_run.py.
    """

    def __init__(self, num_processes, devices_each, folder, text, victim=None, fault=(), **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = SETTINGS | {
            "data.path": text,
            "run.folder": folder,
            "distributed.coordinator": f"127.0.0.1:{port}",
            "distributed.num_processes": num_processes,
            "distributed.heartbeat_seconds": PATIENT_SECONDS,
        }
        settings |= dotted(changes)
        environment = os.environ | {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices_each}"}
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    *([FAULTY, *fault, "train"] if index == victim else [TRAIN]),
                    *(f"--{name}={value}" for name, value in settings.items()),
                    f"--distributed.process-id={index}",
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(num_processes)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_checkpoint(self):
        end = time.monotonic() + HANGS_SECONDS
        while not saved_steps(self.folder):
            assert time.monotonic() < end and self.processes[0].poll() is None, self.end()
            time.sleep(0.02)

    def end(self):
        """Exit codes and outputs."""
        outputs = [process.communicate(timeout=HANGS_SECONDS)[0] for process in self.processes]
        return [process.returncode for process in self.processes], outputs


def assert_same_run(folder, expected):
    """The losses of all steps, and the parameters and the attention they led to."""
    rows, expected_rows = (read_metrics(path / "metrics.jsonl") for path in (folder, expected))
    every = {row["step"]: row for row in rows}  # a stopped run has logged one more step
    for row in expected_rows:
        for name in {"train_loss", "val_loss"} & row.keys():
            assert every[row["step"]][name] == pytest.approx(row[name], rel=LOSS_TOLERANCE)
    for name in ("sample.txt", "loss.png"):
        assert (folder / name).stat().st_size > 0
    pairs = zip(*(np.asarray(fd.load(path)[1]["embedding"]) for path in (folder, expected)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    history, expected_history = (fd.read_history(path) for path in (folder, expected))
    np.testing.assert_array_equal(history.steps_M, expected_history.steps_M)
    np.testing.assert_allclose(history.weights_MLNTS, expected_history.weights_MLNTS, atol=1e-3)  # float16


def assert_continues(folder, text, expected, **mesh):
    """Continues a run for four steps in this process, as one that was never stopped."""
    num_steps = max(saved_steps(folder)) + 4
    assert train_here(folder, text, training__num_steps=num_steps, run__resume="must", **mesh) == 0
    assert train_here(expected, text, training__num_steps=num_steps, mesh__data=1) == 0
    assert_same_run(folder, expected)
