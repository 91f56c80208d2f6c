"""The origins of a score sum to it, in every choice of the config, and each is right by itself."""

import functools

import jax
import numpy as np
import pytest
import reference
from shape_names import checked_shape_names
from test_attribution import ORDERS, SCORES, TOKENS_BT, B, T, make, streams

import flax_decoder as fd
from flax_decoder.lens.origins import ORIGINS, query_and_key_origins, score_origins
from flax_decoder.nn.cache import empty_cache

MODELS = {
    **ORDERS,
    **{name: SCORES[name] for name in ("grouped and rotary", "capped slopes")},
    "capped": {**SCORES["capped"], "attention_in_bias": True, "norm_bias": True, "mlp_bias": True},
    "clipped": {"qkv_clip": 0.3, "positions": "rotary", "attention_in_bias": True},
    "own norms": {"qk_norm": "each_head", "qk_norm_kind": "layernorm", "qk_norm_bias": True, "num_kv_heads": 2},
    "unit heads": {"qk_norm": "head", "num_kv_heads": 2, "norm": "rmsnorm"},
    "nothing learned": {"qk_norm": "all", "norm_scale": False, "qkv_clip": 0.3, "num_kv_heads": 2, "norm": "rmsnorm"},
    "not every layer turns": {"positions": "rotary", "rotary_pattern": (True, False)},
}


@functools.cache
def split(name):
    model, params = make(**MODELS[name])
    seen = fd.capture(model, params, TOKENS_BT)
    return model, params, seen, query_and_key_origins(model.config, params, TOKENS_BT, seen)


@pytest.mark.short("both")
@pytest.mark.parametrize("name", MODELS)
def test_origins_sum_to_the_score(name):
    model, params, seen, _ = split(name)
    origins_of = jax.jit(functools.partial(score_origins, model, params, TOKENS_BT, seen), static_argnums=(0, 1))
    for layer, n, b, t, s in np.random.default_rng(0).integers(0, (2, 6, B, T, T), (9, 5)).tolist():
        parts = origins_of(layer, n, b, t, s)
        score = seen["scores"][layer, b, n, t, s]
        np.testing.assert_allclose(parts.total(), score, atol=1e-5)
        assert parts.score == score and np.isfinite(parts.pairs_OO).all()
        turns = model.config.positions == "rotary" and model.config.layer_kinds[layer].rotates and s != t
        assert (abs(parts.rotation) > 1e-6) == turns
        assert (parts.position != 0) == (model.config.positions == "alibi" and s != t)
        assert layer > 0 or not np.any(parts.pairs_OO[2:4])  # nothing was written before


@pytest.mark.short("both")
@pytest.mark.parametrize("name", MODELS)
def test_each_origin_is_what_it_gives_alone(name):
    """In float64, with nothing else in the stream; each norm divides by the size of what it was given when all was."""
    model, params, seen, (q_LBTONH, k_LBTOKH) = split(name)
    config = model.config
    np.testing.assert_allclose(q_LBTONH.sum(3), seen["q"], atol=2e-5)
    np.testing.assert_allclose(k_LBTOKH.sum(3), seen["k"], atol=2e-5)
    for number, origin in enumerate(ORIGINS):
        for layer, (whole_BTD, own_BTD) in enumerate(streams(origin, model, params, seen)[:-1]):
            attention = reference.map_leaves(lambda leaf, i=layer: np.asarray(leaf[i]), params["layers"])["attention"]
            for projection, given_LBTONH in (("query", q_LBTONH), ("key", k_LBTOKH)):
                weights = attention[projection]
                bias = weights.get("bias", 0.0)
                whole, own = (np.einsum("btd,dnh->btnh", x_BTD, weights["kernel"]) for x_BTD in (whole_BTD, own_BTD))
                whole, own = whole + bias, own + bias * (origin == "bias")
                if config.qkv_clip is not None:
                    own = own * np.minimum(1, config.qkv_clip / np.abs(whole))
                    whole = whole.clip(-config.qkv_clip, config.qkv_clip)
                if config.qk_norm != "none":
                    flat = (-2, -1) if config.qk_norm == "all" else -1
                    if config.qk_norm_kind == "layernorm":
                        whole, own = (x - x.mean(flat, keepdims=True) for x in (whole, own))
                    size = np.sqrt((whole**2).mean(flat, keepdims=True) + config.norm_epsilon)
                    scale = attention[f"{projection}_norm"]["scale"] if config.norm_scale else np.ones(())
                    own = own / size * (scale if config.qk_norm == "head" else np.resize(scale, whole.shape[2:]))
                    if config.qk_norm_bias and origin == "bias":
                        own = own + attention[f"{projection}_norm"]["bias"]
                np.testing.assert_allclose(given_LBTONH[layer, :, :, number], own, atol=2e-5, err_msg=origin)


def test_pairs_are_products_of_origins():
    model, params, seen, (q_LBTONH, k_LBTOKH) = split("both")
    layer, n, b, t, s = 1, 4, 1, 5, 3
    parts = score_origins(model, params, TOKENS_BT, seen, layer, n, b, t, s)
    assert parts.pairs_OO.shape == (5, 5)
    kv_head = n * model.config.kv_heads // 6
    for i, j in ((0, 2), (2, 0), (3, 4)):
        product = (q_LBTONH[layer, b, t, i, n] * k_LBTOKH[layer, b, s, j, kv_head]).sum() * 10**-0.5
        np.testing.assert_allclose(parts.pairs_OO[i, j], product, rtol=1e-5)


def test_names_are_right():
    model, params, seen, _ = split("both")
    jax.clear_caches()
    with checked_shape_names() as functions:
        jax.eval_shape(functools.partial(query_and_key_origins, model.config), params, TOKENS_BT, seen)
    assert functions >= {f"origins.py:_{name}" for name in ("queries_and_keys", "project")}
    assert functions >= {f"residual.py:{name}" for name in ("layer_writes", "origins_through_norm", "_add", "_at")}


@pytest.mark.full
def test_the_keys_of_a_cache_are_refused():
    model, params = make()
    seen, _ = fd.capture(model, params, TOKENS_BT, empty_cache(model.config, B, 11))
    with pytest.raises(fd.UserError, match="without a cache"):
        score_origins(model, params, TOKENS_BT, seen, 0, 0, 0, 0, 0)
