"""Attention snapshots: the right numbers at the right steps, the same after any stop; hostile folders are refused."""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from shape_names import checked_shape_names

import flax_decoder as fd
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io import files
from flax_decoder.lens import history, watch
from flax_decoder.lens.history import MAX_SNAPSHOTS, Index, from_bytes, read_history, to_bytes, write_index
from flax_decoder.lens.watch import Watch, watched_tokens
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.verification import verify_run

L, N, K, H, T, V = 3, 4, 2, 6, 7, 13
SETTINGS = {
    "model.vocab_size": V,
    "model.context_length": 8,
    "model.num_layers": L,
    "model.num_heads": N,
    "model.num_kv_heads": K,
    "model.head_dim": H,
    "model.embed_dim": 8,
    "training.num_steps": 20,
    "training.batch_size": 8,
    "lens.every": 4,
}
TOKENS_T = np.random.default_rng(0).integers(0, V, T).astype(np.int32)
TOLERANCE = 2.0**-11  # float16 has 11 significant bits


def configured(**changes):
    """Changes to SETTINGS are named section__field."""
    return fd.load_config(None, SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})


def make(**changes):
    """A config, and parameters of its model."""
    config = configured(**changes)
    return config, params_of(config.model)


@functools.cache
def params_of(model):
    return jax.jit(fd.Decoder(model).init)(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]


def open_watch(config, folder, step=0, *, tokens_T=TOKENS_T, num_devices=1, writes=True):
    return Watch(config, folder, tokens_T, step, make_mesh(config, jax.devices()[:num_devices]), writes=writes)


@pytest.fixture(scope="module")
def model():
    return make()


@functools.cache
def params_at(model, step):
    """Other parameters at each step, as a pure function of it: what training would do."""
    return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * step), params_of(model))


def run(config, folder, start, stop):
    """Records after each step, as a run does that resumes at `start` and stops after `stop`."""
    watching = open_watch(config, folder, start)
    for step in range(start, stop + 1):
        watching.record(step, params_at(config.model, step))
    return watching


def steps_in(folder):
    return read_history(folder).steps_M.tolist()


def contents(folder):
    """The files of a history, by name."""
    return {path.name: path.read_bytes() for path in (folder / "lens").iterdir()}


# --- What is recorded ---

MODELS = {
    "learned": {},
    "rotary": {"model__positions": "rotary", "model__qk_norm": "head"},
    "windows": {"model__window": 3, "model__window_pattern": [True, False], "model__attention_soft_cap": 5.0},
    "alibi": {"model__positions": "alibi", "model__num_kv_heads": 1, "model__attention": "reference"},
    "dropout, remat": {"model__dropout": 0.5, "model__remat": "full"},
    "bfloat16": {"model__dtype": "bfloat16", "model__positions": "rotary"},
}


@pytest.mark.full
@pytest.mark.parametrize("kind", MODELS)
def test_a_snapshot_is_what_the_model_computes(tmp_path, kind):
    config, params = make(**MODELS[kind])
    with checked_shape_names() as functions:
        open_watch(config, tmp_path).record(0, params)
        found = read_history(tmp_path)
    assert {"history.py:to_bytes", "history.py:from_bytes", "watch.py:_attend"} <= functions
    apply = jax.jit(functools.partial(fd.Decoder(config.model).apply, mutable=["intermediates"]))
    _, sown = apply({"params": params}, TOKENS_T[None])
    sown = sown["intermediates"]["layers"]["attention"]
    sown = {name: np.asarray(sown[name][0], np.float32) for name in sown if isinstance(sown[name], tuple)}
    rotated = "_rotated" if "q_rotated" in sown else ""
    assert bool(rotated) == (config.model.positions == "rotary")
    tolerance = 0.02 if kind == "bfloat16" else TOLERANCE  # scanned layers round bfloat16 elsewhere
    expected = sown["weights"].reshape(L, N, T, T)
    np.testing.assert_allclose(found.weights_MLNTS[0], expected, rtol=tolerance, atol=tolerance)
    for name, array in (("q", found.q_MLTNH), ("k", found.k_MLTKH)):
        expected = sown[name + rotated][:, 0]
        assert array[0].dtype == np.float16 and array[0].shape == expected.shape
        np.testing.assert_allclose(array[0], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(found.tokens_T, TOKENS_T)
    assert found.steps_M.tolist() == [0]


@pytest.mark.short("axes1")
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2}, {"tensor": 2, "data": 2}, {"context": 4, "data": 1}])
def test_a_snapshot_is_the_same_on_many_devices(tmp_path, axes):
    config, params = make(model__vocab_size=16, **{f"mesh__{name}": count for name, count in axes.items()})
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    one_device = Mesh(np.array(jax.devices()[:1]), ("data",))
    Watch(config, tmp_path / "one", TOKENS_T, 0, one_device).record(0, params)
    mesh = make_mesh(config, jax.devices()[:4])
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(1), mesh=mesh)
    with use_mesh(mesh):
        Watch(config, tmp_path / "four", TOKENS_T, 0, mesh).record(0, state.params)
    one, four = read_history(tmp_path / "one"), read_history(tmp_path / "four")
    for name in ("q_MLTNH", "k_MLTKH", "weights_MLNTS"):
        np.testing.assert_allclose(getattr(four, name), getattr(one, name), rtol=TOLERANCE, atol=TOLERANCE)


