"""Attention over a sequence that is spread over devices: the keys and values travel, the queries stay.

Each device holds a part of every sequence. The devices form a ring: at each turn a device attends from its queries to
the keys that are with it, and sends these on to its neighbour, until all queries have seen all keys (Liu et al. 2023).
No device ever holds the keys of a whole sequence, nor more scores than those of one block of queries and one of keys:
so sequences can be longer than one device holds.

The results of the turns are joined as in FlashAttention (Dao et al. 2022, section 3.1). With m the largest score so
far, l the sum of exp(score - m) and a the sum of exp(score - m) v, new scores change them to

    m' = max(m, max score)    l' = exp(m - m') l + sum exp(score - m')    a' = exp(m - m') a + sum exp(score - m') v

and at the end the heads are a / l. The backward pass goes round the ring once more and computes the scores anew; of the
forward pass it needs the heads and m + log l alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from flax_decoder.nn.kernels.block_pairs import (
    MAX_PAIR_TOKENS,
    Blocks,
    for_each_block_pair,
    merge_blocks,
    split_blocks,
)
from flax_decoder.nn.kernels.ring import Ring
from flax_decoder.nn.kernels.splash import HEADS
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.nn.precision import accumulation_dtype

# The largest score before there is one: finite, because infinity minus infinity is not a number.
LOWEST = -1e30


def ring_attention(
    ring: Ring,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    max_tokens: int = MAX_PAIR_TOKENS,
) -> jax.Array:
    """The numbers of `attention.dot_product_attention`, for causal sequences that are split over a ring of devices.

    Tokens may lie in any order; `parallel.zigzag` gives one in which all devices have the same work. A pair of blocks
    in which no query sees a key costs nothing. Other arguments: see `attention.dot_product_attention`.

    Args:
        ring: from `find_ring`.
        mask: which keys a query sees (T = S); each position of a document is there once.
        dropout: probability of zeroing a weight, where there is an `rng`.
        rng: key of the dropout; None is no dropout.
        max_tokens: most queries, and most keys, of a block.
    """
    params = ScoreParams(q_BTNH.shape[-1] ** -0.5 if scale is None else scale, soft_cap, dropout, max_tokens)
    return _attend(ring, params, q_BTNH, k_BSKH, v_BSKH, mask, rng)


@dataclasses.dataclass(frozen=True)
class ScoreParams:
    """The constants of `ring_attention`, and how they turn products into scores and drop weights."""

    scale: float
    soft_cap: float | None
    dropout: float
    max_tokens: int

    def scores(self, mask: MaskSpec, products_BKGTS: jax.Array) -> jax.Array:
        """From products of queries and keys to scores_BKGTS, minus infinity where a query does not see a key."""
        scores_BKGTS = products_BKGTS * self.scale
        if self.soft_cap is not None:
            scores_BKGTS = self.soft_cap * jnp.tanh(scores_BKGTS / self.soft_cap)
        return mask.masked(scores_BKGTS)

    def drop(self, rng: jax.Array | None, mask: MaskSpec, weights_BKGTS: jax.Array) -> jax.Array:
        """Zeroes some weights: of one pair of blocks always the same ones, since both passes must agree on them."""
        if self.dropout == 0 or rng is None:
            return weights_BKGTS
        places_BT, key_places_BS = mask.positions_BT, mask.key_positions_BS
        if mask.segments_BT is not None and mask.key_segments_BS is not None:
            # Positions count anew in each document, so many pairs have the same; with the starts they are places.
            places_BT, key_places_BS = places_BT + mask.segments_BT, key_places_BS + mask.key_segments_BS
        rng = jax.random.fold_in(rng, places_BT.max())
        rng = jax.random.fold_in(rng, key_places_BS.min())
        kept_BKGTS = jax.random.bernoulli(rng, 1 - self.dropout, weights_BKGTS.shape)
        return jnp.where(kept_BKGTS, weights_BKGTS / (1 - self.dropout), 0)


# --- All devices: whole arrays, and how their axes are split ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    ring: Ring,
    params: ScoreParams,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    rng: jax.Array | None,
) -> jax.Array:
    return _attend_forward(ring, params, q_BTNH, k_BSKH, v_BSKH, mask, rng)[0]


def _attend_forward(
    ring: Ring,
    params: ScoreParams,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    rng: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The heads, and what the backward pass needs: per device nothing larger than its part of the queries."""
    function = functools.partial(_forward, ring, params)
    in_specs = *(ring.spec,) * 3, mask.partition_specs(ring.rows, ring.axes, ring.heads), PartitionSpec()
    heads_BTNH, log_sums_BTN = ring.shard_map(function, in_specs, ring.spec)(q_BTNH, k_BSKH, v_BSKH, mask, rng)
    heads_BTNH, log_sums_BTN = checkpoint_name(heads_BTNH, HEADS), checkpoint_name(log_sums_BTN, HEADS)
    return heads_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask, rng, heads_BTNH, log_sums_BTN)


