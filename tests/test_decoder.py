"""The whole network: equal to the reference in every choice of its config, and to itself in every way to run it."""

import dataclasses
import functools
import random
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn

from flax_decoder.config import ModelConfig, fields_of
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers
from flax_decoder.nn.stack import stacked_or_tuple

B, T, V = 2, 7, 17
SIZES = {
    "vocab_size": V,
    "context_length": 11,
    "num_layers": 2,
    "embed_dim": 14,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "mlp_dim": 13,
}
# Any generator serves; this one compiles in a tenth of the time of the default.
RNG = functools.partial(jax.random.key, impl="rbg")
TOKENS_BT = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)

# float32 rounds at 6e-8 of numbers up to 10, some hundred times on the way through two layers.
TOLERANCE = 5e-5

# Together these hold every choice and every switch; `test_the_list_above_is_complete` counts.
CHOICES = {
    "default": {},
    "gpt2": {
        "num_kv_heads": None,
        "norm_bias": True,
        "attention_in_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "feed_forward": "gelu_tanh",
        "attention": "reference",
        "matmul_precision": "highest",
    },
    "vaswani": {
        "positions": "sinusoidal",
        "norm_position": "post",
        "final_norm": False,
        "feed_forward": "relu",
        "embed_scale": 3.7,
        "head_bias": True,
    },
    "llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "feed_forward": "swiglu",
        "tied_head": False,
        "rotary_base": 501.0,
        "rotary_scaling": "llama3",
        "rotary_scaling_factor": 5.0,
        "rotary_original_context": 29,
        "attention": "blockwise",
        "remat": "attention",
    },
    "neox": {
        "head_bias": True,
        "positions": "rotary",
        "rotary_fraction": 0.4,
        "rotary_layout": "interleaved",
        "rotary_pattern": (True, False),
        "rotary_scaling": "longrope",
        "rotary_original_context": 5,
        "rotary_short_factors": (1.1, 1.7),
        "rotary_long_factors": (2.5, 9.0),
        "rotary_magnitude": 1.2,
        "rotary_query_scaling": 0.3,
        "parallel_residual": True,
        "shared_norm": True,
        "residual_scale": 0.7,
        "norm_bias": True,
        "attention_in_bias": True,
        "tied_head": False,
        "scan_layers": True,
    },
    "gemma": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_position": "both",
        "qk_norm": "head",
        "attention_scale": 0.17,
        "rotary_window_base": 97.0,
        "rotary_scaling": "dynamic",
        "rotary_scaling_factor": 3.0,
        "rotary_original_context": 5,
        "feed_forward": "geglu",
        "embed_scale": 3.7,
        "attention_soft_cap": 1.3,
        "logit_soft_cap": 2.1,
        "num_layers": 3,
        "window": 3,
        "window_pattern": (True, False),
    },
    "bloom": {
        **{"positions": "alibi", "norm_bias": True, "mlp_bias": True, "attention_out_bias": True},
        **{"embedding_norm": True, "qk_norm": "each_head", "qk_norm_kind": "layernorm", "qk_norm_bias": True},
    },
    "olmo": {
        "norm_position": "output",
        "qk_norm": "all",
        "qk_norm_position": "after",
        "qkv_clip": 0.4,
        "logit_scale": 1.9,
        "residual_scale": 0.7,
        "positions": "rotary",
        "norm": "rmsnorm",
        "feed_forward": "geglu_tanh",
    },
    "primer": {
        **{"feed_forward": "relu_squared", "positions": "none", "num_kv_heads": 1, "remat": "dots"},
        **{"norm_scale": False, "qk_norm": "head"},
    },
    "yarn": {
        **{"positions": "rotary", "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_fraction": 0.8},
        **{"rotary_original_context": 29, "rotary_high_frequency_factor": 6.0, "rotary_magnitude": 1.3},
        **{"rotary_low_frequency_factor": 0.4, "window": 3, "window_pattern": (True, False)},
        **{"rotary_window_base": 97.0, "rotary_truncate": False},
    },
    "stretched": {
        "positions": "rotary",
        "rotary_scaling": "linear",
        "rotary_scaling_factor": 3.0,
        "window": 1,
        "attention": "splash",
        "remat": "heads",
    },
    "sloped window": {"positions": "alibi", "window": 4, "scan_layers": True, "remat": "full", "norm_epsilon": 0.3},
    "llama4": {
        "positions": "rotary",
        "rotary_scaling": "llama3",
        "rotary_original_context": 29,
        "rotary_low_frequency_factor": 1.5,
        "rotary_high_frequency_factor": 6.0,
        "qk_norm": "head",
        "output_init": "zero",
        "scan_layers": True,
        "window": 3,
        "window_pattern": (False, True),
        "rotary_window_base": 97.0,
    },
}
# Settings that change how a model starts or trains, or a dtype: tests of their own.
NOT_HERE = {"dropout", "init_stddev", "dtype"}


