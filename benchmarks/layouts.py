"""Does it matter how devices share the work? The same run on every layout of 8 devices, beside one device.

    python benchmarks/layouts.py [--steps 20]

Simulates 8 devices on CPU, in float32. All runs start from the same seed and see the same batches: by config alone on
each mesh whose axes multiply to 8, in parts (gradient accumulation), and by hand under pmap, shard_map and jit. Prints
by how much each differs from one device; exits with 1 where a loss, at any step, differs by more than 1e-5 of itself,
or a parameter tensor at the end by more than 1e-4 of its length.

A single number of a tensor can differ by more: AdamW divides each by its own usual gradient, and where that is all but
zero, the order in which devices add decides its sign. The largest such difference is printed too.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

# Before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_decoder as fd
from flax_decoder.data.batches import train_batch
from flax_decoder.parallel.mesh import AXES, make_mesh, use_mesh
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import jit_step

NUM_DEVICES = 8
LOSS_TOLERANCE = 1e-5
PARAMS_TOLERANCE = 1e-4
# Each is a multiple of what any layout splits it into.
SETTINGS = {
    "model.vocab_size": 256,
    "model.context_length": 32,
    "model.num_layers": 2,
    "model.num_heads": 8,
    "model.embed_dim": 64,
    "model.positions": "rotary",
    "model.feed_forward": "swiglu",
    "model.norm": "rmsnorm",
    "training.batch_size": 16,
}
# Python's own help texts, a token a byte.
TOKENS = np.frombuffer("".join(topics.values()).encode(), np.uint8)
Losses = list[float]


@dataclasses.dataclass(frozen=True)
class ByHand:
    """What a user writes who spreads `fd.train_step` himself: the compiled step, and where its arguments go."""

    take_step: Callable[[Any, Any], Any]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    one_of: Callable[[Any], Any] = lambda leaf: leaf


def layouts() -> Iterator[dict[str, int]]:
    """Every way to write 8 as a product of the mesh axes."""
    sizes = [size for size in range(1, NUM_DEVICES + 1) if NUM_DEVICES % size == 0]
    for choice in np.ndindex(*(len(sizes),) * len(AXES)):
        layout = {axis: sizes[i] for axis, i in zip(AXES, choice, strict=True)}
        if math.prod(layout.values()) == NUM_DEVICES:
            yield layout


def run_by_config(num_steps: int, num_parts: int = 1, **mesh: int) -> tuple[Losses, Any]:
    """Losses and final parameters of a run that the config alone spreads; as the training loop does it."""
    changes = {f"mesh.{axis}": size for axis, size in mesh.items()} | {"training.accumulation_steps": num_parts}
    config = fd.load_config(None, SETTINGS | {"training.num_steps": num_steps} | changes)
    devices = make_mesh(config, jax.devices()[: math.prod(mesh.values())])
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=devices)
    take_step, losses = jit_step(state, devices), []
    with use_mesh(devices):
        for step in range(num_steps):
            batch = place_batch(TOKENS, config.training, config.model.context_length, devices, step)
            state, metrics = take_step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def run_by_hand(num_steps: int, way: ByHand) -> tuple[Losses, Any]:
    """Losses and final parameters of a run in which `fd.train_step` is called step by step."""
    config = fd.load_config(None, SETTINGS | {"training.num_steps": num_steps})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    state, losses = jax.tree.map(way.place_state, state), []
    for step in range(num_steps):
        batch = train_batch(
            TOKENS,
            seed=config.training.seed,
            step=step,
            batch_size=config.training.batch_size,
            context_length=config.model.context_length,
        )
        # On so few cores one program at a time: two whose devices wait for each other could wait for ever.
        state, metrics = jax.block_until_ready(way.take_step(state, jax.tree.map(way.place_batch, batch)))
        losses.append(float(way.one_of(jax.device_get(metrics["loss"]))))
    return losses, jax.tree.map(way.one_of, jax.device_get(state.params))


def ways_by_hand() -> dict[str, ByHand]:
    """The same step, spread over all devices by three of JAX's means."""
    step = functools.partial(fd.train_step, axis_name="batch")
    mesh = jax.make_mesh((NUM_DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    whole, by_row = PartitionSpec(), PartitionSpec("batch")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, by_row), out_specs=whole, check_vma=False)
    put_whole = functools.partial(jax.device_put, device=NamedSharding(mesh, whole))
    put_by_row = functools.partial(jax.device_put, device=NamedSharding(mesh, by_row))
    return {
        "by hand: pmap": ByHand(
            jax.pmap(step, axis_name="batch"),
            lambda leaf: np.broadcast_to(leaf, (NUM_DEVICES, *leaf.shape)),
            lambda rows: rows.reshape(NUM_DEVICES, -1, *rows.shape[1:]),
            lambda leaf: leaf[0],
        ),
        "by hand: shard_map": ByHand(jax.jit(mapped), put_whole, put_by_row),
        "by hand: jit, batch in parts": ByHand(jax.jit(fd.train_step), put_whole, put_by_row),
    }


def all_runs(num_steps: int) -> Iterator[tuple[str, tuple[Losses, Any]]]:
    """Each way to run, by name."""
    for layout in layouts():
        yield name_of(layout), run_by_config(num_steps, **layout)
    alone = dict.fromkeys(AXES, 1)
    cube = alone | {"data": 2, "fsdp": 2, "tensor": 2}
    ring = alone | {"fsdp": 2, "context": 2, "tensor": 2}
    for num_parts in (2, 4):
        for layout in (alone, cube, ring):
            yield f"{name_of(layout)}, {num_parts} parts", run_by_config(num_steps, num_parts, **layout)
    for name, way in ways_by_hand().items():
        yield name, run_by_hand(num_steps, way)


def name_of(layout: dict[str, int]) -> str:
    """A layout in a few words."""
    return " x ".join(f"{axis} {size}" for axis, size in layout.items() if size > 1) or "one device"


def differences(run: tuple[Losses, Any], expected: tuple[Losses, Any]) -> tuple[float, float, float]:
    """The worst relative difference of a loss and of a tensor, and the largest difference of a single parameter."""
    of_losses = [abs(one - other) / other for one, other in zip(run[0], expected[0], strict=True)]
    pairs = list(zip(jax.tree.leaves(run[1]), jax.tree.leaves(expected[1]), strict=True))
    of_tensors = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs]
    largest = [np.abs(one - other).max() for one, other in pairs]
    # np.max, unlike max, hands on what is not a number.
    return float(np.max(of_losses)), float(np.max(of_tensors)), float(np.max(largest))


def main() -> int:
    """Prints a row for each way to run; 1 where one differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    num_steps = parser.parse_args().steps
    expected = run_by_config(num_steps, **dict.fromkeys(AXES, 1))
    print(f"one device: loss {expected[0][0]:.4f} at the first step, {expected[0][-1]:.4f} at step {num_steps}\n")
    print("| Run | Loss, worst step | Parameters, worst tensor | Largest single difference |\n|---|---|---|---|")
    broken = []
    for name, run in all_runs(num_steps):
        loss, tensor, single = differences(run, expected)
        print(f"| {name} | {loss:.1e} | {tensor:.1e} | {single:.1e} |", flush=True)
        if not (loss <= LOSS_TOLERANCE and tensor <= PARAMS_TOLERANCE):
            broken.append(name)
    print(f"\nbroken bounds ({LOSS_TOLERANCE:.0e}, {PARAMS_TOLERANCE:.0e}): {', '.join(broken) or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
