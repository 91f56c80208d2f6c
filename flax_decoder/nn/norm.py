"""Normalisation of activations, computed in at least float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import ModelConfig
from flax_decoder.nn.precision import accumulation_dtype


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis.

        LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
        RMSNorm(x)   =  x            / sqrt(mean(x^2) + epsilon) * scale

    Attributes:
        kind: "layernorm" or "rmsnorm".
        epsilon: added under the root, so that a constant input is not divided by zero.
        use_bias: LayerNorm learns a shift.
        use_scale: the scale is learned; without, it is 1.
    """

    kind: Literal["layernorm", "rmsnorm"]
    epsilon: float
    use_bias: bool = False
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., width) to the same shape and dtype."""
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        y = x.astype(accumulation_dtype(x.dtype))
        if self.kind == "layernorm":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        if self.use_scale:
            y *= self.param("scale", nn.initializers.ones, x.shape[-1:]).reshape(shape).astype(y.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, x.shape[-1:]).reshape(shape).astype(y.dtype)
        y = y.astype(x.dtype)
        self.sow("intermediates", "output", y)
        return y


def norm_of(config: ModelConfig, name: str | None = None) -> Norm:
    """A norm of the residual stream."""
    return Norm(config.norm, config.norm_epsilon, config.norm_bias, config.norm_scale, name=name)