def test_logits_are_not_computed(model):
    config, params = model
    decoder = fd.Decoder(dataclasses.replace(config.model, scan_layers=True))

    def program(function):
        return jax.jit(function).lower(params, TOKENS_T[None]).compile().as_text()

    logits = f"f32[1,{T},{V}]", f"f32[{T},{V}]"
    full = program(lambda params, tokens: decoder.apply({"params": params}, tokens))
    assert any(shape in full for shape in logits)
    recording = program(lambda params, tokens: watch._attend(decoder, params, tokens))
    assert not any(shape in recording for shape in logits)


def test_numbers_beyond_float16_are_clipped():
    q_LTNH, k_LTKH = np.full((1, 2, 1, 3), 1e30, np.float32), np.full((1, 2, 1, 3), -1e6, np.float32)
    record = from_bytes(to_bytes(q_LTNH, k_LTKH, np.full((1, 1, 2, 2), 0.5, np.float32)))
    assert (record["q"] == 65504).all() and (record["k"] == -65504).all() and (record["weights"] == 0.5).all()


def test_a_snapshot_that_is_not_finite_is_left_out(tmp_path, model, capsys):
    config, params = model
    watching = open_watch(config, tmp_path)
    watching.record(0, jax.tree.map(lambda leaf: leaf * np.nan, params))
    assert "not finite after step 0" in capsys.readouterr().out and read_history(tmp_path) is None
    watching.record(4, params)
    assert steps_in(tmp_path) == [4]


# --- When ---


@pytest.mark.parametrize(("every", "num_steps", "steps"), [(4, 10, [0, 4, 8, 10]), (50, 3, [0, 3]), (0, 10, None)])
def test_snapshots_come_at_the_first_step_every_few_and_at_the_last(tmp_path, every, num_steps, steps):
    run(configured(lens__every=every, training__num_steps=num_steps), tmp_path, 0, num_steps)
    found = read_history(tmp_path)
    assert (found and found.steps_M.tolist()) == steps
    assert (tmp_path / "lens").exists() == (every > 0)


def test_a_run_without_a_history_gets_its_first_snapshot_when_it_resumes(tmp_path):
    run(configured(), tmp_path, 6, 9)
    assert steps_in(tmp_path) == [6, 8]
    run(configured(), tmp_path, 9, 12)
    assert steps_in(tmp_path) == [6, 8, 12]


@pytest.mark.parametrize(("limit", "every", "expected"), [(4, 32, [0, 32, 50]), (5, 16, [0, 16, 32, 48, 50])])
def test_a_long_run_keeps_every_other_snapshot(tmp_path, monkeypatch, limit, every, expected):
    monkeypatch.setattr(history, "max_snapshots", lambda *_: limit)
    config, params = make(lens__every=1, training__num_steps=50)
    watching = open_watch(config, tmp_path)
    for step in range(51):
        watching.record(step, params)
        steps = sorted(int(name.removesuffix(".npy")) for name in contents(tmp_path) if name != "history.json")
        assert steps == steps_in(tmp_path) and len(steps) <= limit
        assert {step % watching.every for step in steps if step != 50} <= {0}
    assert watching.every == every and steps == expected


