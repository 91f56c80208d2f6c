import os
import signal
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
from flax_decoder.config import DistributedConfig
from flax_decoder.errors import UserError
from flax_decoder.parallel import processes
from flax_decoder.training import loop
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.metrics import read_metrics

TRAIN = Path(__file__).parent.parent / "train.py"
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
# Float32 sums in another order.
LOSS_TOLERANCE = 1e-5
# Short where a process is killed, else so long that a busy machine does not look like a dead process.
HEARTBEAT_SECONDS, PATIENT_SECONDS = 10, HANGS_SECONDS


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


def train_here(folder, text, **changes):
    """Trains in this process; `changes` to SETTINGS are named section__field."""
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    config = fd.load_config(None, SETTINGS | {"data.path": str(text), "run.folder": str(folder)} | overrides)
    return loop.train(config, Path(folder))


class Job:
    """The processes of a training job on this machine."""

    def __init__(self, num_processes, devices_each, folder, text, **changes):
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
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        environment = os.environ | {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices_each}"}
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    TRAIN,
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


@pytest.fixture(scope="module")
def expected(tmp_path_factory, text):
    """A run of one process on one device."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    assert train_here(folder, text, mesh__data=1) == 0
    return folder


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


@pytest.mark.short("data 4")
@pytest.mark.parametrize(
    ("mesh", "shown"),
    [({}, "data 4"), ({"mesh__fsdp": 2, "mesh__tensor": 2}, "fsdp 2 x tensor 2")],  # the second splits all matrices
    ids=["data 4", "fsdp 2 tensor 2"],
)
def test_two_processes_train_as_one_does(expected, text, tmp_path, mesh, shown):
    with Job(2, 2, tmp_path / "run", text, **mesh) as job:
        codes, outputs = job.end()
    assert codes == [0, 0], outputs
    assert f"on 4 devices (cpu): {shown}" in outputs[0]
    assert "step" not in outputs[1]  # one prints for all
    assert_same_run(job.folder, expected)
    assert (job.folder / "sample.txt").read_text() == (expected / "sample.txt").read_text()
    # The coordinator belongs to one start of the job, not to the run.
    assert fd.load_config(job.folder / "config.toml").distributed.coordinator is None


@pytest.mark.full
def test_four_processes_stop_at_one_step_and_go_on_as_one(text, tmp_path):
    # Matrices are split over processes, so that none could save or sample alone.
    with Job(4, 1, tmp_path / "run", text, mesh__fsdp=2, mesh__tensor=2, training__num_steps=20_000) as job:
        job.wait_for_checkpoint()
        job.processes[2].send_signal(signal.SIGTERM)
        codes, outputs = job.end()
    assert codes == [143] * 4, outputs
    step = max(saved_steps(job.folder))
    assert f"stopped by SIGTERM: saved at step {step}" in outputs[0]
    assert read_metrics(job.folder / "metrics.jsonl")[-1]["step"] == step
    assert_continues(job.folder, text, tmp_path / "expected", mesh__tensor=2)


@pytest.mark.full
def test_a_job_ends_with_its_first_dead_process_and_goes_on_with_fewer(text, tmp_path):
    quick = {"distributed__heartbeat_seconds": HEARTBEAT_SECONDS, "training__num_steps": 20_000}
    with Job(2, 1, tmp_path / "run", text, **quick) as job:
        job.wait_for_checkpoint()
        job.processes[1].kill()
        codes, outputs = job.end()  # otherwise it would wait for the dead one forever
    assert codes == [-signal.SIGABRT, -signal.SIGKILL], outputs
    assert_continues(job.folder, text, tmp_path / "expected", mesh__data=1)


def test_an_error_in_the_first_process_ends_them_all(text, tmp_path):
    with Job(2, 1, tmp_path / "run", text, mesh__data=2, training__batch_size=5) as job:
        codes, outputs = job.end()
    assert codes == [2, 1]
    assert "error: training.batch_size = 5 is not a multiple of mesh.data = 2" in outputs[0]
    assert "fault: the first process of the job has stopped; its output says why" in outputs[1]
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "node1:1234"}, "give --distributed.num-processes N and --distributed.process-id I"),
        ({"process_id": 1}, "do not say where the other processes are"),
    ],
)
def test_an_incomplete_description_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        processes.join(DistributedConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributed.coordinator": "node1"}, "coordinator = 'node1' must be HOST:PORT"),
        ({"distributed.num_processes": 2, "distributed.process_id": 2}, "process_id = 2 must be under num_processes"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        fd.load_config(None, settings)


def test_a_missing_coordinator_is_an_error_after_join_seconds():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        config = DistributedConfig(coordinator=address, num_processes=2, process_id=1, join_seconds=1)
        with pytest.raises(UserError, match=f"distributed.coordinator = {address}: no answer in 1 seconds"):
            processes.join(config)
