"""A process of a job is killed, stopped or fails: the others end with a line, and all go on as if nothing had been."""

import contextlib
import io
import signal
import subprocess
import sys

import pytest
from job import Job, assert_same_run, train_here

from flax_decoder.cli import main
from flax_decoder.parallel.processes import LOST_CODE

# So long that a busy machine does not look like a dead process, and short enough to wait for.
HEARTBEAT_SECONDS = 20
LINE = "fault: another process of the job has ended, or no longer answers; its output may say why. Start all processes "
# Where the fault happens: points of faulty_run.py, and at which call.
POINTS = {
    "start": ("opening", 1),
    "first": ("step", 1),
    "middle": ("step", 6),
    "evaluation": ("evaluation", 2),
    "save": ("save", 2),
    "arrays": ("amid arrays", 2),
    "sampling": ("sampling", 1),
}
# What only the first process does.
OF_THE_FIRST = {"hashes": ("after arrays", 2), "manifest": ("after manifest", 1), "rename": ("after rename", 1)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, text):
    """A run of one process on one device, not disturbed."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert train_here(folder, text, mesh__data=1) == 0
    return folder


def cases():
    for number, (point, victims) in enumerate(
        [*((point, (0, 1)) for point in POINTS), *((point, (0,)) for point in OF_THE_FIRST)]
    ):
        for victim in victims:
            for sent, size in (("SIGKILL", 2), ("SIGKILL", 4), ("SIGSTOP", 4 if (number + victim) % 2 else 2)):
                yield pytest.param(sent, point, victim, size, id=f"{sent}-{point}-{victim} of {size}")


@pytest.mark.full
@pytest.mark.fault("A process of a job is killed or stopped")
@pytest.mark.parametrize(("sent", "point", "victim", "size"), [*cases()])
def test_a_job_that_loses_a_process_goes_on(expected, text, tmp_path, sent, point, victim, size):
    name, count = (POINTS | OF_THE_FIRST)[point]
    fault = (sent, name, str(count), "0")
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2} if size == 4 else {}  # none could save or sample alone
    quick = {"distributed__heartbeat_seconds": HEARTBEAT_SECONDS, "distributed__join_seconds": 600}
    with Job(size, 1, tmp_path / "run", text, victim, fault, **quick | mesh) as job:
        others = [process for index, process in enumerate(job.processes) if index != victim]
        outputs = [process.communicate(timeout=1800)[0] for process in others]
    for process, output in zip(others, outputs, strict=True):
        assert process.returncode == LOST_CODE, output
        assert output.splitlines()[-1].startswith(LINE) and output.count(LINE) == 1, output
        assert "Traceback" not in output, output
    assert job.processes[victim].returncode == -signal.SIGKILL
    # With another number of processes: of this one, or half as many.
    if size == 2:
        assert train_here(job.folder, text, mesh__data=1) == 0
    else:
        with Job(2, 2, job.folder, text, **mesh) as later:
            codes, outputs = later.end()
        assert codes == [0, 0], outputs
    assert main(["verify", str(job.folder)]) == 0
    assert_same_run(job.folder, expected)


@pytest.mark.full
@pytest.mark.fault("A process of a job fails")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_does_not_wait_for_the_others(text, tmp_path, victim):
    """It gets a signal that becomes an exception, as a mistake in the program would."""
    with Job(2, 1, tmp_path / "run", text, victim, ("SIGUSR1", "step", "6", "0")) as job:
        codes, outputs = job.end()
    assert codes[victim] == 1 and "RuntimeError: a mistake" in outputs[victim]
    assert codes[1 - victim] == LOST_CODE and outputs[1 - victim].splitlines()[-1].startswith(LINE)


def test_an_abort_is_told():
    script = (
        "import ctypes, signal; from flax_decoder.parallel import processes as p;"
        "ctypes.CDLL(None).signal(signal.SIGABRT, p._on_abort); ctypes.CDLL(None).abort()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (LOST_CODE, "") and done.stderr.startswith(LINE), done
