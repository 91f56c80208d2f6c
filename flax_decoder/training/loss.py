"""The cross-entropy loss, of all logits at once or in chunks of tokens to save memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_decoder.nn.axes import constrain, logical_axes, num_parts
from flax_decoder.nn.traffic import log_sum_exp, saves_traffic

# Memory for the float32 logits of one chunk on a device, if the config gives no chunk size.
LOGITS_BYTES = 2**30

Sums = tuple[jax.Array, jax.Array]


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The negative log probability, in nats, of each target.

        loss = log Z - logit[target],   log Z = log sum exp(logits)

    Args:
        logits_BTV: predictions, float32.
        targets_BT: the tokens to predict. Under jit an id outside the vocabulary gives NaN.
        z_loss: weight of the penalty (log Z)^2, which keeps logits from drifting (Chowdhery et al. 2022, section 5).

    Returns:
        losses_BT, and penalties_BT that training adds to them.
    """
    # The one pass is not for a vocabulary that is split over devices.
    in_one_pass = saves_traffic() and num_parts("vocab") == 1
    log_z_BT = log_sum_exp(logits_BTV) if in_one_pass else jax.nn.logsumexp(logits_BTV, axis=-1)
    inside_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    # A comparison instead of a lookup: its gradient fuses with that of log Z into one pass over the logits.
    ids_V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.result_type(targets_BT))
    is_target_BTV = targets_BT[:, :, None] == ids_V[None, None]
    target_logits_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    losses_BT = jnp.where(inside_BT, log_z_BT - target_logits_BT, jnp.nan)
    return losses_BT, z_loss * jnp.square(log_z_BT)


def summed_losses(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, z_loss: float = 0.0) -> Sums:
    """The losses of `cross_entropy`, weighted by the mask and summed: with penalties (to minimise), and without."""
    losses_BT, penalties_BT = cross_entropy(logits_BTV, targets_BT, z_loss)
    mask_BT = mask_BT.astype(losses_BT.dtype)
    # A masked target may be any number, such as -100: its loss must not become 0 * NaN.
    losses_BT = jnp.where(mask_BT > 0, losses_BT, 0.0)
    return jnp.sum((losses_BT + penalties_BT) * mask_BT), jnp.sum(losses_BT * mask_BT)