@pytest.mark.short("3-4-4", "7-12-5", "12-19-4", "20-20-5")
@pytest.mark.parametrize("limit", [4, 5])
@pytest.mark.parametrize(("saved", "stopped"), [(0, 3), (3, 4), (7, 12), (8, 8), (12, 19), (20, 20)])
def test_a_stopped_run_keeps_what_an_unbroken_one_keeps(tmp_path, monkeypatch, limit, saved, stopped):
    monkeypatch.setattr(history, "max_snapshots", lambda *_: limit)
    config = configured(lens__every=1)
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
    run(config, tmp_path / "unbroken", 0, 20)
    run(config, tmp_path / "stopped", 0, stopped)
    (tmp_path / "stopped" / "lens" / ".19.npy.tmp").write_text("left by a kill")
    (tmp_path / "stopped" / "lens" / "19.npy").write_text("written, but not yet in the index")
    run(config, tmp_path / "stopped", saved, 20)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "unbroken")


def test_snapshots_after_the_step_are_deleted_on_resume(tmp_path):
    run(configured(), tmp_path, 0, 20)
    open_watch(configured(), tmp_path, 9)
    assert steps_in(tmp_path) == [0, 4, 8] and len(contents(tmp_path)) == 4


def test_other_settings_continue_the_same_history(tmp_path):
    run(configured(), tmp_path, 0, 8)
    run(configured(lens__every=3), tmp_path, 8, 12)
    assert steps_in(tmp_path) == [0, 4, 8, 9, 12]
    before = contents(tmp_path)
    run(configured(lens__every=0), tmp_path, 8, 12)
    assert contents(tmp_path) == before


def test_another_process_computes_and_writes_nothing(tmp_path, model):
    config, params = model
    open_watch(config, tmp_path, writes=False).record(0, params)
    assert list(tmp_path.iterdir()) == []
    run(config, tmp_path, 0, 4)
    before = contents(tmp_path)
    other = open_watch(config, tmp_path, 4, writes=False)
    other._attend = pytest.fail  # the snapshot exists
    other.record(4, params)
    assert contents(tmp_path) == before


# --- An existing history ---


def test_a_history_of_another_text_is_renamed(tmp_path, model, capsys):
    config, params = model
    run(config, tmp_path, 0, 4)
    before = contents(tmp_path)
    for count in (1, 2):
        other_T = (TOKENS_T + count) % V
        open_watch(config, tmp_path, 4, tokens_T=other_T).record(4, params)
        printed = capsys.readouterr().out
        assert "lens: is of another text" in printed and f"is now lens.{count}, and a new history begins" in printed
        np.testing.assert_array_equal(read_history(tmp_path).tokens_T, other_T)
        assert steps_in(tmp_path) == [4]
    (tmp_path / "lens").rename(tmp_path / "lens.3")
    (tmp_path / "lens.1").rename(tmp_path / "lens")
    assert contents(tmp_path) == before


def test_a_damaged_history_is_renamed_and_training_continues(tmp_path, capsys):
    run(configured(), tmp_path, 0, 4)
    (tmp_path / "lens" / "0.npy").write_bytes(b"something else")
    run(configured(), tmp_path, 4, 8)
    printed = capsys.readouterr().out
    assert "lens/0.npy: is missing or damaged" in printed and "lens.1" in printed
    assert (tmp_path / "lens.1" / "0.npy").read_bytes() == b"something else"
    assert steps_in(tmp_path) == [4, 8]


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    """The bytes that version 1 of the format has; a change of them would lose the histories there are."""
    type_of_record = [("q", "<f2", (1, 2, 1, 1)), ("k", "<f2", (1, 2, 1, 1)), ("weights", "<f2", (1, 1, 2, 2))]
    record = np.array(([[[[1]], [[2]]]], [[[[3]], [[4]]]], [[[[1, 0], [0.5, 0.5]]]]), type_of_record)
    snapshot = as_npy(record)
    assert to_bytes(record["q"], record["k"], record["weights"]) == snapshot
    document = {"format": 1, "every": 5, "tokens": [8, 9], "moments": {"10": hashlib.sha256(snapshot).hexdigest()}}
    document["sha256"] = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "10.npy").write_bytes(snapshot)
    (tmp_path / "lens" / "history.json").write_text(json.dumps(document) + "\n")
    found = read_history(tmp_path)
    assert found.steps_M.tolist() == [10] and found.tokens_T.tolist() == [8, 9]
    assert found.k_MLTKH.ravel().tolist() == [3, 4] and found.weights_MLNTS.ravel().tolist() == [1, 0, 0.5, 0.5]


