"""One step of training: a pure function from state and batch to the next state."""

import copy
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
from flax_decoder.errors import UserError, require_type
from flax_decoder.nn.arguments import check_key
from flax_decoder.nn.axes import in_each_copy, logical_axes, num_parts, refuse_explicit_axes
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.lora import init_adapters, with_adapters
from flax_decoder.nn.params import head_params, layers_of
from flax_decoder.nn.precision import widened
from flax_decoder.parallel.mesh import compiler_options, num_row_devices, sharding_of
from flax_decoder.training.batch import Batch, checked_batch
from flax_decoder.training.loss import chunk_size, chunked_losses, summed_losses
from flax_decoder.training.optimizer import apply_update, make_optimizer
from flax_decoder.training.shown import describe_state
from flax_decoder.training.spikes import is_spike

Metrics = dict[str, jax.Array]


class TrainState(train_state.TrainState):
    """Flax's train state (`step`, `params`, `opt_state`, `tx`, `apply_fn`), and static settings of the step.

    It has no random key: randomness is a function of (seed, step).

    Attributes:
        seed: seed of the dropout.
        accumulation_steps: number of parts in which a batch is computed.
        z_loss: weight of the penalty on the softmax's normalizer.
        loss_chunk_tokens: logits per device are computed for this many tokens at a time; 0: for all; None: see
            `chunk_size`.
        skip_spikes: a step whose loss exceeds this many times the running mean is not applied; 0 applies all.
        sums_by_copy: if a batch is computed in parts on a mesh, gradients are summed over the copies of the parameters
            once, at the end. Not with dropout, whose random numbers are those of one device.
        frozen: parameters that do not learn, beside which `params` are adapters (`nn/lora.py`); None in other training.
    """

    seed: int = struct.field(pytree_node=False, default=0)
    accumulation_steps: int = struct.field(pytree_node=False, default=1)
    z_loss: float = struct.field(pytree_node=False, default=0.0)
    loss_chunk_tokens: int | None = struct.field(pytree_node=False, default=None)
    skip_spikes: float = struct.field(pytree_node=False, default=0.0)
    sums_by_copy: bool = struct.field(pytree_node=False, default=False)
    frozen: Any = None

    @property
    def all_params(self) -> Any:
        """The parameters that `apply_fn` takes: those that learn, and the frozen ones where there are any."""
        return with_adapters(self.frozen, self.params)

    @classmethod
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: optax.GradientTransformation, **settings: Any
    ) -> Self:
        """The state before the first step, as in Flax.

        `step` is an array, so that the second step compiles nothing. The optimizer's state is in at least float32 where
        params are in fewer bits: its squares and its epsilon would be lost there.
        """
        layers_of(with_adapters(settings.get("frozen"), params))
        state: Self = super().create(apply_fn=apply_fn, params=widened(params), tx=tx, **settings)
        return state.replace(step=jnp.zeros((), jnp.int32), params=params)

    def __repr__(self) -> str:
        """One line; Python's own has one for each parameter and function."""
        return describe_state(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of all arrays; model and optimizer are shared, so that both states are trees of one structure."""
        copied: Self = jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), self)
        return copied

    def apply_gradients(self, *, grads: Any, loss: jax.Array | None = None, **changes: Any) -> Self:
        """The state after one update by the optimizer, which gets the loss if it takes one; see `apply_update`."""
        params, opt_state = apply_update(self.tx, grads, self.opt_state, self.params, loss)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)


def init_state(
    model: Decoder,
    config: Config,
    *,
    rng: jax.Array,
    mesh: Mesh | None = None,
    params: Any = None,
    tx: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step.

    With `config.lora.rank`, adapters learn, and the parameters themselves are `state.frozen`.

    Args:
        model: the network.
        config: its `optimizer`, `lora` and `training` sections are used.
        rng: key for the parameters, which do not depend on the mesh.
        mesh: the devices over which the state is sharded from the start; None uses the default device.
        params: the parameters to start from, of a trained model; None draws them. They are copied only where they have
            another dtype or lie on other devices, so a step that is given the state to keep takes them along.
        tx: an optimizer of optax in place of the one that `config.optimizer` describes.

    Raises:
        UserError: an argument of another kind; parameters of another model; or adapters that it cannot have.
    """
    require_type("model", model, Decoder, "such as Decoder(config.model)")
    require_type("config", config, Config, "from load_config")
    require_type("mesh", mesh, Mesh | None)
    check_key(rng)
    require_type("tx", tx, optax.GradientTransformation | None, "such as optax.adamw(1e-3)")
    make = state_maker(model, config, 1 if mesh is None else num_row_devices(mesh), tx)
    shapes = jax.eval_shape(make, rng)
    shardings: Any = None if mesh is None else state_shardings(mesh, shapes)
    if params is None:
        return jax.jit(make, out_shardings=shardings)(rng)
    given = "params" if shapes.frozen is None else "frozen"
    params = _placed(params, getattr(shapes, given), shardings and getattr(shardings, given))
    make_others = jax.jit(
        lambda rng, params: make(rng, params).replace(**{given: None}),
        out_shardings=shardings and shardings.replace(**{given: None}),
    )
    return make_others(rng, params).replace(**{given: params})


def _placed(params: Any, shapes: Any, shardings: Any) -> Any:
    """Given parameters, with the dtypes and on the devices of those that would be drawn."""
    params = {**params, "layers": layers_of(params)}
    found, wanted = (jax.tree.map(np.shape, tree) for tree in (params, shapes))
    if found != wanted:
        raise UserError("params are not those of the model: they have other names or shapes; give the model of `load`")
    cast = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), params, shapes)
    return cast if shardings is None else jax.device_put(cast, shardings)


