import contextlib
import errno
import functools
import io
import json
import math
import os
import signal
import time
import types

import jax
import numpy as np
import pytest
from job import TEXT, train_here
from limits import HANGS_SECONDS

import flax_decoder as fd
from flax_decoder.config import TrainingConfig
from flax_decoder.errors import FaultError, UserError
from flax_decoder.io import files
from flax_decoder.lens.history import read_history
from flax_decoder.training import environment, hardware, loop
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.flops import flops_per_token
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.verification import verify_run

NUM_STEPS = 8
RULES = {
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "model.dropout": 0.2,
    "training.num_steps": NUM_STEPS,
    "training.batch_size": 2,
    "training.eval_every": 2,
    "training.save_every": 2,
    "training.log_every": 2,
    "training.keep_newest": 2,
    "training.sample_tokens": 12,
    "lens.every": 3,
}
# The log entries that depend on the clock.
TIMES = ("tokens_per_second", "seconds")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


train = functools.partial(train_here, settings=RULES)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def finished(request, tmp_path_factory, text):
    """An uninterrupted run, and the name of its optimizer."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert train(folder, text, optimizer__name=request.param) == 0
    return folder, request.param


def rows_without_times(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: {name: value for name, value in row.items() if name not in TIMES} for row in rows}


def assert_equal_to_the_last_bit(folder, expected):
    """Compares log, parameters, sample and lens snapshots; `folder` may have an extra line for the step of a stop."""
    rows, expected_rows = rows_without_times(folder), rows_without_times(expected)
    assert {step: rows[step] for step in expected_rows} == expected_rows
    steps = list(rows)
    assert steps == sorted(set(steps))
    jax.tree.map(np.testing.assert_array_equal, fd.load(folder)[1], fd.load(expected)[1])
    assert (folder / "sample.txt").read_text() == (expected / "sample.txt").read_text()
    assert snapshots(folder) == snapshots(expected)


def snapshots(folder):
    return {path.name: path.read_bytes() for path in (folder / "lens").iterdir()}


def at_step(monkeypatch, step, action):
    """Calls `action` once during a step, when the loop asks for the batch of the next one."""
    original, happened = loop.place_batch, []

    def place_batch(tokens, training, context_length, mesh, asked):
        if asked == step + 1 and not happened:
            happened.append(step)
            action()
        return original(tokens, training, context_length, mesh, asked)

    monkeypatch.setattr(loop, "place_batch", place_batch)


class CrashError(Exception):
    """An unexpected exception."""


def crash():
    raise CrashError


def wait_for(condition):
    end = time.monotonic() + HANGS_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.short("muon")
def test_a_run_that_crashed_continues_to_the_same_end(finished, text, tmp_path, monkeypatch, capsys):
    expected, name = finished
    with monkeypatch.context() as patch, pytest.raises(CrashError):
        at_step(patch, 5, crash)
        patch.setattr(environment, "cpu_features", lambda: ["abacus"])
        train(tmp_path / "run", text, optimizer__name=name)
    wait_for(lambda: saved_steps(tmp_path / "run") == [2, 4])  # saved in the background
    # A line of the crashed run beyond its checkpoint, and one cut short.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train_loss": 99.0, "seconds": 1.0}\n{"step": 6, "tr')
    capsys.readouterr()
    assert train(tmp_path / "run", text, optimizer__name=name) == 0
    out = capsys.readouterr().out
    assert "from the checkpoint of step 4" in out and "may differ" in out and "without abacus" in out
    assert 5 not in rows_without_times(tmp_path / "run")
    assert_equal_to_the_last_bit(tmp_path / "run", expected)


@pytest.mark.full  # tests/faults/test_signals.py has two of it in processes of their own
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("step", [5, 6])  # no multiple of save_every, and one where it would evaluate
def test_a_run_that_was_stopped_continues_to_the_same_end(finished, text, tmp_path, monkeypatch, capsys, number, step):
    expected, name = finished
    with monkeypatch.context() as patch:
        at_step(patch, step - 1, lambda: os.kill(os.getpid(), number))
        assert train(tmp_path / "run", text, optimizer__name=name) == 128 + number
    assert saved_steps(tmp_path / "run")[-1] == step
    assert f"stopped by {number.name}: saved at step {step}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert train(tmp_path / "run", text, optimizer__name=name, run__resume="must") == 0
    assert "may differ" not in capsys.readouterr().out
    assert_equal_to_the_last_bit(tmp_path / "run", expected)


def test_what_a_run_folder_holds(finished, text):
    folder, name = finished
    assert {entry.name for entry in folder.iterdir()} == {
        "config.toml",
        "tokenizer.json",
        "corpus",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "sample.txt",
        "lens",
        "run_id",
        ".lock",
    }
    config = fd.load_config(folder / "config.toml")
    assert config.model.vocab_size == len(set(TEXT))  # resolved
    assert config.optimizer.name == name and config.data.path == str(text) and config.run.folder == str(folder)
    rules = {
        "data.path": str(text),
        "run.folder": str(folder),
        "optimizer.name": name,
        "model.vocab_size": len(set(TEXT)),
    }
    assert config == fd.load_config(None, RULES | rules)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The opening newline is not shown.
    assert RULES["training.sample_tokens"] <= len((folder / "sample.txt").read_text()) + 1
    assert set((folder / "sample.txt").read_text()) <= set(TEXT)


def test_what_a_line_of_metrics_says(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    unknown = ("mfu", "mfu_causal")  # of a CPU
    fields = ("train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "gradient_norm", *TIMES)
    for row in rows:
        assert row.keys() == {"step", "tokens", "skipped_steps", "run_id", *fields, *unknown}
        assert row["skipped_steps"] == 0
        assert all(row[name] == "unknown" for name in unknown)
        assert row["tokens"] == row["step"] * 2 * 8  # batch_size, context_length
        assert all(type(row[name]) is float and math.isfinite(row[name]) for name in fields)
        # One character of this text is one byte; the mean is over all but the first of them.
        num_tokens = len(TEXT) - int(0.9 * len(TEXT))
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2) * num_tokens / num_tokens)
    assert rows[0]["learning_rate"] == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 8)) / 2))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_the_newest_and_the_best_checkpoints_are_kept(text, tmp_path, monkeypatch):
    """Validation losses are faked so that the second is the best."""
    losses = iter([3.0, 2.0, 4.0, 5.0, 6.0])

    def evaluate(*args, **options):
        return {"loss": next(losses), "bits_per_byte": 1.0}

    monkeypatch.setattr(loop, "evaluate_batches", evaluate)
    assert train(tmp_path / "run", text, training__num_steps=10) == 0
    assert saved_steps(tmp_path / "run") == [4, 8, 10]
    params = {step: fd.load(tmp_path / "run", step=step)[1]["embedding"] for step in ("best", "latest", 4, 10)}
    np.testing.assert_array_equal(params["best"], params[4])
    np.testing.assert_array_equal(params["latest"], params[10])
    assert not np.array_equal(params["best"], params["latest"])


def test_the_first_step_may_be_logged(text, tmp_path, capsys):
    """The only step timed so far includes compilation."""
    assert train(tmp_path / "run", text, training__log_every=1, training__num_steps=3, training__eval_every=3) == 0
    assert list(rows_without_times(tmp_path / "run")) == [1, 2, 3]
    *_, generate, lens = capsys.readouterr().out.splitlines()
    assert f" flax-decoder generate {tmp_path / 'run'} --prompt " in generate and " flax-decoder lens " in lens


def test_a_run_stopped_before_its_first_evaluation_can_be_ended_there(text, tmp_path, monkeypatch, capsys):
    rare = {"training__eval_every": 100, "training__save_every": 100}
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "run", text, **rare) == 143
    assert train(tmp_path / "run", text, **rare, training__num_steps=3) == 0
    assert (tmp_path / "run" / "sample.txt").exists()


@pytest.mark.full
def test_each_line_tells_the_part_of_the_peak(text, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CHIPS", (hardware.Chip("cpu", 1e12, 1e9, 1e9, 1e9),))
    changes = {"mesh__data": 2, "mesh__tensor": 2, "model__vocab_size": 40, "training__num_steps": 4}
    assert train(tmp_path, text, training__sample_tokens=0, **changes) == 0
    model = fd.load_config(tmp_path / "config.toml").model
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        speed = row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(flops_per_token(model, "full") * speed / 4e12)
        assert row["mfu_causal"] == pytest.approx(flops_per_token(model, "causal") * speed / 4e12)


@pytest.mark.full
def test_a_run_learns_the_same_whether_it_is_watched_or_not(finished, text, tmp_path):
    expected, name = finished
    history = read_history(expected)
    assert history.steps_M.tolist() == [0, 3, 6, 8]
    _, begins_at_a_word = TEXT[int(0.9 * len(TEXT)) :].split(maxsplit=1)  # of the validation split
    assert fd.load(expected)[2].decode(history.tokens_T) == begins_at_a_word[:8]
    assert len(np.unique(history.weights_MLNTS, axis=0)) == 4  # it learns
    assert train(tmp_path / "run", text, optimizer__name=name, lens__every=0) == 0
    assert not (tmp_path / "run" / "lens").exists()
    assert rows_without_times(tmp_path / "run") == rows_without_times(expected)
    jax.tree.map(np.testing.assert_array_equal, fd.load(tmp_path / "run")[1], fd.load(expected)[1])


def test_the_last_snapshot_is_of_the_model_that_is_saved(finished):
    model, params, _ = fd.load(finished[0])
    history = read_history(finished[0])
    seen = fd.capture(model, params, history.tokens_T[None], names=("q_rotated", "k_rotated", "weights"))
    for found, expected in zip((history.q_MLTNH, history.k_MLTKH, history.weights_MLNTS), seen.values(), strict=True):
        np.testing.assert_allclose(found[-1], expected[:, 0], rtol=1e-3, atol=1e-5)  # float16


@pytest.mark.full
def test_another_text_may_be_watched_when_a_run_goes_on(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, text, training__num_steps=4) == 0
    before = snapshots(run)
    assert train(run, text, lens__prompt="To be", lens__every=2) == 0
    assert "lens: is of another text" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (run / "lens.1").iterdir()} == before
    history = read_history(run)
    assert history.steps_M.tolist() == [4, 6, 8] and fd.load(run)[2].decode(history.tokens_T) == "To be"
    results = {result.path.name: result for result in verify_run(run)}
    assert results["lens"].passed and "3 snapshots" in results["lens"].message and "lens.1" not in results


def test_a_text_that_cannot_be_watched_is_refused_before_anything_is_written(text, tmp_path):
    for prompt in ("To be?", ""):
        with pytest.raises(UserError, match=r"lens\.prompt"):
            train(tmp_path / "run", text, lens__prompt=prompt)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_disk_that_refuses_a_snapshot_ends_the_run(text, tmp_path, monkeypatch):
    def refuse(path, mode):
        if path.name == ".6.npy.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode)

    with monkeypatch.context() as patch, pytest.raises(FaultError, match=r"6\.npy\.tmp: cannot write a snapshot"):
        patch.setattr(files, "open", refuse, raising=False)
        train(tmp_path / "run", text)
    assert all(result.passed is not False for result in verify_run(tmp_path / "run"))
    assert train(tmp_path / "run", text) == 0
    assert read_history(tmp_path / "run").steps_M.tolist() == [0, 3, 6, 8]


def test_the_next_step_is_given_before_the_last_is_read_and_all_time_between_them_counts(tmp_path, text, monkeypatch):
    events, clock, num_steps = [], [0.0], 6
    jit_step, place_batch, check = loop.jit_step, loop.place_batch, loop.Checkpoints.check

    def jit_and_note(*args, **options):
        take_step = jit_step(*args, **options)

        def step(*args):
            events.append("step")
            return take_step(*args)

        return step

    def place_and_note(*args):
        events.append("batch")
        clock[0] += 1  # a slow one
        return place_batch(*args)

    def check_slowly(self):
        clock[0] += 3  # what the loop does after a step
        check(self)

    class Reader:
        def device_get(self, tree):
            events.append("read")
            return jax.device_get(tree)

        def block_until_ready(self, tree):
            events.extend(["wait"] * len(tree))
            return jax.block_until_ready(tree)

        def __getattr__(self, name):
            return getattr(jax, name)

    monkeypatch.setattr(loop, "jit_step", jit_and_note)
    monkeypatch.setattr(loop, "place_batch", place_and_note)
    monkeypatch.setattr(loop.Checkpoints, "check", check_slowly)
    monkeypatch.setattr(loop, "jax", Reader())
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    every = {"training__num_steps": num_steps, "training__log_every": 3, "training__sample_tokens": 0, "lens__every": 0}
    never = {"training__eval_every": 100, "training__save_every": 100}
    assert train(tmp_path / "run", text, **every, **never) == 0
    # The devices have the next step and its batch before anybody waits for this one, except for a line of the log.
    between_lines = ["step", "batch", *["step", "batch", "wait", "read"] * 2, "read"]
    assert events == ["batch"] + between_lines * 2
    tokens_per_step = RULES["training.batch_size"] * RULES["model.context_length"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["tokens_per_second"] for row in rows] == [tokens_per_step / (1 + 3)] * 2


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 3.0], 1, True),
        ([3.0, 4.0, 2.9], 1, False),
        ([2.0, 3.0, 2.0], 2, True),
        ([2.0, 3.0], 2, False),
        ([2.0, 3.0, 4.0], 0, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(losses, patience, expected):
    rows = [{"step": step, "val_loss": loss} for step, loss in enumerate(losses)]
    with_others = [line for row in rows for line in (row, {"step": row["step"]})]
    assert loop.has_settled(with_others, TrainingConfig(patience=patience)) == expected


@pytest.mark.full
def test_a_run_ends_where_its_validation_loss_no_longer_falls(tmp_path, text, monkeypatch, capsys):
    losses = iter([4.0, 3.0, 3.5, 3.0, 2.0])  # at steps 2, 4, ...
    monkeypatch.setattr(loop, "evaluate_batches", lambda *_, **__: {"loss": next(losses), "bits_per_byte": 1.0})
    run, patient = tmp_path / "run", {"training__patience": 2, "training__save_every": 4, "training__num_steps": 20}
    assert train(run, text, **patient) == 0
    assert saved_steps(run) == [4, 8]  # the best and the last
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [2, 4, 6, 8]
    assert "best validation loss 3.0000 (1.000 bits per byte) at step 4" in capsys.readouterr().out
    assert train(run, text, **patient) == 0
    assert "is finished after 8 steps. Its validation loss no longer fell: --step best is" in capsys.readouterr().out
    (run / "loss.png").unlink()  # as if it was killed before its results
    assert train(run, text, **patient) == 0 and saved_steps(run) == [4, 8]
    assert train(run, text, **patient | {"training__patience": 3, "training__num_steps": 10}) == 0
    assert saved_steps(run)[-1] == 10 and next(losses, None) is None


@pytest.fixture(scope="module")
def mixed(text, tmp_path_factory):
    """A function that trains on a mixture of two texts, the folder of its runs, and what a first one printed."""
    folder = tmp_path_factory.mktemp("mixed")
    other = folder / "other.txt"
    other.write_text(TEXT.replace("nobler", "robler"))  # the same characters: a program for all

    def run(name, weight=3.0, **changes):
        mixture = [{"path": str(text), "weight": weight}, {"path": str(other)}]
        rest = {"data__path": None, "data__mixture": mixture, "training__eval_every": 4, "training__save_every": 4}
        return train(folder / name, text, **rest | changes)

    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run("whole") == 0
    return run, folder, output.getvalue()


def test_a_mixture_is_told_by_source(mixed):
    _, folder, output = mixed
    row = rows_without_times(folder / "whole")[8]
    assert f"hamlet  75.0% of the rows, 0.16 epochs of {len(TEXT) * 9 // 10} tokens, " in output
    assert (
        output.count(f": hamlet {row['val_loss/hamlet']:.4f}, other {row['val_loss/other']:.4f}") == 2
    )  # and the best
    for name in ("val_loss", "val_bits_per_byte"):
        assert row[name] == pytest.approx(0.75 * row[f"{name}/hamlet"] + 0.25 * row[f"{name}/other"], rel=1e-12)
        assert row[f"{name}/hamlet"] != row[f"{name}/other"]
    assert row["tokens/hamlet"] + row["tokens/other"] == row["tokens"] and row["tokens/other"] > 0
    assert all(result.passed for result in verify_run(folder / "whole"))


def test_a_run_goes_on_with_the_mixture_it_began_with(mixed, text):
    run, folder, _ = mixed
    with pytest.raises(UserError, match=r"data\.mixture\[0\]\.weight, part of all rows: +saved 0\.75, asked 0\.66"):
        run("whole", weight=2.0)
    with pytest.raises(UserError, match=r"data\.mixture, number of sources: +saved 2, asked 1"):
        run("whole", data__path=str(text), data__mixture=None)
    other, before = folder / "other.txt", (folder / "other.txt").read_text()
    other.write_text(before.replace("robler", "rubler"))
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.path, SHA-256 of the text: +saved"):
        run("whole")
    other.unlink()
    assert run("whole") == 0  # it has its tokens
    other.write_text(before)


@pytest.mark.full
def test_a_mixture_is_resumed_to_the_last_bit(mixed, monkeypatch):
    run, folder, _ = mixed
    with monkeypatch.context() as patch, pytest.raises(CrashError):
        at_step(patch, 6, crash)
        run("parts", data__document_mask=True)
    wait_for(lambda: saved_steps(folder / "parts") == [4])
    assert run("parts", data__document_mask=True) == run("once", data__document_mask=True) == 0
    assert_equal_to_the_last_bit(folder / "parts", folder / "once")
