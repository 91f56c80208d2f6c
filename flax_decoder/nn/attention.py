"""Queries, keys, values: the heart.

Each position asks a question (its query), has a label (its key) and a content (its value). It takes in the contents of
the positions whose labels match its question, and no position sees what comes after it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import LayerKind, ModelConfig
from flax_decoder.nn.axes import constrain
from flax_decoder.nn.cache import LayerKV, append_to_cache
from flax_decoder.nn.call import Call, Hook
from flax_decoder.nn.kernels.choice import choose_attention
from flax_decoder.nn.linear import Linear
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.nn.norm import normed_heads
from flax_decoder.nn.positions import alibi_slopes, rotary_frequencies, rotary_magnitude, rotate, scale_queries
from flax_decoder.nn.precision import accumulation_dtype


class SelfAttention(nn.Module):
    """Multi-head causal self-attention.

    In "intermediates" it records q, k (before and after rotation), v, scores, weights and heads.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, call: Call, kind: LayerKind, cached: LayerKV | None = None
    ) -> tuple[jax.Array, LayerKV | None]:
        """Lets each position gather from itself and from those before it.

        Args:
            x_BTD: the input of each position.
            call: positions of the tokens, and how this call runs.
            kind: the window of this layer, and whether it rotates.
            cached: k_BKSH and v_BKSH of this layer for the tokens before.

        Returns:
            What each position gathered, (B, T, D), and `cached` with the new keys and values in it.

        Raises:
            UserError: `config.attention` names an implementation that does not run on the devices.
        """
        config, record = self.config, call.hook(self)
        bias, stddev, adapter = config.attention_in_bias, config.init_stddev, call.adapter
        linear = functools.partial(Linear, use_bias=bias, init_stddev=stddev, adapter=adapter)
        query_shape, key_shape = (config.num_heads, config.head_width), (config.kv_heads, config.head_width)

        with jax.named_scope("qkv"):
            # A query is what a position looks for,
            q_BTNH = linear(query_shape, config.dtype, name="query")("BTD,DNH->BTNH", x_BTD)
            # a key is what it can be found by,
            k_BTKH = linear(key_shape, config.dtype, name="key")("BTD,DKH->BTKH", x_BTD)
            # and a value is what it gives to those who find it.
            v_BTKH = linear(key_shape, config.dtype, name="value")("BTD,DKH->BTKH", x_BTD)
            q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
            k_BTKH, v_BTKH = (constrain(x, "batch", "length", "kv_heads", None) for x in (k_BTKH, v_BTKH))
            if config.qkv_clip is not None:
                low, high = -config.qkv_clip, config.qkv_clip
                q_BTNH, k_BTKH, v_BTKH = (jnp.clip(x, low, high) for x in (q_BTNH, k_BTKH, v_BTKH))
            if config.qk_norm_position == "before":
                q_BTNH, k_BTKH = normed_heads(config, q_BTNH, k_BTKH)
            q_BTNH, k_BTKH, v_BTKH = record("q", q_BTNH), record("k", k_BTKH), record("v", v_BTKH)

        if config.positions == "rotary":
            with jax.named_scope("rotary"):
                frequencies, magnitude = rotary_frequencies(config, kind, call), rotary_magnitude(config, kind)
                how = call.positions_BT, frequencies, config.rotary_layout, magnitude
                q_BTNH, k_BTKH = rotate(q_BTNH, *how), rotate(k_BTKH, *how)
                if config.qk_norm_position == "after":
                    q_BTNH, k_BTKH = normed_heads(config, q_BTNH, k_BTKH)
                q_BTNH = scale_queries(config, q_BTNH, call.positions_BT)
                q_BTNH, k_BTKH = record("q_rotated", q_BTNH), record("k_rotated", k_BTKH)

        k_BSKH, v_BSKH, key_positions_BS, window = k_BTKH, v_BTKH, call.positions_BT, kind.window
        if cached is not None:
            with jax.named_scope("cache"):
                k_BSKH, v_BSKH, key_positions_BS, window, cached = append_to_cache(cached, k_BTKH, v_BTKH, call, window)

        with jax.named_scope("attention"):
            slopes_N = jnp.asarray(alibi_slopes(config.num_heads)) if config.positions == "alibi" else None
            key_positions_BS = record("key_positions", key_positions_BS)
            segments = call.segments_BT, call.segments_BT  # of queries and of keys
            mask = MaskSpec(call.positions_BT, key_positions_BS, slopes_N, window, *segments)
            # Either the formula below, or a faster way to the same numbers.
            attend = choose_attention(self, dot_product_attention, call, q_BTNH, k_BSKH, has_cache=cached is not None)
            heads_BTNH = record("heads", attend(q_BTNH, k_BSKH, v_BSKH, mask))

        with jax.named_scope("out"):
            settings = config.dtype, config.attention_out_bias, config.output_stddev, adapter
            out = Linear((config.embed_dim,), *settings, name="out")
            return out("BTNH,NHD->BTD", constrain(heads_BTNH, "batch", "length", "heads", None)), cached


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    hook: Hook = lambda name, array: array,
) -> jax.Array:
    """Averages the values, weighted by how well each key matches the query.

        Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V        (Vaswani et al. 2017, eq. 1; d_k is H)

    With K < N, each key/value head serves the G = N / K query heads beside each other (grouped-query attention,
    Ainslie et al. 2023; with K = 1 multi-query attention, Shazeer 2019).

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which keys a query sees, at least one for each.
        scale: factor of the scores; None is 1 / sqrt(H).
        soft_cap: scores go through soft_cap * tanh(score / soft_cap) first (Gemma 2).
        hook: records or replaces "scores" (minus infinity behind the mask) and "weights", both (B, K, G, T, S) in at
            least float32.

    Returns:
        The averages heads_BTNH in the dtype of the values.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    # Var(q . k) grows as H; dividing by sqrt(H) keeps the softmax off its flat ends.
    dtype = accumulation_dtype(q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype)
    scores_BKGTS *= H**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = hook("scores", mask.masked(scores_BKGTS))

    weights_BKGTS = hook("weights", jax.nn.softmax(scores_BKGTS, axis=-1))
    # In this order of axes the product reads the values as they lie in a cache; in another, a transposed copy of them.
    heads_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return heads_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
