import base64
import json
import zlib

import numpy as np
import pytest

from flax_decoder.lens.packing import SMALL_BYTES, pack


def unpack(packed):
    """The array as a page shows it."""
    content = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8).astype(np.uint64)
    planes = content.reshape(packed["planes"], -1)
    unsigned = sum((plane << np.uint64(8 * place) for place, plane in enumerate(planes)), np.zeros(1, np.uint64))
    integers = (unsigned >> np.uint64(1)).astype(np.int64) ^ -(unsigned & np.uint64(1)).astype(np.int64)
    return (integers / 10.0 ** packed["decimals"]).reshape(packed["shape"])


@pytest.mark.parametrize("decimals", [0, 3, 6])
@pytest.mark.parametrize("shape", [(200,), (3, 5, 7), (2, 0)])
def test_rounded_numbers_come_back(shape, decimals):
    rng = np.random.default_rng(0)
    array = rng.uniform(-1, 1, shape) * 10.0 ** rng.integers(-4, 5, shape)
    shown = unpack(json.loads(json.dumps(pack(array, decimals))))
    assert shown.shape == shape
    np.testing.assert_allclose(shown, np.rint(array * 10.0**decimals) / 10.0**decimals, rtol=1e-15, atol=0)


def test_integers_of_any_number_of_bytes_come_back():
    for number in (0, 1, -1, 127, 128, -128, 255, 256, -32769, 2**31, -(2**40)):
        assert unpack(pack(np.array([[0, number, 1]]), 0)).tolist() == [[0, number, 1]]


def test_numbers_too_large_for_their_decimals_keep_fewer():
    packed = pack(np.array([1.5e12, -0.25]), 5)
    assert packed["decimals"] == 3
    assert unpack(packed).tolist() == [1.5e12, -0.25]


@pytest.mark.parametrize("bits", [6, 11])
def test_a_large_array_takes_no_more_than_it_may(bits):
    array = np.random.default_rng(0).standard_normal(500_000)
    packed = pack(array, 6, bits)
    size = len(packed["data"]) * 3 / 4
    assert 0 < packed["decimals"] < 6
    assert bits / 16 * array.size < size <= max(bits / 8 * array.size, SMALL_BYTES)
    assert np.abs(unpack(packed) - array).max() <= 0.5 * 10.0 ** -packed["decimals"] + 1e-12


def test_a_small_array_keeps_its_decimals():
    assert pack(np.random.default_rng(0).standard_normal(1000), 6, 1)["decimals"] == 6
