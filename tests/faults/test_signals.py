"""SIGINT and SIGTERM, whatever a run is at: it saves, says so by its exit code, and loses nothing."""

import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import run_state
import tiny_run
from limits import HANGS_SECONDS

FAULTY = Path(__file__).parent / "faulty_run.py"
NUM_STEPS, SAVE_EVERY, EVAL_EVERY = 120, 10, 5
RULES = {
    "training__num_steps": NUM_STEPS,
    "training__log_every": 1,
    "training__eval_every": EVAL_EVERY,
    "training__save_every": SAVE_EVERY,
}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 10))]
BOTH = (signal.SIGTERM, signal.SIGINT)


def interrupted(number, point, count, delay, arguments, **environment):
    """Runs the training until the signal has come: exit code, output, and errors."""
    words = [sys.executable, str(FAULTY), number.name, point, str(count), str(delay), "train", *arguments[2:]]
    code, output, errors = tiny_run.finish(words, PYTHONUNBUFFERED="1", **environment)
    assert "Traceback" not in errors and "Exception ignored" not in errors, (point, errors)
    return code, output


def assert_saved(folder, output, number):
    """That the step that was taken last is the one that was saved; returns it."""
    saved = re.search(rf"stopped by {number.name}: saved at step (\d+); the same command continues", output)
    assert saved, output
    step = int(saved[1])
    assert run_state.newest_verified(folder) == run_state.last_step(folder) == step
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never stopped, its text, and a cache that has its programs."""
    folder = tmp_path_factory.mktemp("whole")
    text, cache = tiny_run.write_text_file(folder), str(folder / "cache")
    code, _, errors = tiny_run.finish(tiny_run.command(folder / "run", text, **RULES), JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    return folder / "run", text, cache


@pytest.mark.fault("SIGTERM and SIGINT in a run")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_stopped_again_and_again(whole, tmp_path, count_cases, request, seed):
    """Each time at another point, at once or, in the further seeds, somewhat later."""
    expected, text, cache = whole
    rng = random.Random(seed)
    folder = tmp_path / "run"
    arguments = tiny_run.command(folder, text, **RULES)
    points = ["step", "compile", "evaluation", "save"]
    if request.config.getoption("--full"):
        cases = [(point, number) for point in points for number in BOTH]
        cases += [(point, rng.choice(BOTH)) for point in ("after arrays", "restoring")]
        rng.shuffle(cases)
    else:  # what is restored must have been saved; two signals while a program compiles are a test of their own
        cases = [("step", BOTH[0]), ("save", BOTH[1]), ("restoring", BOTH[0])]
    done = 0
    for point, number in cases:
        if point == "restoring" and done == 0:
            continue
        count = 1 if point in ("compile", "restoring", "after arrays", "save") else rng.randint(1, 3)
        delay = 0.0 if seed == 0 else rng.choice([0.0, 0.003, 0.01, 0.03])
        environment = {"JAX_COMPILATION_CACHE_DIR": cache}
        if point == "compile":  # what is in the cache is not compiled
            environment = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        code, output = interrupted(number, point, count, delay, arguments, **environment)
        assert code == 128 + number, (point, output)
        before, done = done, assert_saved(folder, output, number)
        # Where it had to stop: at the end of the step, or at the next one.
        earliest = {
            "step": before + count,
            "compile": before + 1,
            "restoring": before + 1,
            "evaluation": (before // EVAL_EVERY + count) * EVAL_EVERY,
            "save": (before // SAVE_EVERY + 1) * SAVE_EVERY + 1,
            "after arrays": (before // SAVE_EVERY + 1) * SAVE_EVERY + 1,
        }[point]
        assert done >= earliest, point
        if delay == 0 and point != "after arrays":  # which is in the background
            assert done == earliest, point
        assert {step: row for step, row in run_state.losses(expected).items() if step <= done} == run_state.losses(
            folder
        )
    # When all steps are done and the sample is being written, that is finished.
    number = rng.choice(BOTH)
    code, output = interrupted(number, "sampling", 1, 0, arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 128 + number and assert_saved(folder, output, number) == NUM_STEPS
    code, output, errors = tiny_run.finish(arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    run_state.assert_ended_alike(folder, expected)
    count_cases(len(cases) + 1)


@pytest.mark.fault("SIGTERM and SIGINT at a start")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_run_that_is_stopped_while_it_is_prepared(whole, tmp_path, number):
    _, text, cache = whole
    arguments = tiny_run.command(tmp_path / "run", text, **RULES)
    code, output = interrupted(number, "preparing", 1, 0, arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 128 + number, output
    assert list(tmp_path.iterdir()) == []


# Sends itself a signal at the COUNTth of all imports and openings of files, from when the command has its handlers.
STOPPED = """
import os, sys
from flax_decoder import cli

left, number = int(sys.argv[1]), int(sys.argv[2])

def listen(event, _):
    global left
    if event in ("import", "open"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

keep = cli._keep_compilations
cli._keep_compilations = lambda: (sys.addaudithook(listen), keep())
sys.exit(cli.main(sys.argv[3:]))
"""
MAX_EVENTS = 3500  # a start has some 2,600; what comes after them are steps


@pytest.mark.fault("SIGTERM and SIGINT at a start")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_stopped_at_any_time_of_its_start(whole, tmp_path, count_cases, request, seed):
    """In imports, in preparations, in compiling: it leaves with the code, and what it began it has saved."""
    _, text, cache = whole
    rng = random.Random(seed)
    num_cases = 6 if request.config.getoption("--full") else 2
    arguments = tiny_run.command(tmp_path / "run", text, **RULES | {"training__num_steps": 10**6})
    for place in range(num_cases):
        folder = tmp_path / "run"
        number = BOTH[place % 2]
        # Places of the start by what has been done, not by the time, which depends on the machine; a part of them each.
        share = MAX_EVENTS // num_cases
        count = place * share + rng.randint(1, share)
        words = [sys.executable, "-c", STOPPED, str(count), str(int(number)), "train", *arguments[2:]]
        code, output, errors = tiny_run.finish(words, JAX_COMPILATION_CACHE_DIR=cache, PYTHONUNBUFFERED="1")
        assert code == 128 + number, (output, errors)
        assert "Traceback" not in errors and "Exception ignored" not in errors, errors
        if "saved at step" in output:
            assert_saved(folder, output, number)
        assert run_state.leftovers(folder) == []
    count_cases(num_cases)


@pytest.mark.fault("SIGTERM and SIGINT, twice")
@pytest.mark.parametrize("numbers", [BOTH, pytest.param(BOTH[::-1], marks=pytest.mark.full)])
def test_a_second_signal_leaves_at_once(whole, tmp_path, numbers):
    """While a large program compiles, which takes far longer."""
    _, text, _ = whole
    folder = tmp_path / "run"
    slow = {"model__num_layers": 24, "training__num_steps": 3}
    first, second = numbers
    arguments = tiny_run.command(folder, text, **RULES | slow)
    words = [sys.executable, str(FAULTY), first.name, "compile", "1", "0", "train", *arguments[2:]]
    process = tiny_run.start(words, JAX_ENABLE_COMPILATION_CACHE="0", PYTHONUNBUFFERED="1")
    try:
        while first.name not in (line := process.stdout.readline()):
            assert line, process.communicate()
        os.kill(process.pid, second)
        output, errors = process.communicate(timeout=HANGS_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 128 + second and "Traceback" not in errors, errors
    assert "saved" not in output and "XLA has compiled it" not in output
    assert run_state.newest_verified(folder) == 0
