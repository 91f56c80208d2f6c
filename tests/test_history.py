import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import pickle

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
from flax_decoder.lens.history import MAX_MOMENTS, Index, from_bytes, read_history, read_index, to_bytes, write_index
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
# float16 has 11 digits of two.
TOLERANCE = 2.0**-11


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


def at(params, step):
    """Other parameters at each step, as a pure function of it: what training would do."""
    return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * step), params)


def run(config, params, folder, start, stop):
    """Looks after each step, as a run does that goes on at `start` and stops after `stop`."""
    seen = open_watch(config, folder, start)
    for step in range(start, stop + 1):
        seen.look(step, at(params, step))
    return seen


def kept(folder):
    """All files of a history and what is in them."""
    return {path.name: path.read_bytes() for path in (folder / "lens").iterdir()}


# --- What is kept ---

MODELS = {
    "learned": {},
    "rotary": {"model__positions": "rotary", "model__qk_norm": "head"},
    "windows": {"model__window": 3, "model__window_pattern": [True, False], "model__attention_soft_cap": 5.0},
    "alibi": {"model__positions": "alibi", "model__num_kv_heads": 1, "model__attention": "reference"},
    "dropout, remat": {"model__dropout": 0.5, "model__remat": "full"},
    "bfloat16": {"model__dtype": "bfloat16", "model__positions": "rotary"},
}


@pytest.mark.short("rotary", "alibi")
@pytest.mark.parametrize("kind", MODELS)
def test_a_moment_is_what_the_model_does(tmp_path, kind):
    config, params = make(**MODELS[kind])
    with checked_shape_names() as functions:
        open_watch(config, tmp_path).look(0, params)
        seen = read_history(tmp_path)
    assert {"history.py:to_bytes", "history.py:from_bytes", "watch.py:_attend"} <= functions
    apply = jax.jit(functools.partial(fd.Decoder(config.model).apply, mutable=["intermediates"]))
    _, inside = apply({"params": params}, TOKENS_T[None])
    inside = inside["intermediates"]["layers"]["attention"]
    inside = {name: np.asarray(inside[name][0], np.float32) for name in inside if isinstance(inside[name], tuple)}
    rotated = "_rotated" if "q_rotated" in inside else ""
    assert bool(rotated) == (config.model.positions == "rotary")
    tolerance = 0.02 if kind == "bfloat16" else TOLERANCE  # a loop over layers rounds a bfloat16 elsewhere
    expected = inside["weights"].reshape(L, N, T, T)
    np.testing.assert_allclose(seen.weights_MLNTS[0], expected, rtol=tolerance, atol=tolerance)
    for name, found in (("q", seen.q_MLTNH), ("k", seen.k_MLTKH)):
        expected = inside[name + rotated][:, 0]
        assert found[0].dtype == np.float16 and found[0].shape == expected.shape
        np.testing.assert_allclose(found[0], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(seen.tokens_T, TOKENS_T)
    assert seen.steps_M.tolist() == [0]


@pytest.mark.short("axes1")
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2}, {"tensor": 2, "data": 2}, {"context": 4, "data": 1}])
def test_a_moment_is_the_same_on_many_devices(tmp_path, model, axes):
    config, params = make(model__vocab_size=16, **{f"mesh__{name}": count for name, count in axes.items()})
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    one_device = Mesh(np.array(jax.devices()[:1]), ("data",))
    Watch(config, tmp_path / "one", TOKENS_T, 0, one_device).look(0, params)
    mesh = make_mesh(config, jax.devices()[:4])
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(1), mesh=mesh)
    with use_mesh(mesh):
        Watch(config, tmp_path / "four", TOKENS_T, 0, mesh).look(0, state.params)
    one, four = read_history(tmp_path / "one"), read_history(tmp_path / "four")
    for name in ("q_MLTNH", "k_MLTKH", "weights_MLNTS"):
        np.testing.assert_allclose(getattr(four, name), getattr(one, name), rtol=TOLERANCE, atol=TOLERANCE)


def test_nothing_is_computed_but_what_is_kept(model):
    config, params = model
    decoder = fd.Decoder(dataclasses.replace(config.model, scan_layers=True))

    def program(look):
        return jax.jit(look).lower(params, TOKENS_T[None]).compile().as_text()

    logits = f"f32[1,{T},{V}]", f"f32[{T},{V}]"
    whole = program(lambda params, tokens: decoder.apply({"params": params}, tokens))
    assert any(shape in whole for shape in logits)
    looked = program(lambda params, tokens: watch._attend(decoder, params, tokens))
    assert not any(shape in looked for shape in logits)


