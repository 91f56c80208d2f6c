"""Attention over a sequence that is spread over devices: the keys and values travel, the queries stay.

Each device holds a part of every sequence. The devices form a ring: at each turn a device lets its queries look at the
keys that are with it, and passes these on to its neighbour, until all queries have met all keys (Liu et al. 2023). No
device ever holds the keys of a whole sequence, nor more scores than those of one block of queries and one of keys: so
sequences can be longer than one device holds.

The results of the turns are joined as in FlashAttention (Dao et al. 2022, section 3.1). With m the largest score so
far, l the sum of exp(score - m) and a the sum of exp(score - m) v, new scores change them to

    m' = max(m, max score)    l' = exp(m - m') l + sum exp(score - m')    a' = exp(m - m') a + sum exp(score - m') v

and at the end the heads are a / l. The backward pass goes round once more and computes the scores anew; of the forward
pass it needs the heads and m + log l alone.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_decoder.nn.precision import at_least_float32
from flax_decoder.nn.ring import Ring
from flax_decoder.nn.token_blocks import BLOCK_TOKENS, Blocks, cut, meet, whole

# The largest score where there is none yet: finite, because infinity minus infinity is not a number.
LOWEST = -1e30


class Sight(NamedTuple):
    """What else than their products decides how queries and keys score: of the arrays here, or where they lie."""

    positions_BT: Any
    key_positions_BS: Any
    window: Any
    slopes_N: Any
    rng: Any


def ring_attention(
    ring: Ring,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array | int,
    slopes_N: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> jax.Array:
    """The numbers of `attention.dot_product_attention`, for causal sequences that are spread over a ring of devices.

    Tokens may lie in any order; `parallel.zigzag` gives one in which all devices have the same work. A block of
    queries and a block of keys that cannot see each other cost nothing.

    Args:
        ring: from `find_ring`.
        q_BTNH: queries.
        k_BSKH: keys; S = T.
        v_BSKH: values.
        positions_BT: where queries and keys stand, counted from 0, each position once; B may be 1.
        window: how many positions a query sees, its own included.
        slopes_N: how much the scores of each head fall per position of distance (ALiBi); not learned.
        soft_cap: scores go through soft_cap * tanh(score / soft_cap) first (Gemma 2).
        scale: what scores are multiplied by, where it is not 1 / sqrt(H).
        dropout: probability of zeroing a weight, where there is an `rng`.
        rng: start of the dropout's randomness; left out, there is no dropout.
        block_tokens: most queries, and most keys, of a block.

    Returns:
        heads_BTNH, in the dtype of the values.
    """
    formula = _Formula(q_BTNH.shape[-1] ** -0.5 if scale is None else scale, soft_cap, dropout, block_tokens)
    sight = Sight(positions_BT, positions_BT, jnp.asarray(window, positions_BT.dtype), slopes_N, rng)
    return _attend(ring, formula, q_BTNH, k_BSKH, v_BSKH, sight)


@dataclasses.dataclass(frozen=True)
class _Formula:
    """The constants of `ring_attention`, and what they do to scores and weights."""

    scale: float
    soft_cap: float | None
    dropout: float
    block_tokens: int

    def scores(self, sight: Sight, products_BKGTS: jax.Array) -> jax.Array:
        """From products of queries and keys to scores_BKGTS, minus infinity where a query does not see a key."""
        scores_BKGTS = products_BKGTS * self.scale
        if self.soft_cap is not None:
            scores_BKGTS = self.soft_cap * jnp.tanh(scores_BKGTS / self.soft_cap)
        distance_BTS = sight.positions_BT[:, :, None] - sight.key_positions_BS[:, None]
        if sight.slopes_N is not None:
            slopes_BKGTS = sight.slopes_N.astype(scores_BKGTS.dtype).reshape(1, *scores_BKGTS.shape[1:3], 1, 1)
            scores_BKGTS -= slopes_BKGTS * distance_BTS[:, None, None].astype(scores_BKGTS.dtype)
        seen_BTS = (distance_BTS >= 0) & (distance_BTS < sight.window)
        return jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf)

    def drop(self, sight: Sight, weights_BKGTS: jax.Array) -> jax.Array:
        """Zeroes some weights: of the same two blocks always the same ones, since two passes must agree on them."""
        if self.dropout == 0 or sight.rng is None:
            return weights_BKGTS
        rng = jax.random.fold_in(sight.rng, sight.positions_BT.max())
        rng = jax.random.fold_in(rng, sight.key_positions_BS.min())
        kept_BKGTS = jax.random.bernoulli(rng, 1 - self.dropout, weights_BKGTS.shape)
        return jnp.where(kept_BKGTS, weights_BKGTS / (1 - self.dropout), 0)


# --- All devices: whole arrays, and where their axes lie ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    ring: Ring, formula: _Formula, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
) -> jax.Array:
    return _attend_forward(ring, formula, q_BTNH, k_BSKH, v_BSKH, sight)[0]


def _attend_forward(
    ring: Ring, formula: _Formula, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The heads, and what the backward pass needs: per device nothing larger than its part of the queries."""
    function = functools.partial(_forward, ring, formula)
    in_specs = *(ring.spec,) * 3, _sight_specs(ring, sight)
    heads_BTNH, log_sums_BTN = ring.spread(function, in_specs, ring.spec)(q_BTNH, k_BSKH, v_BSKH, sight)
    return heads_BTNH, (q_BTNH, k_BSKH, v_BSKH, sight, heads_BTNH, log_sums_BTN)