def words_of(name):
    annotation = fields_of("model")[name].annotation
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def random_choices(rng):
    """One allowed mixture of all settings."""
    while True:
        settings = {name: rng.choice(words_of(name)) for name in fields_of("model") if words_of(name)}
        settings |= {name: rng.random() < 0.5 for name, field in fields_of("model").items() if field.annotation is bool}
        settings |= {
            "dtype": "float32",
            "num_kv_heads": rng.choice([1, 2, 3, 6, None]),
            "window": rng.choice([None, 1, 3, 5]),
            "attention_scale": rng.choice([None, 0.17]),
            "attention_soft_cap": rng.choice([None, 0.9]),
            "logit_soft_cap": rng.choice([None, 1.9]),
            "embed_scale": rng.choice([1.0, 2.3]),
            "rotary_fraction": rng.choice([1.0, 0.4]),
            "rotary_pattern": rng.choice([(True,), (True, False)]),
            "rotary_original_context": 29,
            "residual_scale": rng.choice([1.0, 0.7]),
            "qkv_clip": rng.choice([None, 0.4]),
            "logit_scale": rng.choice([1.0, 1.9]),
        }
        settings["window_pattern"] = rng.choice([(True,), (False, True)]) if settings["window"] else (True,)
        num_pairs = int(SIZES["head_dim"] * settings["rotary_fraction"]) // 2
        settings |= {"rotary_short_factors": (1.7,) * num_pairs, "rotary_long_factors": (3.1,) * num_pairs}
        if settings["positions"] != "rotary":
            settings |= {"rotary_scaling": "none", "rotary_fraction": 1.0, "rotary_pattern": (True,)}
        try:
            ModelConfig(**SIZES | settings)
        except ValueError:
            continue
        return settings


RANDOM = {f"random {seed}": random_choices(random.Random(seed)) for seed in range(8)}


def make(seed=0, **settings):
    model = Decoder(ModelConfig(**SIZES | settings))
    return model, reference.random_params(model, seed)


@pytest.mark.parametrize("name", [*CHOICES, *(pytest.param(name, marks=pytest.mark.full) for name in RANDOM)])
def test_logits_equal_the_reference(name):
    model, params = make(**(CHOICES | RANDOM)[name])
    logits_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    expected_BTV = reference.decode(params, TOKENS_BT, model.config)
    assert logits_BTV.dtype == jnp.float32 and logits_BTV.shape == (B, T, V)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=1e-5)
    assert np.abs(expected_BTV - expected_BTV.mean(-1, keepdims=True)).max() > 0.5


def test_the_list_above_is_complete():
    for name, field in fields_of("model").items():
        values = {getattr(ModelConfig(**SIZES | settings), name) for settings in CHOICES.values()}
        if name in NOT_HERE or name in SIZES:
            continue
        # cuDNN needs a GPU; what can be said of it without one is in test_kernels.py.
        wanted = set(words_of(name)) - {"cudnn"} or ({True, False} if field.annotation is bool else set())
        assert wanted <= values, name
        assert len(values) > 1, f"{name} is never changed"


def test_each_setting_changes_the_logits():
    """A setting that nobody reads would agree with a reference that does not read it either."""
    changes = {
        "embed_scale": 2.0,
        "norm": "rmsnorm",
        "norm_epsilon": 0.5,
        "qk_norm": "all",
        "attention_scale": 0.17,
        "attention_soft_cap": 0.9,
        "logit_soft_cap": 1.9,
        "window": 3,
        "rotary_base": 97.0,
        "rotary_scaling": "linear",
        "feed_forward": "relu",
    }
    base = {"positions": "rotary"}
    before_BTV = reference.decode(make(**base)[1], TOKENS_BT, ModelConfig(**SIZES | base))
    for name, value in changes.items():
        model, params = make(**base | {name: value})
        after_BTV = reference.decode(params, TOKENS_BT[:1], model.config)
        assert np.abs(after_BTV - before_BTV[:1]).max() > 0.01, name


# --- One layout of params, several ways to run ---

