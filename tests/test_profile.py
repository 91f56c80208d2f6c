"""A profile: which steps are traced, and that a trace ends whatever happens."""

import gzip
import json

import jax
import pytest

from flax_decoder.config import Config, RunConfig, TrainingConfig, profiled_steps
from flax_decoder.config_file import load_config
from flax_decoder.errors import UserError
from flax_decoder.training.profile import Profile


@pytest.fixture
def calls(monkeypatch):
    """The calls of JAX's profiler."""
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(f"start {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


@pytest.mark.parametrize(
    ("first", "traced"),
    [(0, [3, 4]), (4, [4]), (5, [])],  # the whole run, and two that continue it
)
def test_these_steps_are_traced(calls, tmp_path, first, traced):
    with Profile(RunConfig(profile="3:2"), tmp_path) as profile:
        seen = []
        for step in range(first, 8):
            profile.update(step, ())
            if len(calls) == 1:
                seen.append(step)
    assert seen == traced
    assert calls == (["start profile", "stop"] if traced else [])


def test_a_trace_has_whole_steps(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda results: calls.append(f"wait for {results}"))
    with Profile(RunConfig(profile="1:2"), tmp_path) as profile:
        for step in range(5):
            profile.update(step, step)
    assert calls == ["wait for 1", "start profile", "wait for 3", "stop"]


def test_a_trace_ends_with_the_run_whatever_ends_it(calls, tmp_path):
    with pytest.raises(KeyboardInterrupt), Profile(RunConfig(profile="0:9"), tmp_path) as profile:
        profile.update(0, ())
        raise KeyboardInterrupt
    assert calls == ["start profile", "stop"]


def test_without_the_setting_or_in_another_process_nothing_is_traced(calls, tmp_path):
    for run, writes in ((RunConfig(), True), (RunConfig(profile="0:9"), False)):
        Profile(run, tmp_path, writes=writes).update(0, ())
    assert calls == [] and profiled_steps(RunConfig()) == range(0)


@pytest.mark.parametrize("text", ["3:", ":2", "3:0", "-1:2", "a:b", "1:2:3", "1:2000000000000"])
def test_what_is_no_start_and_count_is_refused(text):
    with pytest.raises(UserError, match=r"run\.profile.* is not START:STEPS"):
        load_config(None, {"run.profile": text})


def test_steps_that_a_run_does_not_have_are_refused():
    Config(run=RunConfig(profile="8:2"), training=TrainingConfig(num_steps=10))
    with pytest.raises(UserError, match=r"run\.profile = 9:2 is of steps up to 11, but training\.num_steps = 10"):
        load_config(None, {"run.profile": "9:2", "training.num_steps": 10})


@pytest.mark.full
def test_a_trace_can_be_read(tmp_path, capsys):
    with Profile(RunConfig(profile="0:1"), tmp_path) as profile:
        profile.update(0, ())
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))))
        profile.update(1, ())
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    assert str(trace) in capsys.readouterr().out
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
