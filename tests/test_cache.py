"""Decoding with a cache gives the numbers of one pass without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.cache import empty_cache, write
from flax_decoder.nn.decoder import Decoder

B, T, V, CAPACITY = 3, 7, 17, 11
SIZES = {"vocab_size": V, "context_length": 13, "num_layers": 2, "embed_dim": 14, "mlp_dim": 5, "head_dim": 4}
TOKENS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)

# The same float32 products in other shapes: numbers of order 1 to 10, rounded at 6e-8, through two layers.
TOLERANCE = 5e-5

KINDS = {
    "learned": {"positions": "learned", "num_heads": 3},
    "sinusoidal": {"positions": "sinusoidal", "num_heads": 2, "num_kv_heads": 1, "scan_layers": True},
    "rotary": {"positions": "rotary", "num_heads": 6, "num_kv_heads": 2, "rotary_fraction": 0.5, "qk_norm": True},
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


@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "window"])
def test_rows_of_different_lengths(kind):
    """Each row is as long as length_B says: what was computed beyond it is never read."""
    config, expected_BTV, append = compiled(kind)
    length_B = np.array([4, 1, 2], np.int32)
    padded_BT = np.where(np.arange(4) < length_B[:, None], TOKENS_BT[:, :4], 16 - TOKENS_BT[:, :4])
    _, cache = append(empty_cache(config, B, CAPACITY), padded_BT)
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
    cache = cache.replace(k_LBSKH=cache.k_LBSKH + 1e6, v_LBSKH=cache.v_LBSKH + 1e6)
    logits_BTV, _ = append(cache, TOKENS_BT[:, :4])
    np.testing.assert_allclose(logits_BTV, expected_BTV[:, :4], atol=TOLERANCE)


def test_keys_and_values_go_to_their_slots():
    config, _, append = compiled("rotary")
    lengths_B = jnp.asarray([0, 5, 7], jnp.int32)
    cache = empty_cache(config, B, CAPACITY).replace(length_B=lengths_B)
    assert cache.capacity == CAPACITY
    _, cache = append(cache, TOKENS_BT[:, :4])
    slots = np.arange(CAPACITY)
    expected_BS = (slots >= np.array([[0], [5], [7]])) & (slots < np.array([[4], [9], [11]]))
    for array_LBSKH in (cache.k_LBSKH, cache.v_LBSKH):
        assert array_LBSKH.shape == (2, B, CAPACITY, 2, 4)
        for written_BS in np.asarray(array_LBSKH != 0).any((-1, -2)):
            np.testing.assert_array_equal(written_BS, expected_BS)


def test_write():
    cached_BSKH = np.zeros((2, 5, 1, 3), np.float32)
    new_BTKH = np.arange(1, 13, dtype=np.float32).reshape(2, 2, 1, 3)
    written_BSKH = write(jnp.asarray(cached_BSKH), jnp.asarray(new_BTKH), jnp.asarray([[1, 2], [3, 4]]))
    cached_BSKH[0, 1:3], cached_BSKH[1, 3:5] = new_BTKH
    np.testing.assert_array_equal(written_BSKH, cached_BSKH)


def test_more_tokens_than_fit_are_refused():
    config, _, _ = compiled("rotary")
    model = Decoder(config)
    params = reference.random_params(model)
    cache = empty_cache(config, B, CAPACITY).replace(length_B=jnp.asarray([0, 8, 1], jnp.int32))
    with pytest.raises(ValueError, match="4 more tokens do not fit into a cache of 11"):
        model.apply({"params": params}, TOKENS_BT[:, :4], cache=cache)
    _, cache = model.apply({"params": params}, TOKENS_BT[:, :3], cache=cache)  # 8 + 3 do fit
    assert cache.length_B.tolist() == [3, 11, 4]


def test_a_cache_beyond_learned_positions_is_refused():
    config, _, _ = compiled("learned")
    assert empty_cache(config, B, 13).capacity == 13
    with pytest.raises(ValueError, match="a cache of 14 tokens goes beyond context_length = 13"):
        empty_cache(config, B, 14)
    assert empty_cache(compiled("rotary")[0], B, 14).capacity == 14


def test_a_cache_has_the_models_dtype():
    cache = empty_cache(ModelConfig(dtype="bfloat16"), B, CAPACITY)
    assert (cache.k_LBSKH.dtype, cache.v_LBSKH.dtype, cache.length_B.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