def _attend_backward(
    ring: Ring, formula: _Formula, residuals: tuple[Any, ...], dheads_BTNH: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The gradients of queries, keys and values; the rest has none."""
    function = functools.partial(_backward, ring, formula)
    in_specs = *(ring.spec,) * 3, _sight_specs(ring, residuals[3]), *(ring.spec,) * 3
    return *ring.spread(function, in_specs, ring.spec)(*residuals, dheads_BTNH), None


_attend.defvjp(_attend_forward, _attend_backward)


def _sight_specs(ring: Ring, sight: Sight) -> Sight:
    positions = PartitionSpec(ring.rows if sight.positions_BT.shape[0] > 1 else None, ring.axes)
    return Sight(positions, positions, PartitionSpec(), PartitionSpec(ring.heads), PartitionSpec())


# --- One device: its own parts of the arrays ---


def _forward(
    ring: Ring, formula: _Formula, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
) -> tuple[jax.Array, jax.Array]:
    """The heads, and log_sums_BTN: the logarithm of the sum of exp(score) over all keys that a query sees."""
    dtype = at_least_float32(q_BTNH.dtype)
    sight = _own_randomness(ring, sight)
    queries, keys = cut(sight.positions_BT, [q_BTNH], [k_BSKH, v_BSKH], formula.block_tokens)

    def join(query: Blocks, key: Blocks, so_far: Blocks, _: Blocks) -> tuple[Blocks, Blocks]:
        (positions_BT, q_BKGTH), (key_positions_BS, k_BKSH, v_BKSH) = query, key
        largest_BKGT, sums_BKGT, heads_BKGTH = so_far
        here = sight._replace(positions_BT=positions_BT, key_positions_BS=key_positions_BS)
        products_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=dtype)
        scores_BKGTS = formula.scores(here, products_BKGTS)
        new_largest_BKGT = jnp.maximum(largest_BKGT, scores_BKGTS.max(-1))
        fade_BKGT = jnp.exp(largest_BKGT - new_largest_BKGT)
        weights_BKGTS = jnp.exp(scores_BKGTS - new_largest_BKGT[..., None])
        sums_BKGT = fade_BKGT * sums_BKGT + weights_BKGTS.sum(-1)
        weights_BKGTS = formula.drop(here, weights_BKGTS).astype(v_BKSH.dtype)
        new_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH, preferred_element_type=dtype)
        return (new_largest_BKGT, sums_BKGT, fade_BKGT[..., None] * heads_BKGTH + new_BKGTH), ()

    zeros = jnp.zeros(queries[1].shape, dtype)
    nothing = jnp.full(zeros.shape[:-1], LOWEST, dtype), zeros[..., 0], zeros
    visit = functools.partial(meet, join, queries, sight.window)
    largest, sums, heads = ring.go_round(lambda so_far, keys: visit(keys, so_far, ())[0], nothing, keys)
    sums = jnp.where(sums > 0, sums, 1)  # 0 where padding saw nothing
    T = q_BTNH.shape[1]
    return whole(heads / sums[..., None], T).astype(v_BSKH.dtype), whole(largest + jnp.log(sums), T)


def _backward(
    ring: Ring,
    formula: _Formula,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sight: Sight,
    heads_BTNH: jax.Array,
    log_sums_BTN: jax.Array,
    dheads_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the gradient of the heads to those of queries, keys and values, which are summed in at least float32.

    The gradients of keys and values travel with these, and each device adds what its queries give. For the weights
    w = exp(score - log sum) of a query, d score = w (d w - mean), where the mean of d w, weighted by w, is simply
    d heads . heads.
    """
    dtype = at_least_float32(q_BTNH.dtype)
    sight = _own_randomness(ring, sight)
    means_BTN = jnp.einsum("BTNH,BTNH->BTN", dheads_BTNH, heads_BTNH, preferred_element_type=dtype)
    of_queries = [q_BTNH, dheads_BTNH, log_sums_BTN, means_BTN]
    queries, keys = cut(sight.positions_BT, of_queries, [k_BSKH, v_BSKH], formula.block_tokens)

    def pull(query: Blocks, key: Blocks, dq: Blocks, dkey: Blocks) -> tuple[Blocks, Blocks]:
        positions_BT, q_BKGTH, dheads_BKGTH, log_sums_BKGT, means_BKGT = query
        key_positions_BS, k_BKSH, v_BKSH = key
        (dq_BKGTH,), (dk_BKSH, dv_BKSH) = dq, dkey
        here = sight._replace(positions_BT=positions_BT, key_positions_BS=key_positions_BS)
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)

        products_BKGTS = product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
        scores_BKGTS, pull_products = jax.vjp(functools.partial(formula.scores, here), products_BKGTS)
        weights_BKGTS = jnp.exp(scores_BKGTS - log_sums_BKGT[..., None])
        dropped_BKGTS = formula.drop(here, weights_BKGTS).astype(q_BKGTH.dtype)
        dweights_BKGTS = formula.drop(here, product("BKGTH,BKSH->BKGTS", dheads_BKGTH, v_BKSH))
        (dproducts_BKGTS,) = pull_products(weights_BKGTS * (dweights_BKGTS - means_BKGT[..., None]))
        dproducts_BKGTS = dproducts_BKGTS.astype(q_BKGTH.dtype)

        dq_BKGTH += product("BKGTS,BKSH->BKGTH", dproducts_BKGTS, k_BKSH)
        dk_BKSH += product("BKGTS,BKGTH->BKSH", dproducts_BKGTS, q_BKGTH)
        dv_BKSH += product("BKGTS,BKGTH->BKSH", dropped_BKGTS, dheads_BKGTH)
        return (dq_BKGTH,), (dk_BKSH, dv_BKSH)

    zeros = tuple(jnp.zeros(array.shape, dtype) for array in keys[1:])

    def visit(gradients: tuple[Blocks, Blocks], keys: Blocks) -> tuple[Blocks, Blocks]:
        dq, dkeys = gradients
        arrived = ring.pass_on(dkeys)  # added at the end only: it travels while the rest is computed
        dq, new = meet(pull, queries, sight.window, keys, dq, zeros)
        return dq, jax.tree.map(jnp.add, arrived, new)

    dq, dkeys = ring.go_round(visit, ((jnp.zeros(queries[1].shape, dtype),), zeros), keys)
    dk, dv = ring.pass_on(dkeys)  # home: to where the keys themselves are
    dq_BTNH, dk_BSKH, dv_BSKH = (
        whole(blocks, q_BTNH.shape[1]) for blocks in (dq[0], dk[:, :, :, None], dv[:, :, :, None])
    )
    return dq_BTNH.astype(q_BTNH.dtype), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def _own_randomness(ring: Ring, sight: Sight) -> Sight:
    """What lies on different devices drops different weights; what several devices have, the same ones."""
    if sight.rng is None:
        return sight
    place = jax.lax.axis_index((*ring.rows, *ring.axes, *ring.heads))
    return sight._replace(rng=jax.random.fold_in(sight.rng, place))
