"""A power cut after each call of a run: what is on disk then, by POSIX, and that nothing is lost or silent."""

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import file_calls
import pytest
from file_calls import Operation, Recorder
from power_cut import Disk, Materialized, State, states
from run_state import assert_ended_alike, losses
from run_without_arrays import RUN, live, row
from tiny_run import HERE, command, finish

from flax_decoder.cli import main
from flax_decoder.config import RunConfig
from flax_decoder.data.shards import load_corpus
from flax_decoder.errors import BrokenError
from flax_decoder.training.checkpoint import (
    choose_step,
    saved_steps,
    steps_folder,
)
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import MetricsLog
from flax_decoder.training.verification import verify_run

# Of that many states, spread over the run, training goes on.
NUM_RESUMED = 220


class Promise:
    """What a run has said that it has, call by call.

    Attributes:
        created: whether the folder of the run is there for good.
        steps: the checkpoints that are there for good.
    """

    def __init__(self, root: str) -> None:
        self.created, self.steps = False, {0}
        self._run, self._named = Path(root) / RUN, set()

    def follow(self, operation: Operation) -> None:
        """Takes the next call: what was renamed is there for good when its folder is flushed."""
        path = Path(operation.path)
        if operation.kind == "rename":
            if path.parent == steps_folder(self._run) and path.name.isdecimal():
                self.steps.discard(int(path.name))
            self._named.add(Path(operation.target))
        if operation.kind == "fsync":
            flushed = {named for named in self._named if named.parent == path}
            self._named -= flushed
            self.created |= self._run in flushed
            self.steps |= {int(named.name) for named in flushed if named.name.isdecimal()}


def rows_of(run: Path) -> dict[int, dict[str, float]]:
    """The losses in a log; nothing from its first damaged line on."""
    try:
        return losses(run)
    except BrokenError:
        return {}


def assert_nothing_is_lost(run: Path, promise: Promise) -> None:
    """The promised checkpoint is there; all that have a step's name are whole."""
    assert run.is_dir() or not promise.created
    for step in saved_steps(run):
        verify(steps_folder(run) / str(step))
    assert max(saved_steps(run), default=0) >= max(promise.steps)


def cuts(operations: list[Operation], root: str, num_random: int) -> Iterator[tuple[str, Promise, State]]:
    """The states after a cut at each point, and what is promised there; each once."""
    disk, promise, rng, seen = Disk(root), Promise(root), random.Random(7), set()
    for number, operation in enumerate(operations):
        disk.apply(operation)
        promise.follow(operation)
        for name, state in states(disk, rng, num_random):
            key = promise.created, max(promise.steps), frozenset(state.items())
            if key not in seen:
                seen.add(key)
                yield f"{number} ({operation.kind} {operation.path}): {name}", promise, state


@pytest.fixture(scope="module")
def recorded(text, tmp_path_factory):
    """The calls of a run of 40 steps that lost its disk once, the root of its paths, and its arguments."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "disk").mkdir()
    arguments = ["train", *command(folder / "disk" / RUN, text, **HERE, training__num_steps=40)[2:]]
    script = [sys.executable, str(Path(__file__).parent / "recorded_run.py"), str(folder / "disk")]
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    code, _, errors = finish(
        [*script, str(folder / "records"), *arguments], LD_PRELOAD=file_calls.library(), PYTHONPATH=paths
    )
    assert code == 0, errors
    return list(file_calls.read_operations(folder / "records")), folder / "disk", arguments


@pytest.mark.full
@pytest.mark.fault("A power cut after each call of a run")
def test_the_recorded_calls_are_all_that_changed_the_disk(recorded):
    operations, root, _ = recorded
    disk = Disk(str(root))
    for operation in operations:
        disk.apply(operation)
    found = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    assert disk.content() == found


@pytest.mark.fault("A power cut after each call of a run")
def test_a_power_cut_in_a_run_without_arrays(tmp_path, monkeypatch, capsys, count_cases):
    """As below, in a few milliseconds a state."""
    (tmp_path / "live").mkdir()
    recorder = Recorder(tmp_path / "live")
    with monkeypatch.context() as patch:
        recorder.patch(patch)
        live(tmp_path / "live")
    recorder.look()
    disk, number = Materialized(tmp_path / "disk"), 0
    run = tmp_path / "disk" / RUN
    for name, promise, state in cuts(recorder.operations, str(tmp_path / "live"), 3):
        disk.become(state)
        assert_nothing_is_lost(run, promise)
        if promise.created:
            load_corpus(run / "corpus")
        step = max(saved_steps(run), default=0)
        capsys.readouterr()
        log = MetricsLog(RunConfig(), run, step, writes=False)
        assert log.rows == [row(known) for known in range(1, step + 1)], name
        number += 1
    assert number > 150
    count_cases(number)


@pytest.mark.full
@pytest.mark.fault("A power cut after each call of a run")
def test_a_power_cut_at_any_time_loses_no_checkpoint_and_is_told(recorded, tmp_path, capsys, count_cases):
    operations, root, arguments = recorded
    expected = tmp_path / "expected"
    assert main([*arguments, f"--run.folder={expected}"]) == 0
    truth = losses(expected)
    disk, number, resumed = Materialized(tmp_path / "disk"), 0, 0
    total = sum(1 for _ in cuts(operations, str(root), 3))
    run = tmp_path / "disk" / RUN
    for name, promise, state in cuts(operations, str(root), 3):
        number += 1
        disk.become(state)
        capsys.readouterr()
        assert_nothing_is_lost(run, promise)
        if run.is_dir():
            broken = [finding for finding in verify_run(run) if finding.passed is False]
            # Lines after the newest checkpoint, which are written again.
            assert {finding.path.name for finding in broken} <= {"metrics.jsonl"}, (name, broken)
            step = choose_step(run, "latest") if saved_steps(run) else 0
            rows = rows_of(run)
            until = {row for row in truth if row <= step}
            assert broken or (until <= rows.keys() and all(truth[row] == rows[row] for row in rows)), name
        assert capsys.readouterr().err == "", name
        if number * NUM_RESUMED // total > resumed:
            resumed += 1
            copy = disk.copy_to(tmp_path / "copy") / RUN
            assert main([*arguments, f"--run.folder={copy}"]) == 0, (name, capsys.readouterr())
            assert_ended_alike(copy, expected)
            shutil.rmtree(tmp_path / "copy")
    assert number >= 5000 and resumed == NUM_RESUMED
    count_cases(number)
