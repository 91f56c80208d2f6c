"""cuDNN's attention for NVIDIA GPUs, through JAX: never with the scores in memory."""

import jax
import jax.numpy as jnp

from flax_decoder.nn.mask import MaskSpec

# JAX's operation of the forward pass, by name: its results are all that the backward pass needs beside its arguments.
CUDNN_FORWARD = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention of whole sequences, in bfloat16.

    Args:
        q_BTNH: queries; T = S.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which keys a query sees; only its window is read, as the tokens are in order.
        scale: factor of the scores; None is 1 / sqrt(H).
        soft_cap: must be None.

    Returns:
        heads_BTNH in the dtype of the queries.

    Raises:
        ValueError: `soft_cap` is given, which cuDNN does not have.
    """
    if soft_cap is not None:
        raise ValueError("cuDNN's attention has no soft cap")
    # JAX counts the tokens to the left of the query's own. It is right only together with is_causal.
    window = None if mask.window is None else (mask.window - 1, 0)
    # JAX takes an even number of tokens only; one more is in the future of all others, which do not see it.
    T = q_BTNH.shape[1]
    even = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
    heads = jax.nn.dot_product_attention(
        *even, is_causal=True, local_window_size=window, scale=scale, implementation="cudnn"
    )
    return heads[:, :T]
