"""Direct logit attribution: the tokens whose logits the write of a head moves most.

The write is followed through the norms to the head that makes the logits, with the divisors of the norms fixed, as in
`attribution`. What later layers compute from it is not included.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import ModelConfig
from flax_decoder.lens.attribution import head_columns
from flax_decoder.lens.capture import Activations, final_norm_params, norm_params, normalise, through_norm
from flax_decoder.nn.decoder import scaled
from flax_decoder.nn.params import unstack_layers


def pushes(
    config: ModelConfig, params: Any, activations: Activations, tokens_BC: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The tokens whose logits each head raises most and lowers most.

    Args:
        config: the model, not in bfloat16.
        activations: from `capture`, for a single text.
        tokens_BC: candidate tokens, B = 1; negative ones are ignored.
        count: how many to return of each kind, at most the number of candidates.

    Returns:
        Indices into `tokens_BC`, and the changes of their logits, both (L, N, T, 2 * count): the `count` largest
        changes, then the `count` smallest, in descending order.
    """
    columns_BCD = head_columns(params, jnp.maximum(tokens_BC, 0)).astype(activations["residual"].dtype)
    columns_BCD = scaled(columns_BCD, config.logit_scale)
    is_token_1C = tokens_BC >= 0
    layers = unstack_layers(params)["layers"]

    def of_layer(writes_BTND: jax.Array) -> tuple[jax.Array, jax.Array]:
        writes_BTND = through_norm(config, final_norm_params(config, params), activations["residual"][-1], writes_BTND)
        logits_NTC = jnp.einsum("BTND,BCD->NTC", writes_BTND, columns_BCD)
        up, raised = jax.lax.top_k(jnp.where(is_token_1C[None], logits_NTC, -jnp.inf), count)
        down, lowered = jax.lax.top_k(jnp.where(is_token_1C[None], -logits_NTC, -jnp.inf), count)
        indices = jnp.concatenate([raised, lowered[..., ::-1]], axis=-1)
        return indices, jnp.concatenate([up, -down[..., ::-1]], axis=-1)

    writes_LBTND = activations["head_writes"]
    if config.norm_position == "post":
        writes = [through_later_norms(config, layers, activations, layer) for layer in range(len(layers))]
        writes_LBTND = jnp.stack(writes)
    indices, changes = jax.lax.map(of_layer, writes_LBTND)
    return indices, changes


def through_later_norms(config: ModelConfig, layers: Any, activations: Activations, layer: int) -> jax.Array:
    """The head_writes_BTND of a post-norm layer, as summands of the last residual stream."""
    writes_BTND = activations["head_writes"][layer]
    for later in range(layer, len(layers)):
        x_BTD = activations["embeddings"] if later == 0 else activations["residual"][later - 1]
        attention_norm, feed_forward_norm = (
            norm_params(layers[later], f"{part}_norm") for part in ("attention", "feed_forward")
        )
        sum_BTD = x_BTD + activations["attention_write"][later]
        writes_BTND = through_norm(config, attention_norm, sum_BTD, writes_BTND)
        sum_BTD = normalise(config, attention_norm, sum_BTD) + activations["feed_forward_write"][later]
        writes_BTND = through_norm(config, feed_forward_norm, sum_BTD, writes_BTND)
    return writes_BTND
