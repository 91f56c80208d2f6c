"""Attention is what the papers say, sees no future, and is the same in blocks; and these tests would notice if not."""

import copy
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.attention import dot_product_attention
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.mask import MaskSpec

B, T, N, H = 2, 7, 6, 5
POSITIONS = ["learned", "sinusoidal", "rotary", "alibi", "none"]
BLOCK = 64  # queries a block of blockwise attention holds: lengths around and beyond it matter

# float32 rounds at 6e-8; sums of about ten products of order 1, an exponential, and a sum again.
TOLERANCE = 5e-6


def random_qkv(num_kv_heads, seed=0, length=T):
    rng = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, length, num_kv_heads, H), (B, length, num_kv_heads, H)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def causal_mask(window=None, slopes_N=None):
    positions_1T = np.arange(T, dtype=np.int32)[None]
    return MaskSpec(positions_1T, positions_1T, slopes_N, window)


def recorded_attention(*arguments, **settings):
    """The heads, and by name what the formula shows its hook."""
    recorded = {}

    def hook(name, array):
        recorded[name] = array
        return array

    return dot_product_attention(*arguments, hook=hook, **settings), recorded


@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize(
    ("window", "soft_cap", "alibi"), [(None, None, False), (3, None, True), (None, 0.7, False), (1, 0.7, True)]
)
def test_dot_product_attention(num_kv_heads, window, soft_cap, alibi):
    q_BTNH, k_BSKH, v_BSKH = random_qkv(num_kv_heads)
    slopes_N = np.asarray(reference.alibi_slopes(N), np.float32) if alibi else None
    mask = causal_mask(window, slopes_N)
    heads_BTNH, recorded = recorded_attention(q_BTNH, k_BSKH, v_BSKH, mask, soft_cap=soft_cap)
    scores_BKGTS, weights_BKGTS = recorded["scores"], recorded["weights"]
    for b in range(B):
        q_TNH, k_SKH, v_SKH = (np.float64(array[b]) for array in (q_BTNH, k_BSKH, v_BSKH))
        expected_TNH = reference.attention(q_TNH, k_SKH, v_SKH, window, slopes_N, soft_cap)
        np.testing.assert_allclose(heads_BTNH[b], expected_TNH, atol=TOLERANCE)

    K, G = num_kv_heads, N // num_kv_heads
    assert scores_BKGTS.shape == weights_BKGTS.shape == (B, K, G, T, T)
    seen_TS = np.array([[reference.sees(t, s, window) for s in range(T)] for t in range(T)])
    hidden_BKGTS = np.broadcast_to(~seen_TS, weights_BKGTS.shape)
    assert (np.asarray(weights_BKGTS)[hidden_BKGTS] == 0).all()
    assert (np.asarray(scores_BKGTS)[hidden_BKGTS] == -np.inf).all()
    np.testing.assert_allclose(weights_BKGTS.sum(-1), 1, rtol=1e-6)


def test_each_row_has_its_own_mask():
    """Rows at other positions, and empty slots among the keys, as cached decoding has them."""
    q_BTNH, k_BSKH, v_BSKH = random_qkv(2)
    positions_BT, key_positions_BS = np.full((B, 3), 7, np.int32), np.full((B, T), -1, np.int32)
    key_positions_BS[0, 1] = key_positions_BS[1, 4] = 7  # each query sees one key, and so gathers exactly its value
    mask = MaskSpec(positions_BT, key_positions_BS)
    heads_BTNH = dot_product_attention(q_BTNH[:, :3], k_BSKH, v_BSKH, mask)
    np.testing.assert_array_equal(heads_BTNH[0], np.broadcast_to(v_BSKH[0, 1].repeat(3, axis=0), (3, N, H)))
    np.testing.assert_array_equal(heads_BTNH[1], np.broadcast_to(v_BSKH[1, 4].repeat(3, axis=0), (3, N, H)))


def test_the_hook_replaces_weights():
    q_BTNH, k_BSKH, v_BSKH = random_qkv(2)
    whole = dot_product_attention(q_BTNH, k_BSKH, v_BSKH, causal_mask())

    def doubled(name, array):
        return array * 2 if name == "weights" else array

    twice = dot_product_attention(q_BTNH, k_BSKH, v_BSKH, causal_mask(), hook=doubled)
    np.testing.assert_allclose(twice, 2 * whole, rtol=1e-6)


def test_bfloat16_scores_and_softmax_are_float32():
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in random_qkv(2))
    heads, recorded = recorded_attention(q, k, v, causal_mask())
    dtypes = heads.dtype, recorded["scores"].dtype, recorded["weights"].dtype
    assert dtypes == (jnp.bfloat16, jnp.float32, jnp.float32)
    _, exact = recorded_attention(*(array.astype(jnp.float32) for array in (q, k, v)), causal_mask())
    # Only the values are rounded, not the weights.
    np.testing.assert_allclose(recorded["weights"], exact["weights"], atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 3])
