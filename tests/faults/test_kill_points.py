"""A process that is killed at critical points of a save, a start, or an export."""

import random
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import run_state
import tiny_run

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.loading import convert
from flax_decoder.training.checkpoint import choose_step, saved_steps

FAULTY = Path(__file__).parent / "faulty_run.py"
FEW_STEPS, NUM_STEPS, SAVE_EVERY = 24, 60, 2


def rules(num_steps, save_every):
    """Settings with frequent saves, evaluations and log lines, and two checkpoints kept."""
    return {
        "training__num_steps": num_steps,
        "training__log_every": 1,
        "training__eval_every": save_every,
        "training__eval_batches": 1,
        "training__keep_newest": 2,
        "training__save_every": save_every,
    }


RULES, FEW_RULES = rules(NUM_STEPS, SAVE_EVERY), rules(FEW_STEPS, SAVE_EVERY)
# Points of a save, and whether a kill in the n-th save leaves n or n - 1 saves.
SAVES_DONE = {"before arrays": -1, "amid arrays": -1, "after arrays": -1, "after manifest": -1, "after rename": 0}
LEAVES_ARRAYS = ("amid arrays", "after arrays", "after manifest")


def killed_at(point, count, arguments, **environment):
    """Runs a command of flax-decoder, which must be killed."""
    words = [sys.executable, str(FAULTY), "SIGKILL", point, str(count), "0", *arguments]
    code, output, errors = tiny_run.finish(words, PYTHONUNBUFFERED="1", **environment)
    assert code == -9, (point, count, output, errors)
    assert "Traceback" not in errors and "warning: " not in errors, errors
    return output


@pytest.fixture
def finished():
    """A run that is not killed, its text, and a cache with its programs."""
    return tiny_run.finished_run(**FEW_RULES)


EVERY_POINT = [*SAVES_DONE, "pruning", "clearing", "amid restoring", "sampling", "after sampling"]
# A save, the cleanup at the next start, and a deletion.
CASES = [pytest.param(FEW_STEPS, 0, ["amid arrays", "clearing", "pruning"], id="three points")]
CASES += [pytest.param(NUM_STEPS, seed, EVERY_POINT, id=str(seed), marks=pytest.mark.full) for seed in range(10)]


@pytest.mark.fault("SIGKILL at named points")
@pytest.mark.parametrize(("num_steps", "seed", "chosen"), CASES)
def test_a_run_that_is_killed_at_named_points(tmp_path, count_cases, num_steps, seed, chosen):
    settings = rules(num_steps, SAVE_EVERY)
    expected, text, cache, _ = tiny_run.finished_run(**settings)
    rng = random.Random(seed)
    folder = tmp_path / "run"
    environment = {"JAX_COMPILATION_CACHE_DIR": cache}
    arguments = tiny_run.command(folder, text, **settings)
    points = [*SAVES_DONE, "pruning"]
    rng.shuffle(points)
    points.insert(points.index("amid arrays") + 1, "clearing")  # so that there is something to clear
    points.insert(points.index("after rename") + 1, "amid restoring")  # likewise
    points = [point for point in points if point in chosen]
    newest = 0
    for point in points:
        # If there is no checkpoint yet, the first save is killed.
        count = 1 if newest == 0 or point == "clearing" else rng.randint(1, 3)
        if point == "amid restoring":
            count = 2  # the second of its two parts
        output = killed_at(point, count, ["train", *arguments[2:]], **environment)
        if newest > 0 and point not in ("amid restoring", "clearing"):
            assert f"from the checkpoint of step {newest}" in output
        before, newest = newest, run_state.newest_verified(folder)
        if point in SAVES_DONE:
            assert newest == before + SAVE_EVERY * (count + SAVES_DONE[point]), point
        elif point in ("amid restoring", "clearing"):
            assert newest == before
        else:
            assert newest > before
        if newest > 0:
            assert choose_step(folder, "latest") == newest and choose_step(folder, "best") in saved_steps(folder)
        if point in LEAVES_ARRAYS:
            assert any(".new-" in name for name in run_state.leftovers(folder)), point
        if point == "pruning":
            assert any(".old-" in name for name in run_state.leftovers(folder))
    # After the last step: before the first result, and between the two.
    ends = [point for point in ("sampling", "after sampling") if point in chosen]
    for point in ends:
        killed_at(point, 1, ["train", *arguments[2:]], **environment)
        assert run_state.newest_verified(folder) == num_steps and not (folder / "loss.png").exists()
    code, output, errors = tiny_run.finish(arguments, **environment)
    assert code == 0 and f"from the checkpoint of step {num_steps if ends else newest}" in output, errors
    run_state.assert_ended_alike(folder, expected)
    count_cases(len(points) + len(ends))


