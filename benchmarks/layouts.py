"""Whether the mesh changes the numbers: the same run on every layout of 8 devices, compared with one device.

    python benchmarks/layouts.py [--steps 20]

Simulates 8 devices on CPU, in float32. All runs have the same seed and the same batches: by config on each mesh whose
axes multiply to 8, with gradient accumulation, and by hand with pmap, shard_map and jit. Prints how much each differs
from one device; exits with 1 if the loss of any step differs by a relative 1e-5, or a final parameter tensor by 1e-4 of
its norm.

A single number can differ by more: AdamW divides each by the size of its gradients, and if those are almost zero, the
order of summation decides the sign. The largest such difference is printed too.
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

# Set before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_decoder as fd
from flax_decoder.data.splits import Split
from flax_decoder.parallel.mesh import AXES, make_mesh, use_mesh
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import jit_step

NUM_DEVICES = 8
LOSS_TOLERANCE = 1e-5
PARAMS_TOLERANCE = 1e-4
# Every layout divides every size.
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
# Python's own help texts, one token per byte.
TOKENS = np.frombuffer("".join(topics.values()).encode(), np.uint8)
Losses = list[float]


@dataclasses.dataclass(frozen=True)
class ByHand:
    """`fd.train_step` spread by the user: the compiled step, and functions that place its arguments."""

    take_step: Callable[[Any, Any], Any]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    one_of: Callable[[Any], Any] = lambda leaf: leaf


def layouts() -> Iterator[dict[str, int]]:
    """All meshes of 8 devices."""
    sizes = [size for size in range(1, NUM_DEVICES + 1) if NUM_DEVICES % size == 0]
    for choice in np.ndindex(*(len(sizes),) * len(AXES)):
        layout = {axis: sizes[i] for axis, i in zip(AXES, choice, strict=True)}
        if math.prod(layout.values()) == NUM_DEVICES:
            yield layout


def run_by_config(num_steps: int, num_parts: int = 1, **mesh: int) -> tuple[Losses, Any]:
    """Losses and final parameters of a run that is spread by its config, as in the training loop."""
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
    """Losses and final parameters of a run in which `fd.train_step` is spread by hand."""
    config = fd.load_config(None, SETTINGS | {"training.num_steps": num_steps})
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    state, losses = jax.tree.map(way.place_state, state), []
    for step in range(num_steps):
        batch = Split(TOKENS, np.zeros(1, int), 1).train_batch(
            seed=config.training.seed,
            step=step,
            batch_size=config.training.batch_size,
            context_length=config.model.context_length,
        )
        # One program at a time: on few cores, simulated devices of two programs could block each other.
        state, metrics = jax.block_until_ready(way.take_step(state, jax.tree.map(way.place_batch, batch)))
        losses.append(float(way.one_of(jax.device_get(metrics["loss"]))))
    return losses, jax.tree.map(way.one_of, jax.device_get(state.params))


def ways_by_hand() -> dict[str, ByHand]:
    """The same step, spread over all devices in three ways."""
    step = functools.partial(fd.train_step, axis_name="batch")
    mesh = jax.make_mesh((NUM_DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    replicated, by_row = PartitionSpec(), PartitionSpec("batch")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(replicated, by_row), out_specs=replicated, check_vma=False)
    put_replicated = functools.partial(jax.device_put, device=NamedSharding(mesh, replicated))
    put_by_row = functools.partial(jax.device_put, device=NamedSharding(mesh, by_row))
    return {
        "by hand: pmap": ByHand(
            jax.pmap(step, axis_name="batch"),
            lambda leaf: np.broadcast_to(leaf, (NUM_DEVICES, *leaf.shape)),
            lambda rows: rows.reshape(NUM_DEVICES, -1, *rows.shape[1:]),
            lambda leaf: leaf[0],
        ),
        "by hand: shard_map": ByHand(jax.jit(mapped), put_replicated, put_by_row),
        "by hand: jit, batch in parts": ByHand(jax.jit(fd.train_step), put_replicated, put_by_row),
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
    """The text form of a layout."""
    return " x ".join(f"{axis} {size}" for axis, size in layout.items() if size > 1) or "one device"


def differences(run: tuple[Losses, Any], expected: tuple[Losses, Any]) -> tuple[float, float, float]:
    """The worst relative difference of a loss and of a tensor, and the largest difference of a single number."""
    of_losses = [abs(one - other) / other for one, other in zip(run[0], expected[0], strict=True)]
    pairs = list(zip(jax.tree.leaves(run[1]), jax.tree.leaves(expected[1]), strict=True))
    of_tensors = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs]
    largest = [np.abs(one - other).max() for one, other in pairs]
    # np.max, unlike max, propagates NaN.
    return float(np.max(of_losses)), float(np.max(of_tensors)), float(np.max(largest))


def main() -> int:
    """Prints a row per run; returns 1 if one differs by more than its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    num_steps = parser.parse_args().steps
    expected = run_by_config(num_steps, **dict.fromkeys(AXES, 1))
    print(f"one device: loss {expected[0][0]:.4f} at the first step, {expected[0][-1]:.4f} at step {num_steps}\n")
    print("| Run | Loss, worst step | Parameters, worst tensor | Largest single difference |\n|---|---|---|---|")
    failed = []
    for name, run in all_runs(num_steps):
        loss, tensor, single = differences(run, expected)
        print(f"| {name} | {loss:.1e} | {tensor:.1e} | {single:.1e} |", flush=True)
        if not (loss <= LOSS_TOLERANCE and tensor <= PARAMS_TOLERANCE):
            failed.append(name)
    print(f"\nover the tolerances ({LOSS_TOLERANCE:.0e}, {PARAMS_TOLERANCE:.0e}): {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
