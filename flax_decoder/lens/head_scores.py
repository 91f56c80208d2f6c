"""What kinds of heads a model has: how far each head's attention follows some simple rule."""

import jax
import jax.numpy as jnp

from flax_decoder.errors import UserError
from flax_decoder.nn.precision import accumulation_dtype


def head_scores(weights_LBNTS: jax.Array, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """How much of its attention each head gives to where a simple rule points, from 0 (none) to 1 (all of it).

    A rule points each query at some keys. The score is the sum of the weights on those, averaged over all queries that
    the rule points anywhere, of all rows. It is NaN where there is no such query: a text in which no token comes twice
    says nothing of induction.

        previous_token  the token just before the query
        first_token     the first token, of all queries but itself: where heads look that find nothing
        same_token      all earlier tokens that are the same as the query's (not itself)
        induction       all tokens, up to the query's own, that follow an earlier one which is the same as the query's:
                        what came next the last times (Olsson et al. 2022, "In-context Learning and Induction Heads")

    Chance gives some of that, too: beside these, look at what a head of equal weights would have.

    Args:
        weights_LBNTS: attention weights of whole texts, as `capture` gives them; T = S.
        tokens_BT: the tokens they belong to.

    Returns:
        An array (L, N) for each of these names, at least float32.

    Raises:
        UserError: the weights are not those of all these tokens.
    """
    B, T = tokens_BT.shape
    if weights_LBNTS.shape[1] != B or weights_LBNTS.shape[3:] != (T, T):
        raise UserError(
            f"weights_LBNTS has the shape {weights_LBNTS.shape}, tokens_BT {tokens_BT.shape}: "
            "head_scores needs the weights of all these tokens on each other, from a pass without a cache"
        )
    position_T1, position_1S = jnp.arange(T)[:, None], jnp.arange(T)[None]
    is_earlier_1TS = (position_1S < position_T1)[None]
    same_BTS = tokens_BT[:, :, None] == tokens_BT[:, None]
    # A key is pointed at by the token before it, which the first one does not have.
    follows_same_BTS = jnp.pad(same_BTS[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    everywhere_BTS = jnp.ones_like(same_BTS)
    rules = {
        "previous_token": everywhere_BTS & (position_1S == position_T1 - 1)[None],
        "first_token": everywhere_BTS & is_earlier_1TS & (position_1S == 0)[None],
        "same_token": same_BTS & is_earlier_1TS,
        "induction": follows_same_BTS & (position_1S <= position_T1)[None],
    }
    return {name: mean_weight(weights_LBNTS, points_at_BTS) for name, points_at_BTS in rules.items()}


def mean_weight(weights_LBNTS: jax.Array, points_at_BTS: jax.Array) -> jax.Array:
    """(L, N): the weight on the keys a query is pointed at, averaged over those queries that are; NaN without any."""
    dtype = accumulation_dtype(weights_LBNTS.dtype)
    total_LN = jnp.einsum("LBNTS,BTS->LN", weights_LBNTS.astype(dtype), points_at_BTS.astype(dtype))
    return total_LN / points_at_BTS.any(-1).sum().astype(dtype)


def repeated_tokens(rng: jax.Array, vocab_size: int, length: int, batch_size: int = 1) -> jax.Array:
    """Random tokens said twice: the probe for induction heads.

    Nothing in them can be foreseen but the second half, from the first: a model that does better there copies, and the
    heads that find where to copy from have high "induction" scores.

    Args:
        rng: of `jax.random.key`.
        vocab_size: V; tokens are drawn from all of them, each as likely.
        length: tokens said, before they are said again.
        batch_size: B.

    Returns:
        (B, 2 * length), int32.
    """
    tokens_BT = jax.random.randint(rng, (batch_size, length), 0, vocab_size)
    return jnp.concatenate([tokens_BT, tokens_BT], axis=1)
