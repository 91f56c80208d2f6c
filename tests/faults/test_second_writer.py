"""Two processes that want the same run folder: one has it, the other is refused at once and changes nothing."""

import hashlib
import json
import os
import signal
import sys
import time

import pytest
import run_state
import tiny_run
from limits import HANGS_SECONDS

from flax_decoder.cli import main

ENDLESS = {"training__num_steps": 10**6, "training__log_every": 10, "training__eval_every": 10**5}
ENDLESS |= {"training__save_every": 10**6}
# Runs a script as `python SCRIPT ...` would, and then tells what stood in its way: whether JAX was loaded or a
# file of a checkpoint opened.
WATCHED = """
import os, runpy, sys
opened = []
def note(event, details):
    if event == "open" and "checkpoints" in os.fsdecode(details[0] if isinstance(details[0], (str, bytes)) else ""):
        opened.append(details[0])
sys.addaudithook(note)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([name for name in ("jax", "flax", "orbax", "numpy") if name in sys.modules], opened)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the run lies, its text, and a cache for its programs."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    return folder / "runs" / "run", tiny_run.write_text_file(folder / "text"), str(folder / "cache")


@pytest.fixture(scope="module")
def holders():
    """The processes that were started to hold it; the last one may still do."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def holder(place, holders):
    """A process that trains for as long as one likes, and has taken some steps."""
    folder, text, cache = place
    if not holders or holders[-1].poll() is not None:
        holders.append(tiny_run.start(tiny_run.command(folder, text, **ENDLESS), JAX_COMPILATION_CACHE_DIR=cache))
    while run_state.last_step(folder) < 100:
        assert holders[-1].poll() is None, holders[-1].communicate()
        time.sleep(0.01)
    return holders[-1]


def snapshot(folder):
    """What lies in a folder, byte for byte, and when it was last changed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}
    return content | {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.fault("Second writer")
@pytest.mark.parametrize("num_cases", [5, pytest.param(90, marks=pytest.mark.full)])
def test_a_second_writer_is_refused(place, holder, count_cases, num_cases):
    """At once, which is: before it has loaded what takes long, and without a look at what it may not have."""
    folder, text, cache = place
    # What the second one asks for matters not: what would be refused later too, or would have been allowed.
    asked = [
        {},
        {"training__num_steps": 7},
        {"model__num_layers": 2},
        {"run__resume": "must"},
        {"run__resume": "never"},
    ]
    for number in range(num_cases):
        holder.send_signal(signal.SIGSTOP)  # so that all that changes now is the second one's doing
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        before = snapshot(folder.parent)
        _, *arguments = tiny_run.command(folder, text, **ENDLESS | asked[number % len(asked)])
        code, output, errors = tiny_run.finish(
            [sys.executable, "-c", WATCHED, *arguments], JAX_COMPILATION_CACHE_DIR=cache
        )
        assert code == 73 and output == "[] []\n", (output, errors)
        assert f"{folder}: is in use by process {holder.pid} on " in errors and len(errors.splitlines()) == 1
        assert snapshot(folder.parent) == before
        holder.send_signal(signal.SIGCONT)
    # The first one was not disturbed.
    step = run_state.last_step(folder)
    while run_state.last_step(folder) < step + 10:
        assert holder.poll() is None, holder.communicate()
        time.sleep(0.01)
    count_cases(num_cases)


@pytest.mark.fault("Second writer")
def test_a_killed_holder_frees_the_folder(place, holder):
    folder, text, cache = place
    holder.kill()
    holder.wait()
    assert json.loads((folder / ".lock").read_bytes())["pid"] == holder.pid  # which is nobody's any more
    more = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10})
    code, output, errors = tiny_run.finish(more, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0 and "it starts from the beginning" in output, errors
    assert run_state.last_step(folder) == 10 and run_state.leftovers(folder) == []


@pytest.mark.fault("Second writer")
@pytest.mark.short("True-1")
@pytest.mark.parametrize("num_cases", [1, 3, 30])
@pytest.mark.parametrize("fresh", [True, False])
def test_of_two_that_start_at_the_same_instant_one_wins(tmp_path, place, count_cases, num_cases, fresh):
    """On a new folder, beside which a killed start has left its own; and on one that is to be continued."""
    _, text, cache = place
    for number in range(num_cases):
        folder = tmp_path / f"runs{number}" / "run"
        arguments = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10**5})
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        if fresh:
            (folder.parent / f".run.new-{os.uname().nodename}-{2**22 + 1}").mkdir(
                parents=True
            )  # no number of a process
        else:
            short = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10})
            assert tiny_run.finish(short, **environment)[0] == 0
        both = [tiny_run.start(arguments, **environment) for _ in range(2)]
        try:
            while all(process.poll() is None for process in both):
                time.sleep(0.01)
            loser = next(process for process in both if process.poll() is not None)
            winner = next(process for process in both if process is not loser)
            output, errors = loser.communicate()
            assert loser.returncode == 73 and len(errors.splitlines()) == 1, (output, errors)
            assert str(folder) in errors
            while run_state.last_step(folder) < 20:
                assert winner.poll() is None, winner.communicate()
                time.sleep(0.01)
            winner.send_signal(signal.SIGTERM)
            output, errors = winner.communicate(timeout=HANGS_SECONDS)
            assert winner.returncode == 143, (output, errors)
        finally:
            for process in both:
                process.kill()
                process.communicate()
        assert run_state.newest_verified(folder) == run_state.last_step(folder)
        assert run_state.leftovers(folder) == []
        assert main(["verify", str(folder)]) == 0
    count_cases(num_cases)
