"""Which implementation of attention computes a model on which devices."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.nn.axes import may_be_split, num_parts
from flax_decoder.nn.call import Call
from flax_decoder.nn.kernels.blockwise import blockwise
from flax_decoder.nn.kernels.cudnn import CUDNN_FORWARD, cudnn
from flax_decoder.nn.kernels.platform import target_platform
from flax_decoder.nn.kernels.ring import find_ring
from flax_decoder.nn.kernels.ring_attention import ring_attention
from flax_decoder.nn.kernels.splash import HEADS, splash
from flax_decoder.nn.mask import MaskSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array, MaskSpec], jax.Array]
"""From q_BTNH, k_BSKH, v_BSKH and which keys a query sees to heads_BTNH: what all implementations are."""

# Kernels for whole sequences in order; none of them ever holds the scores in memory.
FUSED: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn, "splash": splash}

# What `model.attention = "auto"` takes on each kind of device, if it supports the settings of the model.
FASTEST = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}


def choose_attention(
    module: Any, formula: Callable[..., jax.Array], call: Call, q_BTNH: jax.Array, k_BSKH: jax.Array, *, has_cache: bool
) -> Attend:
    """The formula, or a faster way to its numbers.

    Only the formula gives scores and weights to record, edit or drop, and only it reads a cache; a ring drops weights
    by itself.

    Args:
        module: `SelfAttention`, in which the formula records and drops.
        formula: `dot_product_attention`.
        call: the call of the model.
        q_BTNH: queries, for their shape.
        k_BSKH: keys, for their shape.
        has_cache: keys and values are those of a cache.

    Raises:
        UserError: `config.attention` names an implementation that does not run on the devices, or has no documents.
    """
    config: ModelConfig = module.config
    scale, soft_cap = config.attention_scale, config.attention_soft_cap
    is_watched = call.records or call.edits is not None
    has_dropout = config.dropout > 0 and not call.deterministic
    ring = None if has_cache or is_watched else find_ring(q_BTNH.shape, k_BSKH.shape)
    if ring is not None:
        drops = {"dropout": config.dropout, "rng": module.make_rng("dropout")} if has_dropout else {}
        return functools.partial(ring_attention, ring, scale=scale, soft_cap=soft_cap, **drops)

    is_plain = call.in_order and not (is_watched or has_dropout)
    kernel = choose_kernel(config, has_documents=call.segments_BT is not None) if is_plain else "reference"
    if kernel == "blockwise" and not isinstance(q_BTNH.shape[1], int):
        kernel = "reference"  # with a free length, as in `jax.export`, the number of blocks is not known
    if kernel in FUSED:
        return functools.partial(on_each_device, functools.partial(FUSED[kernel], scale=scale, soft_cap=soft_cap))

    record, dropout = call.hook(module), nn.Dropout(config.dropout, deterministic=call.deterministic)

    def hook(name: str, x_BKGTS: jax.Array) -> jax.Array:
        return dropout(record(name, x_BKGTS)) if name == "weights" else record(name, x_BKGTS)

    formula = functools.partial(formula, scale=scale, soft_cap=soft_cap, hook=hook)
    if config.remat == "attention" and not call.records:
        formula = jax.checkpoint(formula, prevent_cse=not config.scan_layers)
    return functools.partial(blockwise, formula) if kernel == "blockwise" else formula


def choose_kernel(config: ModelConfig, *, has_documents: bool = False) -> str:
    """The implementation that `config.attention` means on the devices a program is traced for.

    Args:
        config: the model.
        has_documents: rows are documents that do not see each other.

    Returns:
        "reference", "blockwise", "cudnn" or "splash".

    Raises:
        UserError: the implementation named by `config.attention` does not run on these devices, or has no documents.
    """
    platform = target_platform()
    name = FASTEST.get(platform, "reference") if config.attention == "auto" else config.attention
    obstacle = _obstacle(config, name, platform, has_documents=has_documents)
    if config.attention != "auto":
        if obstacle is not None:
            raise UserError(f'model.attention = "{name}" {obstacle}; use model.attention = "auto"')
        return name
    # The compiler cannot split a Pallas kernel over devices, and without a mesh it is unknown whether it will have to.
    return "reference" if obstacle is not None or (name == "splash" and may_be_split()) else name


def slower_attention(config: ModelConfig, *, has_documents: bool = False) -> str | None:
    """A line that says why training does not take the fused kernel of these devices; None if it does, or has none."""
    platform = target_platform()
    name = FASTEST.get(platform, "")
    if config.attention != "auto" or name not in FUSED:
        return None
    obstacle = _obstacle(config, name, platform, has_documents=has_documents)
    if obstacle is None and config.dropout > 0:
        obstacle = f"never holds the weights that dropout = {config.dropout} zeroes in training"
    return None if obstacle is None else f"attention is computed by its formula, as {name} {obstacle}"


def for_these_devices(config: ModelConfig) -> ModelConfig:
    """The same model, with `auto` if its implementation of attention does not run on these devices."""
    try:
        choose_kernel(config)
    except UserError:
        return dataclasses.replace(config, attention="auto")
    return config


def _obstacle(config: ModelConfig, name: str, platform: str, *, has_documents: bool) -> str | None:
    """Why an implementation cannot compute a model on a platform; None if it can."""
    obstacle = config.attention_obstacle(name) or _device_obstacle(name, platform, config.head_width)
    if obstacle is None and name == "cudnn":
        if has_documents:
            return "has no documents that do not see each other (segments), in JAX's interface"
        if jax.default_backend() == "gpu":
            return failure(name, config.num_heads, config.kv_heads, config.head_width)
    return obstacle


@functools.cache
def failure(name: str, num_heads: int, kv_heads: int, head_width: int) -> str | None:
    """Why a fused kernel does not run on the devices at hand; it is tried once, forward and backward. None if it runs.

    A library that is missing or too old for the device is known only by that.
    """
    T = 64
    shapes = [(1, T, heads, head_width) for heads in (num_heads, kv_heads, kv_heads)]
    qkv = [np.zeros(shape, jnp.bfloat16) for shape in shapes]

    def total(*qkv: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
        return FUSED[name](*qkv, MaskSpec(positions_BT, positions_BT)).astype(jnp.float32).sum()

    found: list[str] = []

    def attempt() -> None:
        try:
            jax.block_until_ready(jax.jit(jax.grad(total, (0, 1, 2)))(*qkv))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            found.append(f"fails on this device: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")

    # A thread of its own has neither the mesh of the caller nor the program that the caller may be tracing.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0] if found else None


def _device_obstacle(name: str, platform: str, head_width: int) -> str | None:
    """Why an implementation does not run on a platform; None if it does."""
    if name == "splash" and platform not in ("tpu", "cpu"):
        return f"is a kernel for TPUs (CPUs interpret it, slowly), not for this {platform}"
    if name != "cudnn":
        return None
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this runs on {platform}"
    # Compiling ahead of time, without the GPU, JAX assumes an Ampere.
    capability = jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else "8.0"
    generation = float(capability) if capability.replace(".", "").isdigit() else 0.0
    if generation < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, not {capability}"
    widest = 256 if generation >= 9 else 128
    if head_width > widest:
        gpu = f"a GPU of compute capability {capability}"
        return f"supports heads up to {widest} wide on {gpu}, not head_dim = {head_width}"
    return None


def keeps_heads(primitive: Any, *arguments: Any, **params: Any) -> bool:
    """The policy of `jax.checkpoint` that keeps what a fused kernel hands to its backward pass: heads and log sums.

    The formula and blocks hand on more than their heads, which are computed again.
    """
    return primitive.name in CUDNN_FORWARD or _has_name(primitive, *arguments, **params)


_has_name = jax.checkpoint_policies.save_only_these_names(HEADS)


def on_each_device(
    attend: Attend, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: MaskSpec
) -> jax.Array:
    """heads_BTNH of a kernel, computed by each device of the mesh for its rows of the batch and its heads.

    The compiler splits what is made of JAX's own operations; a kernel it would run whole, on every device. Rows and
    heads do not meet in attention, so splitting by hand moves nothing between devices. What the devices do not divide
    is computed by all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if not names:
        return attend(q_BTNH, k_BSKH, v_BSKH, mask)
    B, _, N, _ = q_BTNH.shape
    # Queries and keys are split alike, so that each head of keys stays with its group of queries.
    K = k_BSKH.shape[2]
    rows = "batch" if B % num_parts("batch") == 0 else None
    heads = "heads" if N % num_parts("heads") == K % num_parts("heads") == 0 else None
    spec = nn.logical_to_mesh_axes((rows, None, heads, None)) or PartitionSpec()
    in_specs = spec, spec, spec, mask.partition_specs(spec[0] if len(spec) > 0 else None)
    split = jax.shard_map(attend, in_specs=in_specs, out_specs=spec, axis_names=names, check_vma=False)
    return split(q_BTNH, k_BSKH, v_BSKH, mask)
