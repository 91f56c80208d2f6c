"""One step of training: a pure function from state and batch to the next state."""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training import train_state
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.nn.axes import logical_axes, num_parts
from flax_decoder.nn.decoder import Decoder, check_tokens, head_params
from flax_decoder.parallel.mesh import compiler_options, sharding_of
from flax_decoder.training.loss import chunk_size, chunked_losses, summed_losses
from flax_decoder.training.optimizer import make_optimizer
from flax_decoder.training.spikes import is_spike

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(train_state.TrainState):
    """All that changes in training: `step`, `params` and `opt_state`; and, fixed, how they change.

    It holds no random generator: randomness is a function of (seed, step).

    Attributes:
        seed: start of the dropout's randomness.
        accumulation_steps: a step computes its batch in this many parts.
        z_loss: weight of the penalty on the softmax's normaliser.
        loss_chunk_tokens: a device makes the logits of so many tokens at a time; 0 is all, None as many as are fast.
        skip_spikes: a step whose loss is over this many times the usual one is not applied; 0 applies it.
    """

    seed: int = struct.field(pytree_node=False)
    accumulation_steps: int = struct.field(pytree_node=False)
    z_loss: float = struct.field(pytree_node=False)
    loss_chunk_tokens: int | None = struct.field(pytree_node=False, default=None)
    skip_spikes: float = struct.field(pytree_node=False, default=0.0)

    def apply_gradients(self, *, grads: Any, loss: jax.Array | None = None, **changes: Any) -> Self:
        """The state after one update by the optimizer, which is told the loss too, where it is given."""
        update = optax.with_extra_args_support(self.tx).update
        updates, opt_state = update(grads, self.opt_state, self.params, loss=loss)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)


def init_state(model: Decoder, config: Config, *, rng: jax.Array, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step.

    Args:
        model: the network.
        config: optimizer, number of steps, seed, accumulation and loss of the run.
        rng: from which the parameters are drawn; the same ones on any mesh.
        mesh: devices that hold the state in parts, each made where it belongs; None is the default device.
    """
    make = state_maker(model, config)
    shardings = None if mesh is None else state_shardings(mesh, jax.eval_shape(make, rng))
    return jax.jit(make, out_shardings=shardings)(rng)


def state_maker(model: Decoder, config: Config) -> Callable[[jax.Array], TrainState]:
    """The function from a random key to the state before the first step; see `init_state`."""
    training = config.training
    tx = make_optimizer(config.optimizer, training.num_steps, remembers_losses=training.skip_spikes > 0)

    def make(rng: jax.Array) -> TrainState:
        # The parameters do not depend on the tokens, nor on their number.
        params = model.init(rng, np.zeros((1, 1), np.int32))["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            apply_fn=model.apply,
            params=params,
            tx=tx,
            opt_state=tx.init(params),
            seed=training.seed,
            accumulation_steps=training.accumulation_steps,
            z_loss=training.z_loss,
            loss_chunk_tokens=training.loss_chunk_tokens,
            skip_spikes=training.skip_spikes,
        )

    return make


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a state, or of an abstract one, lies on a mesh: moments lie where their parameters do."""
    return jax.tree.map(lambda axes: sharding_of(mesh, *axes), logical_axes(state))


def train_step(state: TrainState, batch: Batch, *, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
    """Moves the parameters one step down the gradient of the loss on a batch.

    Pure, and not compiled: wrap it in `jax.jit`, `jax.pmap` or `jax.shard_map`.

    Where the loss or a gradient is NaN or infinite, nothing is learned: parameters and optimizer state stay as they
    are, bit for bit, and so does what the optimizer counts, from which the learning rate follows. Only `step` moves on,
    and with it the batch and the dropout, which are functions of (seed, step): the bad batch is passed over. The same
    holds for a loss that is a spike, if `state.skip_spikes` says what is one.

    Args:
        state: where training stands; not changed.
        batch: "inputs" and "targets", token ids (B, T); optionally "mask" (B, T), the weight of each target in the
            loss, 0 leaves it out; and "positions" (B, T), where in the text the inputs stand if not one after another.
        axis_name: the mapped axis over which the batch is spread, under `pmap` or `shard_map`.

    Returns:
        The next state, and the metrics "loss", the mean cross-entropy in nats a token; "gradient_norm", its length
        before clipping; and "applied", whether the parameters were moved.

    Raises:
        ValueError: token ids outside of the vocabulary, where their values are known.
    """
    gradients, metrics = mean_gradients(state, batch, axis_name)
    loss = metrics["loss"]
    # One gradient that is not finite makes their norm so, which also overflows before AdamW's squares do.
    # Both are sums over all devices: all of them decide alike.
    applied = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
    if state.skip_spikes > 0:
        applied &= ~is_spike(loss, state.opt_state, state.skip_spikes)
    # Not a choice of each number between old and new: XLA on CPU would copy the optimizer's state for that.
    after = jax.lax.cond(
        applied,
        lambda state: state.apply_gradients(grads=gradients, loss=loss),
        lambda state: state.replace(step=state.step + 1),
        state,
    )
    return after, metrics | {"applied": applied}


def mean_gradients(state: TrainState, batch: Batch, axis_name: str | None = None) -> tuple[Any, Metrics]:
    """Gradients of the mean loss over a batch, a tree like the parameters, and the metrics; see `train_step`."""
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        state = state.replace(params=_as_own(state.params, axis_name))
    sums, gradients = accumulate(state, batch, rng)
    if axis_name is not None:
        sums, gradients = jax.lax.psum((sums, gradients), axis_name)
    # Dividing sums by the weight of the whole batch, however it was split, gives every token the same weight.
    num_tokens = jnp.maximum(sums["num_tokens"], 1)
    gradients = jax.tree.map(lambda gradient: gradient / num_tokens, gradients)
    return gradients, {"loss": sums["loss"] / num_tokens, "gradient_norm": optax.tree.norm(gradients)}


def _as_own(params: Any, axis_name: str) -> Any:
    """The same parameters, but each device's own in the eyes of JAX, so that so are their gradients.

    `shard_map` follows, unless told not to, what is the same on all devices: it adds up the gradients of that unasked,
    and whoever adds them up once more gets too large ones.
    """
    followed = jax.typeof(jax.lax.axis_index(axis_name)).manual_axis_type.varying
    if not followed:
        return params
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), params)


