"""A run that is killed repeatedly, at random times, has the results of an uninterrupted one."""

import random
import re
import time

import pytest
import run_state
import test_kill_points
import tiny_run
from limits import HANGS_SECONDS

from flax_decoder.cli import main

# Numbers of steps, steps per save, and kills. The short suite uses the settings of test_kill_points.py, so that both
# share an uninterrupted run.
FEW, MANY = (test_kill_points.FEW_STEPS, test_kill_points.SAVE_EVERY, 2), (600, 5, 20)
CASES = [pytest.param(*FEW, 0, False, id="few")]
CASES += [pytest.param(*MANY, seed, False, id=str(seed), marks=pytest.mark.full) for seed in range(10)]
# Adapters learn, with dropout, beside the weights of another run.
CASES += [pytest.param(300, 5, 20, seed, True, id=f"adapters {seed}", marks=pytest.mark.full) for seed in range(3)]


def made_at(path):
    """The inode of a file, which changes when the file is replaced."""
    return path.stat().st_ino if path.exists() else None


@pytest.mark.fault("SIGKILL at random times")
@pytest.mark.parametrize(("num_steps", "save_every", "num_kills", "seed", "adapters"), CASES)
def test_a_run_that_is_killed_at_random_times(tmp_path, count_cases, num_steps, save_every, num_kills, seed, adapters):
    # Every step is logged, so that every loss is compared.
    rules = test_kill_points.rules(num_steps, save_every)
    if adapters:
        base = tiny_run.finished_run(**test_kill_points.FEW_RULES).run
        rules |= {"run__start_from": base, "lora__rank": 3, "lora__dropout": 0.1}
    expected, text, cache, run_seconds = tiny_run.finished_run(**rules)
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
            # Kills are spread over all steps; some come earlier, during imports, compilation or restoring.
            target = newest + rng.randint(1, max((num_steps - newest) // (num_kills - number + 3), 1))
            early = number % 4 == seed % 4
            end = time.monotonic() + (rng.uniform(0, run_seconds) if early else HANGS_SECONDS)
            # Until the log is rewritten at the start, it has lines beyond the checkpoint.
            while (made_at(log) == log_before or run_state.last_step(folder) < target) and time.monotonic() < end:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            assert early or time.monotonic() < end
            end = time.monotonic() + rng.uniform(0, 0.05)  # for some more steps and saves
            while time.monotonic() < end and run_state.last_step(folder) < num_steps - save_every:
                time.sleep(0.001)
        finally:
            process.kill()
            output, errors = process.communicate()
        assert process.returncode == -9, (output, errors)  # it did not end before the kill
        assert "Traceback" not in errors and "warning: " not in errors, errors
        continued = re.search(r"from the checkpoint of step (\d+)", output)
        assert continued is None or int(continued[1]) == newest
        for step, row in run_state.losses(folder).items():
            assert row == expected_losses[step]
        # Lost are at most the steps since the last save and an unfinished save.
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
