"""Queries, keys, values: the heart.

Every position asks a question (its query), wears a label (its key) and holds a content (its value). It takes in the
contents of the positions whose labels match its question, and no position sees what comes after it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import ModelConfig
from flax_decoder.nn.attention_choice import choose_kernel
from flax_decoder.nn.attention_kernels import FUSED, blockwise, on_each_device
from flax_decoder.nn.axes import constrain
from flax_decoder.nn.cache import LayerKV, positions_of_slots, write
from flax_decoder.nn.intermediates import OwnEdits, edited, show
from flax_decoder.nn.linear import Linear
from flax_decoder.nn.norm import Norm
from flax_decoder.nn.positions import alibi_slopes, rotary_frequencies, rotate
from flax_decoder.nn.precision import at_least_float32
from flax_decoder.nn.ring import find_ring
from flax_decoder.nn.ring_attention import ring_attention

# A window that no sequence fills.
NO_WINDOW = 2**30


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    edit: Callable[[str, jax.Array], jax.Array] = lambda name, array: array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Averages the values, weighted by how well each key matches the query.

        Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V        (Vaswani et al. 2017, eq. 1; d_k is H)

    With K < N, each key/value head serves the G = N / K query heads that stand beside each other (grouped-query
    attention, Ainslie et al. 2023; with K = 1 multi-query attention, Shazeer 2019).

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask_BTS: True where a query may look at a key, at least once for each query; B may be 1.
        bias_BNTS: added to the scores; B may be 1.
        soft_cap: scores go through soft_cap * tanh(score / soft_cap) first (Gemma 2).
        scale: what scores are multiplied by, where it is not 1 / sqrt(H).
        drop: applied to the weights, for dropout.
        edit: gives what takes the place of the scores, and of the weights, for those who want to change them.

    Returns:
        The averages heads_BTNH in the dtype of the values; and in at least float32, for those who want to look, the
        scores (minus infinity behind the mask) and the weights, both (B, K, G, T, S).
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    # Var(q . k) grows as H; dividing by sqrt(H) keeps the softmax off its flat ends.
    dtype = at_least_float32(q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype)
    scores_BKGTS *= H**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    if bias_BNTS is not None:
        scores_BKGTS += bias_BNTS.reshape(-1, K, N // K, T, S).astype(dtype)
    scores_BKGTS = edit("scores", jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf))

    weights_BKGTS = edit("weights", jax.nn.softmax(scores_BKGTS, axis=-1))
    # In this order of axes the product reads the values as they lie in a cache; in another, a transposed copy of them.
    heads_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", drop(weights_BKGTS).astype(v_BSKH.dtype), v_BSKH)
    return heads_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), scores_BKGTS, weights_BKGTS


class SelfAttention(nn.Module):
    """Multi-head causal self-attention.

    Asked for "intermediates", it hands out q, k (before and after rotation), v, scores, weights and heads.

    Attributes:
        config: the model.
        edits: change what goes by these names on the way.
    """

    config: ModelConfig
    edits: OwnEdits | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        window: int | None,
        cached: LayerKV | None = None,
        end_B: jax.Array | None = None,
        num_spare: int = 0,
        *,
        fast: bool = False,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerKV | None]:
        """Lets each position gather from itself and from those before it.

        Args:
            x_BTD: what the positions hold.
            positions_BT: where they stand, counted from 0; B may be 1.
            window: how many positions a query sees, its own included; None is all up to its own.
            cached: k_BKSH and v_BKSH of this layer, with the tokens before in the slots of their positions.
            end_B: with a cache, the position from which on a row's tokens are padding.
            num_spare: see `KVCache`.
            fast: a faster implementation may be taken, as the tokens of each row stand in order from position 0 on.
            deterministic: False drops weights at random.

        Returns:
            What each position gathered, (B, T, D), and `cached` with the new keys and values in it.

        Raises:
            UserError: `config.attention` names an implementation that does not run on the devices.
        """
        config = self.config
        q_BTNH, k_BSKH, v_BSKH = self.queries_keys_values(x_BTD, positions_BT, window)
        drops_weights = config.dropout > 0 and not deterministic
        wants_weights = self.is_mutable_collection("intermediates") or self.edits is not None
        ring = None if cached is not None or wants_weights else find_ring(q_BTNH.shape, k_BSKH.shape)
        kernel = choose_kernel(config) if fast and not (drops_weights or wants_weights) else "reference"
        soft_cap, scale = config.attention_soft_cap, config.attention_scale
        if ring is not None:
            rng = self.make_rng("dropout") if drops_weights else None
            attend = functools.partial(ring_attention, ring, soft_cap=soft_cap, scale=scale, rng=rng)
            sight = positions_BT, window or NO_WINDOW, self.slopes()
            heads_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, *sight, dropout=config.dropout)
        elif kernel in FUSED:
            fused = functools.partial(FUSED[kernel], window=window, soft_cap=soft_cap, scale=scale)
            heads_BTNH = on_each_device(fused, q_BTNH, k_BSKH, v_BSKH)
        else:
            key_positions_BS = positions_BT
            if cached is not None:
                window = min(window or cached[0].shape[2], cached[0].shape[2] - num_spare)
                k_BSKH, v_BSKH, key_positions_BS, cached = self.with_cached(k_BSKH, v_BSKH, positions_BT, cached, end_B)
            self.sow("intermediates", "key_positions", key_positions_BS)
            mask_BTS, bias_BNTS = self.mask_and_bias(positions_BT, key_positions_BS, window)
            drop = nn.Dropout(config.dropout, deterministic=deterministic)
            heads_BTNH = self.by_formula(kernel, q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, window, drop)
        heads_BTNH = show(self, "heads", heads_BTNH, self.edits)

        out = Linear((config.embed_dim,), 2, config.attention_out_bias, config.output_stddev, config.dtype, name="out")
        return out(constrain(heads_BTNH, "batch", "length", "heads", None)), cached

    def by_formula(
        self,
        kernel: str,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask_BTS: jax.Array,
        bias_BNTS: jax.Array | None,
        window: int | None,
        drop: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """heads_BTNH by `dot_product_attention`, of all queries at once or of one block after the other."""
        config = self.config
        attend: Callable[..., tuple[jax.Array, ...]] = functools.partial(
            dot_product_attention, soft_cap=config.attention_soft_cap, scale=config.attention_scale, drop=drop
        )
        if self.edits is not None:
            attend = functools.partial(attend, edit=self.edit_heads)
        if config.remat == "attention" and not self.is_mutable_collection("intermediates"):
            attend = jax.checkpoint(attend, prevent_cse=not config.scan_layers)
        if kernel == "blockwise":
            return blockwise(attend, q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, window)
        heads_BTNH, scores_BKGTS, weights_BKGTS = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)
        self.sow("intermediates", "scores", scores_BKGTS)
        self.sow("intermediates", "weights", weights_BKGTS)
        return heads_BTNH

    def edit_heads(self, name: str, x_BKGTS: jax.Array) -> jax.Array:
        """Scores or weights, edited: those who edit count N heads, and not which of them share keys."""
        x_BNTS = x_BKGTS.reshape(x_BKGTS.shape[0], self.config.num_heads, *x_BKGTS.shape[-2:])
        return edited(name, x_BNTS, self.edits).reshape(x_BKGTS.shape)

    def mask_and_bias(
        self, positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What each query may look at, mask_BTS, and what its position adds to the scores, bias_BNTS."""
        distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None]
        mask_BTS = (distance_BTS >= 0) & (key_positions_BS >= 0)[:, None]
        if window is not None:
            mask_BTS &= distance_BTS < window
        slopes_N = self.slopes()
        if slopes_N is None:
            return mask_BTS, None
        return mask_BTS, -slopes_N[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)

    def slopes(self) -> jax.Array | None:
        """slopes_N: by how much the scores of each head fall per position of distance, where positions are ALiBi's."""
        return jnp.asarray(alibi_slopes(self.config.num_heads)) if self.config.positions == "alibi" else None

    def with_cached(
        self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, cached: LayerKV, end_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, LayerKV]:
        """All keys and values there are to look at, k_BSKH and v_BSKH, where they stand, and the cache with the new.

        A single token may take its slot first: what it writes over is out of its sight. Of several, the first still
        sees what the last ones write over, so they look at the cache as it was and at each other.
        """
        end_B = positions_BT[:, -1] + 1 if end_B is None else end_B
        new = k_BTKH, v_BTKH
        written = write(cached[0], k_BTKH, positions_BT, end_B), write(cached[1], v_BTKH, positions_BT, end_B)
        num_slots = cached[0].shape[2]
        if k_BTKH.shape[1] == 1:
            k_BSKH, v_BSKH = (array_BKSH.swapaxes(1, 2) for array_BKSH in written)
            return k_BSKH, v_BSKH, positions_of_slots(num_slots, positions_BT[:, 0] + 1), written
        before = (array_BKSH.swapaxes(1, 2) for array_BKSH in cached)
        k_BSKH, v_BSKH = (jnp.concatenate(parts, axis=1) for parts in zip(before, new, strict=True))
        earlier = positions_of_slots(num_slots, positions_BT[:, 0])
        return k_BSKH, v_BSKH, jnp.concatenate([earlier, positions_BT], axis=1), written

    def queries_keys_values(
        self, x_BTD: jax.Array, positions_BT: jax.Array, window: int | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What each position asks, how it can be found, and what it has to give: q_BTNH, k_BTKH and v_BTKH."""
        config = self.config

        def project(name: str, num_heads: int) -> jax.Array:
            shape = (num_heads, config.head_width)
            return Linear(shape, 1, config.attention_in_bias, config.init_stddev, config.dtype, name=name)(x_BTD)

        q_BTNH = constrain(project("query", config.num_heads), "batch", "length", "heads", None)
        k_BTKH = constrain(project("key", config.kv_heads), "batch", "length", "kv_heads", None)
        v_BTKH = constrain(project("value", config.kv_heads), "batch", "length", "kv_heads", None)

        if config.qk_norm != "none":
            q_BTNH = self.normalise("query_norm", q_BTNH)
            k_BTKH = self.normalise("key_norm", k_BTKH)
        q_BTNH = show(self, "q", q_BTNH, self.edits)
        k_BTKH = show(self, "k", k_BTKH, self.edits)
        v_BTKH = show(self, "v", v_BTKH, self.edits)
        if config.positions == "rotary":
            frequencies = rotary_frequencies(config, in_window=window is not None)
            q_BTNH = show(self, "q_rotated", rotate(q_BTNH, positions_BT, frequencies), self.edits)
            k_BTKH = show(self, "k_rotated", rotate(k_BTKH, positions_BT, frequencies), self.edits)
        return q_BTNH, k_BTKH, v_BTKH

    def normalise(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """Queries or keys of unit size, each head by itself or all heads of a position as one."""
        norm = Norm("rmsnorm", self.config.norm_epsilon, name=name)
        if self.config.qk_norm == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
