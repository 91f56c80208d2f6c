import numpy as np
import pytest

from flax_decoder.parallel.zigzag import zigzag


def test_a_device_holds_an_early_chunk_and_a_late_one():
    assert zigzag(8, 2).tolist() == [2, 3, 4, 5, 0, 1, 6, 7]
    assert zigzag(6, 3).tolist() == [2, 3, 1, 4, 0, 5]
    assert zigzag(4, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("length", "num_parts"), [(24, 2), (24, 3), (96, 8)])
def test_each_position_occurs_once_and_all_devices_have_as_many_keys(length, num_parts):
    parts = zigzag(length, num_parts).reshape(num_parts, -1)
    assert sorted(parts.flat) == list(range(length))
    assert len(set((parts + 1).sum(axis=1))) == 1
    assert parts.dtype == np.int32


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="20 tokens are not a multiple of 2 x 4"):
        zigzag(20, 4)
