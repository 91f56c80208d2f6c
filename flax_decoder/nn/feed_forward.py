"""The feed-forward network, which works on each position by itself."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import ModelConfig
from flax_decoder.nn.axes import constrain
from flax_decoder.nn.call import Call
from flax_decoder.nn.linear import Linear
from flax_decoder.nn.precision import in_float32
from flax_decoder.nn.traffic import saves_traffic


def gelu(x: jax.Array) -> jax.Array:
    """x times the probability that a standard normal number is below x (Hendrycks and Gimpel 2016), exact, by erf."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,  # the tanh approximation of the original GPT-2
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021 (Primer)
    "swiglu": jax.nn.silu,  # the GLU variants of Shazeer 2020 put these on the gate
    "geglu": gelu,
    "geglu_tanh": jax.nn.gelu,
}
GATED = ("swiglu", "geglu", "geglu_tanh")


def gated(activation: Callable[[jax.Array], jax.Array], gate_BTF: jax.Array, h_BTF: jax.Array) -> jax.Array:
    """activation(gate) * h."""
    if saves_traffic():  # one function of both has one gradient of both, in one pass
        return in_float32(lambda gate_BTF, h_BTF: h_BTF * activation(gate_BTF))(gate_BTF, h_BTF)
    return h_BTF * in_float32(activation)(gate_BTF)


class FeedForward(nn.Module):
    """down(activation(up(x))), or for the GLUs down(activation(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, call: Call) -> jax.Array:
        """Maps (B, T, D) to (B, T, D), each position by itself."""
        config = self.config
        activation = ACTIVATIONS[config.feed_forward]
        linear = functools.partial(Linear, dtype=config.dtype, use_bias=config.mlp_bias, adapter=call.adapter)

        h_BTF = linear((config.mlp_width,), init_stddev=config.init_stddev, name="up")("BTD,DF->BTF", x_BTD)
        if config.feed_forward in GATED:
            gate_BTF = linear((config.mlp_width,), init_stddev=config.init_stddev, name="gate")("BTD,DF->BTF", x_BTD)
            h_BTF = gated(activation, gate_BTF, h_BTF)
        else:
            h_BTF = in_float32(activation)(h_BTF)
        h_BTF = call.hook(self)("hidden", constrain(h_BTF, "batch", "length", "mlp"))
        return linear((config.embed_dim,), init_stddev=config.output_stddev, name="down")("BTF,FD->BTD", h_BTF)