def _attend_backward(
    ring: Ring, params: ScoreParams, residuals: tuple[Any, ...], dheads_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The gradients of queries, keys and values; mask and rng have none."""
    function = functools.partial(_backward, ring, params)
    in_specs = (
        *(ring.spec,) * 3,
        residuals[3].partition_specs(ring.rows, ring.axes, ring.heads),
        PartitionSpec(),
        *(ring.spec,) * 3,
    )
    return *ring.shard_map(function, in_specs, ring.spec)(*residuals, dheads_BTNH), None, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- One device: its parts of the arrays ---


def _forward(
    ring: Ring,
    params: ScoreParams,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The heads, and log_sums_BTN: the logarithm of the sum of exp(score) over all keys that a query sees."""
    dtype = accumulation_dtype(q_BTNH.dtype)
    rng = _device_rng(ring, rng)
    queries, keys = split_blocks(mask, [q_BTNH], [k_BSKH, v_BSKH], params.max_tokens)

    def join(mask: MaskSpec, query: Blocks, key: Blocks, so_far: Blocks, none: Blocks) -> tuple[Blocks, Blocks]:
        (*_, q_BKGTH), (*_, k_BKSH, v_BKSH) = query, key
        largest_BKGT, sums_BKGT, heads_BKGTH = so_far
        products_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=dtype)
        scores_BKGTS = params.scores(mask, products_BKGTS)
        new_largest_BKGT = jnp.maximum(largest_BKGT, scores_BKGTS.max(-1))
        fade_BKGT = jnp.exp(largest_BKGT - new_largest_BKGT)
        weights_BKGTS = jnp.exp(scores_BKGTS - new_largest_BKGT[..., None])
        sums_BKGT = fade_BKGT * sums_BKGT + weights_BKGTS.sum(-1)
        weights_BKGTS = params.drop(rng, mask, weights_BKGTS).astype(v_BKSH.dtype)
        new_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH, preferred_element_type=dtype)
        return (new_largest_BKGT, sums_BKGT, fade_BKGT[..., None] * heads_BKGTH + new_BKGTH), none

    zeros = jnp.zeros(queries[2].shape, dtype)
    nothing = jnp.full(zeros.shape[:-1], LOWEST, dtype), zeros[..., 0], zeros

    def visit(so_far: Any, keys: Blocks) -> Any:
        return for_each_block_pair(join, mask, queries, keys, so_far, ())[0]

    largest, sums, heads = ring.scan(visit, nothing, keys)
    sums = jnp.where(sums > 0, sums, 1)  # 0 where padding saw nothing
    T = q_BTNH.shape[1]
    heads_BTNH = merge_blocks(heads / sums[..., None], T).astype(v_BSKH.dtype)
    return heads_BTNH, merge_blocks(largest + jnp.log(sums), T)