WAYS = [(scan, remat) for scan in (False, True) for remat in ("none", "attention", "dots", "heads", "full")]


@functools.cache
def loss_and_gradients(scan_layers, remat, dropout):
    settings = {"positions": "rotary", "num_kv_heads": 3, "window": 4, "window_pattern": (True, False)}
    model, params = make(**settings, scan_layers=scan_layers, remat=remat, dropout=dropout)
    weights_BTV = np.random.default_rng(3).standard_normal((B, T, V)).astype(np.float32)

    def loss(params):
        rngs = {"dropout": RNG(5)}
        logits_BTV = model.apply({"params": params}, TOKENS_BT, deterministic=False, rngs=rngs)
        return (weights_BTV * logits_BTV).sum(), logits_BTV

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.short("True-full-0.3")
@pytest.mark.short(
    "False-attention-0.3", "False-dots-0.0", "False-heads-0.0", "True-none-0.3", "True-dots-0.3", "True-full-0.3"
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("scan_layers", "remat"), WAYS[1:])
def test_scan_and_remat_change_no_number(scan_layers, remat, dropout):
    expected = loss_and_gradients(False, "none", dropout)
    result = loss_and_gradients(scan_layers, remat, dropout)
    # Gradients of order 1 to 100; the compiler may sum in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), result, expected)


def test_dropout_drops():
    (_, whole_BTV), _ = loss_and_gradients(False, "none", 0.0)
    (_, dropped_BTV), _ = loss_and_gradients(False, "none", 0.3)
    assert np.abs(whole_BTV - dropped_BTV).max() > 0.1


def test_dropout_is_a_function_of_the_rng():
    model, params = make(dropout=0.3)

    @jax.jit
    def logits(rng):
        return model.apply({"params": params}, TOKENS_BT, deterministic=False, rngs={"dropout": rng})

    np.testing.assert_array_equal(logits(RNG(1)), logits(RNG(1)))
    assert np.abs(logits(RNG(1)) - logits(RNG(2))).max() > 0.1
    plain_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(plain_BTV, reference.decode(params, TOKENS_BT, model.config), atol=TOLERANCE)


def test_each_layer_draws_its_own_dropout():
    """Layers of equal params that drop the same weights twice would average over fewer models."""
    model, params = make(dropout=0.5, positions="none", num_layers=2)
    embedding_VD = np.ones_like(params["embedding"])

    def dropped(scan_layers):
        config = dataclasses.replace(model.config, scan_layers=scan_layers)
        variables = {"params": params | {"embedding": jnp.asarray(embedding_VD)}}
        rngs = {"dropout": RNG(0)}
        apply = functools.partial(Decoder(config).apply, deterministic=False, mutable=["intermediates"])
        _, seen = jax.jit(apply)(variables, TOKENS_BT, rngs=rngs)
        attention = seen["intermediates"]["layers"]["attention"]
        v_LBSKH, weights, heads_LBTNH = (attention[name][0] for name in ("v", "weights", "heads"))
        # The first query has one key: its heads are that value, kept (times 2) or dropped (times 0).
        assert weights.shape[0] == v_LBSKH.shape[0] == 2
        first_LBKG = heads_LBTNH[:, :, 0, :, 0].reshape(2, B, 2, 3) / v_LBSKH[:, :, 0, :, None, 0]
        return np.round(first_LBKG).astype(int)

    for scan_layers in (False, True):
        kept_LBKG = np.asarray(dropped(scan_layers))
        assert set(kept_LBKG.flat) == {0, 2}
        assert (kept_LBKG[0] != kept_LBKG[1]).any()


@functools.cache
def initial(**settings):
    model = Decoder(ModelConfig(**SIZES, qk_norm="head", mlp_bias=True, tied_head=False, **settings))
    # The default generator: RNG gives the layers of a vmap different numbers even for equal keys.
    return jax.jit(model.init)(jax.random.key(0), TOKENS_BT)["params"]


def test_params_have_one_layout():
    plain, scanned = initial(), initial(scan_layers=True, remat="full")
    jax.tree.map(np.testing.assert_array_equal, scanned, plain)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(plain))
    kernel_LDNH = plain["layers"]["attention"]["query"]["kernel"]
    assert kernel_LDNH.shape == (2, 14, 6, 10)
    assert np.abs(kernel_LDNH[0] - kernel_LDNH[1]).max() > 0.01  # each layer starts from its own numbers
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(plain["layers"]))


