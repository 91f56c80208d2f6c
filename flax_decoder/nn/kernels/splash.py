"""Splash attention, JAX's kernel for TPUs: causal, with windows, never with the scores in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.nn.kernels.platform import target_platform
from flax_decoder.nn.mask import MaskSpec

# The name of what this kernel and rings keep for their backward pass, for a policy of `jax.checkpoint`.
HEADS = "heads and log sums of attention"
# A TPU's vectors have 128 lanes, and the kernel takes blocks of whole vectors.
LANES = 128
# Most tokens, and most bytes, of a block of queries or keys. Larger blocks are faster (on a v6e, 1024 tokens by a third
# than axlearn's default: github.com/apple/axlearn/pull/958) until a step of the kernel no longer fits 16 MiB of vector
# memory: with these the compilers for v5e and v5p find room for any setting, with twice as many tokens they do not.
MAX_BLOCK_TOKENS = 1024
MAX_BLOCK_BYTES = 2**18


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """`dot_product_attention` of whole sequences (T = S) by the Splash kernel; CPUs interpret it, slowly, for tests.

    Of the mask the window and the segments are read, as the tokens are in order. The sequence is padded to whole
    blocks. Padding lies in the future of all real tokens, so none of them sees it.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    block_tokens = block_size(T, H, q_BTNH.dtype.itemsize)
    num_padded = _up_to_whole(T, block_tokens)
    # The kernel does not scale the scores. Scaling the queries is the same, up to one more rounding in bfloat16.
    q_BTNH = (q_BTNH.astype(jnp.float32) * (H**-0.5 if scale is None else scale)).astype(q_BTNH.dtype)
    q_BNPH, k_BKPH, v_BKPH = (_heads_first(x_BTNH, num_padded) for x_BTNH in (q_BTNH, k_BSKH, v_BSKH))
    window = None if mask.window is None or mask.window >= T else mask.window
    kernel = _kernel(num_padded, block_tokens, window, soft_cap)
    heads_BNPH: jax.Array = jax.vmap(kernel)(q_BNPH, k_BKPH, v_BKPH, _segment_ids(mask, num_padded))
    return heads_BNPH[:, :, :T].swapaxes(1, 2)


def _segment_ids(mask: MaskSpec, num_padded: int) -> Any:
    """The documents of queries and keys as the kernel takes them; padding is one of its own."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    if mask.segments_BT is None or mask.key_segments_BS is None:
        return None
    segments = mask.segments_BT, mask.key_segments_BS
    padded = (jnp.pad(x, ((0, 0), (0, num_padded - x.shape[1])), constant_values=-1) for x in segments)
    return splash_attention.SegmentIds(*(x.astype(jnp.int32) for x in padded))


def block_size(num_tokens: int, head_width: int, num_bytes: int) -> int:
    """Number of tokens of a block: as many as memory has room for, unless that pads a sequence by more than an eighth.

    Args:
        num_tokens: length of a sequence.
        head_width: H.
        num_bytes: bytes of one number.
    """
    token_bytes = _up_to_whole(head_width, LANES) * num_bytes
    size = MAX_BLOCK_TOKENS
    while size > LANES and (
        size * token_bytes > MAX_BLOCK_BYTES or _up_to_whole(num_tokens, size) - num_tokens > num_tokens // 8
    ):
        size //= 2
    return size


def _up_to_whole(number: int, part: int) -> int:
    """The next multiple of `part`."""
    return -(-number // part) * part


def _heads_first(x_BTNH: jax.Array, num_padded: int) -> jax.Array:
    """x_BNPH: heads before positions, with zeros behind the last one up to P of them."""
    return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, num_padded - x_BTNH.shape[1]), (0, 0)))


def _kernel(num_tokens: int, block_tokens: int, window: int | None, soft_cap: float | None) -> Any:
    """The kernel for sequences of one length; JAX computes once which blocks it visits."""
    # Slow to import, and not needed on other devices.
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = num_tokens, num_tokens
    if window is None:
        mask: Any = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block_sizes = splash_attention.BlockSizes(
        block_q=block_tokens,
        block_kv=block_tokens,
        block_kv_compute=block_tokens,
        block_q_dq=block_tokens,
        block_kv_dq=block_tokens,
        block_q_dkv=block_tokens,
        block_kv_dkv=block_tokens,
        block_kv_dkv_compute=block_tokens,
    )
    return splash_attention.make_splash_mha(
        # One mask serves all heads.
        splash_attention.MultiHeadMask([mask]),
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=HEADS,
        interpret=target_platform() == "cpu",
    )