def _backward(
    ring: Ring,
    params: ScoreParams,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    rng: jax.Array | None,
    heads_BTNH: jax.Array,
    log_sums_BTN: jax.Array,
    dheads_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the gradient of the heads to those of queries, keys and values, which are summed in at least float32.

    The gradients of keys and values travel with these, and each device adds those of its queries. For the weights
    w = exp(score - log sum) of a query, d score = w (d w - mean), where the mean of d w, weighted by w, is
    d heads . heads.
    """
    dtype = accumulation_dtype(q_BTNH.dtype)
    rng = _device_rng(ring, rng)
    means_BTN = jnp.einsum("BTNH,BTNH->BTN", dheads_BTNH, heads_BTNH, preferred_element_type=dtype)
    query_arrays = [q_BTNH, dheads_BTNH, log_sums_BTN, means_BTN]
    queries, keys = split_blocks(mask, query_arrays, [k_BSKH, v_BSKH], params.max_tokens)

    def pull(mask: MaskSpec, query: Blocks, key: Blocks, dq: Blocks, dkey: Blocks) -> tuple[Blocks, Blocks]:
        *_, q_BKGTH, dheads_BKGTH, log_sums_BKGT, means_BKGT = query
        *_, k_BKSH, v_BKSH = key
        (dq_BKGTH,), (dk_BKSH, dv_BKSH) = dq, dkey
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)

        products_BKGTS = product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
        scores_BKGTS, pull_products = jax.vjp(functools.partial(params.scores, mask), products_BKGTS)
        weights_BKGTS = jnp.exp(scores_BKGTS - log_sums_BKGT[..., None])
        dropped_BKGTS = params.drop(rng, mask, weights_BKGTS).astype(q_BKGTH.dtype)
        dweights_BKGTS = params.drop(rng, mask, product("BKGTH,BKSH->BKGTS", dheads_BKGTH, v_BKSH))
        (dproducts_BKGTS,) = pull_products(weights_BKGTS * (dweights_BKGTS - means_BKGT[..., None]))
        dproducts_BKGTS = dproducts_BKGTS.astype(q_BKGTH.dtype)

        dq_BKGTH += product("BKGTS,BKSH->BKGTH", dproducts_BKGTS, k_BKSH)
        dk_BKSH += product("BKGTS,BKGTH->BKSH", dproducts_BKGTS, q_BKGTH)
        dv_BKSH += product("BKGTS,BKGTH->BKSH", dropped_BKGTS, dheads_BKGTH)
        return (dq_BKGTH,), (dk_BKSH, dv_BKSH)

    zeros = tuple(jnp.zeros(array.shape, dtype) for array in keys[2:])

    def visit(gradients: tuple[Blocks, Blocks], keys: Blocks) -> tuple[Blocks, Blocks]:
        dq, dkeys = gradients
        arrived = ring.send_to_next(dkeys)  # added at the end only: they travel while the rest is computed
        dq, new = for_each_block_pair(pull, mask, queries, keys, dq, zeros)
        return dq, jax.tree.map(jnp.add, arrived, new)

    dq, dkeys = ring.scan(visit, ((jnp.zeros(queries[2].shape, dtype),), zeros), keys)
    dk, dv = ring.send_to_next(dkeys)  # to the devices of the keys themselves
    dq_BTNH, dk_BSKH, dv_BSKH = (
        merge_blocks(blocks, q_BTNH.shape[1]) for blocks in (dq[0], dk[:, :, :, None], dv[:, :, :, None])
    )
    return dq_BTNH.astype(q_BTNH.dtype), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def _device_rng(ring: Ring, rng: jax.Array | None) -> jax.Array | None:
    """A key per part of the arrays: devices with other parts drop other weights, those with the same, the same."""
    if rng is None:
        return None
    return jax.random.fold_in(rng, jax.lax.axis_index((*ring.rows, *ring.axes, *ring.heads)))
