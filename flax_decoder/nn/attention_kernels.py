"""Faster ways to the numbers of `attention.dot_product_attention`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from flax_decoder.nn.axes import num_parts
from flax_decoder.nn.splash import splash

# Measured on CPU: smaller blocks spend their time on starting matrix products, larger ones on masked scores.
BLOCK_TOKENS = 64


def blockwise(
    attend: Callable[..., tuple[jax.Array, ...]],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attention of a whole sequence, one block of queries at a time.

    A block of queries meets only the keys up to its own end: half of all scores lie in the future of their query and
    need not be computed. Nor are those before the window of its first query.

    Args:
        attend: attention of some queries to some keys, such as `dot_product_attention`.
        q_BTNH: queries; T = S.
        k_BSKH: keys.
        v_BSKH: values.
        mask_BTS: True where a query may look, never at a later key; B may be 1.
        bias_BNTS: added to the scores; B may be 1.
        window: how many keys the mask shows a query at most, its own and those before it; None is all.

    Returns:
        heads_BTNH.
    """
    blocks = []
    for start in range(0, q_BTNH.shape[1], BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, q_BTNH.shape[1])
        seen = slice(0 if window is None else max(start - window + 1, 0), stop)
        bias = None if bias_BNTS is None else bias_BNTS[:, :, start:stop, seen]
        mask = mask_BTS[:, start:stop, seen]
        blocks.append(attend(q_BTNH[:, start:stop], k_BSKH[:, seen], v_BSKH[:, seen], mask, bias)[0])
    return jnp.concatenate(blocks, axis=1)


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Causal attention of a whole sequence by NVIDIA's cuDNN, in bfloat16; see `splash` for the arguments.

    Raises:
        ValueError: `soft_cap` is given, which cuDNN does not know.
    """
    if soft_cap is not None:
        raise ValueError("cuDNN's attention has no soft cap")
    # JAX counts the tokens to the left of the query's own. It is right only together with is_causal.
    local_window = None if window is None else (window - 1, 0)
    # JAX takes an even number of tokens only; one more lies in the future of all others, which do not see it.
    T = q_BTNH.shape[1]
    even = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
    heads = jax.nn.dot_product_attention(
        *even, is_causal=True, local_window_size=local_window, scale=scale, implementation="cudnn"
    )
    return heads[:, :T]


# Kernels that never hold the scores in memory, for whole sequences whose tokens stand in their order.
FUSED: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn, "splash": splash}


def on_each_device(
    attend: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> jax.Array:
    """heads_BTNH of `attend`, computed by each device of the mesh for its rows of the batch and its heads.

    The compiler splits what is made of JAX's own operations; a kernel it would run whole, on every device. Rows and
    heads do not meet in attention, so splitting by hand moves nothing between devices. What does not divide by the
    number of devices is computed by all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if not names:
        return attend(q_BTNH, k_BSKH, v_BSKH)
    B, _, N, _ = q_BTNH.shape
    # Queries and keys are split alike, so that each head of keys stays with its group of queries.
    K = k_BSKH.shape[2]
    rows = "batch" if B % num_parts("batch") == 0 else None
    heads = "heads" if N % num_parts("heads") == K % num_parts("heads") == 0 else None
    spec = nn.logical_to_mesh_axes((rows, None, heads, None)) or PartitionSpec()
    split = jax.shard_map(attend, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False)
    return split(q_BTNH, k_BSKH, v_BSKH)
