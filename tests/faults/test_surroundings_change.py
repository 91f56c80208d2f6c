"""What the surroundings of a run do to it while it trains: memory, clock, disk and the cache of programs."""

import errno
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from run_state import losses
from tiny_run import HERE, command

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.training import loop, metrics
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.verification import verify_run

pytestmark = pytest.mark.fault("Memory, clock, a read-only disk, a broken cache of programs, in mid run")

FAULTS = {
    "memory of Python": (MemoryError(), "out of memory"),
    "memory of XLA": (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8000000000 bytes."), "8.0 GB"),
    "read-only": (OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.jsonl"), "Read-only file system"),
}


def assert_ended_like(run, trained):
    expected, found = losses(trained), losses(run)
    assert {step: found[step] for step in expected} == expected
    assert [result for result in verify_run(run) if result.passed is False] == []
    jax.tree.map(np.testing.assert_array_equal, fd.load(run)[1], fd.load(trained)[1])


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_mid_run_is_told_in_two_lines_and_nothing_is_lost(
    text, trained, tmp_path, monkeypatch, capsys, name
):
    run = tmp_path / "run"
    arguments = ["train", *command(run, text, **HERE)[2:]]
    error, part = FAULTS[name]
    calls = []

    def fail(original):
        def replacement(*given, **named):
            calls.append(given)
            if len(calls) > 7:
                raise error
            return original(*given, **named)

        return replacement

    with monkeypatch.context() as patch:
        if name == "read-only":
            patch.setattr(metrics, "open", fail(open), raising=False)
            calls.extend([()] * 4)
        else:
            patch.setattr(loop, "place_batch", fail(loop.place_batch))
        assert main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("fault: ") and part in told and len(told.splitlines()) <= 2 and "Traceback" not in told
    assert saved_steps(run)
    assert main(arguments) == 0
    assert_ended_like(run, trained[0])


def test_too_little_memory_for_the_message_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("flax_decoder.cli.evaluate", fail)
    monkeypatch.setattr("flax_decoder.cli._shortage", fail)
    assert main(["eval", "a", "b"]) == 1
    assert capsys.readouterr().err == "fault: out of memory\n"


@pytest.mark.full
@pytest.mark.parametrize("damage", ["cut", "zeroed", "random", "flipped"])
def test_a_broken_cache_of_programs_changes_no_number(tmp_path, damage):
    finished = tiny_run.finished_run()
    cache = Path(shutil.copytree(finished.cache, tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for path in (path for path in cache.iterdir() if path.name.endswith("-cache")):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        changed = {
            "cut": content[: len(content) // 2],
            "zeroed": bytes(len(content)),
            "random": rng.bytes(len(content)),
            "flipped": content,
        }
        path.write_bytes(changed[damage])
    code, _, error = tiny_run.finish(command(tmp_path / "run", finished.text), JAX_COMPILATION_CACHE_DIR=str(cache))
    assert code == 0, error
    assert_ended_like(tmp_path / "run", finished.run)


@pytest.mark.full
def test_a_clock_that_is_set_back_changes_nothing(text, trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = ["train", *command(run, text, **HERE)[2:]]
    assert main([*arguments, "--training.num-steps=8", "--optimizer.warmup-steps=1"]) == 0
    hour = time.time() + 3600
    for path in run.rglob("*"):  # as if all of it had been written before
        os.utime(path, (hour, hour))
    with monkeypatch.context() as patch:  # killed between the last checkpoint and the results
        patch.setattr(loop, "write_results", lambda *_: None)
        assert main([*arguments, "--optimizer.warmup-steps=1"]) == 0
    before = (run / "sample.txt").stat().st_mtime
    assert main([*arguments, "--optimizer.warmup-steps=1"]) == 0
    assert (run / "sample.txt").stat().st_mtime != before  # it is not taken for that of these steps
    assert all(row["seconds"] >= 0 for row in metrics.read_metrics(run / "metrics.jsonl"))
