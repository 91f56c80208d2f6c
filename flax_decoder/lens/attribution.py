"""Why this token: a logit as a sum of what each token, head and feed-forward wrote.

The logit of a token is the product of its column of the head with the final norm of the residual stream, and the stream
is a sum: embeddings, and all that the layers wrote. A norm stands between. It divides by the size of its input; that
size taken as it was, the norm is a matrix and a shift, so the logit is a sum, too:

    logit = embedding · d + sum over layers of (attention + feed_forward) · d + (what biases give)

d, the direction, is the column of the head as it looks from before the norm. Each head's write is in turn a sum over
the tokens it read: weight · (value W_O). How a head came to its weights is not part of this: see `score_parts`.
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
from flax_decoder.lens.capture import capture
from flax_decoder.nn.decoder import Decoder, check_tokens
from flax_decoder.nn.norm import Norm
from flax_decoder.nn.positions import alibi_slopes

# Of what `capture` gives, what an attribution is made of; the first four layer by layer.
NEEDED = ("weights", "v", "heads", "hidden", "embeddings", "residual", "logits")


class Attribution(struct.PyTreeNode):
    """One logit at each position, or the difference of two, in parts that sum to it.

    Attributes:
        token_BT: from what the position's token is: its embedding.
        position_BT: from where it stands: its learned or sinusoidal vector; 0 where there is none.
        heads_LBNTS: from each head, through what it read at position S.
        feed_forward_LBT: from the feed-forward network of each layer, its own biases included.
        bias_BT: from the biases of norms and of attention's output, which are the same for all tokens.
        soft_cap_BT: from squashing the logits; 0 where the model does not.
        logit_BT: the model's own number.
    """

    token_BT: jax.Array
    position_BT: jax.Array
    heads_LBNTS: jax.Array
    feed_forward_LBT: jax.Array
    bias_BT: jax.Array
    soft_cap_BT: jax.Array
    logit_BT: jax.Array

    def total_BT(self) -> jax.Array:
        """The sum of all parts: `logit_BT`, up to rounding."""
        ends_BT = self.token_BT + self.position_BT + self.bias_BT + self.soft_cap_BT
        return ends_BT + self.heads_LBNTS.sum((0, 2, 4)) + self.feed_forward_LBT.sum(0)

    def largest(self, batch: int, t: int, count: int = 10) -> list[tuple[str, float]]:
        """The parts of one logit that matter most, up or down, each with a name; layers and heads count from 0."""
        heads_LNS, feed_forward_L = np.asarray(self.heads_LBNTS[:, batch, :, t]), self.feed_forward_LBT[:, batch, t]
        parts = {name: getattr(self, f"{name}_BT")[batch, t] for name in ("token", "position", "bias", "soft_cap")}
        parts |= {f"feed-forward {layer}": part for layer, part in enumerate(feed_forward_L)}
        parts |= {f"head {layer}.{n} from position {s}": part for (layer, n, s), part in np.ndenumerate(heads_LNS)}
        return sorted(((name, float(part)) for name, part in parts.items()), key=lambda part: -abs(part[1]))[:count]


def attribute(
    model: Decoder, params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, versus_BT: jax.Array | None = None
) -> Attribution:
    """Splits the logit of a token at each position into what each part of the model gave to it.

    Of a text, `fd.attribute(model, params, tokens_BT[:, :-1], tokens_BT[:, 1:])` says why each token came next. Logits
    may all be shifted without a change to what is likely; where two tokens compete, ask for the difference.

    The model is computed in float32 even if its dtype is bfloat16, whose rounding would belong to no part.

    Args:
        model: the model.
        params: its parameters.
        tokens_BT: what the model reads.
        targets_BT: the token at each position whose logit is asked for.
        versus_BT: the token at each position whose logit is taken off; left out, none is.

    Raises:
        UserError: the shapes differ.
        ValueError: token ids outside the vocabulary (where they are known, that is outside of jit).
    """
    dtype: Literal["float32", "float64"] = "float64" if model.config.dtype == "float64" else "float32"
    # A loop over the layers compiles in a third of the time or less; the numbers are the same.
    config = dataclasses.replace(model.config, dtype=dtype, attention="reference", scan_layers=True)
    for name, wanted_BT in (("targets_BT", targets_BT), ("versus_BT", versus_BT)):
        if wanted_BT is None:
            continue
        if wanted_BT.shape != tokens_BT.shape:
            raise UserError(f"{name} has the shape {wanted_BT.shape}, tokens_BT {tokens_BT.shape}: give one token each")
        check_tokens(wanted_BT, model.config.vocab_size or 0)
    # By default, TPUs and GPUs round the factors of float32 products.
    with jax.default_matmul_precision("highest"):
        seen = capture(Decoder(config), params, tokens_BT, names=NEEDED)
        return attribute_seen(config, params, seen, tokens_BT, targets_BT, versus_BT)


@functools.partial(jax.jit, static_argnums=0)
def attribute_seen(
    config: ModelConfig,
    params: Any,
    seen: dict[str, jax.Array],
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    versus_BT: jax.Array | None = None,
) -> Attribution:
    """`attribute` from the arrays of a pass that was captured before: for several targets of one text.

    On GPUs and TPUs the sums are exact under `jax.default_matmul_precision("highest")`, there and here.

    Args:
        config: the model, not in bfloat16.
        params: its parameters.
        seen: what `capture` gave for these tokens, without edits; what is in `NEEDED` will do.
        tokens_BT: see `attribute`.
        targets_BT: see `attribute`.
        versus_BT: see `attribute`.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        layers = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    streams_MBTD = jnp.concatenate([seen["embeddings"][None], seen["residual"]])  # M = L + 1
    dtype = streams_MBTD.dtype

    def logit_and_cut(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The model's logit, its column of the head, and what the soft cap takes."""
        logit_BT = jnp.take_along_axis(seen["logits"], tokens_BT[..., None], axis=-1)[..., 0]
        column_BTD = head_columns(params, tokens_BT).astype(dtype)
        if config.logit_soft_cap is None:
            return logit_BT, column_BTD, jnp.zeros_like(logit_BT)
        raw_BT = (normalise(config, params["final_norm"], streams_MBTD[-1]) * column_BTD).sum(-1)
        return logit_BT, column_BTD, squash(raw_BT, config.logit_soft_cap)

    logit_BT, column_BTD, soft_cap_BT = logit_and_cut(targets_BT)
    if versus_BT is not None:
        others = logit_and_cut(versus_BT)
        logit_BT, column_BTD, soft_cap_BT = logit_BT - others[0], column_BTD - others[1], soft_cap_BT - others[2]

    direction_BTD, bias_BT = back_through_norm(config, params["final_norm"], streams_MBTD[-1], column_BTD)

    def layer(direction_BTD: jax.Array, own: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return back_through_layer(config, direction_BTD, *own)

    arrays = {name: seen[name] for name in NEEDED[:4]}
    direction_BTD, (heads_LBNTS, feed_forward_LBT, bias_LBT) = jax.lax.scan(
        layer, direction_BTD, (layers, streams_MBTD[:-1], arrays), reverse=True
    )
    token_BTD = jnp.take(params["embedding"], tokens_BT, axis=0).astype(dtype) * config.embed_scale
    return Attribution(
        token_BT=(token_BTD * direction_BTD).sum(-1),
        position_BT=((seen["embeddings"] - token_BTD) * direction_BTD).sum(-1),
        heads_LBNTS=heads_LBNTS,
        feed_forward_LBT=feed_forward_LBT,
        bias_BT=bias_BT + bias_LBT.sum(0),
        soft_cap_BT=soft_cap_BT,
        logit_BT=logit_BT,
    )


def back_through_layer(
    config: ModelConfig, direction_BTD: jax.Array, params: Any, x_BTD: jax.Array, seen: dict[str, jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """What a layer's writes give along a direction, and the direction as it looks from before the layer.

    Args:
        config: the model.
        direction_BTD: what the stream after the layer is multiplied by.
        params: the layer's.
        x_BTD: the stream before the layer.
        seen: the layer's part of what was captured.

    Returns:
        The direction for `x_BTD`, and the parts heads_BNTS, feed_forward_BT and bias_BT.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(x_BTD.dtype), params)
    out = params["attention"]["out"]
    gathered_BTD = linear(out, "BTNH,NHD->BTD", seen["heads"])
    written_BTD = linear(params["feed_forward"]["down"], "BTF,FD->BTD", seen["hidden"])
    attended_BTD = x_BTD + gathered_BTD
    if config.norm_position == "post":
        attended_BTD = normalise(config, params["attention_norm"], attended_BTD)

    back = functools.partial(back_through_sum, config, params)
    direction_BTD, own_BTD, bias_BT = back("feed_forward", attended_BTD, written_BTD, direction_BTD)
    feed_forward_BT = (written_BTD * own_BTD).sum(-1)
    direction_BTD, own_BTD, more_BT = back("attention", x_BTD, gathered_BTD, direction_BTD)
    bias_BT += more_BT
    if config.attention_out_bias:
        bias_BT += (own_BTD * out["bias"][None, None]).sum(-1)
    direction_BTNH = jnp.einsum("BTD,NHD->BTNH", own_BTD, out["kernel"])
    return direction_BTD, (head_parts(seen["weights"], seen["v"], direction_BTNH), feed_forward_BT, bias_BT)


def head_parts(weights_BNTS: jax.Array, v_BSKH: jax.Array, direction_BTNH: jax.Array) -> jax.Array:
    """heads_BNTS: what each head gives along a direction by each value it took, weight · (value · direction).

    The direction comes to the heads; the writes of all heads from all tokens, (B, T, N, S, D), are never held.
    """
    B, T, N, H = direction_BTNH.shape
    S, K = v_BSKH.shape[1:3]
    direction_BTKGH = direction_BTNH.reshape(B, T, K, N // K, H)
    products_BKGTS = jnp.einsum("BSKH,BTKGH->BKGTS", v_BSKH, direction_BTKGH)
    return weights_BNTS * products_BKGTS.reshape(B, N, T, S)


def back_through_sum(
    config: ModelConfig, params: Any, part: str, x_BTD: jax.Array, write_BTD: jax.Array, direction_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The directions behind one of a block's two sums: x + write, norm(x + write) or x + norm(write).

    Returns:
        The direction for the stream, that for the write, and the part of the norm's bias, (B, T).
    """
    if config.norm_position == "post":
        norm = params[f"{part}_norm"]
        direction_BTD, bias_BT = back_through_norm(config, norm, x_BTD + write_BTD, direction_BTD)
        return direction_BTD, direction_BTD, bias_BT
    if config.norm_position in ("both", "output"):
        own_BTD, bias_BT = back_through_norm(config, params[f"{part}_output_norm"], write_BTD, direction_BTD)
        return direction_BTD, own_BTD, bias_BT
    return direction_BTD, direction_BTD, jnp.zeros_like(direction_BTD[..., 0])


def back_through_norm(
    config: ModelConfig, params: Any, x_BTD: jax.Array, direction_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The direction from before a norm: norm(x) · direction = x · (the result) + (what the norm's bias gives).

    The size of x, by which the norm divides, is taken as it was. Taking the mean off is linear by itself, and for a
    product it is the same whether it is taken off the one factor or the other.
    """
    dtype = x_BTD.dtype
    bias_BT = jnp.zeros_like(x_BTD[..., 0])
    if config.norm_bias:
        bias_BT = (direction_BTD * params["bias"].astype(dtype)[None, None]).sum(-1)
    direction_BTD = direction_BTD * params["scale"].astype(dtype)[None, None]
    if config.norm == "layernorm":
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        direction_BTD -= direction_BTD.mean(-1, keepdims=True)
    return direction_BTD * jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + config.norm_epsilon), bias_BT


def normalise(config: ModelConfig, params: Any, x_BTD: jax.Array) -> jax.Array:
    """One of the model's own norms, by itself."""
    return Norm(config.norm, config.norm_epsilon, config.norm_bias).apply({"params": params}, x_BTD)  # type: ignore[return-value]


def linear(params: Any, equation: str, x: jax.Array) -> jax.Array:
    """One of the model's own projections, by itself."""
    y = jnp.einsum(equation, x, params["kernel"])
    return y + params["bias"][None, None] if "bias" in params else y


def head_columns(params: Any, tokens_BT: jax.Array) -> jax.Array:
    """What the final hidden states are multiplied by for the logits of these tokens, (B, T, D)."""
    if "head" in params:
        return jnp.moveaxis(jnp.take(params["head"], tokens_BT, axis=1), 0, -1)
    return jnp.take(params["embedding"], tokens_BT, axis=0)


class ScoreParts(struct.PyTreeNode):
    """The score of one query and one key, in parts that sum to it.

    Attributes:
        dimensions_H: from each number of the query times its number of the key, times the scale (1 / sqrt(H) if the
            model has none of its own); where positions are rotary, as they are after the rotation.
        soft_cap: from squashing; 0 where the model does not.
        position: from the distance, where positions are ALiBi's; else 0.
        mask: minus infinity where the query may not look at the key; else 0.
        score: the model's own number.
    """

    dimensions_H: jax.Array
    soft_cap: jax.Array
    position: jax.Array
    mask: jax.Array
    score: jax.Array

    def total(self) -> jax.Array:
        """The sum of all parts: `score`, up to rounding."""
        return self.dimensions_H.sum() + self.soft_cap + self.position + self.mask


def score_parts(
    model: Decoder, seen: dict[str, jax.Array], layer: int, head: int, batch: int, t: int, s: int
) -> ScoreParts:
    """Splits one score, query · key, into what each dimension of the head gave to it.

    Args:
        model: the model.
        seen: what `capture` gave, without a cache and without edits.
        layer: counted from 0, as all that follow.
        head: which query head.
        batch: which row.
        t: which query.
        s: which key.

    Raises:
        UserError: the keys are not all there, as with a cache.
    """
    config = model.config
    if seen["k_rotated"].shape[2] != seen["scores"].shape[-1]:
        raise UserError("score_parts: the keys of a cache are not captured; capture the whole text without a cache")
    scores_TS, positions_S = seen["scores"][layer, batch, head], seen["key_positions"][layer, batch]
    dtype = scores_TS.dtype
    q_H = seen["q_rotated"][layer, batch, t, head].astype(dtype)
    k_H = seen["k_rotated"][layer, batch, s, head * config.kv_heads // config.num_heads].astype(dtype)
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    dimensions_H = q_H * k_H * scale
    soft_cap = position = jnp.zeros((), dtype)
    if config.attention_soft_cap is not None:
        soft_cap = squash(dimensions_H.sum(), config.attention_soft_cap)
    if config.positions == "alibi":
        slope = float(alibi_slopes(config.num_heads)[head])
        position = -slope * (positions_S[t] - positions_S[s]).astype(dtype)
    mask = jnp.where(jnp.isneginf(scores_TS[t, s]), -jnp.inf, 0.0).astype(dtype)
    return ScoreParts(dimensions_H, soft_cap, position, mask, scores_TS[t, s])


def squash(x: jax.Array, cap: float) -> jax.Array:
    """What a soft cap adds to a number: cap * tanh(x / cap) - x."""
    return cap * jnp.tanh(x / cap) - x