def test_what_float16_cannot_hold_is_its_largest_number():
    q_LTNH, k_LTKH = np.full((1, 2, 1, 3), 1e30, np.float32), np.full((1, 2, 1, 3), -1e6, np.float32)
    record = from_bytes(to_bytes(q_LTNH, k_LTKH, np.full((1, 1, 2, 2), 0.5, np.float32)))
    assert (record["q"] == 65504).all() and (record["k"] == -65504).all() and (record["weights"] == 0.5).all()


def test_a_moment_that_is_not_finite_is_left_out(tmp_path, model, capsys):
    config, params = model
    seen = open_watch(config, tmp_path)
    seen.look(0, jax.tree.map(lambda leaf: leaf * np.nan, params))
    assert "not finite after step 0" in capsys.readouterr().out and read_history(tmp_path) is None
    seen.look(4, params)
    assert read_history(tmp_path).steps_M.tolist() == [4]


# --- When ---


@pytest.mark.parametrize(
    ("every", "num_steps", "steps"), [(4, 10, [0, 4, 8, 10]), (5, 10, [0, 5, 10]), (50, 3, [0, 3]), (0, 10, None)]
)
def test_moments_come_every_so_many_steps(tmp_path, model, every, num_steps, steps):
    config, params = make(lens__every=every, training__num_steps=num_steps)
    run(config, params, tmp_path, 0, num_steps)
    seen = read_history(tmp_path)
    assert (seen and seen.steps_M.tolist()) == steps
    assert (tmp_path / "lens").exists() == (every > 0)


def test_a_run_from_before_there_was_a_lens_gets_its_first_moment_where_it_stands(tmp_path, model):
    config, params = model
    run(config, params, tmp_path, 6, 9)
    assert read_history(tmp_path).steps_M.tolist() == [6, 8]
    run(config, params, tmp_path, 9, 12)
    assert read_history(tmp_path).steps_M.tolist() == [6, 8, 12]


@pytest.mark.parametrize(("most", "every", "expected"), [(4, 32, [0, 32, 50]), (5, 16, [0, 16, 32, 48, 50])])
def test_a_long_run_keeps_every_other_moment(tmp_path, monkeypatch, most, every, expected):
    monkeypatch.setattr(watch, "most_moments", lambda *_: most)
    config, params = make(lens__every=1, training__num_steps=50)
    seen = open_watch(config, tmp_path)
    for step in range(51):
        seen.look(step, params)
        steps = sorted(int(name.removesuffix(".npy")) for name in kept(tmp_path) if name != "history.json")
        assert steps == read_history(tmp_path).steps_M.tolist() and len(steps) <= most
        assert {step % seen.every for step in steps if step != 50} <= {0}
    assert seen.every == every and steps == expected


@pytest.mark.short("3-4-4", "7-12-5", "12-19-4", "20-20-5")
@pytest.mark.parametrize("most", [4, 5])
@pytest.mark.parametrize(("saved", "stopped"), [(0, 3), (3, 4), (7, 12), (8, 8), (12, 19), (20, 20)])
def test_a_run_that_was_stopped_keeps_what_one_never_stopped_does(tmp_path, monkeypatch, most, saved, stopped):
    monkeypatch.setattr(watch, "most_moments", lambda *_: most)
    config, params = make(lens__every=1)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run(config, params, tmp_path / "whole", 0, 20)
    run(config, params, tmp_path / "stopped", 0, stopped)
    (tmp_path / "stopped" / "lens" / ".19.npy.tmp").write_text("left by a kill")
    (tmp_path / "stopped" / "lens" / "19.npy").write_text("written, but not yet in the index")
    run(config, params, tmp_path / "stopped", saved, 20)
    assert kept(tmp_path / "stopped") == kept(tmp_path / "whole")


def test_moments_after_the_step_are_dropped_before_they_come_again(tmp_path, model):
    config, params = model
    run(config, params, tmp_path, 0, 20)
    open_watch(config, tmp_path, 9)
    assert read_history(tmp_path).steps_M.tolist() == [0, 4, 8] and len(kept(tmp_path)) == 4


def test_other_settings_go_on_in_the_same_history(tmp_path, model):
    config, params = model
    run(config, params, tmp_path, 0, 8)
    run(make(lens__every=3)[0], params, tmp_path, 8, 12)
    assert read_history(tmp_path).steps_M.tolist() == [0, 4, 8, 9, 12]
    before = kept(tmp_path)
    run(make(lens__every=0)[0], params, tmp_path, 8, 12)  # looks at nothing, and touches nothing
    assert kept(tmp_path) == before


