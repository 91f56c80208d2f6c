"""What a run puts on its devices: whether there is room, and batches straight from the text."""

import functools
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.data.batches import train_batch
from flax_decoder.errors import UserError
from flax_decoder.parallel.mesh import mesh_sizes, sharding_of
from flax_decoder.parallel.zigzag import zigzag
from flax_decoder.training.flops import num_product_weights
from flax_decoder.training.step import Batch

# A weight and its gradient, both in float32: the least that training needs.
BYTES_A_WEIGHT = 8


def require_room(config: Config, num_devices: int) -> None:
    """Refuses a run that cannot fit, by the least it must hold; whether one does fit, `plan` says.

    Args:
        config: the run; its `model.vocab_size` is known.
        num_devices: over which it is to be spread.

    Raises:
        UserError: the settings do not fit the devices, or the model not their memory.
    """
    sizes = mesh_sizes(config, num_devices)
    needed = BYTES_A_WEIGHT * num_product_weights(config.model) // (sizes["fsdp"] * sizes["tensor"])
    there = device_bytes(min(math.prod(sizes.values()), jax.local_device_count()))
    if needed > there:
        raise UserError(
            f"model: its weights and their gradients take at least {needed / 1e9:,.0f} GB a device, which has "
            f"{there / 1e9:,.1f};\ntry a smaller model, or split it with --mesh.fsdp; flax-decoder plan says what fits"
        )


def device_bytes(num_here: int) -> int:
    """The memory of a device; as many simulated ones as work here share that of the machine."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats["bytes_limit"]) if "bytes_limit" in stats else machine // num_here


def place_batch(tokens: np.ndarray, config: Config, mesh: Mesh, step: int) -> Batch:
    """The training batch of a step, spread over a mesh; each process reads only the rows its devices hold.

    Args:
        tokens: the training split; may be memory-mapped.
        config: seed, batch size and context length of the run, which alone decide what is in a batch.
        mesh: the devices.
        step: number of the step, from 0.

    Returns:
        "inputs" and "targets", int32 [B, T]. Where the mesh splits sequences, their tokens are in an order
        that gives all devices the same work, and "positions" says where each stands.
    """
    training, T = config.training, config.model.context_length
    shape = (training.batch_size, T)
    num_parts = mesh.shape["context"]
    order_T = zigzag(T, num_parts) if num_parts > 1 else None

    @functools.cache  # devices that hold parts of the same rows share one reading of them
    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        batch = train_batch(
            tokens,
            seed=training.seed,
            step=step,
            batch_size=training.batch_size,
            context_length=T,
            rows=slice(start, stop),
        )
        if order_T is None:
            return batch
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), batch["inputs"].shape)
        return {name: rows[:, order_T] for name, rows in (batch | {"positions": positions}).items()}

    def part(name: str, index: Any) -> np.ndarray:
        rows, columns = index
        return read(*rows.indices(training.batch_size)[:2])[name][:, columns]

    sharding = sharding_of(mesh, "batch", "length")
    names = ("inputs", "targets") if order_T is None else ("inputs", "targets", "positions")
    return {name: jax.make_array_from_callback(shape, sharding, functools.partial(part, name)) for name in names}
