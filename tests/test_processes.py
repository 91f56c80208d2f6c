import signal
import socket

import pytest
from job import HEARTBEAT_SECONDS, TEXT, Job, assert_continues, assert_same_run, train_here

import flax_decoder as fd
from flax_decoder.config import DistributedConfig
from flax_decoder.errors import UserError
from flax_decoder.parallel import processes
from flax_decoder.parallel.processes import LOST_CODE
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.metrics import read_metrics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, text):
    """A run of one process on one device."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    assert train_here(folder, text, mesh__data=1) == 0
    return folder


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
    assert codes == [LOST_CODE, -signal.SIGKILL], outputs
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