def test_params_start_as_the_config_says():
    plain, zero = initial(), initial(output_init="zero")
    np.testing.assert_allclose(np.std(plain["layers"]["attention"]["query"]["kernel"]), 0.02, rtol=0.1)
    for part, name in (("attention", "out"), ("feed_forward", "down")):
        np.testing.assert_allclose(np.std(plain["layers"][part][name]["kernel"]), 0.01, rtol=0.15)  # 0.02 / sqrt(2 L)
        assert not np.any(zero["layers"][part][name]["kernel"])
        zero["layers"][part][name]["kernel"] = plain["layers"][part][name]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, zero, plain)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        if path[-1].key in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, path[-1].key == "scale"))


@pytest.mark.parametrize(
    ("flag", "owners"),
    [
        ("norm_bias", {"attention_norm", "feed_forward_norm", "final_norm"}),
        ("attention_in_bias", {"query", "key", "value"}),
        ("attention_out_bias", {"out"}),
        ("mlp_bias", {"up", "gate", "down"}),
    ],
)
def test_biases_are_where_the_config_wants_them(flag, owners):
    """The reference adds the biases it finds; here is said which there are."""

    def owners_of_biases(**settings):
        leaves = jax.tree_util.tree_leaves_with_path(make(feed_forward="swiglu", **settings)[1])
        return {path[-2].key for path, _ in leaves if path[-1].key == "bias"}

    assert owners_of_biases() == set()
    assert owners_of_biases(**{flag: True}) == owners


