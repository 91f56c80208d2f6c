import math

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from flax_decoder.config_file import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params
from flax_decoder.training.flops import flops_per_token, utilization

B = 2
SMALL = {"vocab_size": 37, "context_length": 12, "num_layers": 3, "embed_dim": 20, "num_heads": 5}
ARCHITECTURES = {
    "multi-head": {},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 7},
    "multi-query": {"num_kv_heads": 1},
    "gated": {"feed_forward": "swiglu", "mlp_dim": 23},
    "own head": {"tied_head": False},
    "biases": {"norm_bias": True, "attention_in_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "alibi": {"positions": "alibi"},
    "parallel": {"parallel_residual": True, "positions": "rotary", "norm": "rmsnorm", "qk_norm": "head"},
}


def model_config(**settings):
    return load_config(None, {f"model.{name}": value for name, value in settings.items()}).model


def traced(config):
    """The forward pass of the readable attention, and the sum of its logits with gradients, as JAX traces them."""
    model = Decoder(config)

    def forward(params, tokens_BT):
        return model.apply({"params": params}, tokens_BT)

    gradient = jax.grad(lambda params, tokens_BT: forward(params, tokens_BT).sum())
    arguments = abstract_params(model), jax.ShapeDtypeStruct((B, config.context_length), np.int32)
    return jax.jit(forward).trace(*arguments), jax.jit(gradient).trace(*arguments)


def product_flops(jaxpr):
    """Operations of all matrix products in a traced program: two for each output and each number summed into it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in summed)
        total += sum(product_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.short("grouped", "gated", "own head", "parallel")
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_full_count_is_that_of_the_products_in_the_program(changes):
    """The readable attention multiplies each query with all T keys, and gradients take two products for each one."""
    config = model_config(**(SMALL | changes), attention="reference")
    forward, gradient = traced(config)
    expected = flops_per_token(config, "full") * B * config.context_length
    assert 3 * product_flops(forward.jaxpr.jaxpr) == expected
    assert product_flops(gradient.jaxpr.jaxpr) == expected


@pytest.mark.parametrize(
    ("window", "pattern"), [(None, [True]), (5, [True]), (5, [True, False]), (1, [False, True]), (99, [True])]
)
def test_keys_are_counted_as_the_masks_show_them(window, pattern):
    T, L, N, H = 12, 3, 5, 4
    config = model_config(**SMALL, window=window, window_pattern=pattern if window else [True])
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None]
    causal, full = 0, 0
    for layer in range(L):
        W = window if window and pattern[layer % len(pattern)] else T
        causal += ((distance_TS >= 0) & (distance_TS < W)).sum() / T
        full += min(W, T)
    without_keys = flops_per_token(model_config(**SMALL), "full") - 12 * N * H * L * T
    assert (flops_per_token(config, "full") - without_keys) == 12 * N * H * full
    # The halved count leaves out half of the key at the query's own position, at most, and is rounded to whole keys.
    assert abs(flops_per_token(config, "causal") - without_keys - 12 * N * H * causal) <= 12 * N * H * (L / 2 + 0.5)


def test_the_gpt_2_shape_by_hand():
    """nanoGPT's count for 124M, 6 N + 12 L H Q T, has norms, too, but not what the vocabulary is padded by."""
    config = load_config("configs/gpt2_124m.toml").model
    weights = 12 * 12 * 768**2 + 50304 * 768
    assert flops_per_token(config, "full") == 6 * weights + 12 * 12 * 768 * 1024 == 854_654_976


def test_a_vocabulary_is_needed():
    with pytest.raises(ValueError, match="vocab_size"):
        flops_per_token(model_config(embed_dim=8, num_heads=2), "full")


def test_utilization_is_the_part_of_all_devices_peak():
    config = model_config(**SMALL)
    seen = utilization(config, 1e9, "NVIDIA H100 80GB HBM3", num_devices=4)
    assert seen["mfu"] == pytest.approx(flops_per_token(config, "full") * 1e9 / (4 * 989e12))
    assert seen["mfu_causal"] == pytest.approx(flops_per_token(config, "causal") * 1e9 / (4 * 989e12))


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA GeForce RTX 9090", "TPU v99"])
def test_where_the_peak_is_not_known_nothing_is_guessed(device_kind):
    assert utilization(model_config(**SMALL), 1e9, device_kind, 1) == {"mfu": "unknown", "mfu_causal": "unknown"}