def state_maker(
    model: Decoder, config: Config, num_devices: int = 1, tx: optax.GradientTransformation | None = None
) -> Callable[..., TrainState]:
    """The function from a random key, and perhaps parameters, to the state if so many devices share a batch."""
    training, lora = config.training, config.lora
    remembers = training.skip_spikes > 0
    tx = make_optimizer(config.optimizer, training.num_steps, remembers_losses=remembers, tx=tx)
    if lora.adapter is not None:  # a clone would be another program for `jit`
        model = model.clone(adapter=lora.adapter)

    def make(rng: jax.Array, params: Any = None) -> TrainState:
        frozen = None
        if params is None:  # they do not depend on the values or the number of tokens
            params = model.init(rng, np.zeros((1, 1), np.int32))["params"]
        if lora.rank is not None:
            params, frozen = init_adapters(lora, params, jax.random.fold_in(rng, 1)), params
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            apply_fn=model.apply,
            params=params,
            tx=tx,
            opt_state=tx.init(params),
            seed=training.seed,
            accumulation_steps=training.num_parts(num_devices),
            z_loss=training.z_loss,
            loss_chunk_tokens=training.loss_chunk_tokens,
            skip_spikes=training.skip_spikes,
            sums_by_copy=config.model.dropout == config.lora.dropout == 0,
            frozen=frozen,
        )

    return make


def require_adapters(config: Config) -> None:
    """Raises UserError if the model cannot have the adapters that `config.lora` asks for."""
    if config.lora.rank is None:
        return
    if jax.process_count() > 1:
        raise UserError(f"lora.rank = {config.lora.rank}: adapters train in one process; leave out [distributed]")
    jax.eval_shape(state_maker(Decoder(config.model), config), jax.random.key(0))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """The sharding of each array of a (possibly abstract) state; moments are sharded like their parameters."""
    refuse_explicit_axes(mesh)
    return jax.tree.map(lambda axes: sharding_of(mesh, *axes), logical_axes(state))


