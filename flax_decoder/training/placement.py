"""Device memory and batch placement."""

import functools
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.config import Config, TrainingConfig
from flax_decoder.data.splits import MixedSplit, Split
from flax_decoder.errors import UserError
from flax_decoder.parallel.mesh import mesh_sizes, sharding_of
from flax_decoder.parallel.zigzag import zigzag
from flax_decoder.training.batch import Batch
from flax_decoder.training.flops import num_product_weights

# A weight in float32, and as much for its gradient if it has one: the least that training needs.
BYTES_PER_WEIGHT = 4


def require_room(config: Config, num_devices: int) -> None:
    """Refuses a run whose weights and gradients alone exceed the devices' memory; `plan` computes what fits.

    Raises:
        UserError: the mesh does not fit the devices, or the model does not fit their memory.
    """
    sizes = mesh_sizes(config, num_devices)
    bytes_per_weight = (2 if config.lora.rank is None else 1) * BYTES_PER_WEIGHT
    required = bytes_per_weight * num_product_weights(config.model) // (sizes["fsdp"] * sizes["tensor"])
    available = device_bytes(min(math.prod(sizes.values()), jax.local_device_count()))
    if required > available:
        raise UserError(
            f"model: its weights and their gradients take at least {required / 1e9:,.0f} GB per device, which has "
            f"{available / 1e9:,.1f};\ntry a smaller model, or split it with --mesh.fsdp; flax-decoder plan says what "
            "fits"
        )


def device_bytes(num_local: int) -> int:
    """The memory of a device, in bytes; `num_local` simulated ones share that of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", machine_bytes // num_local))


def place_batch(
    split: Split | MixedSplit, training: TrainingConfig, context_length: int, mesh: Mesh, step: int
) -> Batch:
    """The training batch of a step, from 0, sharded over a mesh; each process reads only the rows of its devices.

    Returns:
        The arrays of `split.train_batch`, [B, T]. If the mesh splits sequences, tokens are reordered to balance the
        work of the devices, and "positions" gives the original position of each, in its document where there are
        "segments".
    """
    B, T = training.batch_size, context_length
    num_parts = mesh.shape["context"]
    order_T = zigzag(T, num_parts) if num_parts > 1 else None

    @functools.cache  # devices that hold parts of the same rows share one read
    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        rows = slice(start, stop)
        batch = split.train_batch(seed=training.seed, step=step, batch_size=B, context_length=T, rows=rows)
        if order_T is None:
            return batch
        return {name: array[:, order_T] for name, array in with_positions(batch).items()}

    def part(name: str, index: Any) -> np.ndarray:
        rows, columns = index
        return read(*rows.indices(B)[:2])[name][:, columns]

    sharding = sharding_of(mesh, "batch", "length")
    own, *_ = filter(None, sharding.addressable_devices_indices_map((B, T)).values())  # of a device of this process
    names = read(*own[0].indices(B)[:2])
    return {name: jax.make_array_from_callback((B, T), sharding, functools.partial(part, name)) for name in names}


def with_positions(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch for any order of its tokens: "positions" count in each document, and no two share their "segments"."""
    index_BT = np.broadcast_to(np.arange(batch["inputs"].shape[1], dtype=np.int32), batch["inputs"].shape)
    if "segments" not in batch:
        return batch | {"positions": index_BT}
    is_first_BT = np.diff(batch["segments"], axis=1, prepend=batch["segments"][:, :1]) != 0
    starts_BT = np.maximum.accumulate(np.where(is_first_BT, index_BT, 0), axis=1)
    return batch | {"positions": index_BT - starts_BT, "segments": starts_BT}
