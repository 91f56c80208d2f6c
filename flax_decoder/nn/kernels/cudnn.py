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
    """`dot_product_attention` of whole sequences (T = S), in bfloat16.

    Of the mask only the window is read, as the tokens are in order.

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
