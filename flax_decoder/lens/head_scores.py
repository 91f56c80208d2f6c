"""Scores for kinds of heads: how much of its attention a head gives to the keys of a simple rule."""

import jax
import jax.numpy as jnp

from flax_decoder.errors import UserError
from flax_decoder.nn.arguments import as_array, as_integers, check_shape
from flax_decoder.nn.precision import accumulation_dtype


def head_scores(weights_LBNTS: jax.Array, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """How much of its attention each head gives to the keys of simple rules, from 0 to 1.

    A rule selects some keys for each query. The score is the sum of the weights on those, averaged over the queries for
    which it selects any, of all rows; NaN if there are none: without a repeated token there is no induction.

        previous_token  the token just before the query
        first_token     the first token, for all queries after it: a common resting place of heads
        same_token      all earlier copies of the query's token
        induction       all tokens, up to the query's own, that follow an earlier copy of the query's token
                        (Olsson et al. 2022, "In-context Learning and Induction Heads")

    Uniform attention has scores above zero, too: compare with those.

    Args:
        weights_LBNTS: attention weights of full texts, from `capture`; T = S.
        tokens_BT: their tokens.

    Returns:
        An array (L, N) for each of these names, in at least float32.

    Raises:
        UserError: the shapes do not match.
        ValueError: tokens are no integers.
    """
    weights_LBNTS = jnp.asarray(as_array(weights_LBNTS, "weights_LBNTS"))
    B, T = check_shape(tokens_BT)
    tokens_BT = as_integers(tokens_BT)
    if weights_LBNTS.ndim != 5 or weights_LBNTS.shape[1] != B or weights_LBNTS.shape[3:] != (T, T):
        raise UserError(
            f"weights_LBNTS has the shape {weights_LBNTS.shape}, tokens_BT {tokens_BT.shape}: "
            "head_scores needs the weights of all these tokens on each other, from a pass without a cache"
        )
    position_T1, position_1S = jnp.arange(T)[:, None], jnp.arange(T)[None]
    is_earlier_1TS = (position_1S < position_T1)[None]
    same_BTS = tokens_BT[:, :, None] == tokens_BT[:, None]
    # Whether the token before the key is the query's; the first key has none before it.
    follows_same_BTS = jnp.pad(same_BTS[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    everywhere_BTS = jnp.ones_like(same_BTS)
    rules = {
        "previous_token": everywhere_BTS & (position_1S == position_T1 - 1)[None],
        "first_token": everywhere_BTS & is_earlier_1TS & (position_1S == 0)[None],
        "same_token": same_BTS & is_earlier_1TS,
        "induction": follows_same_BTS & (position_1S <= position_T1)[None],
    }
    return {name: mean_weight(weights_LBNTS, selected_BTS) for name, selected_BTS in rules.items()}


def mean_weight(weights_LBNTS: jax.Array, selected_BTS: jax.Array) -> jax.Array:
    """(L, N): the total weight on the selected keys, averaged over the queries that have any; NaN if none has."""
    dtype = accumulation_dtype(weights_LBNTS.dtype)
    total_LN = jnp.einsum("LBNTS,BTS->LN", weights_LBNTS.astype(dtype), selected_BTS.astype(dtype))
    return total_LN / selected_BTS.any(-1).sum().astype(dtype)


def repeated_tokens(rng: jax.Array, vocab_size: int, length: int, batch_size: int = 1) -> jax.Array:
    """Random tokens, repeated once: the probe for induction heads.

    Only the second half can be predicted, by copying from the first; heads that find what to copy have high "induction"
    scores.

    Args:
        rng: from `jax.random.key`.
        vocab_size: V; tokens are drawn uniformly.
        length: number of tokens before the repetition.
        batch_size: B.

    Returns:
        (B, 2 * length), int32.
    """
    tokens_BT = jax.random.randint(rng, (batch_size, length), 0, vocab_size)
    return jnp.concatenate([tokens_BT, tokens_BT], axis=1)