def test_another_process_looks_and_writes_nothing(tmp_path, model):
    config, params = model
    seen = open_watch(config, tmp_path, writes=False)
    seen.look(0, params)
    assert list(tmp_path.iterdir()) == []
    run(config, params, tmp_path, 0, 4)
    before = kept(tmp_path)
    other = open_watch(config, tmp_path, 4, writes=False)
    other._attend = pytest.fail  # has all that is due
    other.look(4, params)
    assert kept(tmp_path) == before


# --- What is there already ---


def test_a_history_of_another_text_is_set_aside(tmp_path, model, capsys):
    config, params = model
    run(config, params, tmp_path, 0, 4)
    before = kept(tmp_path)
    for count in (1, 2):
        other_T = (TOKENS_T + count) % V
        open_watch(config, tmp_path, 4, tokens_T=other_T).look(4, params)
        printed = capsys.readouterr().out
        assert "lens: is of another text" in printed and f"is now lens.{count}, and a new history begins" in printed
        np.testing.assert_array_equal(read_history(tmp_path).tokens_T, other_T)
        assert read_history(tmp_path).steps_M.tolist() == [4]
    (tmp_path / "lens").rename(tmp_path / "lens.3")
    (tmp_path / "lens.1").rename(tmp_path / "lens")
    assert kept(tmp_path) == before


def test_a_damaged_history_is_set_aside_and_training_goes_on(tmp_path, model, capsys):
    config, params = model
    run(config, params, tmp_path, 0, 4)
    (tmp_path / "lens" / "0.npy").write_bytes(b"something else")
    run(config, params, tmp_path, 4, 8)
    printed = capsys.readouterr().out
    assert "lens/0.npy: is missing or damaged" in printed and "lens.1" in printed
    assert (tmp_path / "lens.1" / "0.npy").read_bytes() == b"something else"
    assert read_history(tmp_path).steps_M.tolist() == [4, 8]


# --- Faults and hostile folders ---


@pytest.fixture
def small(tmp_path):
    """A history of two moments of a very small model, and the function that gives a file another content."""
    rng = np.random.default_rng(0)
    contents = {
        s: to_bytes(*(rng.random(shape) for shape in ((1, 2, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2)))) for s in (0, 5)
    }

    def write(contents, tokens=(3, 4)):
        moments = {step: hashlib.sha256(content).hexdigest() for step, content in contents.items()}
        write_index(tmp_path / "lens", Index(5, list(tokens), moments))
        for step, content in contents.items():
            (tmp_path / "lens" / f"{step}.npy").write_bytes(content)

    write(contents)
    assert read_history(tmp_path).steps_M.tolist() == [0, 5]
    return contents, write


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


@pytest.mark.parametrize("name", ["history.json", "0.npy", "5.npy"])
def test_each_bit_counts(tmp_path, small, name):
    path = tmp_path / "lens" / name
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if name == "history.json" else 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(BrokenError):
            read_history(tmp_path)
    path.write_bytes(content[:-1])
    refused(tmp_path)
    path.write_bytes(content + b"\n")
    refused(tmp_path)
    path.write_bytes(content)
    assert read_history(tmp_path) is not None


def as_npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


class Harm:
    def __reduce__(self):
        return os.abort, ()


def zipped():
    file = io.BytesIO()
    np.savez_compressed(file, q=np.zeros(10**6))
    return file.getvalue()


def with_header(shape, descr):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def kind(number, N=1):
    return np.dtype([("q", number, (1, 2, N, 1)), ("k", number, (1, 2, 1, 1)), ("weights", number, (1, 1, 2, 2))])


