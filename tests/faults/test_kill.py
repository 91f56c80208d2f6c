"""A run that is killed again and again, at any time, must end as if nothing had been."""

import random
import re
import sys
import time

import pytest
import run_state
import tiny_run

NUM_STEPS, SAVE_EVERY, NUM_KILLS = 600, 5, 20
# Every step is logged, so that every loss is compared.
RULES = {
    "training__num_steps": NUM_STEPS,
    "training__log_every": 1,
    "training__eval_every": SAVE_EVERY,
    "training__eval_batches": 1,
}
DEADLINE_SECONDS = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never stopped, its text, a cache that has its programs, and the seconds from its start to its end.

    A cache of its own: a program that is killed while it writes to the cache leaves half a file there.
    """
    folder = tmp_path_factory.mktemp("whole")
    text, cache = tiny_run.write_text_file(folder), str(folder / "cache")
    started = time.monotonic()
    arguments = tiny_run.command(folder / "run", text, **RULES, training__save_every=NUM_STEPS)
    code, _, errors = tiny_run.finish(arguments, JAX_COMPILATION_CACHE_DIR=cache)
    assert code == 0, errors
    return folder / "run", text, cache, time.monotonic() - started


def made_at(path):
    """Tells a file from the one that takes its place."""
    return path.stat().st_ino if path.exists() else None


@pytest.mark.fault("SIGKILL at random times")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 10))])
def test_a_run_that_is_killed_at_random_times(whole, tmp_path, count_cases, seed):
    expected, text, cache, whole_seconds = whole
    expected_losses = run_state.losses(expected)
    rng = random.Random(seed)
    folder = tmp_path / "run"
    log = folder / "metrics.jsonl"
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    arguments = tiny_run.command(folder, text, **RULES, training__save_every=SAVE_EVERY)
    newest = reached = 0
    redone = []
    for number in range(NUM_KILLS):
        log_before = made_at(log)
        process = tiny_run.start(arguments, **environment)
        try:
            # Such that the kills are spread over all the steps. Some come earlier: in imports, compiling, restoring.
            target = newest + rng.randint(1, max((NUM_STEPS - newest) // (NUM_KILLS - number + 3), 1))
            early = number % 4 == seed % 4
            end = time.monotonic() + (rng.uniform(0, whole_seconds) if early else DEADLINE_SECONDS)
            # The log is made anew at a start: until then it has lines beyond the checkpoint.
            while (made_at(log) == log_before or run_state.last_step(folder) < target) and time.monotonic() < end:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            assert early or time.monotonic() < end
            time.sleep(rng.uniform(0, 0.05))  # in which it takes some steps and saves
        finally:
            process.kill()
            output, errors = process.communicate()
        assert process.returncode == -9, (output, errors)  # and did not end before
        assert "Traceback" not in errors and "warning: " not in errors, errors
        continued = re.search(r"from the checkpoint of step (\d+)", output)
        assert continued is None or int(continued[1]) == newest
        for step, row in run_state.losses(folder).items():
            assert row == expected_losses[step]
        # All that is lost: the steps since the last save, and the save that was in flight.
        reached = max(reached if continued is None else newest, run_state.last_step(folder))
        before, newest = newest, run_state.newest_verified(folder)
        assert newest >= before
        redone.append(reached - newest)
        assert redone[-1] <= 2 * SAVE_EVERY
    code, _, errors = tiny_run.finish(arguments, **environment)
    assert code == 0, errors
    run_state.assert_ended_alike(folder, expected)
    code, output, _ = tiny_run.finish([sys.executable, "-m", "flax_decoder", "verify", str(folder)])
    assert code == 0, output
    print("steps redone after each kill:", redone)
    count_cases(NUM_KILLS)
