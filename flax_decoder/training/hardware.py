"""What the hardware can do: peaks of accelerators from their data sheets, and a description of this machine's CPU."""

import dataclasses
import os
import platform
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    name: str  # prefix of its `device_kind`
    peak_flops: float  # dense bfloat16 matrix products, FLOP/s
    memory_bytes: float  # data sheets mean powers of ten or of two; the smaller reading is used
    memory_bandwidth: float  # bytes/s between memory and cores
    # bytes/s in one direction over all links (ICI, NVLink, else PCIe); data sheets usually give the sum of both
    interconnect_bandwidth: float


# TPUs: Google Cloud, "TPU v4", "v5e", "v5p", "v6e", "TPU7x" (two devices per chip). GPUs: NVIDIA's data sheets,
# without sparsity.
CHIPS = (
    Chip("TPU v4", 275e12, 32e9, 1.2e12, 150e9),
    Chip("TPU v5 lite", 197e12, 16e9, 0.8e12, 200e9),
    Chip("TPU v5e", 197e12, 16e9, 0.8e12, 200e9),
    Chip("TPU v5", 459e12, 95e9, 2.765e12, 600e9),  # v5p; the runtime uses either name
    Chip("TPU v6 lite", 918e12, 32e9, 1.6e12, 400e9),
    Chip("TPU v6e", 918e12, 32e9, 1.6e12, 400e9),
    Chip("TPU7x", 1153.5e12, 96e9, 3.69e12, 300e9),
    Chip("NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1.555e12, 300e9),
    Chip("NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2.039e12, 300e9),
    Chip("NVIDIA A100-PCIE-40GB", 312e12, 40e9, 1.555e12, 32e9),
    Chip("NVIDIA A100 80GB PCIe", 312e12, 80e9, 1.935e12, 32e9),
    Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3.35e12, 450e9),
    Chip("NVIDIA H100 PCIe", 756e12, 80e9, 2.0e12, 64e9),
    Chip("NVIDIA H100 NVL", 835e12, 94e9, 3.9e12, 300e9),
    Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 450e9),
    Chip("NVIDIA H200 NVL", 835e12, 141e9, 4.8e12, 450e9),
    Chip("NVIDIA B200", 2250e12, 180e9, 7.7e12, 900e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip with the longest name that `device_kind` begins with; None for an unknown device."""
    if " MIG " in device_kind:  # a slice of a GPU, with an unknown part of its peak
        return None
    known = [chip for chip in CHIPS if device_kind.startswith(chip.name)]
    return max(known, key=lambda chip: len(chip.name), default=None)


CPUINFO = Path("/proc/cpuinfo")  # Linux only

# Vector units, widest first: name in XLA_FLAGS, flag in /proc/cpuinfo, description.
VECTOR_UNITS = (
    ("AVX512", "avx512f", "AVX-512, 512 bits"),
    ("AVX2", "avx2", "AVX2, 256 bits"),
    ("AVX", "avx", "AVX, 256 bits"),
    ("SSE4_2", "sse4_2", "SSE4.2, 128 bits"),
    ("SVE", "sve", "SVE"),  # its width varies
    ("NEON", "asimd", "NEON, 128 bits"),
)


# Of the flags in /proc/cpuinfo, those of instructions that a compiler of numbers uses, on x86 and ARM.
_COMPUTING = re.compile("s?sse|avx|amx|fma|f16c|bmi|asimd|sve|sme|bf16|i8mm|fp")


def cpu_features() -> list[str]:
    """The processor's features that compiled programs may use, sorted, and the number of cores of this process."""
    _, flags, cores = _cpu()
    return [*sorted({flag for flag in flags if _COMPUTING.match(flag)}), f"{cores}-core"]


def describe_cpu() -> str:
    """The processor's name, the number of cores this process may use, and the widest vector unit XLA may use."""
    name, flags, cores = _cpu()
    return f"{name}, {cores} {'core' if cores == 1 else 'cores'}, {_vectors(flags, os.environ.get('XLA_FLAGS', ''))}"


def _cpu() -> tuple[str, list[str], int]:
    """The processor's name, its flags, and the number of cores that this process may use."""
    try:
        cpuinfo = CPUINFO.read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    first_core = cpuinfo.strip().partition("\n\n")[0]
    facts = dict(re.findall(r"^(model name|flags|Features)[ \t]*:[ \t]*(.*\S)", first_core, re.MULTILINE))
    machine = platform.machine()
    name = facts.get("model name") or platform.processor() or machine or "unknown processor"
    # All 64-bit ARM processors have NEON; macOS has no /proc/cpuinfo to tell.
    flags = (facts.get("flags") or facts.get("Features") or ("asimd" if machine == "arm64" else "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return name, flags, cores


def _vectors(flags: list[str], xla_flags: str) -> str:
    """The widest vector unit of a processor, or the widest one that XLA_FLAGS allow."""
    available = [name for _, flag, name in VECTOR_UNITS if flag in flags]
    if not available:
        return "vector unit unknown"
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags)  # the last one counts
    names = [unit for unit, _, _ in VECTOR_UNITS]
    limit = limits[-1].upper() if limits else ""
    # Values such as AVX512_BF16 and AMX are not in the table: they have no wider vectors.
    allowed_units = VECTOR_UNITS[names.index(limit) :] if limit in names else VECTOR_UNITS
    allowed = next((name for _, flag, name in allowed_units if flag in flags), available[0])
    return allowed if allowed == available[0] else f"{allowed} by XLA_FLAGS (it has {available[0]})"