def test_scan_and_remat_are_really_on():
    """The comparisons above compare something with itself unless the settings change the program."""

    def program(**settings):
        model, params = make(**settings)
        return str(jax.make_jaxpr(model.apply)({"params": params}, TOKENS_BT))

    assert " scan[" not in program() and "remat" not in program()
    assert " scan[" in program(scan_layers=True)
    assert "remat" in program(remat="full")
    assert program(scan_layers=True).count("dot_general") == program(scan_layers=True, num_layers=9).count(
        "dot_general"
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bfloat16(scan_layers):
    settings = {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "swiglu", "scan_layers": scan_layers}
    model, params = make(**settings, dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    expected_BTV = reference.decode(params, TOKENS_BT, model.config)
    assert logits_BTV.dtype == jnp.float32
    # bfloat16 rounds at 2^-9 of each number; some tens of roundings of logits that reach 5 add up to about 0.1.
    difference = np.abs(logits_BTV - expected_BTV).max()
    assert 1e-4 < difference < 0.15
    # Logits are never bfloat16, not even on the way; on CPU the numbers would not tell.
    # One row: no other array has its T rows of V numbers.
    program = str(jax.make_jaxpr(model.apply)({"params": params}, TOKENS_BT[:1]))
    assert f"f32[1,{T},{V}]" in program and "bf16[" in program
    assert f"bf16[1,{T},{V}]" not in program and f"bf16[{T},{V}]" not in program


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_float64_is_exact_throughout(norm):
    settings = {"positions": "rotary", "rotary_base": 77.0, "norm": norm, "feed_forward": "geglu", "qk_norm": "head"}
    model, params = make(**settings, attention_soft_cap=2.0, logit_soft_cap=3.0)
    model = Decoder(dataclasses.replace(model.config, dtype="float64"))
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        model.apply({"params": params}, TOKENS_BT)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        logits_BTV = np.asarray(jax.jit(model.apply)({"params": exact}, TOKENS_BT))
    # One float32 on the way would leave 1e-8.
    np.testing.assert_allclose(logits_BTV, reference.decode(params, TOKENS_BT, model.config), rtol=1e-12, atol=1e-12)


@pytest.mark.short("False-settings1")
@pytest.mark.parametrize("settings", [{"positions": "rotary", "window": 5}, {"attention": "blockwise"}])
@pytest.mark.parametrize("has_cache", [True, False])
def test_a_model_can_be_exported_with_a_free_batch_and_length(has_cache, settings):
    model, params = make(**settings)
    B, T = jax.export.symbolic_shape("B, T", constraints=[f"T<={TOKENS_BT.shape[1]}"])
    cache = empty_cache(model.config, len(TOKENS_BT), TOKENS_BT.shape[1]) if has_cache else None
    leaves, structure = jax.tree.flatten(cache)
    free = [jax.ShapeDtypeStruct((B, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    @jax.jit
    def logits_of(params, tokens_BT, leaves):
        result = model.apply({"params": params}, tokens_BT, jax.tree.unflatten(structure, leaves))
        return result[0] if has_cache else result

    exported = jax.export.export(logits_of)(params, jax.ShapeDtypeStruct((B, T), jnp.int32), free)
    logits_BTV = exported.call(params, TOKENS_BT, leaves)
    np.testing.assert_allclose(logits_BTV, logits_of(params, TOKENS_BT, leaves), rtol=1e-5, atol=1e-6)


# --- A look inside ---

INSIDE = {"positions": "rotary", "rotary_fraction": 0.4, "attention_in_bias": True, "window": 4, "num_layers": 3}


@functools.cache
def look_inside(scan_layers=False, **settings):
    model, params = make(**INSIDE | settings, scan_layers=scan_layers)
    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    logits_BTV, seen = apply({"params": params}, TOKENS_BT)
    return model, params, logits_BTV, seen["intermediates"]


@pytest.mark.short("True")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_intermediates_are_what_their_names_say(scan_layers):
    model, params, logits_BTV, seen = look_inside(scan_layers)
    attention = seen["layers"]["attention"]
    names = {"q", "k", "v", "q_rotated", "k_rotated", "scores", "weights", "heads"}
    assert names <= attention.keys()
    assert all(type(attention[name]) is tuple and len(attention[name]) == 1 for name in names)
    L, N, K, H, G = 3, 6, 2, 10, 3
    q_LBTNH, k_LBSKH, v_LBSKH = (attention[name][0] for name in "qkv")
    assert q_LBTNH.shape == attention["q_rotated"][0].shape == attention["heads"][0].shape == (L, B, T, N, H)
    assert k_LBSKH.shape == v_LBSKH.shape == attention["k_rotated"][0].shape == (L, B, T, K, H)
    weights_LBKGTS, scores_LBKGTS = attention["weights"][0], attention["scores"][0]
    assert weights_LBKGTS.shape == scores_LBKGTS.shape == (L, B, K, G, T, T)

    np.testing.assert_allclose(weights_LBKGTS.sum(-1), 1, rtol=1e-6)
    seen_TS = np.array([[reference.sees(t, s, 4) for s in range(T)] for t in range(T)])
    assert (np.asarray(weights_LBKGTS)[..., ~seen_TS] == 0).all()
    assert (np.asarray(weights_LBKGTS)[..., seen_TS] > 0).all()
    np.testing.assert_allclose(weights_LBKGTS, jax.nn.softmax(scores_LBKGTS, axis=-1), atol=1e-6)
    heads_LBTKGH = np.einsum("LBKGTS,LBSKH->LBTKGH", weights_LBKGTS, v_LBSKH)
    np.testing.assert_allclose(attention["heads"][0], heads_LBTKGH.reshape(L, B, T, N, H), atol=TOLERANCE)

    exact = reference.map_leaves(np.float64, params)
    own = reference.map_leaves(lambda leaf: leaf[0], exact["layers"])
    for b, t in np.ndindex(B, T):
        x_D = reference.norm(exact["embedding"][TOKENS_BT[b, t]], own["attention_norm"], model.config)
        for name, array in (("query", q_LBTNH), ("key", k_LBSKH), ("value", v_LBSKH)):
            expected = reference.linear(x_D, own["attention"][name])
            np.testing.assert_allclose(array[0, b, t], expected, atol=TOLERANCE)
            frequencies = reference.rotary_frequencies(H, model.config)
            if name != "value":
                turned = np.array([reference.rotate(head, t, frequencies) for head in expected])
                rotated = attention["q_rotated" if name == "query" else "k_rotated"][0][0, b, t]
                np.testing.assert_allclose(rotated, turned, atol=TOLERANCE)
    np.testing.assert_allclose(seen["final_norm"]["output"][0] @ params["embedding"].T, logits_BTV, atol=TOLERANCE)


def test_scanned_and_unrolled_layers_show_the_same():
    unrolled, scanned = (look_inside(scan_layers)[3] for scan_layers in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE), scanned, unrolled)


def test_without_rotation_there_is_nothing_rotated():
    attention = look_inside(positions="alibi", rotary_fraction=1.0)[3]["layers"]["attention"]
    assert {"q", "k", "v", "scores", "weights", "heads"} <= attention.keys()
    assert not {"q_rotated", "k_rotated"} & attention.keys()


@pytest.mark.short("auto", "reference")
@pytest.mark.parametrize("attention", ["auto", "blockwise", "reference"])
def test_looking_inside_changes_no_logit(attention):
    model, params, logits_BTV, seen = look_inside(attention=attention)
    plain_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(plain_BTV, logits_BTV, atol=TOLERANCE)
    assert "weights" in seen["layers"]["attention"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_nobody_asks_for_costs_nothing(scan_layers, monkeypatch):
    """The program is, letter by letter, the one of a model that offers no intermediates at all."""
    model, params = make(**INSIDE, attention="reference", scan_layers=scan_layers)

    def program(mutable=False):
        # A new function each time: make_jaxpr remembers the old ones.
        return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS_BT, mutable=mutable))(params))

    offering, asked = program(), program(["intermediates"])
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    assert offering == program()
    assert len(asked) > len(offering)


# --- Refusals ---


@pytest.mark.parametrize("wrong", [V, V + 1000, -1, -V, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_vocabulary_is_refused(wrong):
    model, params = make()
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"token id {wrong} is not in the vocabulary: 0 to {V - 1}"):
        model.apply({"params": params}, tokens_BT)
    with pytest.raises(ValueError, match=f"token id {wrong} "):
        model.apply({"params": params}, jnp.asarray(tokens_BT))


@functools.cache
def jitted(positions):
    model, params = make(positions=positions)
    return jax.jit(functools.partial(model.apply, {"params": params}))


@pytest.mark.parametrize("wrong", [V, -1, -V, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_vocabulary_becomes_nan_where_it_cannot_be_refused(wrong):
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[1, 2] = wrong
    logits_BTV = jitted("learned")(tokens_BT)
    assert np.isnan(logits_BTV[1, 2:]).all()
    np.testing.assert_array_equal(logits_BTV[0], jitted("learned")(TOKENS_BT)[0])
    assert np.isfinite(logits_BTV[0]).all()


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_tokens_that_are_no_integers_are_refused(dtype):
    model, params = make()
    with pytest.raises(ValueError, match="token ids must be integers"):
        model.apply({"params": params}, TOKENS_BT.astype(dtype))
    with pytest.raises(ValueError, match="token ids must be integers"):
        jax.eval_shape(model.apply, {"params": params}, TOKENS_BT.astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8, np.int32])
def test_integers_of_any_width_are_tokens(dtype):
    np.testing.assert_array_equal(jitted("learned")(TOKENS_BT.astype(dtype)), jitted("learned")(TOKENS_BT))


def test_learned_positions_end():
    model, params = make(positions="learned")
    longest_BT = np.zeros((1, 11), np.int32)
    jax.eval_shape(model.apply, {"params": params}, longest_BT)
    with pytest.raises(ValueError, match="12 tokens are more than context_length = 11"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 12), np.int32))


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "alibi", "none"])
def test_other_positions_do_not_end(positions):
    model, params = make(positions=positions)
    assert jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 12), np.int32)).shape == (1, 12, V)


