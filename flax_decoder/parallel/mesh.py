"""The device mesh, and the one table that maps logical axes of arrays to axes of the mesh.

The network names the axes of its arrays by meaning ("batch", "embed", "heads"). `RULES` says over which mesh axis each
is split, and XLA inserts the communication.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_decoder.config import Config
from flax_decoder.errors import UserError

# Devices along the last axis are neighbors: tensor parallelism communicates most, within each layer.
AXES = ("data", "fsdp", "context", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("copies", "data"),  # devices with copies of the same parameters
    ("length", "context"),
    ("embed", "fsdp"),  # of parameters only: activations are not split along the residual stream
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # "layers" and "head_dim" are never split.
)

# Compiler options of steps by platform, the one place for them; none was measured on a device yet. An option that the
# environment variable XLA_FLAGS names is left to it. `benchmarks/first_gpu.py` measures more of them, one by one.
COMPILER_OPTIONS: dict[str, dict[str, str | int | bool]] = {
    # These let gradients be reduce-scattered also if a part is only one register (128 numbers) wide; by default such a
    # gradient is all-reduced in full, and most of the sum is discarded.
    "tpu": {
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    },
}
# The same for several devices. What GPUs send is moved to where it overlaps with computation. NVIDIA's images for JAX
# set it (docs.nvidia.com/jax-toolbox/environment-variables), and JAX's docs advise it (GPU performance tips).
OPTIONS_OF_MANY: dict[str, dict[str, str | int | bool]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
# For the same bits each time: no operation that adds in the order in which threads arrive, and no choice between
# kernels by how long each took.
DETERMINISTIC_OPTIONS: dict[str, dict[str, str | int | bool]] = {
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}
}


def mesh_sizes(config: Config, num_devices: int) -> dict[str, int]:
    """The number of devices along each of `AXES`; their product may be less than `num_devices`.

    Raises:
        UserError: there are too few devices, or a size of the config is not a multiple of the devices that split it.
    """
    asked = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(count for count in asked.values() if count not in (None, -1))
    shown = " x ".join(f"{axis} {count}" for axis, count in asked.items() if count not in (None, -1))
    if fixed > num_devices:
        raise UserError(f"mesh: {shown} = {fixed} devices are more than the {num_devices} there are")
    rest = num_devices // fixed
    if -1 in asked.values() and fixed * rest != num_devices:
        raise UserError(f"mesh: {num_devices} devices are not a multiple of {shown} = {fixed}, so -1 has no number")
    sizes = {axis: rest if count == -1 else count for axis, count in asked.items()}
    if sizes["data"] is None:
        # The default: as many devices as divide the batch.
        left = 1 if -1 in asked.values() else rest
        rows = config.training.batch_size // config.training.accumulation_steps
        sizes["data"] = max(n for n in range(1, left + 1) if rows % (n * sizes["fsdp"]) == 0 or n == 1)
    _check_divides(config, sizes)
    return sizes


def make_mesh(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """Arranges devices, present or described, as `config.mesh` says; surplus ones are left out.

    Raises:
        UserError: see `mesh_sizes`; or surplus devices in a job of several processes.
    """
    sizes = mesh_sizes(config, len(devices))
    used = math.prod(sizes.values())
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh: uses {used} of {len(devices)} devices, but a job of several processes must use all: set mesh.data "
            f"or mesh.fsdp to -1, and training.batch_size = {config.training.batch_size} to a multiple"
        )
    return mesh_of(devices[:used], **sizes)


def mesh_of(devices: Sequence[jax.Device], data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the given shape, with devices in an order that suits their interconnect."""
    arranged = arrange(devices, (data, fsdp, context, tensor))
    # With Auto axes the compiler decides how each operation is split; RULES constrain only the arrays that matter.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in an array of a shape, such that its last axes are those with the fastest links.

    Raises:
        UserError: there are several TPU slices, and they divide neither data nor fsdp, which alone may cross the slower
            network between them.
    """
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)
    from jax.experimental import mesh_utils

    # Of GPUs JAX takes the order as it is: those of a machine are beside each other.
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    crossing = next((axis for axis in (0, 1) if shape[axis] % num_slices == 0), None)
    if crossing is None:
        raise UserError(
            f"mesh: {num_slices} TPU slices divide neither data = {shape[0]} nor fsdp = {shape[1]}, and within a layer "
            "nothing is sent between slices:\nset mesh.data or mesh.fsdp to a multiple"
        )
    over_slices = tuple(num_slices if axis == crossing else 1 for axis in range(len(shape)))
    within = tuple(size // outer for size, outer in zip(shape, over_slices, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, over_slices, devices, allow_split_physical_axes=True)


def num_row_devices(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in dict(RULES)["batch"])


def compiler_options(mesh: Mesh, *, deterministic: bool = False) -> dict[str, str | int | bool] | None:
    """The compiler options of a step on a mesh, for `jax.jit`, without those that XLA_FLAGS decides.

    `deterministic` needs all of its own, whatever XLA_FLAGS says.
    """
    platform = mesh.devices.flat[0].platform
    platform = {"cuda": "gpu"}.get(platform, platform)
    options = COMPILER_OPTIONS.get(platform, {}) | (OPTIONS_OF_MANY.get(platform, {}) if mesh.size > 1 else {})
    given = {flag.removeprefix("--").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    options = {name: value for name, value in options.items() if name not in given}
    return options | (DETERMINISTIC_OPTIONS.get(platform, {}) if deterministic else {}) or None


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Within it, programs are compiled for the mesh, with arrays split by `RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def sharding_of(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array, by the logical names of its axes; None is an axis that is not split."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, RULES) or PartitionSpec())


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    """Raises UserError if a size is not a multiple of the devices that split it."""
    model, training = config.model, config.training
    rows = training.batch_size // training.accumulation_steps
    of_parts = " / accumulation_steps" if training.accumulation_steps > 1 else ""
    split = [
        (f"training.batch_size{of_parts}", rows, ("data", "fsdp")),
        ("model.embed_dim", model.embed_dim, ("fsdp",)),
        ("model.num_heads", model.num_heads, ("tensor",)),
        ("model.num_kv_heads", model.kv_heads, ("tensor",)),
        ("model.mlp_dim", model.mlp_width, ("tensor",)),
        ("model.vocab_size", model.vocab_size or 0, ("tensor",)),
    ]
    for name, size, axes in split:
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts != 0:
            over = " x ".join(f"mesh.{axis}" for axis in axes if sizes[axis] > 1 or len(axes) == 1)
            advice = ""
            if name == "model.vocab_size":
                advice = f"; set it to {-(-size // parts) * parts}: unused ids do no harm"
            if name == "training.batch_size":
                advice = f"; set it to {-(-size // parts) * parts}, or use fewer devices"
            raise UserError(f"{name} = {size} is not a multiple of {over} = {parts}{advice}")
    # Each device holds an early and a late chunk of a sequence (see zigzag.py).
    if sizes["context"] > 1 and model.context_length % (2 * sizes["context"]) != 0:
        raise UserError(
            f"model.context_length = {model.context_length} is not a multiple of 2 x mesh.context = "
            f"{2 * sizes['context']}"
        )
