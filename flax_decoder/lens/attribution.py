"""Splits a logit into contributions of embeddings, heads and feed-forward networks.

The logit of a token is the product of its column of the head with the final norm of the residual stream, and the stream
is a sum: the embedding, and what every layer writes. With its divisor held fixed a norm is linear, so the logit is a
sum, too:

    logit = embedding · d + sum over layers of (attention + feed_forward) · d + (contributions of biases)

d, the direction, is the head's column carried back through the norms. The write of an attention head is in turn a sum
over the tokens it reads: weight · (value W_O). How a head computes its weights is not included: see `score_parts`.
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.lens.capture import Activations, capture, final_norm_params, stacked_layers
from flax_decoder.lens.residual import BIAS, POSITION, TOKEN, layer_writes, origins_through_norm, residual_origins
from flax_decoder.nn.arguments import as_integers, check_tokens
from flax_decoder.nn.decoder import Decoder, scaled
from flax_decoder.nn.positions import alibi_slopes

# The activations that an attribution is computed from.
NEEDED = ("weights", "v", "heads", "hidden", "embeddings", "logits")


class Attribution(struct.PyTreeNode):
    """The contributions to one logit at each position, or to the difference of two; they sum to it.

    Attributes:
        token_BT: the token's embedding.
        position_BT: its learned or sinusoidal position vector; 0 if there is none.
        heads_LBNTS: each head, by source position S.
        feed_forward_LBT: the feed-forward network of each layer, with its biases.
        bias_BT: the biases of the head, of norms and of attention's output projection.
        soft_cap_BT: the change by the logit soft cap; 0 if there is none.
        logit_BT: the model's logit.
    """

    token_BT: jax.Array
    position_BT: jax.Array
    heads_LBNTS: jax.Array
    feed_forward_LBT: jax.Array
    bias_BT: jax.Array
    soft_cap_BT: jax.Array
    logit_BT: jax.Array

    def total_BT(self) -> jax.Array:
        """The sum of all contributions: `logit_BT`, up to rounding."""
        ends_BT = self.token_BT + self.position_BT + self.bias_BT + self.soft_cap_BT
        return ends_BT + self.heads_LBNTS.sum((0, 2, 4)) + self.feed_forward_LBT.sum(0)

    def largest(self, batch: int, t: int, count: int = 10) -> list[tuple[str, float]]:
        """Name and value of the contributions to one logit that are largest in absolute value."""
        heads_LNS, feed_forward_L = np.asarray(self.heads_LBNTS[:, batch, :, t]), self.feed_forward_LBT[:, batch, t]
        parts = {name: getattr(self, f"{name}_BT")[batch, t] for name in ("token", "position", "bias", "soft_cap")}
        parts |= {f"feed-forward {layer}": part for layer, part in enumerate(feed_forward_L)}
        parts |= {f"head {layer}.{n} from position {s}": part for (layer, n, s), part in np.ndenumerate(heads_LNS)}
        return sorted(((name, float(part)) for name, part in parts.items()), key=lambda part: -abs(part[1]))[:count]


def attribute(
    model: Decoder, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, versus_BT: jax.Array | None = None
) -> Attribution:
    """Splits the logit of a token at each position into contributions of the model's parts.

    For a text, `fd.attribute(model, params, tokens_BT[:, :-1], tokens_BT[:, 1:])` explains each next token. Adding the
    same number to all logits does not change the probabilities; to compare two tokens, split their difference.

    Computed in float32 even if the model's dtype is bfloat16, whose rounding would belong to no part.

    Args:
        model: the model.
        params: its parameters.
        tokens_BT: the input tokens.
        targets_BT: at each position, the token whose logit is split.
        versus_BT: at each position, a token whose logit is subtracted; None subtracts nothing.

    Raises:
        UserError: the shapes differ.
        ValueError: token ids outside the vocabulary; not checked inside jit, where they are unknown.
    """
    dtype: Literal["float32", "float64"] = "float64" if model.config.dtype == "float64" else "float32"
    # Scanned layers compile in a third of the time or less; the numbers are the same.
    config = dataclasses.replace(model.config, dtype=dtype, attention="reference", scan_layers=True)
    vocab_size = model.config.vocab_size or 0
    tokens_BT, targets_BT = (as_integers(check_tokens(ids_BT, vocab_size)) for ids_BT in (tokens_BT, targets_BT))
    versus_BT = None if versus_BT is None else as_integers(check_tokens(versus_BT, vocab_size))
    for name, chosen_BT in (("targets_BT", targets_BT), ("versus_BT", versus_BT)):
        if chosen_BT is not None and chosen_BT.shape != tokens_BT.shape:
            raise UserError(f"{name} has the shape {chosen_BT.shape}, tokens_BT {tokens_BT.shape}: give one token each")
    # By default, TPUs and GPUs round the factors of float32 products.
    with jax.default_matmul_precision("highest"):
        activations = capture(Decoder(config), params, tokens_BT, names=NEEDED)
        return attribute_activations(config, params, activations, tokens_BT, targets_BT, versus_BT)


@functools.partial(jax.jit, static_argnums=0)
def attribute_activations(
    config: ModelConfig,
    params: Any,
    activations: Activations,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    versus_BT: jax.Array | None = None,
) -> Attribution:
    """`attribute` from captured activations, to split several logits of one forward pass.

    On GPUs and TPUs the sums are exact under `jax.default_matmul_precision("highest")`, here and in `capture`.

    Args:
        config: the model, not in bfloat16.
        activations: from `capture`, without edits; those named in `NEEDED`.
    """
    writes = layer_writes(params, activations)

    def given_to_head(writes: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BTOD, _ = residual_origins(config, params, tokens_BT, activations["embeddings"], writes)
        return origins_through_norm(config, final_norm_params(config, params), x_BTOD)

    x_BTOD, back = jax.vjp(given_to_head, writes)
    dtype = x_BTOD.dtype

    def of_logit(tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
        """The model's logit, the token's column and bias in the head, and the change by the soft cap."""
        logit_BT = jnp.take_along_axis(activations["logits"], tokens_BT[..., None], axis=-1)[..., 0]
        column_BTD = scaled(head_columns(params, tokens_BT).astype(dtype), config.logit_scale)
        bias_BT = jnp.zeros_like(logit_BT)
        if config.head_bias:
            bias_BT = scaled(jnp.take(params["head_bias"], tokens_BT).astype(dtype), config.logit_scale)
        if config.logit_soft_cap is None:
            return logit_BT, column_BTD, bias_BT, jnp.zeros_like(logit_BT)
        raw_BT = (x_BTOD.sum(2) * column_BTD).sum(-1) + bias_BT
        return logit_BT, column_BTD, bias_BT, soft_cap_change(raw_BT, config.logit_soft_cap)

    parts = of_logit(targets_BT)
    if versus_BT is not None:
        parts = tuple(part - other for part, other in zip(parts, of_logit(versus_BT), strict=True))
    logit_BT, column_BTD, head_bias_BT, soft_cap_BT = parts

    origins_BTO = jnp.einsum("BTOD,BTD->BTO", x_BTOD, column_BTD)
    ((heads_direction_LBTD, direction_LBTD),) = back(jnp.broadcast_to(column_BTD[:, :, None], x_BTOD.shape))
    kernel_LNHD = stacked_layers(params)["attention"]["out"]["kernel"].astype(dtype)
    direction_LBTNH = jnp.einsum("LBTD,LNHD->LBTNH", heads_direction_LBTD, kernel_LNHD)
    return Attribution(
        token_BT=origins_BTO[..., TOKEN],
        position_BT=origins_BTO[..., POSITION],
        heads_LBNTS=jax.vmap(head_contributions)(activations["weights"], activations["v"], direction_LBTNH),
        feed_forward_LBT=(writes[1] * direction_LBTD).sum(-1),
        bias_BT=head_bias_BT + origins_BTO[..., BIAS],
        soft_cap_BT=soft_cap_BT,
        logit_BT=logit_BT,
    )


def head_contributions(weights_BNTS: jax.Array, v_BSKH: jax.Array, direction_BTNH: jax.Array) -> jax.Array:
    """heads_BNTS: weight · (value · direction), for each head and each source.

    Projecting the direction to the heads avoids the writes of all heads from all tokens, (B, T, N, S, D).
    """
    B, T, N, H = direction_BTNH.shape
    S, K = v_BSKH.shape[1:3]
    direction_BTKGH = direction_BTNH.reshape(B, T, K, N // K, H)
    products_BKGTS = jnp.einsum("BSKH,BTKGH->BKGTS", v_BSKH, direction_BTKGH)
    return weights_BNTS * products_BKGTS.reshape(B, N, T, S)


def head_columns(params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The columns of the head for these tokens, (B, T, D)."""
    if "head" in params:
        return jnp.moveaxis(jnp.take(params["head"], tokens_BT, axis=1), 0, -1)
    return jnp.take(params["embedding"], tokens_BT, axis=0)


