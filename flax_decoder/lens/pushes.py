"""What was written: the tokens whose logits a head's write moves most, straight from there to the head.

A write is added to the residual stream, which goes through norms to the head that makes logits. As in `attribution`, a
norm divides by the size that its input had. What later layers make of a write is not part of this.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import ModelConfig
from flax_decoder.lens.attribution import head_columns, normalise
from flax_decoder.lens.capture import Seen
from flax_decoder.nn.stack import unstack


def pushes(
    config: ModelConfig, params: Any, seen: Seen, tokens_BC: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The tokens that each head raises most, then those that it lowers most.

    Args:
        config: the model, not in bfloat16.
        params: its parameters.
        seen: what `capture` gave for a single text.
        tokens_BC: the tokens to look at, B = 1; negative ones are left out.
        count: how many of each; there must be as many tokens.

    Returns:
        Indices into `tokens_BC` and by how much their logits move, both (L, N, T, 2 * count); most raised first, most
        lowered last.
    """
    columns_BCD = head_columns(params, jnp.maximum(tokens_BC, 0)).astype(seen["residual"].dtype)
    is_token_1C = tokens_BC >= 0
    layers = params["layers"] if isinstance(params["layers"], tuple) else unstack(params["layers"])

    def of_layer(writes_BTND: jax.Array) -> tuple[jax.Array, jax.Array]:
        writes_BTND = through_norm(config, params["final_norm"], seen["residual"][-1], writes_BTND)
        logits_NTC = jnp.einsum("BTND,BCD->NTC", writes_BTND, columns_BCD)
        up, most_raised = jax.lax.top_k(jnp.where(is_token_1C[None], logits_NTC, -jnp.inf), count)
        down, most_lowered = jax.lax.top_k(jnp.where(is_token_1C[None], -logits_NTC, -jnp.inf), count)
        places = jnp.concatenate([most_raised, most_lowered[..., ::-1]], axis=-1)
        return places, jnp.concatenate([up, -down[..., ::-1]], axis=-1)

    writes_LBTND = seen["head_writes"]
    if config.norm_position == "post":
        writes_LBTND = jnp.stack([through_later_norms(config, layers, seen, layer) for layer in range(len(layers))])
    places, values = jax.lax.map(of_layer, writes_LBTND)
    return places, values


def through_later_norms(config: ModelConfig, layers: Any, seen: Seen, layer: int) -> jax.Array:
    """A layer's head_writes_BTND as they stand in the last residual stream, where norms follow the sums."""
    writes_BTND = seen["head_writes"][layer]
    for later in range(layer, len(layers)):
        x_BTD = seen["embeddings"] if later == 0 else seen["residual"][later - 1]
        own = layers[later]
        sum_BTD = x_BTD + seen["attention_write"][later]
        writes_BTND = through_norm(config, own["attention_norm"], sum_BTD, writes_BTND)
        sum_BTD = normalise(config, own["attention_norm"], sum_BTD) + seen["feed_forward_write"][later]
        writes_BTND = through_norm(config, own["feed_forward_norm"], sum_BTD, writes_BTND)
    return writes_BTND


def through_norm(config: ModelConfig, params: Any, x_BTD: jax.Array, writes_BTND: jax.Array) -> jax.Array:
    """What a norm of x makes of parts of x: it divides them by the size of x and, for LayerNorm, takes off means."""
    if config.norm == "layernorm":
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        writes_BTND = writes_BTND - writes_BTND.mean(-1, keepdims=True)
    inverse_BT1 = jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + config.norm_epsilon)
    scale_D = params["scale"].astype(x_BTD.dtype)
    return writes_BTND * inverse_BT1[..., None] * scale_D[None, None, None]
