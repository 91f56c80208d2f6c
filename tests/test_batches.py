import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.data import batches as batches_module
from flax_decoder.data.batches import BLOCK_ROWS, deal, dealt, quotas, validation_batches
from flax_decoder.data.splits import MixedSplit, Split

T, NUM_TOKENS = 7, 107
NUM_WINDOWS = (NUM_TOKENS - T) // T  # 14
TOKENS = np.arange(NUM_TOKENS, dtype=np.uint16)  # each token says where it stands


def train_batch(tokens, *, document_starts=None, **options):
    """The training batch of a step, of tokens that are a split by themselves."""
    return Split(tokens, document_starts, 0, has_mask=document_starts is not None).train_batch(**options)


def rows(num_rows, *, tokens=TOKENS, batch_size=1, seed=3, context_length=T):
    """The first rows of training, as first tokens and whole batches."""
    steps = range(-(-num_rows // batch_size))
    batches = [
        train_batch(tokens, seed=seed, step=step, batch_size=batch_size, context_length=context_length)
        for step in steps
    ]
    return np.concatenate([batch["inputs"] for batch in batches])[:num_rows]


def test_targets_are_the_inputs_moved_on_by_one():
    batch = train_batch(TOKENS, seed=3, step=5, batch_size=4, context_length=T)
    assert batch.keys() == {"inputs", "targets"}
    for array in batch.values():
        assert array.shape == (4, T) and array.dtype == np.int32 and array.flags.c_contiguous
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)  # TOKENS count up


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))
def test_each_epoch_visits_each_window_once_without_overlap(context_length, extra, seed):
    num_tokens = context_length + 1 + extra
    num_windows = max((num_tokens - context_length) // context_length, 1)
    starts = rows(3 * num_windows, tokens=np.arange(num_tokens), seed=seed, context_length=context_length)[:, 0]
    for epoch in starts.reshape(3, num_windows):
        steps = np.diff(np.sort(epoch))
        assert (steps == context_length).all()
        assert 0 <= epoch.min() < context_length
        assert epoch.max() + context_length < num_tokens


def test_epochs_have_their_own_order_and_offset():
    epochs = rows(20 * NUM_WINDOWS)[:, 0].reshape(20, NUM_WINDOWS)
    assert {int(epoch.min()) for epoch in epochs} == set(range(T))  # 20 draws of 7 offsets; this seed shows all
    orders = {tuple((epoch - epoch.min()) // T) for epoch in epochs}
    assert len(orders) == 20
    assert tuple(range(NUM_WINDOWS)) not in orders


@pytest.mark.parametrize("batch_size", [2, 5, 14, 33])  # 33 windows a batch span three epochs
def test_the_order_does_not_depend_on_the_batch_size(batch_size):
    np.testing.assert_array_equal(rows(70, batch_size=batch_size), rows(70, batch_size=1))


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(seed, step):
        return train_batch(TOKENS, seed=seed, step=step, batch_size=4, context_length=T)["inputs"]

    before = batch(seed=0, step=9).copy()
    assert not np.array_equal(batch(seed=1, step=9), before)
    assert not np.array_equal(batch(seed=0, step=10), before)
    for epoch in range(10):  # more epochs than the cache keeps
        batch(seed=0, step=epoch * NUM_WINDOWS)[:] = 0  # the caller may do with a batch what it likes
    np.testing.assert_array_equal(batch(seed=0, step=9), before)
    np.testing.assert_array_equal(batch(seed=np.int64(0), step=np.int64(9)), before)


def test_the_order_stays_what_it_was():
    """A run that is continued by a later version of this package must see the batches it would have seen."""
    starts = rows(NUM_WINDOWS + 3, seed=3)[:, 0].tolist()
    assert starts == [82, 68, 61, 19, 96, 5, 75, 12, 33, 54, 47, 89, 40, 26, 55, 34, 6]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="7 tokens hold no window: context_length = 7 needs at least 8"):
        train_batch(TOKENS[:T], seed=0, step=0, batch_size=1, context_length=T)


def test_memory_mapped_tokens_give_plain_arrays(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    batches = [train_batch(mapped, seed=3, step=0, batch_size=5, context_length=T)]
    batches += validation_batches(mapped, batch_size=5, context_length=T)
    for array in itertools.chain.from_iterable(batch.values() for batch in batches):
        assert type(array) is np.ndarray
    np.testing.assert_array_equal(batches[0]["inputs"], rows(5))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 80), st.integers(1, 9), st.integers(1, 5))
def test_validation_scores_each_target_once(num_tokens, context_length, batch_size):
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)
    scored = []
    for batch in validation_batches(tokens, batch_size=batch_size, context_length=context_length):
        real = batch["mask"] == 1
        assert all(array.shape == (batch_size, context_length) for array in batch.values())
        assert [array.dtype for array in batch.values()] == [np.int32, np.int32, np.float32]
        np.testing.assert_array_equal(batch["mask"][~real], 0)
        np.testing.assert_array_equal(batch["inputs"][~real], 0)
        np.testing.assert_array_equal(batch["targets"][~real], 0)
        np.testing.assert_array_equal(batch["targets"][real], batch["inputs"][real] + 1)
        np.testing.assert_array_equal(np.diff(batch["inputs"], axis=1)[real[:, 1:]], 1)
        assert real.any()
        scored += batch["targets"][real].tolist()
    assert scored == tokens[1:].tolist()