def test_no_gradient_flows_to_keys_and_values_out_of_sight(window):
    q_BTNH, k_BSKH, v_BSKH = random_qkv(3)

    def heads_THN(k_SKH, v_SKH):
        return dot_product_attention(q_BTNH[:1], k_SKH[None], v_SKH[None], causal_mask(window))[0]

    for jacobian_TNHSKH in jax.jit(jax.jacrev(heads_THN, argnums=(0, 1)))(k_BSKH[0], v_BSKH[0]):
        reached_TS = np.asarray(jacobian_TNHSKH != 0).any(axis=(1, 2, 4, 5))
        seen_TS = np.array([[reference.sees(t, s, window) for s in range(T)] for t in range(T)])
        assert not reached_TS[~seen_TS].any()
        # A query with one key gives it weight 1 whatever the key: the gradient to that key may be zero.
        assert reached_TS[seen_TS & (seen_TS.sum(-1, keepdims=True) > 1)].all()


# --- Planted faults: what this suite would miss if weights were equal or sizes the same ---

FAULTY_MODEL = {
    "vocab_size": 17,
    "num_layers": 1,
    "embed_dim": 14,
    "num_heads": N,
    "num_kv_heads": 2,
    "head_dim": 10,
    "mlp_dim": 11,
    "positions": "rotary",
    "window": 4,
}


def swap_keys_and_values(params):
    attention = params["layers"]["attention"]
    attention["key"], attention["value"] = attention["value"], attention["key"]


def values_from_key_weights(params):
    params["layers"]["attention"]["value"] = params["layers"]["attention"]["key"]


def softmax_over_queries(scores_TS):
    return reference_softmax(scores_TS.T).T


reference_sees, reference_softmax = reference.sees, reference.softmax
FAULTS = {
    "K and V swapped": swap_keys_and_values,
    "V computed from the key weights": values_from_key_weights,
    "no 1/sqrt(H)": ("score_scale", lambda head_width: 1.0),
    "sees one position of the future": ("sees", lambda t, s, window: reference_sees(t + 1, s, window + 1)),
    "does not see itself": ("sees", lambda t, s, window: reference_sees(t, s, window) and (s < t or t == 0)),
    "window one too long": ("sees", lambda t, s, window: reference_sees(t, s, window + 1)),
    "window one too short": ("sees", lambda t, s, window: reference_sees(t, s, window - 1)),
    "softmax over queries": ("softmax", softmax_over_queries),
    "heads grouped as n % K": ("kv_head_of", lambda n, num_heads, num_kv_heads: n % num_kv_heads),
    "rotary pairs interleaved": ("rotary_pair", lambda i, rotated, layout: (2 * i, 2 * i + 1)),
}


@functools.cache
def healthy_model():
    config = ModelConfig(**FAULTY_MODEL)
    model = Decoder(config)
    params = reference.random_params(model)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (1, T))
    return config, params, tokens_BT, np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT))


def test_without_a_fault_the_library_agrees():
    config, params, tokens_BT, logits_BTV = healthy_model()
    np.testing.assert_allclose(logits_BTV, reference.decode(params, tokens_BT, config), atol=2e-5)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name, monkeypatch):
    config, params, tokens_BT, logits_BTV = healthy_model()
    params, fault = copy.deepcopy(params), FAULTS[name]
    if callable(fault):
        fault(params)
    else:
        monkeypatch.setattr(reference, *fault)
    difference = np.abs(reference.decode(params, tokens_BT, config) - logits_BTV).max()
    assert difference > 0.02  # a thousand times the tolerance above


# --- Causality of the whole network ---


def reached(length, at, **settings):
    """Which inputs have any influence on the logits at some positions: (len(at), length), by gradients.

    Each position has its own token, so that the gradient of row i of the embedding is the gradient of one input.
    """
    sizes = {"vocab_size": length, "context_length": length, "embed_dim": 10, "num_heads": 1, "mlp_dim": 7}
    model = Decoder(ModelConfig(**sizes, num_layers=2, tied_head=False, **settings))
    params = reference.random_params(model)
    rng = np.random.default_rng(0)
    tokens_T = rng.permutation(length)
    cotangents = np.zeros((len(at), length, length), np.float32)
    cotangents[np.arange(len(at)), at] = rng.standard_normal((len(at), length))

    @jax.jit
    def gradients(embedding_VD):
        def logits_TV(embedding_VD):
            return model.apply({"params": params | {"embedding": embedding_VD}}, tokens_T[None])[0]

        return jax.vmap(jax.vjp(logits_TV, embedding_VD)[1])(cotangents)[0]

    return np.asarray(gradients(params["embedding"]) != 0).any(-1)[:, tokens_T]


AT = {T: range(T), 2 * BLOCK + 3: [0, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 2]}