@pytest.mark.full
@pytest.mark.fault("SIGKILL at named points")
def test_a_first_save_that_is_killed_amid_its_arrays(tmp_path):
    expected, text, cache, _ = tiny_run.finished_run(**RULES)
    environment = {"JAX_COMPILATION_CACHE_DIR": cache}
    arguments = tiny_run.command(tmp_path / "run", text, **RULES)
    killed_at("amid arrays", 1, ["train", *arguments[2:]], **environment)
    assert saved_steps(tmp_path / "run") == [] and run_state.leftovers(tmp_path / "run")
    # That save is not repeated, so its leftovers are not overwritten.
    arguments = tiny_run.command(tmp_path / "run", text, **RULES | {"training__save_every": 2 * SAVE_EVERY})
    code, output, errors = tiny_run.finish(arguments, **environment)
    assert code == 0 and "has no checkpoint yet: it starts from the beginning" in output, errors
    run_state.assert_ended_alike(tmp_path / "run", expected)


@pytest.mark.fault("A verified checkpoint at every instant")
def test_there_is_a_verified_checkpoint_at_every_instant(finished, tmp_path, capsys, count_cases):
    """While a run saves and prunes continually, another process verifies its checkpoints.

    The run is as long as it takes for enough of its checkpoints to have been seen, on whatever machine.
    """
    _, text, cache, _ = finished
    folder = tmp_path / "run"
    arguments = tiny_run.command(folder, text, **FEW_RULES | {"training__num_steps": 10**6})
    process = tiny_run.start(arguments, JAX_COMPILATION_CACHE_DIR=cache)
    seen = [0]
    num_checks = 0
    try:
        while not saved_steps(folder):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        while len(set(seen)) < 7:
            seen.append(choose_step(folder, "latest"))
            assert choose_step(folder, "best") > 0
            num_checks += 1
            assert process.poll() is None, process.communicate()
    finally:
        process.kill()
        process.communicate()
    assert seen == sorted(seen)
    assert "warning" not in capsys.readouterr().err
    count_cases(num_checks)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """The model of the run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    convert(tiny_run.finished_run(**FEW_RULES).run, folder)
    return folder


@pytest.mark.fault("SIGKILL in an export")
@pytest.mark.parametrize("to_run", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("at_each", [False, pytest.param(True, marks=pytest.mark.full)])
def test_an_export_that_is_killed(finished, hugging_face, tmp_path, count_cases, to_run, at_each):
    """At the third file that is written or, with --full, at each one, until there are no more."""
    source = hugging_face if to_run else finished[0]
    target = tmp_path / "target"
    count = 1 if at_each else 3
    num_killed = 0
    arguments = ["convert", str(source), str(target)]
    while True:
        code, output, errors = tiny_run.finish(
            [sys.executable, str(FAULTY), "SIGKILL", "file", str(count), "0", *arguments]
        )
        if code == 0:
            break
        assert code == -9, (output, errors)
        assert not target.exists() and run_state.leftovers(target)
        num_killed += 1
        count += 1
        if not at_each:
            assert main(arguments) == 0
            break
    assert num_killed >= 5 or (num_killed == 1 and not at_each)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert run_state.leftovers(target) == []
    ours, theirs = (fd.load(path)[1] for path in (target, hugging_face))  # which has more biases
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    count_cases(num_killed)
