import os
import platform

import pytest

from flax_decoder.training import hardware
from flax_decoder.training.hardware import CHIPS, chip_of, describe_cpu


@pytest.mark.parametrize(
    ("kind", "tera_flops", "giga_bytes"),
    [
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA H200 NVL", 835, 141),
    ],
)
def test_a_device_kind_names_its_own_chip(kind, tera_flops, giga_bytes):
    chip = chip_of(kind)
    assert (chip.peak_flops, chip.memory_bytes) == (tera_flops * 1e12, giga_bytes * 1e9)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v9", ""])
def test_what_is_not_in_the_table_is_not_guessed(kind):
    assert chip_of(kind) is None


def test_every_chip_is_whole_and_named_once():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        # A chip computes faster than it reads, and reads faster than it sends.
        assert chip.peak_flops > 50 * chip.memory_bandwidth > 50 * chip.interconnect_bandwidth > 0
        assert 1e10 < chip.memory_bytes < 1e12


# What the system tells of processors, cut down; the second core of each would tell something else.
INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse sse4_2 avx f16c fma avx2 avx512f avx512bw avx512_bf16 amx_bf16

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
AMD = INTEL.replace("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "AMD EPYC").replace("avx512", "no").strip("\n")
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes fphp asimdhp
CPU implementer\t: 0x41

processor\t: 1
Features\t: fp asimd sve
"""


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """Describes a planted processor of which this process may use some cores."""

    def describe(cpuinfo, xla_flags="", cores=(0, 3), machine="aarch64"):
        path = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(hardware, "CPUINFO", path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cores), raising=False)
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
        return describe_cpu()

    return describe


XEON = "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"


@pytest.mark.parametrize(
    ("cpuinfo", "xla_flags", "described"),
    [
        (INTEL, "", f"{XEON}, 2 cores, AVX-512, 512 bits"),
        (INTEL, "--a=1 --xla_cpu_max_isa=AVX2 --b=1", f"{XEON}, 2 cores, AVX2, 256 bits by XLA_FLAGS (it has AVX-512,"),
        (INTEL, "--xla_cpu_max_isa=AVX512 --xla_cpu_max_isa=sse4_2", f"{XEON}, 2 cores, SSE4.2, 128 bits by XLA_FLAGS"),
        (INTEL, "--xla_cpu_max_isa=AMX_FP16", f"{XEON}, 2 cores, AVX-512, 512 bits"),
        (AMD, "--xla_cpu_max_isa=AVX512", "AMD EPYC, 2 cores, AVX2, 256 bits"),
        (AMD, "--xla_cpu_max_isa=AVX", "AMD EPYC, 2 cores, AVX, 256 bits by XLA_FLAGS (it has AVX2, 256 bits)"),
        (ARM, "", "aarch64, 2 cores, NEON, 128 bits"),
        (ARM.replace("aes", "sve"), "", "aarch64, 2 cores, SVE"),
        (ARM, "--xla_cpu_max_isa=AVX2", "aarch64, 2 cores, NEON, 128 bits"),
        ("\0\xff: :\nmodel name\t:\nflags", "", "aarch64, 2 cores, vector unit unknown"),
        (None, "", "aarch64, 2 cores, vector unit unknown"),
    ],
)
def test_a_processor_is_described(cpu, cpuinfo, xla_flags, described):
    shown = cpu(cpuinfo, xla_flags)
    assert shown.startswith(described) and (shown == described or "by XLA_FLAGS" in shown)


def test_a_processor_is_described_if_the_system_tells_little(cpu, monkeypatch):
    assert cpu(None, cores=[5], machine="arm64") == "arm64, 1 core, NEON, 128 bits"
    assert cpu(None, machine="").startswith("unknown processor, 2 cores")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert "1 core, " in describe_cpu()