def test_limited_validation_is_evenly_spaced():
    def first_tokens(limit):
        batches = validation_batches(TOKENS, batch_size=2, context_length=T, limit=limit)
        return [int(batch["inputs"][0, 0]) for batch in batches]

    assert first_tokens(0) == [0, 14, 28, 42, 56, 70, 84, 98]
    assert first_tokens(4) == [0, 28, 56, 84]
    assert first_tokens(3) == [0, 28, 70]
    assert first_tokens(8) == first_tokens(99) == first_tokens(0)


def test_validation_without_a_target_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, this one has 1"):
        next(validation_batches(TOKENS[:1], batch_size=2, context_length=T))


# --- Large corpora, and documents ---


def test_rounds_visit_each_window_once_and_each_is_spread_over_the_corpus(monkeypatch):
    tokens = np.arange(50 * T + 1)
    monkeypatch.setattr(batches_module, "MAX_SHUFFLED", 8)
    firsts = [
        int(row[0])
        for step in range(100)
        for row in train_batch(tokens, seed=1, step=step, batch_size=1, context_length=T)["inputs"]
    ]
    offset = min(firsts[:50])
    epoch = [(first - offset) // T for first in firsts[: len({*firsts[:50]})]]
    num_windows = (len(tokens) - T) // T
    assert sorted(epoch[:num_windows]) == [*range(num_windows)]
    rounds = [sorted(epoch[start : start + 7]) for start in range(0, num_windows - 7, 7)]
    assert all(np.ptp(windows) > num_windows // 2 for windows in rounds)
    assert rounds[0] == [*range(0, num_windows, 7)]
    whole = train_batch(tokens, seed=1, step=0, batch_size=num_windows, context_length=T)["inputs"][:, 0]
    assert whole.tolist() == firsts[:num_windows]  # also across rounds


STARTS = np.array([0, 5, 6, 40, 41, 90])


def test_segments_number_the_documents_of_a_row_and_no_target_is_in_the_next_one():
    """Against the document of each token, found one by one."""
    document_of = [sum(start <= index for start in STARTS) for index in range(len(TOKENS))]
    tokens = np.arange(len(TOKENS))
    for step in range(12):
        batch = train_batch(tokens, seed=2, step=step, batch_size=3, context_length=T, document_starts=STARTS)
        for inputs, segments, mask in zip(batch["inputs"], batch["segments"], batch["mask"], strict=True):
            documents = [document_of[index] for index in [*inputs, inputs[-1] + 1]]
            assert segments.tolist() == [document - documents[0] for document in documents[:-1]]
            assert mask.tolist() == [float(a == b) for a, b in itertools.pairwise(documents)]
    plain = train_batch(tokens, seed=2, step=0, batch_size=3, context_length=T)
    assert plain.keys() == {"inputs", "targets"}


def test_a_first_token_of_a_document_is_not_asked_for_in_validation():
    batches = [*validation_batches(TOKENS, batch_size=2, context_length=T, document_starts=STARTS)]
    plain = [*validation_batches(TOKENS, batch_size=2, context_length=T)]
    assert sum(batch["mask"].sum() for batch in batches) == sum(batch["mask"].sum() for batch in plain) - 5
    assert all({*np.unique(batch["mask"])} <= {0, 1} for batch in batches)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.75, 0.25], [750, 250]),
        ([1, 1, 1], [334, 333, 333]),
        ([2, 1], [667, 333]),
        ([0.001, 0.999], [1, 999]),
        ([1] * 64, [16] * 40 + [15] * 24),
    ],
)
def test_each_source_has_its_part_of_a_block(weights, expected):
    assert quotas(weights) == expected


