"""Normalisation of activations, computed in at least float32."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import ModelConfig
from flax_decoder.nn.precision import accumulation_dtype
from flax_decoder.nn.traffic import mean_and_variance, saves_traffic


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis.

        LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
        RMSNorm(x)   =  x            / sqrt(mean(x^2) + epsilon) * scale

    Attributes:
        kind: "layernorm" or "rmsnorm".
        epsilon: added under the root, so that a constant input is not divided by zero.
        use_bias: LayerNorm learns a shift.
        use_scale: the scale is learned; without, it is 1.
        num_axes: how many of the last axes the scale and the shift have; the norm is over the last one.
    """

    kind: Literal["layernorm", "rmsnorm"]
    epsilon: float
    use_bias: bool = False
    use_scale: bool = True
    num_axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., width) to the same shape and dtype."""
        own = x.shape[-self.num_axes :]
        shape = (1,) * (x.ndim - self.num_axes) + own
        normalise = with_statistics if saves_traffic() else normalised
        y = normalise(self.kind, self.epsilon, x.astype(accumulation_dtype(x.dtype)))
        if self.use_scale:
            y *= self.param("scale", nn.initializers.ones, own).reshape(shape).astype(y.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, own).reshape(shape).astype(y.dtype)
        y = y.astype(x.dtype)
        self.sow("intermediates", "output", y)
        return y


def normalised(kind: str, epsilon: float, x: jax.Array) -> jax.Array:
    """x over its root mean square, for "layernorm" after its mean is subtracted."""
    if kind == "layernorm":
        x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def with_statistics(kind: str, epsilon: float, x: jax.Array) -> jax.Array:
    """`normalised`, with a gradient that finds the mean and the root of each position, and need not read x for them."""
    return normalised(kind, epsilon, x)


@with_statistics.defjvp
def _change_of_normalised(kind: str, epsilon: float, xs: tuple[jax.Array], changes: tuple[jax.Array]) -> Any:
    (x,), (change,) = xs, changes
    if kind == "layernorm":
        mean, variance = mean_and_variance(x)
        change -= change.mean(-1, keepdims=True)
    else:
        mean, variance = jnp.zeros((), x.dtype), jnp.square(x).mean(-1, keepdims=True)
    # Else the compiler computes them from x again, where they are used.
    mean, inverse_root = jax.lax.optimization_barrier((mean, jax.lax.rsqrt(variance + epsilon)))
    y = (x - mean) * inverse_root
    return y, inverse_root * (change - y * (change * y).mean(-1, keepdims=True))


def norm_of(config: ModelConfig, name: str | None = None) -> Norm:
    """A norm of the residual stream."""
    return Norm(config.norm, config.norm_epsilon, config.norm_bias, config.norm_scale, name=name)


def normed_heads(config: ModelConfig, q_BTNH: jax.Array, k_BTKH: jax.Array) -> list[jax.Array]:
    """Queries and keys of unit size, per head or over all heads of a position; as they are without qk_norm."""
    heads = []
    for name, x in (("query_norm", q_BTNH), ("key_norm", k_BTKH)):
        if config.qk_norm != "none":
            num_axes = 2 if config.qk_norm == "each_head" else 1
            settings = config.qk_norm_kind, config.norm_epsilon, config.qk_norm_bias, config.norm_scale, num_axes
            shape = (*x.shape[:2], -1) if config.qk_norm == "all" else x.shape
            x = Norm(*settings, name=name)(x.reshape(shape)).reshape(x.shape)
        heads.append(x)
    return heads
