"""Examples in windows: each once an epoch, none seen by another, nothing learned across a border."""

import jax
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.config import ModelConfig
from flax_decoder.data.windows import Examples, example_rows, make_windows, validation_windows
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.step import loss_sum

T = 7


def make_examples(lengths):
    """Tokens that say where they stand, from 1 on; of each example the second half is learned, and the first."""
    lengths = np.array(lengths)
    learned = [(np.arange(length) >= length / 2) | (np.arange(length) == 0) for length in lengths]
    return Examples(np.arange(1, lengths.sum() + 1, dtype=np.int32), np.concatenate(learned), np.cumsum(lengths))


def targets_learned(batches):
    """The targets with weight, sorted."""
    return sorted(int(t) for batch in batches for t in batch["targets"][batch["mask"] > 0])


def all_batches(examples, windows, *, num_epochs=1, batch_size=2, seed=3):
    num_steps = -(-num_epochs * len(windows) // batch_size)
    numbers = np.arange(num_steps * batch_size).reshape(num_steps, batch_size)
    return [example_rows(examples, windows, row, seed=seed, context_length=T) for row in numbers]


def test_several_examples_share_a_window():
    examples = make_examples([3, 4, 2])  # 1 2 3 | 4 5 6 7 | 8 9
    (batch,) = validation_windows(
        examples, make_windows(examples, context_length=T, packing=True), batch_size=2, context_length=T
    )
    assert batch["inputs"].tolist() == [[4, 5, 6, 7, 1, 2, 3], [8, 9, 0, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[5, 6, 7, 1, 2, 3, 0], [9, 0, 0, 0, 0, 0, 0]]
    assert batch["mask"].tolist() == [[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert {name: array.dtype for name, array in batch.items()} == {
        **dict.fromkeys(("inputs", "targets", "segments"), np.int32),
        "mask": np.float32,
    }


def test_one_example_a_window():
    examples = make_examples([3, 8, 2])
    windows = make_windows(examples, context_length=T, packing=False)
    first, second = validation_windows(examples, windows, batch_size=2, context_length=T)
    assert first["inputs"].tolist() == [[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10]]
    assert first["targets"].tolist() == [[2, 3, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11]]
    assert first["segments"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0] * 7]
    assert second["inputs"].tolist() == [[12, 13, 0, 0, 0, 0, 0], [0] * 7]
    assert second["mask"].tolist() == [[1, 0, 0, 0, 0, 0, 0], [0] * 7]  # filled up: all batches have one shape
    (only,) = validation_windows(examples, windows, batch_size=2, context_length=T, limit=1)
    assert only["inputs"].tolist() == first["inputs"].tolist()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, T + 1), min_size=1, max_size=40), st.booleans(), st.integers(0, 99))
def test_each_epoch_learns_every_target_once(lengths, packing, seed):
    examples = make_examples(lengths)
    windows = make_windows(examples, context_length=T, packing=packing)
    once = targets_learned(validation_windows(examples, windows, batch_size=3, context_length=T))
    is_first = np.isin(np.arange(len(examples.tokens)), [0, *examples.ends])
    assert once == examples.tokens[examples.learned & ~is_first].tolist()
    three = all_batches(examples, windows, num_epochs=3, batch_size=1, seed=seed)
    assert targets_learned(three) == sorted(3 * once)
    if packing:  # two windows that are at most half full would have been one
        used = [sum(lengths[number] for number in part) for part in np.split(windows.examples, windows.ends[:-1])]
        assert sum(2 * size <= T + 1 for size in used) <= 1


def test_a_batch_is_a_function_of_seed_and_step():
    examples = make_examples([2, 3, 4, 5, 6, 7, 8] * 3)
    windows = make_windows(examples, context_length=T, packing=True)

    def inputs(num, **how):
        return np.concatenate([batch["inputs"] for batch in all_batches(examples, windows, num_epochs=4, **how)])[:num]

    rows = inputs(40)
    np.testing.assert_array_equal(inputs(40, batch_size=5), rows)
    np.testing.assert_array_equal(inputs(40, batch_size=len(windows) * 3), rows)  # a batch of three epochs
    assert (inputs(40, seed=4) != rows).any() and (rows[: len(windows)] != rows[len(windows) : 2 * len(windows)]).any()
    numbers, how = np.arange(5, 10), {"seed": 3, "context_length": T}
    whole, part = (example_rows(examples, windows, some, **how) for some in (numbers, numbers[1:3]))
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][1:3])


def test_an_example_longer_than_a_window_is_refused():
    with pytest.raises(ValueError, match="9 tokens is longer than a window of 8"):
        make_windows(make_examples([9]), context_length=T, packing=True)


@pytest.mark.full
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_examples_in_one_window_do_not_see_each_other(positions):
    config = ModelConfig(vocab_size=61, context_length=T, embed_dim=12, num_heads=2, num_layers=2, positions=positions)
    model, examples = Decoder(config), make_examples([2, 3, 5, 2, 8, 4, 3])
    params, sums = reference.random_params(model), []
    for packing in (True, False):
        windows = make_windows(examples, context_length=T, packing=packing)
        (batch,) = validation_windows(examples, windows, batch_size=len(windows), context_length=T)
        sums.append(jax.device_get(loss_sum(params, model.apply, batch)[1]))
    assert sums[0]["num_tokens"] == sums[1]["num_tokens"] > 0
    np.testing.assert_allclose(sums[0]["loss"], sums[1]["loss"], rtol=1e-6)
