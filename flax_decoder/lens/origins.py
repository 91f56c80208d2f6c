"""Splits scores by what queries and keys are made of: token, position, and what earlier layers wrote.

What a position holds is a sum: the embedding of its token, the vector of its position, the writes of earlier heads and
feed-forward networks, and biases. With the divisors of norms held fixed a query is linear in it, and so is a key. A
score is then a sum over pairs:

    q · k = sum over origins O of the query and O of the key of q_O · k_O

Rotary positions turn q and k. The pairs are of q and k before that; what the turn changes is a part by itself, and
depends on the distance.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flax_decoder.config import ModelConfig
from flax_decoder.lens.attribution import score_parts, score_scale
from flax_decoder.lens.capture import Activations, norm_params, stacked_layers
from flax_decoder.lens.residual import BIAS, layer_writes, origins_through_norm, residual_origins
from flax_decoder.lens.residual import ORIGINS as ORIGINS
from flax_decoder.nn.decoder import Decoder


class ScoreOrigins(struct.PyTreeNode):
    """The contributions to the score of one query and one key, by origin; they sum to it.

    Attributes:
        pairs_OO: origin of the query times origin of the key, in the order of `ORIGINS`, before the rotation.
        rotation: the change by the rotation, and by a norm of queries and keys that follows it; 0 unless positions are
            rotary.
        soft_cap: this and those below are as in `ScoreParts`.
    """

    pairs_OO: jax.Array
    rotation: jax.Array
    soft_cap: jax.Array
    position: jax.Array
    mask: jax.Array
    score: jax.Array

    def total(self) -> jax.Array:
        """The sum of all contributions: `score`, up to rounding."""
        return self.pairs_OO.sum() + self.rotation + self.soft_cap + self.position + self.mask


def score_origins(
    model: Decoder,
    params: Any,
    tokens_BT: jax.Array,
    activations: Activations,
    layer: int,
    head: int,
    batch: int,
    t: int,
    s: int,
) -> ScoreOrigins:
    """Splits one score, query · key, by the origins of both: what came from tokens, and what from positions.

    Other arguments and errors: see `score_parts`.

    Args:
        params: the parameters of the model.
        tokens_BT: the input tokens.
    """
    config = model.config
    parts = score_parts(model, activations, layer, head, batch, t, s)
    q_LBTONH, k_LBTOKH = query_and_key_origins(config, params, tokens_BT, activations)
    kv_head, scale = head * config.kv_heads // config.num_heads, score_scale(config)
    pairs_OO = q_LBTONH[layer, batch, t, :, head] @ k_LBTOKH[layer, batch, s, :, kv_head].T * scale
    unturned = (activations["q"][layer, batch, t, head] * activations["k"][layer, batch, s, kv_head] * scale).sum()
    rotation = parts.dimensions_H.sum() - unturned.astype(parts.score.dtype)
    return ScoreOrigins(pairs_OO, rotation, parts.soft_cap, parts.position, parts.mask, parts.score)


def query_and_key_origins(
    config: ModelConfig, params: Any, tokens_BT: jax.Array, activations: Activations
) -> tuple[jax.Array, jax.Array]:
    """The queries and keys of all layers by origin, before the rotation: q_LBTONH and k_LBTOKH.

    Their sums over O are the activations `q` and `k`, captured without a cache and without edits.
    """
    writes = layer_writes(params, activations)
    _, stream_LBTOD = residual_origins(config, params, tokens_BT, activations["embeddings"], writes)
    return jax.vmap(functools.partial(_queries_and_keys, config))(stacked_layers(params), stream_LBTOD)


def _queries_and_keys(config: ModelConfig, params: Any, h_BTOD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q_BTONH and k_BTOKH of a layer by origin."""
    if config.norm_position in ("pre", "both"):
        h_BTOD = origins_through_norm(config, norm_params(params, "attention_norm"), h_BTOD)
    attention = jax.tree.map(lambda leaf: leaf.astype(h_BTOD.dtype), params["attention"])
    return _project(config, attention, "query", h_BTOD), _project(config, attention, "key", h_BTOD)


def _project(config: ModelConfig, params: Any, name: str, h_BTOD: jax.Array) -> jax.Array:
    """x_BTONH, the queries or keys by origin: the projection, its bias, and the norm of queries and keys."""
    x_BTONH = jnp.einsum("BTOD,DNH->BTONH", h_BTOD, params[name]["kernel"])
    if "bias" in params[name]:
        x_BTONH = x_BTONH.at[:, :, BIAS].add(params[name]["bias"][None, None])
    if config.qkv_clip is not None:
        sum_BT1NH = x_BTONH.sum(2, keepdims=True)
        clipped_BT1NH = jnp.clip(sum_BT1NH, -config.qkv_clip, config.qkv_clip)
        x_BTONH *= jnp.where(sum_BT1NH == 0, 1.0, clipped_BT1NH / sum_BT1NH)
    if config.qk_norm == "none" or config.qk_norm_position == "after":  # then it belongs to what the rotation changes
        return x_BTONH
    axes = (-2, -1) if config.qk_norm == "all" else (-1,)
    if config.qk_norm_kind == "layernorm":
        x_BTONH -= x_BTONH.mean(axes, keepdims=True)
    mean_square = jnp.square(x_BTONH.sum(2, keepdims=True)).mean(axes, keepdims=True)
    x_BTONH *= jax.lax.rsqrt(mean_square + config.norm_epsilon)
    norm, width = norm_params(params, f"{name}_norm"), (1, -1) if config.qk_norm == "head" else x_BTONH.shape[3:]
    if "scale" in norm:
        x_BTONH *= norm["scale"].reshape(1, 1, 1, *width)
    return x_BTONH.at[:, :, BIAS].add(norm["bias"].reshape(1, 1, *width)) if "bias" in norm else x_BTONH
