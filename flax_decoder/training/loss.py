"""How wrong the predictions are, and the same without ever holding all of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_decoder.nn.axes import constrain, logical_axes, num_parts

# Logits of a device that are held at once where nothing else is said, in bytes of float32.
LOGITS_BYTES = 2**30

Sums = tuple[jax.Array, jax.Array]


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Minus the log probability, in nats, that the model gave each next token.

        loss = log Z - logit[target],   log Z = log sum exp(logits)

    Args:
        logits_BTV: predictions, float32.
        targets_BT: the tokens that did come. Under jit an id outside of the vocabulary gives NaN.
        z_loss: weight of the penalty (log Z)^2, which keeps logits from drifting (Chowdhery et al. 2022, section 5).

    Returns:
        losses_BT, and the penalties penalty_BT that training adds to them.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    inside_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    # Looking the target's logit up would be the same, but its gradient could not be computed in one pass with Z's.
    ids_V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.result_type(targets_BT))
    is_target_BTV = targets_BT[:, :, None] == ids_V[None, None]
    target_logits_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    losses_BT = jnp.where(inside_BT, log_z_BT - target_logits_BT, jnp.nan)
    return losses_BT, z_loss * jnp.square(log_z_BT)


def summed_losses(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, z_loss: float = 0.0) -> Sums:
    """Sums of the losses of `cross_entropy`, each times its weight in the mask.

    Returns:
        The sum with penalties, which is to be minimised, and the one without.
    """
    losses_BT, penalties_BT = cross_entropy(logits_BTV, targets_BT, z_loss)
    mask_BT = mask_BT.astype(losses_BT.dtype)
    # A target that does not count may be any number, such as -100: its loss must not become 0 * NaN.
    losses_BT = jnp.where(mask_BT > 0, losses_BT, 0.0)
    return jnp.sum((losses_BT + penalties_BT) * mask_BT), jnp.sum(losses_BT * mask_BT)


def chunk_size(num_tokens: int, vocab_size: int, chosen: int | None = None) -> int | None:
    """How many tokens' logits are made at a time; None is all.

    Args:
        num_tokens: tokens on a device.
        vocab_size: logits of a token on a device.
        chosen: what the config says: a number, 0 for all, None for what fits into `LOGITS_BYTES`.
    """
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
    """`summed_losses` of logits that are made, used and forgotten, some tokens at a time.

    The gradient of a chunk is computed with its loss, while the logits are there: they are not made a second time.
    It is summed in the precision of the parameters.

    Args:
        make_logits: the head, from its parameters and x_BTD to logits_BTV. It must hold no traced values.
        head: its parameters.
        x_BTD: what it reads.
        targets_BT: the tokens that did come.
        mask_BT: weights; constants to the gradient.
        z_loss: as in `cross_entropy`.
        chunk_tokens: how many tokens of each device are worked on at a time.

    Returns:
        As `summed_losses`; the second sum is a constant to the gradient.
    """
    B, T = targets_BT.shape
    X, Y = (parts if size % parts == 0 else 1 for size, parts in ((B, num_parts("batch")), (T, num_parts("length"))))
    cut = functools.partial(_cut, num_batch_parts=X, num_length_parts=Y, chunk_tokens=chunk_tokens)

    def chunk_losses(head: Any, x_RD: jax.Array, targets_R: jax.Array, mask_R: jax.Array) -> Sums:
        logits_1RV = constrain(make_logits(head, x_RD[None]), None, None, "vocab")
        return summed_losses(logits_1RV, targets_R[None], mask_R[None], z_loss)

    total, loss = _sum_of_chunks(chunk_losses, head, cut(x_BTD), (cut(targets_BT), cut(mask_BT)))
    return total, jax.lax.stop_gradient(loss)


def _cut(array: jax.Array, *, num_batch_parts: int, num_length_parts: int, chunk_tokens: int) -> jax.Array:
    """[B, T, ...] to [I, X, Y, R, ...]: I chunks of R tokens from each of the X times Y devices that tokens lie on.

    Each device thus works on tokens of its own. The last chunk is filled up with zeros, which have no weight.
    """
    (B, T), rest = array.shape[:2], array.shape[2:]
    X, Y = num_batch_parts, num_length_parts
    num_tokens = B * T // (X * Y)
    array = array.reshape(X, B // X, Y, T // Y, *rest).swapaxes(1, 2).reshape(X, Y, num_tokens, *rest)
    num_chunks = -(-num_tokens // chunk_tokens)
    R = -(-num_tokens // num_chunks)
    if num_chunks * R > num_tokens:
        array = jnp.pad(array, [(0, 0), (0, 0), (0, num_chunks * R - num_tokens), *((0, 0) for _ in rest)])
    array = jnp.moveaxis(array.reshape(X, Y, num_chunks, R, *rest), 2, 0)
    return constrain(array, None, "batch", "length", *(None for _ in array.shape[3:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(
    chunk_losses: Callable[..., Sums], head: Any, x_IXYRD: jax.Array, labels: tuple[jax.Array, jax.Array]
) -> Sums:
    """The sums over the chunks of all devices; `labels` are targets and weights of the tokens in x_IXYRD."""
    whole_head = _whole(head, x_IXYRD.dtype)

    def compute(chunk: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        return _on_each_device(chunk_losses)(whole_head, *chunk), None

    sums, _ = _summing_scan(compute, (x_IXYRD, *labels))
    return jax.tree.map(jnp.sum, sums)


def _forward(
    chunk_losses: Callable[..., Sums], head: Any, x_IXYRD: jax.Array, labels: tuple[jax.Array, jax.Array]
) -> tuple[Sums, Any]:
    """The same sums, and the gradients of the first one with respect to the head and to x_IXYRD."""
    whole_head = _whole(head, x_IXYRD.dtype)
    losses_and_gradients = jax.value_and_grad(chunk_losses, argnums=(0, 1), has_aux=True)

    def sum_here(gradient: jax.Array, parameter: jax.Array, axes: PartitionSpec) -> jax.Array:
        """In full precision, and by each device for itself: they add up theirs once, when all chunks are done."""
        return constrain(gradient.astype(parameter.dtype), "batch", "length", *_without_width(axes))

    def compute(chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        sums, (head_gradients, x_gradient) = _on_each_device(losses_and_gradients)(whole_head, *chunk)
        return (sums, jax.tree.map(sum_here, head_gradients, head, logical_axes(head))), x_gradient

    (sums, head_gradients), x_gradients = _summing_scan(compute, (x_IXYRD, *labels))
    head_gradient = jax.tree.map(_sum_of_devices, head_gradients, logical_axes(head))
    return jax.tree.map(jnp.sum, sums), (head_gradient, x_gradients)


def _sum_of_devices(gradient: jax.Array, axes: PartitionSpec) -> jax.Array:
    """The sum of the gradients that X times Y devices have found, split as the parameter is.

    First among those that each hold a part of it, who need only add up the parts they keep; then over its copies.
    """
    X, Y, *sizes = gradient.shape
    num_shards = num_parts("embed") if X % num_parts("embed") == 0 else 1
    of_copies = gradient.reshape(X // num_shards, num_shards, Y, *sizes).sum(1)
    return constrain(of_copies, "copies", "length", *axes).sum((0, 1))


def _backward(chunk_losses: Callable[..., Sums], gradients: Any, cotangents: Sums) -> tuple[Any, jax.Array, None]:
    """The gradients are there already; only what follows the sum is still to be multiplied in."""
    head_gradient, x_gradients = jax.tree.map(
        lambda gradient: gradient * cotangents[0].astype(gradient.dtype), gradients
    )
    return head_gradient, x_gradients, None


_sum_of_chunks.defvjp(_forward, _backward)


def _on_each_device(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Maps over the two axes of devices, X and Y, of all arguments but the first."""
    return jax.vmap(jax.vmap(compute, (None, 0, 0, 0)), (None, 0, 0, 0))


def _summing_scan(compute: Callable[[Any], tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """Runs `compute` on one chunk after the other: the sum of its first results, and all of its second ones."""
    shapes, _ = jax.eval_shape(compute, jax.tree.map(lambda rows: rows[0], chunks))
    zeros = jax.tree.map(jnp.zeros_like, shapes)

    def add(total: Any, chunk: Any) -> tuple[Any, Any]:
        part, result = compute(chunk)
        return jax.tree.map(jnp.add, total, part), result

    return jax.lax.scan(add, zeros, chunks)


def _whole(head: Any, dtype: jnp.dtype) -> Any:
    """The head as every chunk needs it, once for all of them: in the dtype of activations, its width in one piece."""
    return jax.tree.map(
        lambda leaf, axes: constrain(leaf.astype(dtype), *_without_width(axes)), head, logical_axes(head)
    )


def _without_width(axes: PartitionSpec) -> tuple[str | None, ...]:
    return tuple(axis if axis == "vocab" else None for axis in axes)
