import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flax_decoder.lens.packing import SMALL_BYTES, pack, unpack

NUMBERS = npst.arrays(np.float64, npst.array_shapes(max_dims=3, max_side=7), elements=st.floats(-1e4, 1e4))


@given(NUMBERS, st.integers(0, 6))
def test_what_is_shown_is_what_rounding_gives(array, decimals):
    shown = unpack(json.loads(json.dumps(pack(array, decimals))))
    assert shown.shape == array.shape
    np.testing.assert_allclose(shown, np.rint(array * 10.0**decimals) / 10.0**decimals, rtol=1e-15, atol=0)


@pytest.mark.parametrize("number", [0, 1, -1, 127, 128, -128, 255, 256, -32769, 2**31, -(2**40)])
def test_integers_of_any_number_of_bytes_come_back(number):
    array = np.array([[0, number, 1]])
    assert (unpack(pack(array, 0)) == array).all()


def test_numbers_too_large_for_their_decimals_keep_fewer():
    packed = pack(np.array([1.5e12, -0.25]), 5)
    assert packed["decimals"] == 3
    assert unpack(packed).tolist() == [1.5e12, -0.25]


@pytest.mark.parametrize("bits", [6, 8, 11])
def test_a_large_array_takes_no_more_than_it_may(bits):
    array = np.random.default_rng(0).standard_normal(500_000)
    packed = pack(array, 6, bits)
    size = len(packed["data"]) * 3 / 4
    assert 0 < packed["decimals"] < 6
    assert bits / 16 * array.size < size <= max(bits / 8 * array.size, SMALL_BYTES)
    assert np.abs(unpack(packed) - array).max() <= 0.5 * 10.0 ** -packed["decimals"] + 1e-12


def test_a_small_array_keeps_its_decimals():
    assert pack(np.random.default_rng(0).standard_normal(1000), 6, 1)["decimals"] == 6


def test_an_empty_array():
    assert unpack(pack(np.zeros((2, 0)), 3)).shape == (2, 0)
