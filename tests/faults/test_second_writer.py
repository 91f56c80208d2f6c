"""Two processes on one run folder: the second is refused at once and changes nothing."""

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
# Runs a script like `python SCRIPT ...`, then prints which heavy packages were loaded and which checkpoints opened.
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
    """The run folder, its text, and a compilation cache."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    return folder / "runs" / "run", tiny_run.write_text_file(folder / "text"), str(folder / "cache")


@pytest.fixture(scope="module")
def holders():
    """The processes started to hold the lock; the last one may still run."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def holder(place, holders):
    """A process that holds the lock and has trained for some steps."""
    folder, text, cache = place
    if not holders or holders[-1].poll() is not None:
        holders.append(tiny_run.start(tiny_run.command(folder, text, **ENDLESS), JAX_COMPILATION_CACHE_DIR=cache))
    while run_state.last_step(folder) < 20:
        assert holders[-1].poll() is None, holders[-1].communicate()
        time.sleep(0.01)
    return holders[-1]


@pytest.mark.fault("Second writer")
@pytest.mark.parametrize("num_cases", [5, pytest.param(90, marks=pytest.mark.full)])
def test_a_second_writer_is_refused(place, holder, count_cases, num_cases):
    """At once: before heavy imports, and without opening a checkpoint."""
    folder, text, cache = place
    # Settings that would be accepted, or refused later.
    asked = [
        {},
        {"training__num_steps": 7},
        {"model__num_layers": 2},
        {"run__resume": "must"},
        {"run__resume": "never"},
    ]
    for number in range(num_cases):
        holder.send_signal(signal.SIGSTOP)  # so that only the second one can change files
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        before = run_state.snapshot(folder.parent)
        _, *arguments = tiny_run.command(folder, text, **ENDLESS | asked[number % len(asked)])
        code, output, errors = tiny_run.finish(
            [sys.executable, "-c", WATCHED, *arguments], JAX_COMPILATION_CACHE_DIR=cache
        )
        assert code == 73 and output == "[] []\n", (output, errors)
        assert f"{folder}: is in use by process {holder.pid} on " in errors and len(errors.splitlines()) == 1
        assert run_state.snapshot(folder.parent) == before
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
    assert json.loads((folder / ".lock").read_bytes())["pid"] == holder.pid  # a dead process
    more = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10})
    code, output, errors = tiny_run.finish(more, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0 and "it starts from the beginning" in output, errors
    assert run_state.last_step(folder) == 10 and run_state.leftovers(folder) == []


@pytest.mark.fault("Second writer")
@pytest.mark.short("True-1")
@pytest.mark.parametrize("num_cases", [1, 3, 30])
@pytest.mark.parametrize("fresh", [True, False])
def test_of_two_that_start_at_the_same_instant_one_wins(tmp_path, place, count_cases, num_cases, fresh):
    """On a new folder, next to leftovers of a killed start, and on an existing run."""
    _, text, cache = place
    for number in range(num_cases):
        folder = tmp_path / f"runs{number}" / "run"
        arguments = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10**5})
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        if fresh:
            (folder.parent / f".run.new-{os.uname().nodename}-{2**22 + 1}").mkdir(
                parents=True
            )  # not a valid process id
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
