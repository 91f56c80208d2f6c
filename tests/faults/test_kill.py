"""A run that is killed again and again, at any time, must end as if nothing had been."""

import random
import re
import time

import pytest
import run_state
import test_kill_points
import tiny_run
from limits import HANGS_SECONDS

from flax_decoder.cli import main

# How many steps a run has, how often it is saved, and how often killed. The short suite kills the run that
# test_kill_points.py kills, so that both compare with the same one that was never killed.
FEW, MANY = (test_kill_points.FEW_STEPS, test_kill_points.SAVE_EVERY, 3), (600, 5, 20)
CASES = [pytest.param(*FEW, 0, id="few")]
CASES += [pytest.param(*MANY, seed, id=str(seed), marks=pytest.mark.full) for seed in range(10)]


def made_at(path):
    """Tells a file from the one that takes its place."""
    return path.stat().st_ino if path.exists() else None


@pytest.mark.fault("SIGKILL at random times")
@pytest.mark.parametrize(("num_steps", "save_every", "num_kills", "seed"), CASES)
def test_a_run_that_is_killed_at_random_times(tmp_path, count_cases, num_steps, save_every, num_kills, seed):
    # Every step is logged, so that every loss is compared.
    rules = test_kill_points.rules(num_steps, save_every)
    expected, text, cache, whole_seconds = tiny_run.whole(**rules)
    expected_losses = run_state.losses(expected)
    rng = random.Random(seed)
    folder = tmp_path / "run"
    log = folder / "metrics.jsonl"
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    arguments = tiny_run.command(folder, text, **rules)
    newest = reached = 0
    redone = []
    for number in range(num_kills):
        log_before = made_at(log)
        process = tiny_run.start(arguments, **environment)
        try:
            # Such that the kills are spread over all the steps. Some come earlier: in imports, compiling, restoring.
            target = newest + rng.randint(1, max((num_steps - newest) // (num_kills - number + 3), 1))
            early = number % 4 == seed % 4
            end = time.monotonic() + (rng.uniform(0, whole_seconds) if early else HANGS_SECONDS)
            # The log is made anew at a start: until then it has lines beyond the checkpoint.
            while (made_at(log) == log_before or run_state.last_step(folder) < target) and time.monotonic() < end:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            assert early or time.monotonic() < end
            end = time.monotonic() + rng.uniform(0, 0.05)  # in which it takes some steps and saves, but not all
            while time.monotonic() < end and run_state.last_step(folder) < num_steps - save_every:
                time.sleep(0.001)
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
        assert redone[-1] <= 2 * save_every
    code, _, errors = tiny_run.finish(arguments, **environment)
    assert code == 0, errors
    run_state.assert_ended_alike(folder, expected)
    assert main(["verify", str(folder)]) == 0
    print("steps redone after each kill:", redone)
    count_cases(num_kills)
