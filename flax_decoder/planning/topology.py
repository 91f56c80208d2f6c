"""The devices of a named topology, such as "v5p:4x4x4", to compile programs for without having them.

The compilers for TPUs and NVIDIA GPUs take a description of the device. JAX is imported inside the functions, because
`prepare` must set environment variables first.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from flax_decoder.errors import UserError

LOCAL = "local"
GPUS_PER_NODE = 8


class Tpu(NamedTuple):
    """A generation of TPUs: dimensions of its torus, and chips of the largest slice."""

    num_dimensions: int
    max_chips: int
    example: str


TPUS = {
    "v5e": Tpu(2, 256, "v5e:4x4"),
    "v5p": Tpu(3, 6144, "v5p:4x4x4"),
    "v6e": Tpu(2, 256, "v6e:16x16"),
    "tpu7x": Tpu(3, 9216, "tpu7x:4x4x4"),
}

# Fields of the compiler's `GpuDeviceInfoProto`. Sources: NVIDIA's CUDA programming guide (compute capability 9.0) and
# data sheets.
_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "l2_cache_size": 52_428_800,
    "clock_rate_ghz": 1.98,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
GPUS: dict[str, tuple[str, dict[str, float]]] = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        _HOPPER | {"memory_bandwidth": 3_352_320_000_000, "device_memory_size": 84_929_347_584},
    ),
    "h200": ("NVIDIA H200", _HOPPER | {"memory_bandwidth": 4_800_000_000_000, "device_memory_size": 150_121_545_728}),
}
KNOWN = ", ".join([*(tpu.example for tpu in TPUS.values()), *(f"{gpu}:8" for gpu in GPUS), LOCAL])


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Splits a name such as "v5p:4x4x4" or "h100:8".

    Returns:
        A key of `TPUS` or `GPUS` and the counts along each dimension; for "local", itself and no counts.

    Raises:
        UserError: an unknown kind, or a shape that it does not have.
    """
    if name == LOCAL:
        return LOCAL, ()
    kind, _, shape = name.lower().partition(":")
    counts = tuple(int(count) for count in shape.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
    if kind in GPUS:
        valid = len(counts) == 1 and (counts[0] <= GPUS_PER_NODE or counts[0] % GPUS_PER_NODE == 0)
        rule = f"a number of GPUs, 1 to {GPUS_PER_NODE} or whole nodes of {GPUS_PER_NODE}, such as {kind}:8"
    elif kind in TPUS:
        tpu, num_chips = TPUS[kind], math.prod(counts)
        even = num_chips == 1 or all(count % 2 == 0 for count in counts[:2])  # a host has 2 x 2 chips
        valid = len(counts) == tpu.num_dimensions and num_chips <= tpu.max_chips and even
        rule = (
            f"{tpu.num_dimensions} dimensions, the first two even, at most {tpu.max_chips} chips; such as {tpu.example}"
        )
    else:
        raise UserError(f"--topology {name}: unknown; known are, also with other numbers: {KNOWN}")
    if not valid:
        raise UserError(f"--topology {name}: {kind} takes {rule}")
    return kind, counts


def prepare(name: str) -> None:
    """Sets the environment variables for the compiler of a topology; call it before JAX is imported.

    Raises:
        UserError: the name is wrong, or the compiler is not installed.
    """
    kind, _ = parse_topology(name)
    # A cached program cannot be timed, and on some devices its text cannot be read.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if kind in TPUS:
        _require("libtpu", "tpu")
        # Else libtpu asks the cloud's metadata server which TPU this is, and locks a TPU that it does not use.
        os.environ |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    elif kind in GPUS:
        _require("jax_cuda13_plugin", "cuda13")
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # Autotuning and Triton need a GPU to run on.
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    if kind != LOCAL:
        os.environ["JAX_PLATFORMS"] = "cpu"


def devices_of(name: str) -> list[Any]:
    """The devices of a topology, which hold no arrays unless it is "local"; call `prepare` first."""
    import jax
    from jax.experimental import topologies

    kind, counts = parse_topology(name)
    if kind == LOCAL:
        return jax.devices()
    if kind in TPUS:
        # The compiler assumes hosts of 2 x 2 chips.
        options = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(counts) == 1 else {}
        return topologies.get_topology_desc(f"{kind}:{'x'.join(map(str, counts))}", platform="tpu", **options).devices
    num_local = min(counts[0], GPUS_PER_NODE)
    shape = f"1x{counts[0] // num_local}x{num_local}"  # slices x nodes x GPUs per node
    target = _gpu_description(kind)
    return topologies.get_topology_desc(name, platform="cuda", topology=shape, target_config=target).devices


def _gpu_description(kind: str) -> str:
    """The text form of the compiler's GpuTargetConfigProto."""
    name, numbers = GPUS[kind]
    info = "\n".join(f"  {field}: {number}" for field, number in numbers.items())
    return (
        f"gpu_device_info {{\n{info}\n  cuda_compute_capability {{ major: 9 }}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 7 }}\nruntime_version {{ major: 13 }}\n'
        f'device_description_str: "{name}"\n'
    )


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"the compiler for this topology is missing ({module}); install it with\n"
            f'  pip install "flax-decoder[{extra}]"'
        )