def test_a_model_without_a_vocabulary_is_refused():
    model = Decoder(ModelConfig())
    with pytest.raises(ValueError, match="vocab_size is not set"):
        model.init(jax.random.key(0), TOKENS_BT)


def test_params_may_be_numpy_arrays():
    model, params = make(positions="learned")
    in_numpy = jax.tree.map(np.asarray, params)
    jax.eval_shape(lambda: model.apply({"params": in_numpy}, TOKENS_BT))


# --- Depth ---


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_params_of_another_depth_are_refused(scan_layers, num_layers):
    models = [Decoder(ModelConfig(**SIZES | {"num_layers": n}, scan_layers=scan_layers)) for n in (2, num_layers)]
    params = reference.random_params(models[1])
    for given in (params, unstack_layers(params)):
        with pytest.raises(ValueError, match=f"params have {num_layers} layers, .* num_layers = 2"):
            models[0].apply({"params": given}, np.zeros((1, 3), np.int32))


def test_layers_may_come_as_a_list_or_by_number():
    layers = tuple({"kernel": np.full(2, i)} for i in range(11))
    by_number = {str(i): layers[i] for i in sorted(range(11), key=str)}  # "10" comes before "2"
    for other in (layers, list(layers), by_number):
        assert stacked_or_tuple(other, 11) == layers
    model = Decoder(ModelConfig(**SIZES))
    params = unstack_layers(reference.random_params(model))
    tokens_BT, apply = np.arange(3)[None], jax.jit(model.apply)
    expected = apply({"params": params}, tokens_BT)
    first, second = params["layers"]
    for other in ([first, second], {"1": second, "0": first}):
        np.testing.assert_array_equal(apply({"params": params | {"layers": other}}, tokens_BT), expected)
