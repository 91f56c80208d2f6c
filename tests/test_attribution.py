"""The contributions to a logit sum to it, in every choice of the config, and each is right by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_decoder
from shape_names import checked_shape_names
from test_decoder import CHOICES, RANDOM, SIZES, V

import flax_decoder as fd
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.lens.attribution import score_parts
from flax_decoder.nn.cache import empty_cache

# Short texts for what is checked part by part in NumPy, and a hundred tokens for the sums.
B, T = 2, 7
RNG = np.random.default_rng(3)
TOKENS_BT, TARGETS_BT, VERSUS_BT = RNG.integers(0, V, (3, B, T)).astype(np.int32)
MANY_BT, MANY_TARGETS_BT, MANY_VERSUS_BT = RNG.integers(0, V, (3, 4, 25)).astype(np.int32)
# A biased model of each order of norms, beside what else changes the way from a write to a logit.
BIASES = {name: True for name in ("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias")}
make = functools.partial(test_decoder.make, context_length=29)
ORDERS = {
    "pre": {**BIASES, "tied_head": False, "final_norm": False},
    "parallel": {**BIASES, "parallel_residual": True, "positions": "sinusoidal", "embed_scale": 3.7},
    "post": {**BIASES, "norm_position": "post", "embed_scale": 3.7, "final_norm": False, "head_bias": True},
    "both": {
        **BIASES,
        "head_bias": True,
        "norm_position": "both",
        "positions": "rotary",
        "window": 3,
        "logit_soft_cap": 2.1,
    },
    "output": {**BIASES, "norm_position": "output", "num_kv_heads": 1, "scan_layers": True},
    "rms": {"norm": "rmsnorm", "norm_position": "post", "positions": "alibi", "logit_soft_cap": 1.9},
    "no scale": {"norm_position": "both", "norm_scale": False, "residual_scale": 0.7},
    "scaled": {
        **{**BIASES, "embedding_norm": True, "residual_scale": 0.7, "logit_scale": 1.9, "head_bias": True},
        **{"embed_scale": 3.7, "parallel_residual": True, "shared_norm": True},
    },
}


@functools.cache
def attributed(order, versus=False):
    model, params = make(**ORDERS[order])
    return model, params, fd.attribute(model, params, TOKENS_BT, TARGETS_BT, VERSUS_BT if versus else None)


def picked(logits_BTV, tokens_BT):
    return np.take_along_axis(np.asarray(logits_BTV), tokens_BT[..., None], -1)[..., 0]


def assert_sums(model, params, tokens_BT, targets_BT, versus_BT=None, bound=1e-5):
    """The contributions sum to the model's logit, relative to the largest logit at that position.

    Float32 rounds at 6e-8 of a number, and some hundred of them are added.
    """
    attribute = jax.jit(functools.partial(fd.attribute, model))
    parts = attribute(params, tokens_BT, targets_BT, versus_BT)
    logits_BTV = jax.jit(model.apply)({"params": params}, tokens_BT)
    largest_BT = np.abs(logits_BTV).max(-1)
    expected_BT = picked(logits_BTV, targets_BT) - (0 if versus_BT is None else picked(logits_BTV, versus_BT))
    for given_BT in (parts.total_BT(), parts.logit_BT):
        assert given_BT.dtype == logits_BTV.dtype
        assert (np.abs(given_BT - expected_BT) <= bound * largest_BT).all()
    # Heads contribute something.
    assert np.abs(parts.heads_LBNTS).max() > 0.01 or model.config.output_init == "zero"
    return parts


FURTHER = [pytest.param(name, marks=pytest.mark.full) for name in RANDOM]


@pytest.mark.short("parallel", "output", "rms")
@pytest.mark.parametrize("name", [*CHOICES, *ORDERS, *FURTHER])
def test_parts_sum_to_the_logit(name):
    model, params = make(**(CHOICES | RANDOM | ORDERS)[name])
    assert_sums(model, params, MANY_BT, MANY_TARGETS_BT)


@pytest.mark.full
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parts_sum_in_models_from_elsewhere(model_type):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import test_families

    model, params, _ = test_families.loaded(model_type, 0)
    tokens_BT, targets_BT = np.random.default_rng(1).integers(0, test_families.V, (2, 2, 50)).astype(np.int32)
    assert_sums(model, params, tokens_BT, targets_BT)


@pytest.mark.full
@pytest.mark.parametrize("order", ["pre", "post", "both"])
def test_parts_sum_to_the_difference_of_two_logits(order):
    model, params = make(**ORDERS[order])
    parts = assert_sums(model, params, MANY_BT, MANY_TARGETS_BT, MANY_VERSUS_BT)
    one, other = (fd.attribute(model, params, MANY_BT, picks) for picks in (MANY_TARGETS_BT, MANY_VERSUS_BT))
    difference = jax.tree.map(jnp.subtract, one, other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), parts, difference)


def alone(part, model, params, seen):
    """One part of the logits by a forward pass in float64 in which nothing else is written."""
    config = model.config
    _, own_BTD = streams(part, model, params, seen)[-1]
    params = reference.map_leaves(lambda leaf: np.asarray(leaf, np.float64), params)
    head_VD = params["embedding"] if config.tied_head else params["head"].T
    bias_V = params["head_bias"] if config.head_bias and part == ("bias",) else np.zeros(V)
    return config.logit_scale * ((own_BTD * head_VD[TARGETS_BT]).sum(-1) + bias_V[TARGETS_BT])


def streams(part, model, params, seen):
    """What attention of each layer is given, and the head at the end: all of it, and the share of one part.

    Each norm subtracts the mean of what it is given, and divides by the size of what it was given when all was there.
    A part is ("head", layer, n, s), ("feed_forward", layer), or the name of one that all layers add to.
    """
    config = model.config
    params = reference.map_leaves(lambda leaf: np.asarray(leaf, np.float64), params)
    seen = {name: np.asarray(array, np.float64) for name, array in seen.items()}
    kind, *which = (part,) if isinstance(part, str) else part

    def norm(params, whole_BTD, own_BTD):
        if config.norm == "layernorm":
            whole_BTD, own_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True) for x_BTD in (whole_BTD, own_BTD))
        gain_BTD = params.get("scale", 1.0) / np.sqrt((whole_BTD**2).mean(-1, keepdims=True) + config.norm_epsilon)
        bias_D = params.get("bias", 0.0)
        return whole_BTD * gain_BTD + bias_D, own_BTD * gain_BTD + bias_D * (kind == "bias")

    def add(name, params, streams, writes):
        if config.norm_position in ("both", "output"):
            writes = norm(params.get(f"{name}_output_norm", {}), *writes)
        pairs, scale = zip(streams, writes, strict=True), config.residual_scale
        streams = [stream_BTD + scale * write_BTD for stream_BTD, write_BTD in pairs]
        return norm(params[f"{name}_norm"], *streams) if config.norm_position == "post" else streams

    token_BTD = params["embedding"][TOKENS_BT] * config.embed_scale
    position_BTD = np.zeros_like(token_BTD)
    if config.positions == "learned":
        position_BTD += params["positions"][:T]
    elif config.positions == "sinusoidal":
        position_BTD += [reference.sinusoidal(t, config.embed_dim) for t in range(T)]
    streams = (token_BTD, token_BTD * (kind == "token"))
    if config.embedding_norm:
        streams = norm(params.get("embedding_norm", {}), *streams)
    now = (streams[0] + position_BTD, streams[1] + position_BTD * (kind == "position"))
    given = []
    for i in range(config.num_layers):
        layer = reference.map_leaves(lambda leaf, i=i: leaf[i], params["layers"])
        given.append(norm(layer.get("attention_norm", {}), *now) if config.norm_position in ("pre", "both") else now)
        out, down = layer["attention"]["out"], layer["feed_forward"]["down"]
        bias_D = out.get("bias", np.zeros(config.embed_dim))
        heads_BTD = np.einsum("btnh,nhd->btd", seen["heads"][i], out["kernel"])
        own_BTD = heads_BTD * (kind == "heads") + bias_D * (kind == "bias")
        if kind == "head" and which[0] == i:
            n, s = which[1:]
            written_BD = seen["v"][i, :, s, n * config.kv_heads // config.num_heads] @ out["kernel"][n]
            own_BTD = seen["weights"][i, :, n, :, s, None] * written_BD[:, None]
        now = add("attention", layer, now, (heads_BTD + bias_D, own_BTD))
        whole_BTD = seen["hidden"][i] @ down["kernel"] + down.get("bias", 0.0)
        now = add("feed_forward", layer, now, (whole_BTD, whole_BTD * (kind == "feed_forward" and which in ([], [i]))))
    return [*given, norm(params.get("final_norm", {}), *now) if config.final_norm else now]


@pytest.mark.short("both")
@pytest.mark.parametrize("order", ORDERS)
def test_each_part_is_what_it_gives_alone(order):
    model, params, parts = attributed(order)
    seen = fd.capture(model, params, TOKENS_BT)
    L, N = SIZES["num_layers"], SIZES["num_heads"]
    expected = {"token": parts.token_BT, "position": parts.position_BT, "bias": parts.bias_BT}
    expected = {(name,): part_BT for name, part_BT in expected.items()}
    expected |= {("feed_forward", i): parts.feed_forward_LBT[i] for i in range(L)}
    expected |= {
        ("head", i, n, s): parts.heads_LBNTS[i, :, n, :, s] for i in range(L) for n in range(N) for s in range(T)
    }
    for part, part_BT in expected.items():
        np.testing.assert_allclose(part_BT, alone(part, model, params, seen), atol=2e-5, err_msg=f"{part}")


@pytest.mark.short("both")
@pytest.mark.parametrize("order", ["both", "rms"])
def test_the_soft_cap_is_what_it_takes(order):
    model, params, parts = attributed(order, versus=True)
    uncapped, _ = make(**ORDERS[order] | {"logit_soft_cap": None})
    capped_BT, raw_BT = (
        picked(logits_BTV, TARGETS_BT) - picked(logits_BTV, VERSUS_BT)
        for logits_BTV in (reference.decode(params, TOKENS_BT, m.config) for m in (model, uncapped))
    )
    np.testing.assert_allclose(parts.soft_cap_BT, capped_BT - raw_BT, atol=5e-5)
    np.testing.assert_allclose(parts.logit_BT, capped_BT, atol=5e-5)
    assert np.abs(parts.soft_cap_BT).max() > 0.1


def test_what_a_model_does_not_have_gives_nothing():
    model, params = make(positions="rotary")
    parts = fd.attribute(model, params, TOKENS_BT, TARGETS_BT)
    for none_BT in (parts.position_BT, parts.bias_BT, parts.soft_cap_BT):
        np.testing.assert_array_equal(none_BT, 0)


def test_nothing_comes_from_what_a_head_did_not_read():
    _, _, parts = attributed("both")
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    is_seen_TS = (distance_TS >= 0) & (distance_TS < 3)
    given_TS = np.abs(parts.heads_LBNTS).min((0, 1, 2))
    np.testing.assert_array_equal(given_TS > 0, is_seen_TS)


def test_float64_sums_to_its_own_rounding():
    with jax.enable_x64(True):
        model, params = make(**ORDERS["both"], dtype="float64")
        parts = assert_sums(model, params, TOKENS_BT, TARGETS_BT, VERSUS_BT, bound=1e-12)
    assert parts.heads_LBNTS.dtype == np.float64


@pytest.mark.full
def test_bfloat16_is_computed_in_float32():
    model, params = make(**ORDERS["post"], dtype="bfloat16")
    parts = fd.attribute(model, params, TOKENS_BT, TARGETS_BT)
    jax.tree.map(np.testing.assert_array_equal, parts, attributed("post")[2])
    logits_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(parts.logit_BT, picked(logits_BTV, TARGETS_BT), atol=0.5)


@pytest.mark.short("dropout")
@pytest.mark.parametrize("way", ["dropout", "unstacked layers, fast attention"])
def test_other_ways_of_running_give_the_same(way):
    settings = {"dropout": 0.5} if way == "dropout" else {"attention": "blockwise", "dropout": 0.0}
    model, params = make(**ORDERS["pre"] | settings)
    params = params if way == "dropout" else fd.unstack_layers(params)
    parts = fd.attribute(model, params, TOKENS_BT, TARGETS_BT)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), parts, attributed("pre")[2])


def test_the_largest_parts_come_first():
    _, _, parts = attributed("pre")
    b, t = 1, 4
    everything = parts.largest(b, t, 10**6)
    # L N sources of attention, L feed-forwards, and token, position, bias and soft cap.
    assert len(everything) == len({name for name, _ in everything}) == 2 * 6 * T + 2 + 4
    np.testing.assert_allclose(sum(part for _, part in everything), parts.logit_BT[b, t], atol=1e-4)
    sizes = [abs(part) for _, part in everything]
    assert sizes == sorted(sizes, reverse=True) and parts.largest(b, t, 3) == everything[:3]
    given = dict(everything)
    assert given["head 1.4 from position 2"] == pytest.approx(float(parts.heads_LBNTS[1, b, 4, t, 2]))
    assert given["feed-forward 1"] == pytest.approx(float(parts.feed_forward_LBT[1, b, t]))
    assert given["bias"] == pytest.approx(float(parts.bias_BT[b, t]))


def test_wrong_targets_are_refused():
    model, params = make()
    with pytest.raises(fd.UserError, match=r"versus_BT has the shape \(2, 6\), tokens_BT \(2, 7\)"):
        fd.attribute(model, params, TOKENS_BT, TARGETS_BT, VERSUS_BT[:, 1:])
    with pytest.raises(ValueError, match="token id 17 is not in the vocabulary: 0 to 16"):
        fd.attribute(model, params, TOKENS_BT, np.full_like(TARGETS_BT, V))


@pytest.mark.short("pre")
@pytest.mark.parametrize("order", ORDERS)
def test_names_are_right(order):
    model, params = make(**ORDERS[order], vocab_size=19)
    with checked_shape_names() as functions:
        jax.eval_shape(functools.partial(fd.attribute, model), params, TOKENS_BT, TARGETS_BT, VERSUS_BT)
        score_parts(model, fd.capture(model, params, TOKENS_BT), 1, 4, 1, 5, 3)
    assert functions >= {
        "attribution.py:attribute_activations",
        "attribution.py:head_contributions",
        "attribution.py:score_parts",
    }


# --- One score ---

SCORES = {
    "plain": {},
    "grouped and rotary": {"positions": "rotary", "num_kv_heads": 3, "attention_scale": 0.17},
    "slopes": {"positions": "alibi", "window": 4},
    "capped": {"positions": "rotary", "attention_soft_cap": 0.3, "qk_norm": "all"},
    "capped slopes": {"positions": "alibi", "attention_soft_cap": 0.3, "num_kv_heads": 1},
}


@pytest.mark.short("capped slopes")
@pytest.mark.parametrize("name", SCORES)
def test_parts_sum_to_the_score(name):
    model, params = make(**SCORES[name])
    seen = fd.capture(model, params, TOKENS_BT)
    split = jax.jit(functools.partial(score_parts, model, seen), static_argnums=1)
    for layer, n, b, t, s in np.random.default_rng(0).integers(0, (2, 6, B, T, T), (25, 5)):
        parts = split(layer, int(n), b, t, s)
        score = seen["scores"][layer, b, n, t, s]
        np.testing.assert_allclose(parts.total(), score, atol=1e-5)
        assert parts.score == score and np.isneginf(parts.mask) == np.isneginf(score)
        assert parts.dimensions_H.shape == (10,) and np.isfinite(parts.dimensions_H).all()
        assert (parts.soft_cap != 0) == ("capped" in name)
        assert (parts.position != 0) == ("slopes" in name and s != t)


def test_each_dimension_is_a_product():
    model, params = make(**SCORES["grouped and rotary"])
    seen = fd.capture(model, params, TOKENS_BT)
    layer, n, b, t, s = 1, 4, 1, 5, 2
    parts = score_parts(model, seen, layer, n, b, t, s)
    expected_H = [
        seen["q_rotated"][layer, b, t, n, h] * seen["k_rotated"][layer, b, s, n // 2, h] * 0.17 for h in range(10)
    ]
    np.testing.assert_allclose(parts.dimensions_H, expected_H, rtol=1e-5)


def test_a_slope_is_a_part_by_itself():
    model, params = make(**SCORES["capped slopes"])
    seen = fd.capture(model, params, TOKENS_BT)
    parts = score_parts(model, seen, 0, 3, 0, 6, 2)
    np.testing.assert_allclose(parts.position, -4 * reference.alibi_slopes(6)[3], rtol=1e-6)
    product = parts.dimensions_H.sum()
    np.testing.assert_allclose(product + parts.soft_cap, 0.3 * np.tanh(product / 0.3), rtol=1e-5)


def test_the_keys_of_a_cache_are_refused():
    model, params = make()
    seen, _ = fd.capture(model, params, TOKENS_BT, empty_cache(model.config, B, 11))
    with pytest.raises(fd.UserError, match="without a cache"):
        score_parts(model, seen, 0, 0, 0, 0, 0)
