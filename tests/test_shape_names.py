import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from shape_names import checked_shape_names

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder

# Distinct primes, or where sizes multiply (N = K G) distinct numbers: two letters can only agree by right.
B, T, S = 5, 7, 11
SIZES = {
    "vocab_size": 17,
    "context_length": 19,
    "num_layers": 2,
    "embed_dim": 22,
    "num_heads": 12,
    "num_kv_heads": 3,
    "head_dim": 8,
    "mlp_dim": 13,
}
TOKENS_BT = np.random.default_rng(0).integers(0, 17, (B, T)).astype(np.int32)
CONFIGS = {
    "gpt2": {"norm_bias": True, "attention_in_bias": True, "mlp_bias": True, "attention": "reference"},
    "llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "feed_forward": "swiglu",
        "tied_head": False,
        "qk_norm": "head",
    },
    "bloom": {"positions": "alibi", "scan_layers": True, "remat": "full", "window": 3, "attention": "blockwise"},
    "vaswani": {"positions": "sinusoidal", "norm_position": "post", "dropout": 0.1},
}
ALWAYS_THERE = {"decoder.py:Decoder.__call__", "decoder.py:Block.__call__", "attention.py:SelfAttention.__call__"}
HERE = __file__


def wrong_rank():
    x_BTD = np.zeros((2, 3))
    return x_BTD


def wrong_size():
    x_BT, y_TD = np.zeros((2, 3)), np.zeros((5, 7))
    return x_BT, y_TD


def wrong_letter():
    B, T = 3, 2
    x_BT = np.zeros((2, 3))
    return B, T, x_BT


def right():
    B, T = 2, 3
    x_BTD, mask_BTS, bias_BT, NO_WINDOW, cached_L = np.zeros((B, T, 5)), np.zeros((1, T, 3)), np.zeros((1, T)), 7, ()
    return x_BTD, mask_BTS, bias_BT, NO_WINDOW, cached_L


@pytest.mark.parametrize("how", ["eager", "jit", "eval_shape"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_rank, r"wrong_rank: x_BTD has the shape \(2, 3\)"),
        (wrong_size, "wrong_size: T is 5 in y_TD but 3 in x_BT"),
        (wrong_letter, "wrong_letter: [BT] is"),
    ],
)
def test_a_wrong_name_is_noticed(function, message, how):
    def run():
        function()
        return jnp.zeros(())

    with pytest.raises(AssertionError, match=message), checked_shape_names(HERE):
        {"eager": run, "jit": jax.jit(run), "eval_shape": functools.partial(jax.eval_shape, run)}[how]()


def test_a_right_name_is_not():
    with checked_shape_names(HERE) as functions:
        right()
    assert "test_shape_names.py:right" in functions


def test_traced_arrays_are_checked_too():
    def wrong(x_BT):
        y_B = x_BT * 2
        return y_B

    with pytest.raises(AssertionError, match=r"wrong: y_B has the shape \(2, 3\)"), checked_shape_names(HERE):
        jax.jit(wrong)(np.zeros((2, 3)))


@pytest.mark.short("gradient-llama", "gradient-vaswani")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["eval_shape", "jit", "gradient"])
def test_names_in_the_network_are_right(name, how):
    config = ModelConfig(**SIZES, **CONFIGS[name])
    model = Decoder(config)
    params = reference.random_params(model)
    rngs = {"dropout": jax.random.key(0, impl="rbg")}

    def logits(params, tokens_BT):
        return model.apply({"params": params}, tokens_BT, deterministic=False, rngs=rngs)

    with checked_shape_names() as functions:
        jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
        if how == "eval_shape":
            jax.eval_shape(logits, params, TOKENS_BT)
        elif how == "jit":
            jax.jit(logits).trace(params, TOKENS_BT)
        else:
            jax.jit(jax.grad(lambda params: logits(params, TOKENS_BT).sum())).trace(params)
    assert functions >= ALWAYS_THERE


@pytest.mark.full
def test_names_are_right_in_an_eager_pass():
    """Layers that are not scanned, outside of jit: every array has its numbers."""
    model = Decoder(ModelConfig(**SIZES, **CONFIGS["llama"]))
    params = reference.random_params(model)
    with checked_shape_names() as functions:
        model.apply({"params": params}, TOKENS_BT)
    assert functions >= {*ALWAYS_THERE, "positions.py:rotate", "feed_forward.py:FeedForward.__call__"}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_right_with_a_cache_and_a_look_inside(name):
    config = ModelConfig(**SIZES, **CONFIGS[name])
    model = Decoder(config)
    params = reference.random_params(model)
    apply = functools.partial(model.apply, mutable=["intermediates"])
    with checked_shape_names() as functions:
        cache = empty_cache(config, B, S)
        jax.eval_shape(apply, {"params": params}, TOKENS_BT, cache=cache)
    assert functions >= {*ALWAYS_THERE, "cache.py:write", "cache.py:empty_cache"}


@pytest.mark.short("PromptLookup(num_tokens=2)")
@pytest.mark.parametrize("draft", [None, fd.PromptLookup(2), "draft"], ids=str)
def test_names_in_generation_are_right(draft):
    """Five prompts of different lengths, so that nothing agrees by chance; each program is traced anew."""
    config = ModelConfig(**SIZES | {"context_length": 29}, **CONFIGS["bloom"])
    model = Decoder(config)
    params = reference.random_params(model)
    prompts = [TOKENS_BT[row, : 2 + row] for row in range(5)]
    draft = fd.Draft(model, params, 3) if draft == "draft" else draft
    options = {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.1}
    jax.clear_caches()
    with checked_shape_names() as functions:
        fd.generate(model, params, prompts, 4, jax.random.key(0), num_samples=2, draft=draft, **options)
        if draft is None:
            options |= {"repetition_penalty": 1.2, "bad_tokens": (3,)}
            prefix = fd.prefill(model, params, prompts[0][:1])
            fd.complete(model, params, prompts, 4, jax.random.key(0), prefix=prefix, top_logprobs=2, **options)
    assert functions >= {"steps.py:prefill_chunk", "cache.py:write", "sampling.py:filtered", "sampling.py:keep_top_p"}