# --- Faults and hostile folders ---


@pytest.fixture
def small(tmp_path):
    """The two snapshots of a very small model, and the function that writes such a history."""
    rng = np.random.default_rng(0)
    shapes = (1, 2, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2)
    snapshots = {step: to_bytes(*map(rng.random, shapes)) for step in (0, 5)}

    def write(snapshots, tokens=(3, 4)):
        digests = {step: hashlib.sha256(content).hexdigest() for step, content in snapshots.items()}
        write_index(tmp_path / "lens", Index(5, list(tokens), digests))
        for step, content in snapshots.items():
            (tmp_path / "lens" / f"{step}.npy").write_bytes(content)

    write(snapshots)
    assert steps_in(tmp_path) == [0, 5]
    return snapshots, write


def refused(folder):
    with pytest.raises(BrokenError) as caught:
        read_history(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "lens")) and len(message.splitlines()) == 1, message
    (result,) = (result for result in verify_run(folder) if result.path == folder / "lens")
    assert result.passed is False
    return message


def test_no_history_is_none(tmp_path):
    assert read_history(tmp_path) is None
    (tmp_path / "lens").mkdir()
    assert read_history(tmp_path) is None


@pytest.mark.parametrize("name", ["history.json", "0.npy"])
def test_each_bit_counts(tmp_path, small, name):
    path = tmp_path / "lens" / name
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if name == "history.json" else 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(BrokenError):
            read_history(tmp_path)
    for changed in (content[:-1], content + b"\n"):
        path.write_bytes(changed)
        refused(tmp_path)


def as_npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


class Harm:
    def __reduce__(self):
        return os.abort, ()


def with_header(descr):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ()}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def record_type(number="<f2", N=1):
    return np.dtype([("q", number, (1, 2, N, 1)), ("k", number, (1, 2, 1, 1)), ("weights", number, (1, 1, 2, 2))])


