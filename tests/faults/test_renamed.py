"""A run folder that is renamed or deleted while its run trains, and a new run that begins at its path."""

import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_state import losses, snapshot
from tiny_run import HERE, command

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.training import loop
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.verification import verify_run

pytestmark = pytest.mark.fault("A run folder renamed, replaced or deleted while it trains")

# Moments of a run: the function of the loop at which they are, which call of it, and the step that is saved.
MOMENTS = {
    "step": ("place_batch", 6, 6),
    "evaluation": ("evaluate_batches", 2, 8),
    "sampling": ("generate_sample", 1, 12),
}


def verified(folder):
    return [result for result in verify_run(folder) if result.passed is not True]


def at(monkeypatch, moment, action):
    """Calls `action` at a moment of the next run, once; before the call of a function of the loop."""
    name, count, step = MOMENTS[moment]
    original, calls = getattr(loop, name), []

    def replacement(*arguments, **named):
        calls.append(name)
        if len(calls) == count + (name == "place_batch"):
            action()
        return original(*arguments, **named)

    monkeypatch.setattr(loop, name, replacement)
    return step


def assert_ended_like(run, trained):
    expected, found = losses(trained), losses(run)  # a stopped run has logged one more step
    assert {step: found[step] for step in expected} == expected and verified(run) == []
    jax.tree.map(np.testing.assert_array_equal, fd.load(run)[1], fd.load(trained)[1])
    assert (run / "sample.txt").read_bytes() == (trained / "sample.txt").read_bytes()


@pytest.mark.short("step-True")
@pytest.mark.parametrize("another", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_follows_its_folder_and_leaves_the_new_one_alone(
    text, trained, tmp_path, monkeypatch, capsys, moment, another
):
    run, moved, before = tmp_path / "run", tmp_path / "moved", {}
    arguments = ["train", *command(run, text, **HERE)[2:]]

    def rename():
        run.rename(moved)
        if another:
            shutil.copytree(trained[0], run)
        before.update(snapshot(tmp_path / "run"))

    with monkeypatch.context() as patch:
        step = at(patch, moment, rename)
        code = main(arguments)
    out, error = capsys.readouterr()
    assert saved_steps(moved)[-1] == step and snapshot(run) == before
    if moment == "sampling":  # the run had nothing else to do
        assert code == 0 and f"a sample, also in {moved}/sample.txt" in out
    else:
        told = f"fault: {run}: was renamed to {moved} while it trained; saved there at step {step}: the same"
        assert code == 1 and error.startswith(told) and error.count("\n") == 1
    assert verified(moved) == []
    assert main([*arguments, f"--run.folder={moved}"]) == 0
    assert_ended_like(moved, trained[0])


@pytest.mark.full
def test_a_run_whose_folder_is_deleted_says_so_and_makes_no_new_one(text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def delete():
        while run.exists():  # a save may be under way in it
            shutil.rmtree(run, ignore_errors=True)

    at(monkeypatch, "step", delete)
    assert main(["train", *command(run, text, **HERE)[2:]]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fault: {run}: has been deleted, or moved") and error.count("\n") == 1
    assert not run.exists()


@pytest.mark.full
@pytest.mark.parametrize("when", ["before the arrays", "after the arrays"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_save_that_is_under_way_is_committed_in_its_folder(
    text, trained, tmp_path, monkeypatch, capsys, number, when
):
    run, moved, before = tmp_path / "run", tmp_path / "moved", {}
    arguments = ["train", *command(run, text, **HERE)[2:]]
    save, wait, saves = ocp.AsyncCheckpointer.save, ocp.AsyncCheckpointer.wait_until_finished, []

    def rename_at(moment):
        if (len(saves), when) == (number, moment) and not before:
            run.rename(moved)
            shutil.copytree(trained[0], run)
            before.update(snapshot(run))

    def saving(writer, *given, **named):
        saves.append(given)
        rename_at("before the arrays")
        save(writer, *given, **named)

    def waiting(writer):
        wait(writer)
        if threading.current_thread().name.startswith("checkpoint"):
            rename_at("after the arrays")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.AsyncCheckpointer, "save", saving)
        patch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", waiting)
        assert main(arguments) == 1
    assert f"was renamed to {moved} while it trained; saved there at step" in capsys.readouterr().err
    assert snapshot(run) == before
    assert verified(moved) == []
    assert main([*arguments, f"--run.folder={moved}"]) == 0
    assert_ended_like(moved, trained[0])


def test_verify_says_what_is_of_another_run(trained, text, tmp_path, capsys):
    """A checkpoint, lines of the log and the lock name their run."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "run_id").write_text("0123456789abcdef\n")
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    broken = [line for line in lines if line.startswith("BROKEN")]
    id = (trained[0] / "run_id").read_text().strip()
    assert len(broken) == 4 and all(f"'{id}'" in line for line in broken), lines
    for part in ("run_id: is 0123456789abcdef, but", "8: is of another run", "12: is of another run", "line 1: is of"):
        assert any(part in line for line in broken)
    (run / "run_id").unlink()  # as that of an earlier version
    assert verified(run) == []