HOSTILE = {
    "a pickle": pickle.dumps(Harm()),
    "an array of objects": as_npy(np.array([Harm()], object)),
    "an archive": zipped(),
    "nothing": b"",
    "plain numbers": as_npy(np.zeros((2, 2))),
    "several moments": as_npy(np.zeros(2, history._record_type(1, 2, 1, 1, 1))),
    "a moment too short": to_bytes(*[np.zeros((1, 2, 1, 1))] * 2, np.zeros((1, 1, 2, 2)))[:-2],
    "of another text": to_bytes(*[np.zeros((1, 3, 1, 1))] * 2, np.zeros((1, 1, 3, 3))),
    "of another model": to_bytes(*[np.zeros((4, 2, 1, 1))] * 2, np.zeros((4, 1, 2, 2))),
    "numbers of another kind": as_npy(np.zeros((), kind("<f4"))),
    "numbers the other way round": as_npy(np.zeros((), kind(">f2"))),
    "heads that do not go together": as_npy(np.zeros((), kind("<f2", N=3))),
    "a field too many": as_npy(np.zeros((), [*kind("<f2").descr, ("more", "<f2")])),
    "a header of a petabyte": with_header((), [("q", "<f2", (10**5, 2, 10**5, 10**5))]),
    "a header that is no header": with_header((), [("q", "<f2", (1,) * 99)]),
    "a header that nests": with_header((), [("q", "(" * 5000)]),
    "NaN": as_npy(np.frombuffer(b"\xff" * 16, history._record_type(1, 2, 1, 1, 1)).reshape(())),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_moment_made_to_do_harm_is_refused(tmp_path, small, kind):
    contents, write = small
    write(contents | {5: HOSTILE[kind]})  # with its right hash
    assert "5.npy: is missing or damaged" in refused(tmp_path)
    if kind != "of another model":
        write({5: HOSTILE[kind]})
        assert "5.npy: is missing or damaged" in refused(tmp_path)


@pytest.mark.parametrize("tokens", [(3, -1), (3, 2**31), (3, "4"), (3, 4.0), (True, 4), "34", (3, 4, 5), ((3,), 4)])
def test_tokens_that_are_none_are_refused(tmp_path, small, tokens):
    contents, write = small
    write(contents, tokens)
    refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"every": 0},
        {"every": -5},
        {"moments": []},
        {"moments": {"../0": "0"}},
        {"moments": {str(step): "0" for step in range(MAX_MOMENTS + 1)}},
        {"more": 1},
        {"tokens": None},
    ],
)
def test_an_index_made_to_do_harm_is_refused(tmp_path, small, change):
    path = tmp_path / "lens" / "history.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_bytes(history._render(document | change))
    if "more" in change:
        assert read_history(tmp_path) is not None  # says what a later version may
    else:
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


@pytest.mark.parametrize("operation", ["open", "index", "moment"])
def test_a_disk_that_fails_is_told(tmp_path, model, monkeypatch, operation):
    config, params = model
    seen = None if operation == "open" else open_watch(config, tmp_path)
    target = {"open": "history.json", "index": ".history.json.tmp", "moment": ".0.npy.tmp"}[operation]

    def fail(source, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    def fail_or_open(path, mode):
        return fail(path) if path.name == target else open(path, mode)

    if operation == "open":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(files, "open", fail_or_open, raising=False)
    with pytest.raises(FaultError, match=f"{target}.*: cannot keep a moment: {os.strerror(errno.ENOSPC)}"):
        (seen or open_watch(config, tmp_path)).look(0, params)
    monkeypatch.undo()
    run(config, params, tmp_path, 0, 4)
    assert read_history(tmp_path).steps_M.tolist() == [0, 4]


# --- The text ---


def test_the_text_is_the_one_asked_for_or_the_beginning_of_the_validation_split():
    config = configured(lens__prompt_tokens=5)
    tokenizer, tokens = CharTokenizer("to be or not"), np.arange(9, dtype=np.uint16)
    tokens_T = watched_tokens(config, tokenizer, tokens)
    assert tokens_T.tolist() == [0, 1, 2, 3, 4] and tokens_T.dtype == np.int32
    asked = configured(lens__prompt_tokens=5, lens__prompt="not or to be")
    assert tokenizer.decode(watched_tokens(asked, tokenizer, tokens)) == "not o"
    short = configured(lens__prompt="not")
    assert tokenizer.decode(watched_tokens(short, tokenizer, tokens)) == "not"
    assert (
        len(watched_tokens(configured(lens__prompt_tokens=200), tokenizer, np.zeros(99, np.uint16))) == 8
    )  # the context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens__prompt": ""}, 'lens.prompt = "" has no token'),
        ({"lens__prompt": "to bee?"}, "lens.prompt: the text has '?'"),
        (
            {"lens__prompt_tokens": 8, "model__num_heads": 2**21, "model__head_dim": 16},
            "a moment of this model takes 2.42 GB",
        ),
    ],
)
def test_a_text_that_cannot_be_watched_is_refused(changes, message):
    config = configured(**changes)
    with pytest.raises(UserError) as caught:
        watched_tokens(config, CharTokenizer("to be or not"), np.arange(9, dtype=np.uint16))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_the_largest_model_has_room_for_its_moments():
    config = fd.load_config("configs/llama3_70b.toml")
    tokens_T = watched_tokens(config, ByteTokenizer(), np.zeros(99, np.uint8))
    assert 16 <= history.most_moments(config.model, len(tokens_T)) < MAX_MOMENTS
    assert history.most_moments(fd.load_config("configs/gpt2_124m.toml").model, len(tokens_T)) == MAX_MOMENTS


def test_the_index_says_what_was_written(tmp_path):
    index = Index(7, [1, 2], {0: "a", 7: "b"})
    write_index(tmp_path / "lens", index)
    assert read_index(tmp_path / "lens") == index
