"""The residual stream as a sum over origins: token, position, heads, feed-forward networks and biases.

Every norm divides by the size of the whole stream, and that divisor is held fixed, also in derivatives: so all is
linear in what the stream is made of.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import ModelConfig
from flax_decoder.lens.capture import Activations, norm_params, stacked_layers, through_norm
from flax_decoder.nn.decoder import scaled

# Axis O.
ORIGINS = ("token", "position", "heads", "feed_forward", "bias")
TOKEN, POSITION, HEADS, FEED_FORWARD, BIAS = range(len(ORIGINS))


def layer_writes(params: Any, activations: Activations) -> tuple[jax.Array, jax.Array]:
    """What each layer writes before any norm: heads_LBTD without the bias of their projection, feed_forward_LBTD."""
    dtype = activations["heads"].dtype
    layers = jax.tree.map(lambda leaf: leaf.astype(dtype), stacked_layers(params))
    out, down = layers["attention"]["out"], layers["feed_forward"]["down"]
    heads_LBTD = jnp.einsum("LBTNH,LNHD->LBTD", activations["heads"], out["kernel"])
    feed_forward_LBTD = jnp.einsum("LBTF,LFD->LBTD", activations["hidden"], down["kernel"])
    return heads_LBTD, feed_forward_LBTD + down["bias"][:, None, None] if "bias" in down else feed_forward_LBTD


def residual_origins(
    config: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    embeddings_BTD: jax.Array,
    writes: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The stream by origin after the last layer, x_BTOD, and before each, x_LBTOD; `writes` is of `layer_writes`."""
    token_BTD = jnp.take(params["embedding"], tokens_BT, axis=0).astype(embeddings_BTD.dtype) * config.embed_scale
    x_BTOD = _at(TOKEN, token_BTD)
    if config.embedding_norm:
        x_BTOD = origins_through_norm(config, norm_params(params, "embedding_norm"), x_BTOD)
    x_BTOD += _at(POSITION, embeddings_BTD - x_BTOD.sum(2))

    def layer(x_BTOD: jax.Array, layer: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params, heads_BTD, feed_forward_BTD = layer
        write_BTOD = _at(HEADS, heads_BTD)
        if config.attention_out_bias:
            write_BTOD += _at(BIAS, params["attention"]["out"]["bias"].astype(x_BTOD.dtype)[None, None])
        after_BTOD = _add(config, params, "attention", x_BTOD, write_BTOD)
        return _add(config, params, "feed_forward", after_BTOD, _at(FEED_FORWARD, feed_forward_BTD)), x_BTOD

    return jax.lax.scan(layer, x_BTOD, (stacked_layers(params), *writes))


def origins_through_norm(config: ModelConfig, params: Any, x_BTOD: jax.Array) -> jax.Array:
    """A norm by origin, with its bias; there is none if `params` is None."""
    x_BTOD = through_norm(config, params, x_BTOD.sum(2), x_BTOD)
    if params is None or "bias" not in params:
        return x_BTOD
    return x_BTOD + _at(BIAS, params["bias"].astype(x_BTOD.dtype)[None, None])


def _at(origin: int, x_BTD: jax.Array) -> jax.Array:
    """x_BTOD, which is 0 but for one origin."""
    return jnp.zeros((*x_BTD.shape[:2], len(ORIGINS), x_BTD.shape[2]), x_BTD.dtype).at[:, :, origin].set(x_BTD)


def _add(config: ModelConfig, params: Any, part: str, x_BTOD: jax.Array, write_BTOD: jax.Array) -> jax.Array:
    """One of the two sums of a block by origin: x + write, norm(x + write) or x + norm(write)."""
    if config.norm_position in ("both", "output"):
        write_BTOD = origins_through_norm(config, norm_params(params, f"{part}_output_norm"), write_BTOD)
    sum_BTOD = x_BTOD + scaled(write_BTOD, config.residual_scale)
    if config.norm_position == "post":
        return origins_through_norm(config, norm_params(params, f"{part}_norm"), sum_BTOD)
    return sum_BTOD
