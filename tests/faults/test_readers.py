"""Commands that read a run while a training in it saves and deletes checkpoints."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flax_decoder as fd
from flax_decoder import loading
from flax_decoder.config_file import to_toml
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.errors import UserError
from flax_decoder.lens import history
from flax_decoder.nn.params import abstract_params
from flax_decoder.training import checkpoint, verification
from flax_decoder.training.checkpoint import save_params, saved_steps, steps_folder
from flax_decoder.training.verification import verify_run

pytestmark = pytest.mark.fault("A checkpoint deleted by a training at each moment of a load")

MODEL = {"vocab_size": 5, "context_length": 4, "num_layers": 1, "embed_dim": 16, "num_heads": 2}
SETTINGS = {f"model.{name}": value for name, value in MODEL.items()}
NEXT = 2


def filled(params, number):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, number, leaf.dtype), params)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder with the checkpoints of steps 1 and 2; all numbers of each are its step."""
    folder = tmp_path_factory.mktemp("run")
    config = fd.load_config(None, SETTINGS)
    params = abstract_params(fd.Decoder(config.model))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "tokenizer.json").write_text(CharTokenizer("abcde").to_json())
    for step in (1, NEXT):
        save_params(folder, step, filled(params, step))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of it with the first checkpoint only, and what a training does next: commit the second, delete the first.

    A checkpoint loses its name before its files, as in `prune`.
    """
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    steps = steps_folder(folder)
    os.rename(steps / str(NEXT), tmp_path / "next")

    def train_on():
        if (steps / "1").exists():
            os.rename(tmp_path / "next", steps / str(NEXT))
            os.rename(steps / "1", steps / ".old-1")
            shutil.rmtree(steps / ".old-1")

    return folder, train_on


# Calls of one load, each with the moment before and the one after it.
MOMENTS = {
    "listing": (checkpoint, "saved_steps"),
    "verifying": (checkpoint, "verify"),
    "manifest": (checkpoint, "read_manifest"),
    "tokenizer": (loading, "require_same_inputs"),
    "restoring": (ocp.StandardCheckpointer, "restore"),
}


@pytest.mark.short("restoring-before-latest", "restoring-after-latest", "verifying-before-1")
@pytest.mark.parametrize("wanted", ["latest", "best", 1])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_reader_goes_on_to_the_next_checkpoint(run, monkeypatch, moment, when, wanted):
    folder, train_on = run
    owner, name = MOMENTS[moment]
    call = getattr(owner, name)

    def beside_a_training(*arguments, **named):
        if when == "before":
            train_on()
            return call(*arguments, **named)
        try:
            return call(*arguments, **named)
        finally:
            train_on()

    monkeypatch.setattr(owner, name, beside_a_training)
    if wanted == 1:
        with pytest.raises(UserError, match=f"has no checkpoint of step 1; there are {NEXT}$"):
            fd.load(folder, step=wanted)
    else:
        _, params, _ = fd.load(folder, step=wanted)
        jax.tree.map(np.testing.assert_array_equal, params, filled(params, NEXT))
    assert saved_steps(folder) == [NEXT]


def test_a_checkpoint_that_is_there_and_cannot_be_read_is_not_tried_again(run, monkeypatch):
    def fail(*arguments):
        raise fd.FaultError("cannot be restored")

    monkeypatch.setattr(loading, "restore_params", fail)
    with pytest.raises(fd.FaultError, match="cannot be restored"):
        fd.load(run[0])


def test_verify_looks_at_what_is_there(run, monkeypatch):
    folder, train_on = run

    def beside_a_training(path):
        train_on()
        return verify(path)

    verify = verification.verify
    monkeypatch.setattr(verification, "verify", beside_a_training)
    found = {result.path.name: result for result in verify_run(folder)}
    assert (found["1"].passed, found["1"].message) == (None, "a running training has just deleted it")
    assert found[str(NEXT)].passed is True and found["config.toml"].passed is True


def test_a_history_that_a_training_thins_out_is_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    contents = {step: history.to_bytes(*map(rng.random, ((1, 2, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2)))) for step in (0, 5)}
    lens = tmp_path / "lens"

    def write(steps):
        digests = {step: history.hashlib.sha256(contents[step]).hexdigest() for step in steps}
        history.write_index(lens, history.Index(5, [3, 4], digests))

    write(contents)
    for step, content in contents.items():
        (lens / f"{step}.npy").write_bytes(content)
    read = history._read

    def beside_a_training(path, max_bytes):
        if path.name == "5.npy":
            write([0])
        return read(path, max_bytes)

    monkeypatch.setattr(history, "_read", beside_a_training)
    assert history.read_history(tmp_path).steps_M.tolist() == [0]


# A training as it looks to a reader: each step is saved, and only the newest is kept.
TRAINING = """
    import sys, threading
    from pathlib import Path
    import jax, numpy as np
    import flax_decoder as fd
    from flax_decoder.training.checkpoint import Checkpoints

    settings, stop = eval(sys.argv[2]), threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set())).start()
    config = fd.load_config(None, settings)
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    step = 2
    with Checkpoints(Path(sys.argv[1]), keep_newest=1) as checkpoints:
        while not stop.is_set():
            step += 1
            params = jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), state.params)
            checkpoints.save(state.replace(step=step, params=params), None)
"""


@pytest.mark.full
@pytest.mark.fault("Loads beside a process that saves and prunes without a pause")
def test_loads_beside_a_training(made, tmp_path, count_cases):
    folder = shutil.copytree(made, tmp_path / "run")
    arguments = [sys.executable, "-c", textwrap.dedent(TRAINING), str(folder), repr(SETTINGS)]
    training = subprocess.Popen(arguments, stdin=subprocess.PIPE)
    try:
        seen = []
        while len(seen) < 100 or len(set(seen)) < 20:
            _, params, _ = fd.load(folder)
            (number,) = {float(number) for leaf in jax.tree.leaves(params) for number in np.ravel(leaf)}
            seen.append(number)
            assert training.poll() is None
    finally:
        training.communicate()
    assert seen == sorted(seen)  # never an older one
    assert training.returncode == 0
    count_cases(len(seen))
