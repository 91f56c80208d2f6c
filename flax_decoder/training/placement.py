"""Batches, from the text straight to the devices that work on them."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.data.batches import train_batch
from flax_decoder.parallel.mesh import sharding_of
from flax_decoder.parallel.zigzag import zigzag
from flax_decoder.training.step import Batch


def place_batches(tokens: np.ndarray, config: Config, mesh: Mesh, step: int, num_steps: int) -> Batch:
    """The training batches of some steps, spread over a mesh; each process reads only the rows its devices hold.

    Args:
        tokens: the training split; may be memory-mapped.
        config: seed, batch size and context length of the run, which alone decide what is in a batch.
        mesh: the devices.
        step: number of the first step, from 0.
        num_steps: how many.

    Returns:
        "inputs" and "targets", int32 [num_steps, B, T]. Where the mesh splits sequences, their tokens are in an order
        that gives all devices the same work, and "positions" says where each stands.
    """
    training, T = config.training, config.model.context_length
    shape = (num_steps, training.batch_size, T)
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
            num_steps=num_steps,
            rows=slice(start, stop),
        )
        if order_T is None:
            return batch
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), batch["inputs"].shape)
        return {name: rows[..., order_T] for name, rows in (batch | {"positions": positions}).items()}

    def part(name: str, index: Any) -> np.ndarray:
        _, rows, columns = index
        return read(*rows.indices(training.batch_size)[:2])[name][..., columns]

    sharding = sharding_of(mesh, None, "batch", "length")
    names = ("inputs", "targets") if order_T is None else ("inputs", "targets", "positions")
    return {name: jax.make_array_from_callback(shape, sharding, functools.partial(part, name)) for name in names}
