"""SIGINT and SIGTERM at any point of a run: it saves, exits with the right code, and loses nothing."""

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
    """Runs the training until the signal; returns exit code and output."""
    words = [sys.executable, str(FAULTY), number.name, point, str(count), str(delay), "train", *arguments[2:]]
    code, output, errors = tiny_run.finish(words, PYTHONUNBUFFERED="1", **environment)
    assert "Traceback" not in errors and "Exception ignored" not in errors, (point, errors)
    return code, output


def assert_saved(folder, output, number):
    """Asserts that the last step was saved; returns it."""
    saved = re.search(rf"stopped by {number.name}: saved at step (\d+); the same command continues", output)
    assert saved, output
    step = int(saved[1])
    assert run_state.newest_verified(folder) == run_state.last_step(folder) == step
    return step


@pytest.fixture
def finished():
    """A run that is not stopped, its text, and a cache with its programs."""
    return tiny_run.finished_run(**RULES)[:3]


@pytest.mark.fault("SIGTERM and SIGINT in a run")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_stopped_again_and_again(finished, tmp_path, count_cases, request, seed):
    """Each time at another point; with seeds other than 0 also after a delay."""
    expected, text, cache = finished
    rng = random.Random(seed)
    folder = tmp_path / "run"
    arguments = tiny_run.command(folder, text, **RULES)
    points = ["step", "compile", "evaluation", "save"]
    if request.config.getoption("--full"):
        cases = [(point, number) for point in points for number in BOTH]
        cases += [(point, rng.choice(BOTH)) for point in ("after arrays", "restoring")]
        rng.shuffle(cases)
    else:  # compilation is covered by the test of two signals, restoring by that of a start
        cases = [("step", BOTH[0]), ("save", BOTH[1])]
    done = 0
    for point, number in cases:
        if point == "restoring" and done == 0:
            continue
        count = 1 if point in ("compile", "restoring", "after arrays", "save") else rng.randint(1, 3)
        delay = 0.0 if seed == 0 else rng.choice([0.0, 0.003, 0.01, 0.03])
        environment = {"JAX_COMPILATION_CACHE_DIR": cache}
        if point == "compile":  # cached programs are not compiled
            environment = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        code, output = interrupted(number, point, count, delay, arguments, **environment)
        assert code == 128 + number, (point, output)
        before, done = done, assert_saved(folder, output, number)
        # It stops at the end of that step or of the next one.
        earliest = {
            "step": before + count,
            "compile": before + 1,
            "restoring": before + 1,
            "evaluation": (before // EVAL_EVERY + count) * EVAL_EVERY,
            "save": (before // SAVE_EVERY + 1) * SAVE_EVERY + 1,
            "after arrays": (before // SAVE_EVERY + 1) * SAVE_EVERY + 1,
        }[point]
        assert done >= earliest, point
        if delay == 0 and point != "after arrays":  # a background thread
            assert done == earliest, point
        assert {step: row for step, row in run_state.losses(expected).items() if step <= done} == run_state.losses(
            folder
        )
    if request.config.getoption("--full"):  # a sample that is being generated is finished
        number = rng.choice(BOTH)
        code, output = interrupted(number, "sampling", 1, 0, arguments, JAX_COMPILATION_CACHE_DIR=cache)
        assert code == 128 + number and assert_saved(folder, output, number) == NUM_STEPS
        cases.append(("sampling", number))
    code, output, errors = tiny_run.finish(arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    run_state.assert_ended_alike(folder, expected)
    count_cases(len(cases))


@pytest.mark.fault("SIGTERM and SIGINT at a start")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_run_that_is_stopped_while_it_is_prepared(finished, tmp_path, number):
    _, text, cache = finished
    arguments = tiny_run.command(tmp_path / "run", text, **RULES)
    code, output = interrupted(number, "preparing", 1, 0, arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 128 + number, output
    assert list(tmp_path.iterdir()) == []


# Sends itself a signal at the COUNTth import or file opening after the command has installed its handlers.
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
MAX_EVENTS = 3500  # a start has about 2,600; later events belong to steps


@pytest.mark.fault("SIGTERM and SIGINT at a start")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_stopped_at_any_time_of_its_start(finished, tmp_path, count_cases, request, seed):
    """During imports, preparation or compilation: it exits with the right code, and started work is saved."""
    _, text, cache = finished
    rng = random.Random(seed)
    num_cases = 6 if request.config.getoption("--full") else 2
    arguments = tiny_run.command(tmp_path / "run", text, **RULES | {"training__num_steps": 10**6})
    for place in range(num_cases):
        folder = tmp_path / "run"
        number = BOTH[place % 2]
        # Points are counted in events, not in time, which depends on the machine; each case has its own range.
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
def test_a_second_signal_leaves_at_once(finished, tmp_path, numbers):
    """While a large program compiles, which takes much longer."""
    _, text, _ = finished
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