def train_step(state: TrainState, batch: Batch, *, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch.

    A pure function, not compiled: wrap it in `jax.jit`, `jax.pmap` or `jax.shard_map`.

    If the loss or a gradient is NaN or infinite, the step is not applied: parameters and optimizer state, including its
    update counts and thus the learning rate, stay the same, bit for bit. Only `step` increases, and with it batch and
    dropout, which are functions of (seed, step): the bad batch is skipped. The same goes for a spike of the loss, if
    `state.skip_spikes` is set.

    Args:
        state: the current state; not changed.
        batch: "inputs" and "targets", token ids (B, T); optionally "mask" (B, T), the weight of each target in the
            loss; "positions" (B, T) of the inputs, if they are not consecutive; and "segments" (B, T), their documents,
            which do not see each other: positions count anew in each, an id that comes back is another one, and no loss
            is asked across a border. Of the target of a row's last token the mask alone decides. With both, see
            `training.batch.without_borders`.
        axis_name: under `pmap` or `shard_map`, the mapped axis over which the batch is split.

    Returns:
        The next state, and the metrics "loss", the mean cross-entropy in nats per token; "gradient_norm", before
        clipping; and "applied", whether the parameters were updated.

    Raises:
        ValueError: a name, shape or dtype in the batch that does not fit; token ids outside the vocabulary or negative
            weights, unless they are traced.
    """
    gradients, metrics = mean_gradients(state, batch, axis_name)
    loss = metrics["loss"]
    # One non-finite gradient makes the norm non-finite, and the norm overflows before AdamW's squares do.
    # Loss and norm are sums over all devices, so all devices decide alike.
    applied = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
    if state.skip_spikes > 0:
        applied &= ~is_spike(loss, state.opt_state, state.skip_spikes)
    # Not `where` on each array: for that XLA on CPU would copy the optimizer's state.
    after = jax.lax.cond(
        applied,
        lambda state: state.apply_gradients(grads=gradients, loss=loss),
        lambda state: state.replace(step=state.step + 1),
        state.replace(frozen=None),  # what passes through a condition may be copied
    ).replace(frozen=state.frozen)
    return after, metrics | {"applied": applied}


def mean_gradients(state: TrainState, batch: Batch, axis_name: str | None = None) -> tuple[Any, Metrics]:
    """Gradients of the mean loss over a batch, a tree like the parameters, and its metrics; see `train_step`."""
    batch = checked_batch(batch, state.all_params["embedding"].shape[0], state.accumulation_steps)
    state = state.replace(params=widened(state.params))  # so gradients are not rounded before they are summed
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        state = state.replace(params=_as_varying(state.params, axis_name))
    sums, gradients = accumulate(state, batch, rng)
    if axis_name is not None:
        sums, gradients = jax.lax.psum((sums, gradients), axis_name)
    # Sums are divided by the weight of the whole batch: each token counts the same, however the batch is split.
    num_tokens = jnp.where(sums["num_tokens"] > 0, sums["num_tokens"], 1)
    gradients = jax.tree.map(lambda gradient: gradient / num_tokens, gradients)
    return gradients, {"loss": sums["loss"] / num_tokens, "gradient_norm": optax.tree.norm(gradients)}


def _as_varying(params: Any, axis_name: str) -> Any:
    """Marks params as device-varying, so that `shard_map` does not psum their gradients: `mean_gradients` does."""
    tracks_variance = jax.typeof(jax.lax.axis_index(axis_name)).manual_axis_type.varying
    if not tracks_variance:  # pmap, or shard_map with check_vma=False
        return params
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), params)


def jit_step(state: TrainState, mesh: Mesh, *, deterministic: bool = False) -> Any:
    """`train_step` under jit on a mesh. The given state is donated; the next one has the same shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), sharding_of(mesh)
    options = compiler_options(mesh, deterministic=deterministic)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """The sums "loss" (nats) and "num_tokens" over a batch, without dropout; for `batch` see `train_step`."""
    batch = checked_batch(batch, state.all_params["embedding"].shape[0])
    return loss_sum(state.all_params, state.apply_fn, batch, loss_chunk_tokens=state.loss_chunk_tokens)[1]


def accumulate(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[Metrics, Any]:
    """Sums of losses and gradients over a batch, computed in `state.accumulation_steps` parts."""

    def sums_and_gradients(batch: Batch, rng: jax.Array) -> tuple[Metrics, Any]:
        def loss(params: Any) -> tuple[jax.Array, Metrics]:
            settings: Any = {"z_loss": state.z_loss, "loss_chunk_tokens": state.loss_chunk_tokens, "rng": rng}
            return loss_sum(with_adapters(state.frozen, params), state.apply_fn, batch, **settings)

        gradients, sums = jax.grad(loss, has_aux=True)(state.params)
        return sums, gradients

    if state.accumulation_steps == 1:
        return sums_and_gradients(batch, rng)

    by_copy = state.sums_by_copy and num_parts("copies") > 1

    def sums_of_part(batch: Batch, rng: jax.Array) -> tuple[Metrics, Any]:
        if not by_copy:
            return sums_and_gradients(batch, rng)
        return in_each_copy(lambda batch: sums_and_gradients(batch, rng))(batch)

    def add_part(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_of_part(*part)), None

    # Of n parts, part i takes every n-th row, so that rows stay on their device.
    parts = jax.tree.map(lambda rows: rows.reshape(-1, state.accumulation_steps, *rows.shape[1:]).swapaxes(0, 1), batch)
    rngs = jax.random.split(rng, state.accumulation_steps)
    shapes = jax.eval_shape(sums_of_part, jax.tree.map(lambda part: part[0], parts), rngs[0])
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    total = jax.lax.scan(add_part, zeros, (parts, rngs))[0]
    return jax.tree.map(lambda leaf: leaf.sum(0), total) if by_copy else total


def loss_sum(
    params: Any,
    apply_fn: Callable[..., Any],
    batch: Batch,
    *,
    z_loss: float = 0.0,
    loss_chunk_tokens: int | None = None,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The sum to minimise over a checked batch, and the sums "loss" and "num_tokens"; `rng` turns dropout on."""
    targets_BT = batch["targets"]
    mask_BT = batch["mask"] if "mask" in batch else jnp.ones(targets_BT.shape, jnp.float32)
    vocab_size = params["embedding"].shape[0]
    tokens_per_device = targets_BT.size // (num_parts("batch") * num_parts("length"))
    chunk_tokens = chunk_size(tokens_per_device, vocab_size // num_parts("vocab"), loss_chunk_tokens)

    result = apply_fn(
        {"params": params},
        batch["inputs"],
        positions_BT=batch.get("positions"),
        segments_BT=batch.get("segments"),
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
