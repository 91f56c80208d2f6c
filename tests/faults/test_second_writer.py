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

ENDLESS = {"training__num_steps": 10**6, "training__log_every": 10, "training__eval_every": 10**5}
ENDLESS |= {"training__save_every": 10**6}
NUM_CASES = [10, pytest.param(90, marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    return tiny_run.write_text_file(tmp_path / "text")


@pytest.fixture
def holder(tmp_path, text, cache):
    """A process that trains for as long as one likes, and has taken some steps."""
    arguments = tiny_run.command(tmp_path / "runs" / "run", text, **ENDLESS)
    process = tiny_run.start(arguments, JAX_COMPILATION_CACHE_DIR=cache)
    while run_state.last_step(tmp_path / "runs" / "run") < 100:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def snapshot(folder):
    """What lies in a folder, byte for byte, and when it was last changed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}
    return content | {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.fault("Second writer")
@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_a_second_writer_is_refused(tmp_path, text, cache, holder, count_cases, num_cases):
    folder = tmp_path / "runs" / "run"
    seconds = []
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
        started = time.monotonic()
        arguments = tiny_run.command(folder, text, **ENDLESS | asked[number % len(asked)])
        code, output, errors = tiny_run.finish(arguments, JAX_COMPILATION_CACHE_DIR=cache)
        seconds.append(time.monotonic() - started)
        assert code == 73 and output == "", (output, errors)
        assert f"{folder}: is in use by process {holder.pid} on " in errors and len(errors.splitlines()) == 1
        assert snapshot(folder.parent) == before
        holder.send_signal(signal.SIGCONT)
    print(f"refused in {min(seconds):.2f} to {max(seconds):.2f} s")
    # Under 1 s where nothing else runs; JAX alone would take longer here.
    assert sorted(seconds)[len(seconds) // 2] < 2
    # The first one was not disturbed.
    step = run_state.last_step(folder)
    while run_state.last_step(folder) < step + 10:
        assert holder.poll() is None, holder.communicate()
        time.sleep(0.01)
    count_cases(num_cases)


@pytest.mark.fault("Second writer")
def test_a_killed_holder_frees_the_folder(tmp_path, text, cache, holder):
    folder = tmp_path / "runs" / "run"
    holder.kill()
    holder.wait()
    assert json.loads((folder / ".lock").read_bytes())["pid"] == holder.pid  # which is nobody's any more
    more = tiny_run.command(folder, text, **ENDLESS | {"training__num_steps": 10})
    code, output, errors = tiny_run.finish(more, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0 and "it starts from the beginning" in output, errors
    assert run_state.last_step(folder) == 10 and run_state.leftovers(folder) == []


@pytest.mark.fault("Second writer")
@pytest.mark.parametrize("num_cases", [3, pytest.param(30, marks=pytest.mark.full)])
@pytest.mark.parametrize("fresh", [True, False])
def test_of_two_that_start_at_the_same_instant_one_wins(tmp_path, text, cache, count_cases, num_cases, fresh):
    """On a new folder, beside which a killed start has left its own; and on one that is to be continued."""
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
            output, errors = winner.communicate(timeout=60)
            assert winner.returncode == 143, (output, errors)
        finally:
            for process in both:
                process.kill()
                process.communicate()
        assert run_state.newest_verified(folder) == run_state.last_step(folder)
        assert run_state.leftovers(folder) == []
    code, output, errors = tiny_run.finish([sys.executable, "-m", "flax_decoder", "verify", str(folder)])
    assert code == 0, (output, errors)
    count_cases(num_cases)