def jit_step(state: TrainState, mesh: Mesh) -> Any:
    """`train_step` under jit on a mesh; the state that is given to it is used up.

    What goes in comes out in the same place: without a word, the compiler might choose another.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), sharding_of(mesh)
    options = compiler_options(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """The sums "loss" (nats) and "num_tokens" over a batch as in `train_step`, without dropout."""
    return loss_sum(state.params, state.apply_fn, batch, loss_chunk_tokens=state.loss_chunk_tokens)[1]


def accumulate(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[Metrics, Any]:
    """Sums of losses and of their gradients over a batch, computed in `state.accumulation_steps` parts."""

    def sums_and_gradients(batch: Batch, rng: jax.Array) -> tuple[Metrics, Any]:
        compute = jax.grad(loss_sum, has_aux=True)
        gradients, sums = compute(
            state.params,
            state.apply_fn,
            batch,
            z_loss=state.z_loss,
            loss_chunk_tokens=state.loss_chunk_tokens,
            rng=rng,
        )
        return sums, gradients

    num_parts = state.accumulation_steps
    if num_parts == 1:
        return sums_and_gradients(batch, rng)

    def add_part(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_and_gradients(*part)), None

    # Part i takes every num_parts-th row: rows that lie on one device stay on it.
    parts = jax.tree.map(lambda rows: rows.reshape(-1, num_parts, *rows.shape[1:]).swapaxes(0, 1), batch)
    rngs = jax.random.split(rng, num_parts)
    shapes = jax.eval_shape(sums_and_gradients, jax.tree.map(lambda part: part[0], parts), rngs[0])
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    return jax.lax.scan(add_part, zeros, (parts, rngs))[0]


def loss_sum(
    params: Any,
    apply_fn: Callable[..., Any],
    batch: Batch,
    *,
    z_loss: float = 0.0,
    loss_chunk_tokens: int | None = None,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The sum to be minimised over a batch, and the sums "loss" and "num_tokens"; `rng` turns dropout on."""
    targets_BT = batch["targets"]
    mask_BT = batch["mask"].astype(jnp.float32) if "mask" in batch else jnp.ones(targets_BT.shape, jnp.float32)
    vocab_size = params["embedding"].shape[0]
    check_tokens(targets_BT, vocab_size, batch.get("mask"))
    tokens_here = targets_BT.size // (num_parts("batch") * num_parts("length"))
    chunk_tokens = chunk_size(tokens_here, vocab_size // num_parts("vocab"), loss_chunk_tokens)

    result = apply_fn(
        {"params": params},
        batch["inputs"],
        positions_BT=batch.get("positions"),
        hidden_only=chunk_tokens is not None,
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
    )
    if chunk_tokens is None:
        total, loss = summed_losses(result, targets_BT, mask_BT, z_loss)
    else:
        total, loss = chunked_losses(
            lambda head, x_BTD: apply_fn({"params": head}, x_BTD, method="logits"),
            head_params(params),
            result,
            targets_BT,
            mask_BT,
            z_loss,
            chunk_tokens=chunk_tokens,
        )
    return total, {"loss": loss, "num_tokens": jnp.sum(mask_BT).astype(loss.dtype)}
