import pytest

from flax_decoder.training.hardware import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "tera_flops", "giga_bytes"),
    [
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v5p", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
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