def test_rows_are_dealt_to_sources_by_exact_quotas():
    counts = [501, 3, 496]
    sources, windows = deal(np.arange(3 * BLOCK_ROWS), counts, seed=3)
    for block in sources.reshape(3, BLOCK_ROWS):
        assert np.bincount(block).tolist() == counts
    assert not np.array_equal(sources[:BLOCK_ROWS], sources[BLOCK_ROWS : 2 * BLOCK_ROWS])
    for source, count in enumerate(counts):
        assert windows[sources == source].tolist() == list(range(3 * count))
    for num_rows in (0, 1, 999, 1000, 2345):
        assert dealt(num_rows, counts, seed=3) == np.bincount(sources[:num_rows], minlength=3).tolist()
    part = deal(np.arange(995, 1010), counts, seed=3)  # over the border of two blocks
    np.testing.assert_array_equal(part, (sources[995:1010], windows[995:1010]))


def mixed(has_mask=False):
    """Two sources, of 14 and 28 windows; the tokens of the second one begin at 1,000."""
    starts = np.array([0, 10, 50])
    parts = (Split(TOKENS, starts, 1, has_mask), Split(np.arange(1000, 1000 + 29 * T), starts, 1, has_mask))
    return MixedSplit(parts, (0.75, 0.25))


def test_each_window_of_a_source_comes_once_in_its_own_epochs():
    split, num_windows = mixed(), (NUM_WINDOWS, 28)
    batches = [split.train_batch(seed=3, step=step, batch_size=50, context_length=T) for step in range(20)]
    firsts = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    for count, own in zip(num_windows, (firsts[firsts < 1000], firsts[firsts >= 1000] - 1000), strict=True):
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) > 7
        for epoch in np.sort(epochs):
            assert (np.diff(epoch) == T).all() and epoch[0] < T
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # in another order
    assert split.epochs(1000, T) == 0.75 * (1000 * T / NUM_TOKENS) and split.num_tokens == NUM_TOKENS + 29 * T


@pytest.mark.parametrize("has_mask", [False, True])
def test_rows_of_a_mixture_are_the_same_in_any_slices_and_batches(has_mask):
    def inputs(batch_size, rows=slice(None), seed=3):
        split, num_steps = mixed(has_mask), 1050 // batch_size  # beyond the first block
        options = {"seed": seed, "batch_size": batch_size, "context_length": T, "rows": rows}
        batches = [split.train_batch(step=step, **options) for step in range(num_steps - 3, num_steps)]
        assert batches[0].keys() == {"inputs", "targets"} | ({"segments", "mask"} if has_mask else set())
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    whole = inputs(30)
    for name, array in whole.items():
        assert array.shape == (3, 30, T) and array.dtype == (np.float32 if name == "mask" else np.int32)
        np.testing.assert_array_equal(array.reshape(9, 10, T)[-3:], inputs(10)[name])
        slices = [slice(0, 7), slice(7, 8), slice(8, 30)]
        np.testing.assert_array_equal(array, np.concatenate([inputs(30, rows)[name] for rows in slices], axis=1))
    assert not np.array_equal(whole["inputs"], inputs(30, seed=4)["inputs"])
    np.testing.assert_array_equal(whole["targets"], whole["inputs"] + 1)


def test_the_order_of_a_mixture_stays_what_it_was():
    batch = mixed().train_batch(seed=3, step=1, batch_size=12, context_length=T)
    assert batch["inputs"][:, 0].tolist() == [18, 4, 88, 9, 30, 23, 37, 1070, 16, 1084, 1161, 51]
