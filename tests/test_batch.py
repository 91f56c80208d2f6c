"""A batch means what it seems to mean, or is refused by name; the compiled step pays nothing for it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_decoder as fd
from flax_decoder.training.batch import checked_batch

B, T, V = 3, 5, 320
SMALL = {"model.num_layers": 1, "model.embed_dim": 8, "model.num_heads": 2, "model.context_length": 7}


def make_batch(**others):
    """Ids that fit every integer dtype."""
    tokens = np.random.default_rng(0).integers(0, 120, (B, T + 1))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]} | others


@pytest.fixture(scope="module")
def state():
    """A vocabulary beyond the largest int8 and uint8."""
    config = fd.load_config(overrides=SMALL | {"model.vocab_size": V})
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))


# --- Dtypes; those of ids are in test_public_functions.py ---


def test_uint16_ids_with_a_vocabulary_beyond_them():
    config = fd.load_config(overrides=SMALL | {"model.vocab_size": 65_600})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    step = jax.jit(fd.eval_step)
    narrow = {name: ids.astype(np.uint16) for name, ids in make_batch().items()}
    assert float(step(state, narrow)["loss"]) == float(step(state, make_batch())["loss"])


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.complex64])
@pytest.mark.parametrize("name", ["inputs", "targets", "positions"])
def test_what_is_no_integer_is_no_id(name, dtype):
    batch = make_batch(positions=np.zeros((B, T), np.int32))
    with pytest.raises(ValueError, match=f"{name} must be integers, not {np.dtype(dtype)}"):
        checked_batch(batch | {name: batch[name].astype(dtype)}, V)


# --- Shapes and names ---


@pytest.mark.parametrize("shape", [(T,), (1, T), (B, 1), (T, B), (B, T, 1), ()])
@pytest.mark.parametrize("name", ["targets", "mask"])
def test_nothing_broadcasts(name, shape):
    with pytest.raises(ValueError, match=re.escape(f'batch["{name}"] has the shape {shape}, but batch["inputs"] has')):
        checked_batch(make_batch(**{name: np.ones(shape, np.int32)}), V)


def test_positions_may_be_those_of_all_rows():
    for rows in (1, B):
        batch = make_batch(positions=np.zeros((rows, T), np.int32))
        assert checked_batch(batch, V)["positions"].shape == (rows, T)
        assert checked_batch(batch, V, num_parts=B)["positions"].shape == (B, T)
    with pytest.raises(ValueError, match="positions"):
        checked_batch(make_batch(positions=np.zeros((2, T), np.int32)), V)


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (T,), (B, T, 1)])
def test_a_batch_has_rows_and_tokens(shape):
    with pytest.raises(ValueError, match=r"must be \(B, T\), both at least 1"):
        checked_batch({"inputs": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32)}, V)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("attention_mask", "mask"),
        ("loss_mask", "mask"),
        ("labels", "targets"),
        ("segment_ids", "segments"),
        ("segment", "segments"),
        ("documents", "segments"),
        ("masks", "mask"),
        ("qwerty", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_is_meant(state, name, meant):
    message = f"did you mean '{meant}'" if meant else "it knows inputs, targets, mask, positions, segments"
    with pytest.raises(ValueError, match=f"the batch has '{name}', which the loss would ignore.*{message}"):
        jax.jit(fd.train_step)(state, make_batch(**{name: np.ones((B, T))}))


def test_a_missing_name_is_refused():
    with pytest.raises(ValueError, match="the batch has no 'targets'"):
        checked_batch({"inputs": np.zeros((B, T), np.int32)}, V)


def test_rows_divide_by_the_parts_of_an_accumulation(state):
    with pytest.raises(ValueError, match="a batch of 3 rows cannot be computed in 2 parts"):
        jax.jit(fd.train_step)(state.replace(accumulation_steps=2), make_batch())


# --- Weights ---


@pytest.mark.parametrize("weight", [1e-3, 1.0, 7.0])
def test_the_loss_is_a_mean_whatever_the_size_of_the_weights(state, weight):
    step = jax.jit(fd.train_step)
    plain, weighted = step(state, make_batch())[1], step(state, make_batch(mask=np.full((B, T), weight)))[1]
    np.testing.assert_allclose(weighted["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(weighted["gradient_norm"], plain["gradient_norm"], rtol=1e-5)


def test_negative_weights_are_refused_or_count_as_nothing(state):
    mask = np.ones((B, T), np.float32)
    mask[0, 0] = -1
    with pytest.raises(ValueError, match="negative weight"):
        checked_batch(make_batch(mask=mask), V)
    found = jax.jit(fd.eval_step)(state, make_batch(mask=mask))
    expected = jax.jit(fd.eval_step)(state, make_batch(mask=np.maximum(mask, 0)))
    assert found == expected


@pytest.mark.parametrize("mask", [np.ones((B, T), bool), np.ones((B, T), np.int8), np.ones((B, T), np.float16)])
def test_weights_may_be_of_any_real_dtype(mask):
    found = checked_batch(make_batch(mask=mask), V)["mask"]
    assert found.dtype == jnp.float32 and (found == 1).all()


@pytest.mark.parametrize("chunk_tokens", [0, 2])
def test_weights_are_constants_with_and_without_chunks(state, chunk_tokens):
    def loss(mask):
        return fd.eval_step(state.replace(loss_chunk_tokens=chunk_tokens), make_batch(mask=mask))["loss"]

    assert not jax.jit(jax.grad(loss))(jnp.ones((B, T))).any()


def test_the_checks_leave_no_trace_in_the_program(state):
    """What goes in as int32 is computed as it was: the check is in Python, when the step is traced."""
    batch = {name: jnp.asarray(ids, jnp.int32) for name, ids in make_batch().items()}
    program = str(jax.make_jaxpr(lambda batch: checked_batch(batch, V))(batch))
    assert re.search(r"let\s+in \(", program), program


# --- Documents ---


def test_no_loss_is_asked_across_a_border(state):
    segments = np.asarray([[0, 0, 1, 1, 1], [5, 5, 5, 5, 5], [2, 3, 4, 4, 4]])
    checked = checked_batch(make_batch(segments=segments), V)
    assert checked["mask"].tolist() == [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    half = checked_batch(make_batch(segments=segments, mask=np.full((B, T), 0.5)), V)
    np.testing.assert_array_equal(half["mask"], checked["mask"] / 2)
    sums = jax.jit(fd.eval_step)(state, make_batch(segments=segments))
    assert sums["num_tokens"] == B * T - 3


def test_borders_are_found_in_any_order_that_leaves_the_last_token_last():
    """As on a mesh that splits sequences; padding of others has one position for all its tokens."""
    segments = np.asarray([[4, 4, 9, 9, 9], [5, 5, 5, 5, 5], [2, 3, 0, 0, 0]])
    positions = np.asarray([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]])
    expected = np.asarray([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    for order in ([0, 1, 2, 3, 4], [2, 0, 3, 1, 4], [3, 2, 1, 0, 4]):
        batch = make_batch(segments=segments[:, order], positions=positions[:, order])
        found = np.asarray(checked_batch(batch, V)["mask"])
        np.testing.assert_array_equal(found[:2], expected[:2, order])
        assert found[2, order.index(0)] == found[2, order.index(1)] == 0
    one = make_batch(segments=segments[:1, [1] * 5].repeat(B, axis=0), positions=np.arange(T)[None])
    assert (np.asarray(checked_batch(one, V)["mask"]) == 1).all()


def test_a_target_across_a_border_may_be_any_number(state):
    batch = make_batch(segments=np.asarray([[0, 0, 1, 1, 1]] * B))
    batch["targets"] = np.where(np.arange(T) == 1, -100, batch["targets"])
    assert np.isfinite(jax.jit(fd.eval_step)(state, batch)["loss"])
    checked_batch(batch, V)
    with pytest.raises(ValueError, match="token id -100 is not in the vocabulary"):
        checked_batch(batch | {"segments": np.zeros((B, T), np.int32)}, V)


def test_documents_of_a_row_have_the_losses_that_they_have_alone(state):
    packed = {name: ids[:1] for name, ids in make_batch().items()} | {"segments": np.asarray([[0, 0, 1, 1, 1]])}
    rows = [{name: ids[:1, part] for name, ids in make_batch().items()} for part in (np.s_[:2], np.s_[2:])]
    rows[0]["mask"] = np.asarray([[1, 0]])
    step = jax.jit(fd.eval_step)
    alone = [step(state, row) for row in rows]
    found = step(state, packed)
    np.testing.assert_allclose(found["loss"], alone[0]["loss"] + alone[1]["loss"], rtol=1e-6)
    assert found["num_tokens"] == 4


@pytest.mark.full
def test_documents_go_with_parts_chunks_and_pmap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (8, T + 1))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segments": rng.integers(0, 2, (8, T))}
    found = {}
    for name, settings in {"plain": {}, "parts": {"accumulation_steps": 2}, "chunks": {"loss_chunk_tokens": 3}}.items():
        config = fd.load_config(
            overrides=SMALL | {"model.vocab_size": V} | {f"training.{key}": value for key, value in settings.items()}
        )
        state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
        found[name] = jax.jit(fd.train_step)(state, batch)[1]
        if name == "plain":
            rows = jax.tree.map(lambda array: array.reshape(4, 2, T), batch)
            copies = jax.tree.map(lambda leaf: np.stack([leaf] * 4), state)
            step = jax.pmap(functools.partial(fd.train_step, axis_name="batch"), axis_name="batch")
            found["pmap"] = jax.tree.map(lambda metric: metric[0], step(copies, rows)[1])
    for metrics in found.values():
        np.testing.assert_allclose(metrics["loss"], found["plain"]["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], found["plain"]["gradient_norm"], rtol=1e-6)
    without = {name: array for name, array in batch.items() if name != "segments"}
    assert abs(jax.jit(fd.train_step)(state, without)[1]["loss"] - found["plain"]["loss"]) > 1e-4


# --- States ---


def test_two_states_of_one_config_share_a_compiled_step():
    config = fd.load_config(overrides=SMALL | {"model.vocab_size": V})
    model = fd.Decoder(config.model)
    one, two = (fd.init_state(model, config, rng=jax.random.key(seed)) for seed in (0, 1))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one.params, two.params)
    step = jax.jit(lambda state, batch: fd.train_step(state, batch))  # not the cache of another test
    for state in (one, two, one.replace(params=mean)):
        step(state, make_batch())
    assert step._cache_size() == 1


def test_a_state_is_made_as_in_flax(state):
    made = fd.TrainState.create(apply_fn=state.apply_fn, params=state.params, tx=optax.adamw(1e-3))
    step = jax.jit(lambda state, batch: fd.train_step(state, batch))  # not the cache of another test
    losses = []
    for _ in range(3):
        made, metrics = step(made, make_batch())
        losses.append(float(metrics["loss"]))
    assert made.step == 3 and losses[2] < losses[0] and step._cache_size() == 1