@pytest.mark.short(
    "learned-reference-7", "sinusoidal-reference-7", "none-reference-7", "rotary-blockwise-131", "alibi-blockwise-131"
)
@pytest.mark.parametrize(("attention", "length"), [("reference", T), ("blockwise", 2 * BLOCK + 3)])
@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_do_not_depend_on_later_tokens(positions, attention, length):
    at = AT[length]
    reached_TS = reached(length, at, positions=positions, attention=attention)
    expected_TS = np.arange(length) <= np.array(at)[:, None]
    assert not reached_TS[~expected_TS].any(), "the future is seen"
    assert reached_TS[expected_TS].all(), "the past is not seen"


@pytest.mark.short("reference-7-3-pattern3-7", "blockwise-131-63-pattern2-124")
@pytest.mark.parametrize(
    ("attention", "length", "window", "pattern", "reach"),
    [
        ("reference", T, 3, (True,), 4),  # two layers, each looking back two positions
        ("blockwise", 2 * BLOCK + 3, 3, (True,), 4),
        ("blockwise", 2 * BLOCK + 3, BLOCK - 1, (True,), 2 * BLOCK - 4),
        ("reference", T, 3, (True, False), T),
        ("blockwise", 2 * BLOCK + 3, 1, (True,), 0),
    ],
)
def test_logits_do_not_depend_on_tokens_beyond_the_windows(attention, length, window, pattern, reach):
    at = AT[length]
    settings = {"positions": "rotary", "attention": attention, "window": window, "window_pattern": pattern}
    reached_TS = reached(length, at, **settings)
    distance_TS = np.array(at)[:, None] - np.arange(length)
    expected_TS = (distance_TS >= 0) & (distance_TS <= reach)
    assert not reached_TS[~expected_TS].any(), "too much is seen"
    assert reached_TS[expected_TS].all(), "too little is seen"


# --- Blocks ---


GROUPED = {"positions": "alibi", "num_heads": 6, "num_kv_heads": 2, "attention_soft_cap": 0.7}
WINDOWED = {"positions": "rotary", "num_heads": 2, "num_kv_heads": 1, "window": 13}


@pytest.mark.short("65-settings3", "131-settings4")
@pytest.mark.parametrize(
    ("length", "settings"),
    [
        (1, GROUPED),
        (BLOCK - 1, WINDOWED),
        (BLOCK, GROUPED),
        (BLOCK + 1, WINDOWED),
        (2 * BLOCK + 3, GROUPED),
        (2 * BLOCK + 3, WINDOWED),
    ],
)
def test_blocks_give_the_same_logits_and_gradients(length, settings):
    sizes = {"vocab_size": 13, "num_layers": 1, "embed_dim": 11, "head_dim": 4, "mlp_dim": 7}
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 13, (B, length))
    weights_BTV = rng.standard_normal((B, length, 13)).astype(np.float32)

    def loss(params, attention):
        model = Decoder(ModelConfig(**sizes, **settings, attention=attention))
        logits_BTV = model.apply({"params": params}, tokens_BT)
        return (weights_BTV * logits_BTV).mean(), logits_BTV

    @jax.jit
    def both(params):
        grad = jax.value_and_grad(loss, has_aux=True)
        return grad(params, "blockwise"), grad(params, "reference")

    (blocks, whole) = both(reference.random_params(Decoder(ModelConfig(**sizes, **settings))))
    # The same numbers summed in another order: up to 131 of order 1, in float32.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), blocks, whole)
    assert np.abs(whole[0][1]).max() > 0.1


def test_blocks_are_really_chosen():
    """The comparison above means something only if the two settings run different programs."""

    def program(attention):
        config = ModelConfig(vocab_size=13, num_layers=1, embed_dim=8, num_heads=2, attention=attention)
        model = Decoder(dataclasses.replace(config, positions="none"))
        params = reference.random_params(model)
        return str(jax.make_jaxpr(model.apply)({"params": params}, np.zeros((1, 131), np.int32)))

    whole_scores = "f32[1,2,1,131,131]"
    assert whole_scores in program("reference")
    assert whole_scores not in program("blockwise")


@pytest.mark.parametrize(("window", "num_keys"), [(None, 6 * 7 // 2 * BLOCK), (BLOCK + 1, (1 + 5 * 2) * BLOCK)])
def test_a_block_meets_no_keys_but_those_that_its_queries_may_see(window, num_keys):
    """Six blocks: each meets all blocks up to its own, or its own and the one before."""
    config = ModelConfig(vocab_size=13, num_layers=1, embed_dim=6, num_heads=1, window=window, positions="none")
    model = Decoder(dataclasses.replace(config, attention="blockwise"))
    params = reference.random_params(model)
    program = jax.make_jaxpr(model.apply)({"params": params}, np.zeros((1, 6 * BLOCK), np.int32))
    scores = re.findall(rf":f32\[1,1,1,{BLOCK},(\d+)\] = exp ", str(program))
    assert len(scores) == 6 and sum(map(int, scores)) == num_keys
