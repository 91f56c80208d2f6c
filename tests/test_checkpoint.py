import errno
import functools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import multihost

import flax_decoder as fd
from flax_decoder.errors import BrokenError, FaultError
from flax_decoder.parallel.processes import gather_at_first
from flax_decoder.training import checkpoint, manifest
from flax_decoder.training.checkpoint import (
    Checkpoints,
    as_fault_error,
    choose_step,
    commit,
    joined_entries,
    newest_manifest,
    prune,
    restore_params,
    restore_state,
    saved_steps,
    steps_folder,
)
from flax_decoder.training.manifest import verify

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: None, 10: 2.5}
KEPT = [4, 8, 10]


def make_state(**optimizer):
    sizes = {"vocab_size": 11, "context_length": 4, "num_layers": 1, "embed_dim": 8, "num_heads": 2}
    settings = {f"model.{name}": value for name, value in sizes.items()}
    config = fd.load_config(None, settings | {f"optimizer.{name}": value for name, value in optimizer.items()})
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))


def after(state, step):
    """A state in which every number is the step."""

    def mark(leaf):
        return jnp.full(leaf.shape, step, leaf.dtype)

    return state.replace(
        step=jnp.asarray(step, jnp.int32),
        params=jax.tree.map(mark, state.params),
        opt_state=jax.tree.map(mark, state.opt_state),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, state = tmp_path_factory.mktemp("run"), make_state()
    checkpoints = Checkpoints(folder, keep_newest=2)
    for step, loss in LOSSES.items():
        checkpoints.save(after(state, step), loss)
    checkpoints.close()
    assert saved_steps(folder) == KEPT  # the newest and the best
    return folder, state


@pytest.mark.parametrize("step", KEPT)
def test_a_state_comes_back_to_the_last_bit(saved, step):
    folder, state = saved
    restored = restore_state(folder, step, state)
    assert restored.step == step and restored.step.dtype == jnp.int32
    expected = after(state, step)
    for one, other in zip(
        jax.tree.leaves((restored.params, restored.opt_state)),
        jax.tree.leaves((expected.params, expected.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    abstract = jax.eval_shape(lambda: state.params)
    jax.tree.map(np.testing.assert_array_equal, restore_params(folder, step, abstract), expected.params)


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_come_back_as_they_were(tmp_path, name):
    state = make_state(name=name, moments_dtype="bfloat16")
    # Any gradients make the moments non-zero; those of the model would compile slowly.
    state = jax.block_until_ready(jax.jit(lambda state: state.apply_gradients(grads=state.params))(state))
    checkpoints = Checkpoints(tmp_path, keep_newest=1)
    checkpoints.save(state, 1.0)
    checkpoints.close()
    restored = restore_state(tmp_path, 1, make_state(name=name, moments_dtype="bfloat16"))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(restored.opt_state)}
    assert jnp.dtype("bfloat16") in dtypes
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert dtypes == {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)}
    # Another dtype is not cast silently.
    with pytest.raises(FaultError, match="cannot be restored"):
        restore_state(tmp_path, 1, make_state(name=name))


@pytest.mark.parametrize(("wanted", "step"), [("latest", 10), ("best", 4), (8, 8)])
def test_choosing_a_checkpoint(saved, wanted, step):
    assert choose_step(saved[0], wanted) == step


def test_a_checkpoint_that_cannot_be_read_is_a_fault(saved):
    folder, state = saved
    with pytest.raises(FaultError, match=r"manifest\.json: is missing"):
        restore_params(folder, 7, state.params)


@pytest.fixture
def heard():
    """What comes to the hook of errors that nobody can catch."""
    before, errors = sys.unraisablehook, []
    sys.unraisablehook = errors.append
    yield errors
    # Some reads of a failed restore end after the test.
    sys.unraisablehook = functools.partial(checkpoint._drop_late_result, before)


def test_reads_that_a_failed_restore_leaves_behind_are_not_heard(saved, tmp_path, heard):
    """Orbax closes its event loop at the first error; each array that is still being read would print a traceback."""
    folder, state = shutil.copytree(saved[0], tmp_path / "run"), saved[1]
    restore_params(folder, 10, state.params)
    assert sys.unraisablehook == heard.append
    for path in steps_folder(folder).glob("10/params/**/d/*"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(FaultError, match="cannot be restored: DATA_LOSS") as caught:
        restore_params(folder, 10, state.params)
    assert len(str(caught.value)) < 1000
    late = RuntimeError("Event loop is closed"), Exception("Encountered error while reading array index: (0,)")
    for error in (*late, RuntimeError("another"), KeyError(1)):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(dropped.exc_value) for dropped in heard] == ["another", "1"]


def test_what_orbax_raises_of_any_kind_is_one_line():
    with pytest.raises(FaultError, match=r"^a: cannot save a checkpoint: it failed$"), as_fault_error(Path("a")):
        raise Exception("it failed See full TensorStore details: kilobytes")
    with pytest.raises(TypeError), as_fault_error(Path("a")):  # a mistake of ours keeps its traceback
        raise TypeError("it failed")


def test_manifests_that_the_disk_does_not_give_are_not_passed_over(saved, monkeypatch):
    """Hashes of tokenizer and corpus would not be looked at."""
    folder = saved[0]
    assert newest_manifest(folder)["step"] == 10
    read, unread = Path.read_bytes, [10]

    def read_or_fail(path):
        if path.name == "manifest.json" and int(path.parent.name) in unread:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    assert newest_manifest(folder)["step"] == 8
    unread += KEPT
    with pytest.raises(BrokenError, match=r"10/manifest\.json: cannot be read: Input/output error"):
        newest_manifest(folder)
    prune(folder, 1)
    assert saved_steps(folder) == KEPT


class ToldValues:
    """The values that the processes of a job tell each other."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout_in_ms):
        return self.values[key]


def test_each_process_hashes_the_arrays_that_it_has_written_and_the_first_joins_the_hashes(tmp_path, monkeypatch):
    new, hashed, told = tmp_path / "checkpoints" / ".new-7", [], ToldValues()
    names = ["params/ocdbt.process_0/d/a", "params/ocdbt.process_1/d/b", "params/ocdbt.process_10/d/c", "params/d/e"]
    for name in names:
        (new / name).parent.mkdir(parents=True)
        (new / name).write_text(name)
    sha256_of = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path, **_: hashed.append(path.name) or sha256_of(path))
    monkeypatch.setattr(multihost, "get_jax_distributed_client", lambda: told)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    entries = {}
    for index in (1, 0):  # the others first, so that what the first one waits for is there
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        entries[index] = joined_entries(new)
        hashed.append(f"by {index}")
    assert hashed == ["b", "by 1", "a", "by 0"] and entries[1] == {}
    commit(new, {"step": 7, "val_loss": None, "config": None, "inputs": {}, "arrays": {}}, entries[0])
    assert hashed[4:] == ["e", "c"]  # those of no process that is here
    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    assert verify(tmp_path / "checkpoints" / "7")["files"].keys() == set(names)

    # One that cannot hash tells it to the first one, which would wait for it.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(FileNotFoundError):
        gather_at_first("again", lambda: (tmp_path / "nothing").read_text())
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(FaultError, match="process 1 of the job has failed"):
        gather_at_first("again", lambda: "{}")