class ScoreParts(struct.PyTreeNode):
    """The contributions to the score of one query and one key; they sum to it.

    Attributes:
        dimensions_H: query times key times scale in each dimension, after the rotation if positions are rotary.
        soft_cap: the change by the soft cap; 0 if there is none.
        position: the ALiBi bias; 0 if there is none.
        mask: minus infinity if the key is masked, else 0.
        score: the model's score.
    """

    dimensions_H: jax.Array
    soft_cap: jax.Array
    position: jax.Array
    mask: jax.Array
    score: jax.Array

    def total(self) -> jax.Array:
        """The sum of all contributions: `score`, up to rounding."""
        return self.dimensions_H.sum() + self.soft_cap + self.position + self.mask


def score_parts(
    model: Decoder, activations: Activations, layer: int, head: int, batch: int, t: int, s: int
) -> ScoreParts:
    """Splits one score, query · key, by the dimensions of the head.

    Args:
        model: the model.
        activations: from `capture`, without a cache and without edits.
        layer: counted from 0, as all others.
        head: the query head.
        batch: the row.
        t: the query position.
        s: the key position.

    Raises:
        UserError: the activations were captured with a cache, so that earlier keys are missing.
    """
    config = model.config
    if activations["k_rotated"].shape[2] != activations["scores"].shape[-1]:
        raise UserError("score_parts: the keys of a cache are not captured; capture the full text without a cache")
    scores_TS, positions_S = activations["scores"][layer, batch, head], activations["key_positions"][layer, batch]
    dtype = scores_TS.dtype
    q_H = activations["q_rotated"][layer, batch, t, head].astype(dtype)
    k_H = activations["k_rotated"][layer, batch, s, head * config.kv_heads // config.num_heads].astype(dtype)
    dimensions_H = q_H * k_H * score_scale(config)
    soft_cap = position = jnp.zeros((), dtype)
    if config.attention_soft_cap is not None:
        soft_cap = soft_cap_change(dimensions_H.sum(), config.attention_soft_cap)
    if config.positions == "alibi":
        slope = float(alibi_slopes(config.num_heads)[head])
        position = -slope * (positions_S[t] - positions_S[s]).astype(dtype)
    mask = jnp.where(jnp.isneginf(scores_TS[t, s]), -jnp.inf, 0.0).astype(dtype)
    return ScoreParts(dimensions_H, soft_cap, position, mask, scores_TS[t, s])


def score_scale(config: ModelConfig) -> float:
    """What a product of query and key is multiplied by."""
    return config.head_width**-0.5 if config.attention_scale is None else config.attention_scale


def soft_cap_change(x: jax.Array, cap: float) -> jax.Array:
    """What a soft cap adds to a number: cap * tanh(x / cap) - x."""
    return cap * jnp.tanh(x / cap) - x