def chunk_size(num_tokens: int, vocab_size: int, chosen: int | None = None) -> int | None:
    """Tokens per chunk of the loss; None means all at once.

    Args:
        num_tokens: per device; if their number is free, as in `jax.export`, there are chunks only where chosen.
        vocab_size: logits per token on a device.
        chosen: the config's number of tokens, 0 for all, None for as many as fit into `LOGITS_BYTES`.
    """
    if not isinstance(num_tokens, int):
        return chosen or None
    size = max(LOGITS_BYTES // (4 * vocab_size), 1) if chosen is None else chosen
    return size if 0 < size < num_tokens else None


def chunked_losses(
    make_logits: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    z_loss: float = 0.0,
    *,
    chunk_tokens: int,
) -> Sums:
    """`summed_losses` without ever holding the logits of more than one chunk of tokens.

    The gradient of a chunk is computed together with its loss, so the logits are computed only once. It is accumulated
    in the dtype of the parameters.

    `make_logits` is the head, from its parameters and x_BTD to logits_BTV; it must not close over traced values. The
    weights are not differentiated, nor is the second sum if there are penalties. Each device has its own chunks.
    """
    B, T = targets_BT.shape
    X, Y = (parts if size % parts == 0 else 1 for size, parts in ((B, num_parts("batch")), (T, num_parts("length"))))
    split = functools.partial(_split, num_batch_parts=X, num_length_parts=Y, chunk_tokens=chunk_tokens)

    def chunk_losses(head: Any, x_RD: jax.Array, targets_R: jax.Array, mask_R: jax.Array) -> Sums:
        logits_1RV = constrain(make_logits(head, x_RD[None]), None, None, "vocab")
        return summed_losses(logits_1RV, targets_R[None], mask_R[None], z_loss)

    total, loss = _sum_of_chunks(chunk_losses, head, split(x_BTD), (split(targets_BT), split(mask_BT)))
    # The gradient is that of the first sum; without penalties both are the same.
    return total, total if z_loss == 0 else jax.lax.stop_gradient(loss)


def _split(array: jax.Array, *, num_batch_parts: int, num_length_parts: int, chunk_tokens: int) -> jax.Array:
    """[B, T, ...] to [I, X, Y, R, ...]: I chunks of R tokens on each of the X times Y devices that hold tokens.

    So each device computes with its local tokens. The last chunk is padded with zeros, which have no weight.
    """
    (B, T), rest = array.shape[:2], array.shape[2:]
    X, Y = num_batch_parts, num_length_parts
    num_tokens = B * T // (X * Y)
    array = array.reshape(X, B // X, Y, T // Y, *rest).swapaxes(1, 2).reshape(X, Y, num_tokens, *rest)
    num_chunks = -(-num_tokens // chunk_tokens)
    R = -(-num_tokens // num_chunks)
    padding = num_chunks * R - num_tokens
    if not isinstance(padding, int) or padding > 0:
        array = jnp.pad(array, [(0, 0), (0, 0), (0, padding), *((0, 0) for _ in rest)])
    array = jnp.moveaxis(array.reshape(X, Y, num_chunks, R, *rest), 2, 0)
    return constrain(array, None, "batch", "length", *(None for _ in array.shape[3:]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_chunks(
    chunk_losses: Callable[..., Sums], head: Any, x_IXYRD: jax.Array, labels: tuple[jax.Array, jax.Array]
) -> Sums:
    """The sums over the chunks of all devices; `labels` are targets and weights of the tokens in x_IXYRD."""
    full_head = _gather_width(head, x_IXYRD.dtype)

    def compute(chunk: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        return _on_each_device(chunk_losses)(full_head, *chunk), None

    sums, _ = _summing_scan(compute, (x_IXYRD, *labels))
    return jax.tree.map(jnp.sum, sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_gradients(
    chunk_losses: Callable[..., Sums], head: Any, x_IXYRD: jax.Array, labels: tuple[jax.Array, jax.Array]
) -> tuple[Sums, Any]:
    """The same sums, and the gradients of the first with respect to the head and x_IXYRD."""
    full_head = _gather_width(head, x_IXYRD.dtype)
    losses_and_gradients = jax.value_and_grad(chunk_losses, argnums=(0, 1), has_aux=True)

    def keep_local(gradient: jax.Array, parameter: jax.Array, axes: PartitionSpec) -> jax.Array:
        """The device's own gradient in the parameter's dtype: devices are summed once, after all chunks."""
        return constrain(gradient.astype(parameter.dtype), "batch", "length", *_without_width(axes))

    def compute(chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        sums, (head_gradients, x_gradient) = _on_each_device(losses_and_gradients)(full_head, *chunk)
        return (sums, jax.tree.map(keep_local, head_gradients, head, logical_axes(head))), x_gradient

    (sums, head_gradients), x_gradients = _summing_scan(compute, (x_IXYRD, *labels))
    head_gradient = jax.tree.map(_sum_of_devices, head_gradients, logical_axes(head))
    return jax.tree.map(jnp.sum, sums), (head_gradient, x_gradients)


@_with_gradients.defjvp
def _second_derivative(chunk_losses: Callable[..., Sums], arguments: Any, tangents: Any) -> Any:
    """What JAX does by itself. Only without a rule it would take constants, as large as the logits, out of the loop."""
    return jax.jvp(functools.partial(_with_gradients.fun, chunk_losses), arguments, tangents)


def _sum_of_devices(gradient: jax.Array, axes: PartitionSpec) -> jax.Array:
    """The sum of the gradients of X times Y devices, sharded like the parameter.

    First over the devices that share one copy of the parameter (a reduce-scatter), then over the copies.
    """
    X, Y, *sizes = gradient.shape
    num_shards = num_parts("embed") if X % num_parts("embed") == 0 else 1
    of_copies = gradient.reshape(X // num_shards, num_shards, Y, *sizes).sum(1)
    return constrain(of_copies, "copies", "length", *axes).sum((0, 1))


@_sum_of_chunks.defjvp
def _derivative(chunk_losses: Callable[..., Sums], arguments: Any, tangents: Any) -> tuple[Sums, Sums]:
    """Also how the total changes: a linear function, so that the backward pass only scales the gradients."""
    sums, gradients = _with_gradients(chunk_losses, *arguments)
    changes = jax.tree.map(lambda one, other: (one * other).astype(sums[0].dtype).sum(), gradients, tangents[:2])
    return sums, (jax.tree.reduce(jnp.add, changes), jnp.zeros_like(sums[1]))


def _on_each_device(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Maps over the device axes X and Y of all arguments but the first."""
    return jax.vmap(jax.vmap(compute, (None, 0, 0, 0)), (None, 0, 0, 0))


def _summing_scan(compute: Callable[[Any], tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """Scans `compute` over the chunks: the sum of its first results, and its stacked second results."""
    shapes, _ = jax.eval_shape(compute, jax.tree.map(lambda rows: rows[0], chunks))
    zeros = jax.tree.map(jnp.zeros_like, shapes)

    def add(total: Any, chunk: Any) -> tuple[Any, Any]:
        part, result = compute(chunk)
        return jax.tree.map(jnp.add, total, part), result

    return jax.lax.scan(add, zeros, chunks)


def _gather_width(head: Any, dtype: jnp.dtype) -> Any:
    """The head in the dtype of activations, with its width gathered once for all chunks."""
    return jax.tree.map(
        lambda leaf, axes: constrain(leaf.astype(dtype), *_without_width(axes)), head, logical_axes(head)
    )


def _without_width(axes: PartitionSpec) -> tuple[str | None, ...]:
    return tuple(axis if axis == "vocab" else None for axis in axes)