HOSTILE = {
    "an array of objects": as_npy(np.array([Harm()], object)),
    "nothing": b"",
    "several snapshots": as_npy(np.zeros(2, record_type())),
    "a snapshot too short": as_npy(np.zeros((), record_type()))[:-2],
    "of another text": to_bytes(*[np.zeros((1, 3, 1, 1))] * 2, np.zeros((1, 1, 3, 3))),
    "numbers of another kind": as_npy(np.zeros((), record_type("<f4"))),
    "shapes that contradict each other": as_npy(np.zeros((), record_type(N=3))),
    "a field too many": as_npy(np.zeros((), [*record_type().descr, ("more", "<f2")])),
    "a header of a petabyte": with_header([("q", "<f2", (10**5, 2, 10**5, 10**5))]),
    "NaN": as_npy(np.frombuffer(b"\xff" * 16, record_type()).reshape(())),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_snapshot_is_refused(tmp_path, small, kind):
    _, write = small
    write({5: HOSTILE[kind]})  # with its right hash
    assert "5.npy: is missing or damaged" in refused(tmp_path)


def test_snapshots_of_two_models_are_refused(tmp_path, small):
    snapshots, write = small
    write(snapshots | {5: to_bytes(*[np.zeros((4, 2, 1, 1))] * 2, np.zeros((4, 1, 2, 2)))})
    assert "5.npy: is missing or damaged" in refused(tmp_path)


CHANGES = {
    **{f"tokens {tokens}": {"tokens": tokens} for tokens in ([3, -1], [3, 2**31], [3, "4"], [3, 4.0], [True, 4], "34")},
    **{f"tokens {tokens}": {"tokens": tokens} for tokens in ([[3], 4], None)},
    "another format": {"format": 2},
    "no steps between": {"every": 0},
    "a list of snapshots": {"moments": []},
    "a path": {"moments": {"../0": "0"}},
    "too many": {"moments": {str(step): "0" for step in range(MAX_SNAPSHOTS + 1)}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_index_is_refused(tmp_path, small, change):
    path = tmp_path / "lens" / "history.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_bytes(history._render(document | {"more": 1}))  # a later version may say more
    assert steps_in(tmp_path) == [0, 5]
    path.write_bytes(history._render(document | CHANGES[change]))
    assert "history.json: is missing or damaged" in refused(tmp_path)


def test_no_link_and_no_pipe_is_read(tmp_path, small):
    for name in ("5.npy", "history.json"):
        path, aside = tmp_path / "lens" / name, tmp_path / "aside"
        path.rename(aside)
        path.symlink_to(aside)
        assert "is a link" in refused(tmp_path)
        path.unlink()
        os.mkfifo(path)
        assert "not a regular file" in refused(tmp_path)
        path.unlink()
        aside.rename(path)
    (tmp_path / "lens" / "5.npy").unlink()
    assert "No such file" in refused(tmp_path)


@pytest.mark.parametrize("target", [".history.json.tmp", ".0.npy.tmp"])
def test_a_failing_disk_is_reported(tmp_path, model, monkeypatch, target):
    config, params = model

    def fail_or_open(path, mode):
        if path.name == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", fail_or_open, raising=False)
        with pytest.raises(FaultError, match=f"{target}.*: cannot write a snapshot: {os.strerror(errno.ENOSPC)}"):
            open_watch(config, tmp_path).record(0, params)
    run(config, tmp_path, 0, 4)
    assert steps_in(tmp_path) == [0, 4]


# --- The text ---


def test_the_text_is_the_prompt_or_the_beginning_of_the_validation_split():
    tokenizer, validation = CharTokenizer("to be or not"), np.arange(99, dtype=np.uint16)

    def watched(**changes):
        return watched_tokens(configured(**changes), tokenizer, validation)

    tokens_T = watched(lens__prompt_tokens=5)  # without the space, the first token
    assert tokens_T.tolist() == [1, 2, 3, 4, 5] and tokens_T.dtype == np.int32
    assert tokenizer.decode(watched(lens__prompt_tokens=5, lens__prompt="not or to be")) == "not o"
    assert tokenizer.decode(watched(lens__prompt="not")) == "not"
    assert len(watched(lens__prompt_tokens=200)) == 8  # context_length


@pytest.mark.parametrize(
    ("text", "shown"),
    [("eed, to be.", "to"), ("eed\n  12 to", "12"), ("eed,\n\n(a b", "b"), ("eeeeee", "ee"), ("", None), ("e", "e")],
)
def test_the_text_begins_with_a_word(text, shown):
    tokens = np.array(list(text.encode()), np.uint8)
    if shown is None:
        with pytest.raises(UserError, match="no token"):
            watched_tokens(configured(model__vocab_size=256), ByteTokenizer(), tokens)
    else:
        watched = watched_tokens(configured(model__vocab_size=256), ByteTokenizer(), tokens)
        assert ByteTokenizer().decode(watched)[: len(shown)] == shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens__prompt": ""}, 'lens.prompt = "" has no token'),
        ({"lens__prompt": "to bee?"}, "lens.prompt: the text has '?'"),
        (
            {"lens__prompt_tokens": 8, "model__num_heads": 2**21, "model__head_dim": 16},
            "a snapshot of this model takes 2.42 GB",
        ),
    ],
)
def test_a_text_that_cannot_be_watched_is_refused(changes, message):
    with pytest.raises(UserError) as caught:
        watched_tokens(configured(**changes), CharTokenizer("to be or not"), np.arange(9, dtype=np.uint16))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_the_largest_model_has_room_for_its_snapshots():
    config = fd.load_config("configs/llama3_70b.toml")
    tokens_T = watched_tokens(config, ByteTokenizer(), np.zeros(99, np.uint8))
    assert 16 <= history.max_snapshots(config.model, len(tokens_T)) < MAX_SNAPSHOTS
    assert history.max_snapshots(fd.load_config("configs/gpt2_124m.toml").model, len(tokens_T)) == MAX_SNAPSHOTS
