"""Decoding with a cache gives the numbers of one pass without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.cache import empty_cache, positions_of_slots, write
from flax_decoder.nn.decoder import Decoder

B, T, V, CAPACITY = 3, 7, 17, 11
SIZES = {"vocab_size": V, "context_length": 13, "num_layers": 2, "embed_dim": 14, "mlp_dim": 5, "head_dim": 4}
TOKENS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)

# The same float32 products in other shapes: numbers of order 1 to 10, rounded at 6e-8, through two layers.
TOLERANCE = 5e-5

KINDS = {
    "learned": {"positions": "learned", "num_heads": 3},
    "sinusoidal": {"positions": "sinusoidal", "num_heads": 2, "num_kv_heads": 1, "scan_layers": True},
    "rotary": {
        "positions": "rotary",
        "num_heads": 6,
        "num_kv_heads": 2,
        "rotary_fraction": 0.5,
        "qk_norm": "head",
        "scan_layers": True,
    },
    "alibi": {"positions": "alibi", "num_heads": 6, "num_kv_heads": 3, "attention": "blockwise"},
    "none": {"positions": "none", "num_heads": 2, "attention": "reference"},
    "window": {
        "positions": "rotary",
        "num_heads": 2,
        "window": 3,
        "window_pattern": (False, True),
        "scan_layers": True,
    },
}


@functools.cache
def compiled(kind):
    """The config, the logits of one pass over TOKENS_BT, and a function that appends tokens to a cache."""
    model = Decoder(ModelConfig(**SIZES, **KINDS[kind]))
    apply = functools.partial(jax.jit(model.apply), {"params": reference.random_params(model)})
    return model.config, apply(TOKENS_BT), lambda cache, tokens_BT: apply(tokens_BT, cache=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_equal_one_pass(kind):
    config, expected_BTV, append = compiled(kind)
    logits_BTV, cache = append(empty_cache(config, B, CAPACITY), TOKENS_BT[:, :4])
    np.testing.assert_allclose(logits_BTV, expected_BTV[:, :4], atol=TOLERANCE)
    for t in range(4, T):
        logits_BTV, cache = append(cache, TOKENS_BT[:, t : t + 1])
        np.testing.assert_allclose(logits_BTV[:, 0], expected_BTV[:, t], atol=TOLERANCE)
    np.testing.assert_array_equal(cache.length_B, np.full(B, T))


@pytest.mark.short("window")
@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "window"])
def test_rows_of_different_lengths(kind):
    """Each row is as long as length_B says: what was computed beyond it is never read."""
    config, expected_BTV, append = compiled(kind)
    length_B = np.array([4, 1, 2], np.int32)
    padded_BT = np.where(np.arange(4) < length_B[:, None], TOKENS_BT[:, :4], 16 - TOKENS_BT[:, :4])
    _, cache = append(empty_cache(config, B, CAPACITY, rollback_slots=3), padded_BT)
    cache = cache.replace(length_B=jnp.asarray(length_B))
    for step in range(3):
        at_B = length_B + step
        logits_BTV, cache = append(cache, TOKENS_BT[np.arange(B), at_B][:, None])
        np.testing.assert_allclose(logits_BTV[:, 0], expected_BTV[np.arange(B), at_B], atol=TOLERANCE)
    np.testing.assert_array_equal(cache.length_B, length_B + 3)


def test_lowering_the_length_forgets():
    config, expected_BTV, append = compiled("rotary")
    _, cache = append(empty_cache(config, B, CAPACITY), (TOKENS_BT[:, :4] + 1) % V)
    logits_BTV, _ = append(cache.replace(length_B=jnp.zeros_like(cache.length_B)), TOKENS_BT[:, :4])
    np.testing.assert_allclose(logits_BTV, expected_BTV[:, :4], atol=TOLERANCE)


def test_what_lies_beyond_the_length_does_not_matter():
    config, expected_BTV, append = compiled("alibi")
    cache = empty_cache(config, B, CAPACITY)
    # 1e6, not NaN: a weight of exactly 0 times NaN would be NaN.
    cache = cache.replace(layers=jax.tree.map(lambda array_BKSH: array_BKSH + 1e6, cache.layers))
    logits_BTV, _ = append(cache, TOKENS_BT[:, :4])
    np.testing.assert_allclose(logits_BTV, expected_BTV[:, :4], atol=TOLERANCE)


def test_keys_and_values_go_to_their_slots():
    config, _, append = compiled("rotary")
    lengths_B = jnp.asarray([0, 5, 9], jnp.int32)
    _, cache = append(empty_cache(config, B, CAPACITY).replace(length_B=lengths_B), TOKENS_BT[:, :4])
    # Positions 9 to 12 of the last row: 11 and 12 are in the slots of 0 and 1.
    expected = [[0, 1, 2, 3], [5, 6, 7, 8], [0, 1, 9, 10]]
    assert len(cache.layers) == 2
    for array_BKSH in jax.tree.leaves(cache.layers):
        assert array_BKSH.shape == (B, 2, CAPACITY, 4)
        written_BKS = np.asarray(array_BKSH != 0).any(-1)
        assert [[np.flatnonzero(row).tolist() for row in row_KS] for row_KS in written_BKS] == [
            [e, e] for e in expected
        ]


def test_write():
    new_BTKH = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2, 1)
    positions_BT = jnp.asarray([[1, 2, 3], [3, 4, 5]])
    written_BKSH = write(jnp.zeros((2, 2, 5, 1)), jnp.asarray(new_BTKH), positions_BT, jnp.asarray([3, 6]))
    # The third token of the first row is padding; the second row goes on in slot 0.
    expected_BKS = [[[0, 1, 3, 0, 0], [0, 2, 4, 0, 0]], [[11, 0, 0, 7, 9], [12, 0, 0, 8, 10]]]
    np.testing.assert_array_equal(written_BKSH[..., 0], expected_BKS)


def test_more_new_tokens_than_slots_leave_the_last():
    new_BTKH = np.arange(1, 8, dtype=np.float32).reshape(1, 7, 1, 1)
    written_BKSH = write(jnp.zeros((1, 1, 3, 1)), jnp.asarray(new_BTKH), jnp.arange(7)[None], jnp.asarray([6]))
    np.testing.assert_array_equal(written_BKSH.ravel(), [4, 5, 6])  # positions 3, 4, 5; the seventh is padding


def test_positions_of_slots():
    positions_BS = positions_of_slots(3, jnp.asarray([0, 1, 3, 4, 8]))
    assert (positions_BS[0] < 0).all()
    assert positions_BS[1, 0] == 0 and (positions_BS[1, 1:] < 0).all()
    assert positions_BS[2:].tolist() == [[0, 1, 2], [3, 1, 2], [6, 7, 5]]


def test_a_layer_with_a_window_has_its_slots_only():
    config, _, _ = compiled("window")
    cache = empty_cache(config, B, CAPACITY, rollback_slots=2)
    assert [k_BKSH.shape[2] for k_BKSH, _ in cache.layers] == [CAPACITY + 2, 3 + 2]
    assert [k_BKSH.shape[2] for k_BKSH, _ in empty_cache(config, B, 2).layers] == [2, 2]


@pytest.mark.short("rotary")
@pytest.mark.parametrize("kind", ["rotary", "alibi", "window", "none"])
def test_a_row_that_outgrows_its_slots_sees_the_last_of_them(kind):
    """As if every layer without a window had one as long as its slots; in pieces of any length, padded or not."""
    config, _, append = compiled(kind)
    slots = config.window or 5
    rolling = Decoder(dataclasses.replace(config, window=slots, window_pattern=(True,)))
    tokens_BT = np.random.default_rng(3).integers(0, V, (B, 23)).astype(np.int32)
    expected_BTV = jax.jit(rolling.apply)({"params": reference.random_params(rolling)}, tokens_BT)
    cache, done = empty_cache(config, B, slots), 0
    for count in (4, 1, 1, 3, 7, 1, 2, 1, 3):
        logits_BTV, cache = append(cache, tokens_BT[:, done : done + count])
        np.testing.assert_allclose(logits_BTV, expected_BTV[:, done : done + count], atol=TOLERANCE)
        done += count
    assert done == 23


def test_padding_leaves_no_trace():
    config, expected_BTV, _ = compiled("rotary")
    model = Decoder(config)
    params = reference.random_params(model)
    apply = jax.jit(functools.partial(model.apply, last_only=True))
    cache, length_B = empty_cache(config, B, 4), np.zeros(B, np.int32)
    for num_tokens_B in ([2, 0, 1], [1, 2, 0], [0, 2, 2]):
        num_tokens_B = np.asarray(num_tokens_B, np.int32)
        at_BT = np.minimum(
            length_B[:, None] + np.arange(3), length_B[:, None] + np.maximum(num_tokens_B[:, None], 1) - 1
        )
        tokens_BT = np.take_along_axis(TOKENS_BT, at_BT, axis=1)
        logits_B1V, cache = apply({"params": params}, tokens_BT, cache=cache, num_tokens_B=jnp.asarray(num_tokens_B))
        length_B = length_B + num_tokens_B
        for row in np.flatnonzero(num_tokens_B):
            np.testing.assert_allclose(logits_B1V[row, 0], expected_BTV[row, length_B[row] - 1], atol=TOLERANCE)
    np.testing.assert_array_equal(cache.length_B, length_B)


def test_spare_slots_let_tokens_be_forgotten_after_they_took_the_place_of_others():
    config, _, append = compiled("rotary")
    tokens_BT = np.random.default_rng(3).integers(0, V, (B, 9)).astype(np.int32)
    _, straight = append(empty_cache(config, B, 4, rollback_slots=3), tokens_BT)
    _, detour = append(empty_cache(config, B, 4, rollback_slots=3), tokens_BT[:, :7])
    _, detour = append(detour, (tokens_BT[:, 6:9] + 1) % V)
    _, detour = append(detour.replace(length_B=detour.length_B - 3), tokens_BT[:, 7:9])
    next_BT = tokens_BT[:, :1]
    np.testing.assert_allclose(append(detour, next_BT)[0], append(straight, next_BT)[0], atol=TOLERANCE)


def test_a_cache_beyond_learned_positions_is_refused():
    config, _, _ = compiled("learned")
    assert empty_cache(config, B, 13).layers[0][0].shape[2] == 13
    with pytest.raises(ValueError, match="a cache of 14 tokens goes beyond context_length = 13"):
        empty_cache(config, B, 14)
    assert empty_cache(compiled("rotary")[0], B, 14).layers[0][0].shape[2] == 14


def test_a_cache_has_the_models_dtype():
    cache = empty_cache(ModelConfig(dtype="bfloat16"), B, CAPACITY)
    assert [leaf.dtype for leaf in jax.tree.leaves(cache)] == 8 * [jnp.bfloat16] + [jnp.int32]
