"""The per-position network: what a token does with what attention brought it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import ModelConfig
from flax_decoder.nn.axes import constrain
from flax_decoder.nn.intermediates import OwnEdits, show
from flax_decoder.nn.linear import Linear


def gelu(x: jax.Array) -> jax.Array:
    """x times the chance that a standard normal number is under x (Hendrycks and Gimpel 2016), exactly, by erf."""
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


class FeedForward(nn.Module):
    """down(activation(up(x))), or for the GLUs down(activation(gate(x)) * up(x)).

    Attributes:
        config: the model.
        edits: change what goes by these names on the way.
    """

    config: ModelConfig
    edits: OwnEdits | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps (B, T, D) to (B, T, D), each position by itself."""
        config = self.config

        def linear(name: str, width: int, init_stddev: float) -> Linear:
            return Linear((width,), 1, config.mlp_bias, init_stddev, config.dtype, name=name)

        activation = ACTIVATIONS[config.feed_forward]
        h_BTF = linear("up", config.mlp_width, config.init_stddev)(x_BTD)
        if config.feed_forward in GATED:
            h_BTF *= activation(linear("gate", config.mlp_width, config.init_stddev)(x_BTD))
        else:
            h_BTF = activation(h_BTF)
        h_BTF = show(self, "hidden", constrain(h_BTF, "batch", "length", "mlp"), self.edits)
        return linear("down", config.embed_dim, config.output_stddev)(h_BTF)
