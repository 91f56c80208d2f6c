import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import (
    Sampling,
    TokenCounts,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
)

B, V = 6, 13
LOGITS = (3 * np.random.default_rng(0).normal(size=(B, V))).astype(np.float32)


def softmax(logits_V):
    exponentials_V = np.exp(np.asarray(logits_V, np.float64) - max(logits_V))
    return exponentials_V / exponentials_V.sum()


def assert_kept(filtered_BV, kept_B):
    """Each row has its logits at the kept ids and minus infinity elsewhere."""
    for row, kept, logits_V in zip(np.asarray(filtered_BV), kept_B, LOGITS, strict=True):
        assert set(np.flatnonzero(row > -np.inf)) == set(kept)
        np.testing.assert_array_equal(row[list(kept)], logits_V[list(kept)])


def kept_by_top_p(logits_V, p):
    """The rule as a loop: the likeliest tokens, until their probabilities add up to p."""
    kept, total = [], 0.0
    for token in np.argsort(-logits_V):
        if total >= p:
            break
        kept.append(token)
        total += softmax(logits_V)[token]
    return kept


@pytest.mark.parametrize("k", [1, 4, V])
def test_top_k(k):
    assert_kept(keep_top_k(jnp.asarray(LOGITS), k, V), np.argsort(-LOGITS)[:, :k])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.99])
def test_top_p(p):
    assert_kept(keep_top_p(jnp.asarray(LOGITS), p), [kept_by_top_p(logits_V, p) for logits_V in LOGITS])


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p(min_p):
    probabilities = map(softmax, LOGITS)
    assert_kept(keep_min_p(jnp.asarray(LOGITS), min_p), [np.flatnonzero(p >= min_p * p.max()) for p in probabilities])


def test_ties_at_the_threshold_stay_with_top_k_and_smaller_ids_with_top_p():
    kept_BV = keep_top_k(jnp.array([[1.0, 2.0, 2.0, 0.0]]), 1, 2) > -jnp.inf
    assert kept_BV.tolist() == [[False, True, True, False]]
    kept_BV = keep_top_p(jnp.array([[0.0, 1.0, 1.0, 1.0]]), 0.5) > -jnp.inf
    assert kept_BV.tolist() == [[False, True, True, False]]


def test_repetition_makes_tokens_less_likely_whatever_their_sign():
    occurs_BV = np.random.default_rng(1).random((B, V)) < 0.5
    result_BV = penalise_repetition(jnp.asarray(LOGITS), jnp.asarray(occurs_BV), 1.7)
    expected_BV = np.where(occurs_BV, LOGITS * np.where(LOGITS > 0, 1 / 1.7, 1.7), LOGITS)
    np.testing.assert_allclose(result_BV, expected_BV, rtol=1e-6)  # one float32 product
    assert (np.asarray(result_BV)[occurs_BV] < LOGITS[occurs_BV]).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [math.nan]),
        ("frequency_penalty", [math.inf]),
        ("repetition_penalty", [0.0, -1.0, math.inf]),
    ],
)
def test_values_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{name} = {value} must be"):
            Sampling(**{name: value})


def draw(logits_BV, sampling, seed=0, occurs_BV=None):
    rngs_B = jax.random.split(jax.random.key(seed), len(logits_BV))
    occurs_BV = np.zeros(logits_BV.shape, bool) if occurs_BV is None else occurs_BV
    counts = TokenCounts(jnp.asarray(occurs_BV), jnp.zeros(logits_BV.shape, jnp.int32))
    tokens_B = sample(jnp.asarray(logits_BV), sampling.filters(logits_BV.shape[1]), counts, rngs_B)
    assert tokens_B.dtype == jnp.int32
    return np.asarray(tokens_B)


def frequencies(logits_V, sampling, num_draws=20_000, occurs_V=None):
    logits_BV = np.tile(np.asarray(logits_V, np.float32), (num_draws, 1))
    occurs_BV = None if occurs_V is None else np.tile(occurs_V, (num_draws, 1))
    return np.bincount(draw(logits_BV, sampling, occurs_BV=occurs_BV), minlength=len(logits_V))


def chi_square(counts, probabilities):
    drawn = probabilities > 0
    assert counts[~drawn].sum() == 0
    expected = counts.sum() * probabilities[drawn]
    return ((counts[drawn] - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits_V = LOGITS[0] / 3
    counts = frequencies(logits_V, Sampling(temperature=temperature))
    # 12 degrees of freedom: a fair sampler passes 32.9 once in a thousand seeds; this seed is fixed.
    assert chi_square(counts, softmax(logits_V / temperature)) < 32.9


def test_filters_apply_in_the_order_of_the_fields():
    logits_V = np.log(np.array([0.4, 0.3, 0.2, 0.07, 0.03]))
    occurs_V = np.array([True, False, False, False, False])
    # The penalty makes the first log(0.4) * 3 = log(0.064), then dividing by 0.5 squares all: 0.0041, 0.09, 0.04,
    # 0.0049, 0.0009. The four likeliest leave the last out; of the sum, 0.139, the second and third make 93.5 %.
    sampling = Sampling(repetition_penalty=3.0, temperature=0.5, top_k=4, top_p=0.93)
    counts = frequencies(logits_V, sampling, num_draws=3000, occurs_V=occurs_V)
    # 1 degree of freedom, once in a thousand
    assert chi_square(counts, np.array([0, 9, 4, 0, 0]) / 13) < 10.8


def test_temperature_0_takes_the_likeliest_whatever_the_filters():
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.2)):
        np.testing.assert_array_equal(draw(LOGITS, sampling), LOGITS.argmax(-1))


def test_padding_ids_are_never_drawn():
    logits_BV = np.tile(LOGITS[0], (500, 1))
    logits_BV[:, 9:] += 20  # padding would be by far the likeliest
    for temperature in (0.0, 5.0):
        assert draw(logits_BV, Sampling(temperature=temperature, vocab_size=9)).max() < 9


def test_a_row_does_not_depend_on_its_neighbours():
    filters = Sampling(top_k=9, top_p=0.95).filters(V)
    rngs_B = jax.random.split(jax.random.key(0), B)
    together_B = sample(jnp.asarray(LOGITS), filters, None, rngs_B)
    order = np.array([3, 0, 5])
    some_B = sample(jnp.asarray(LOGITS[order]), filters, None, rngs_B[order])
    np.testing.assert_array_equal(some_B, together_B[order])


def test_penalties_for_tokens_in_the_new_text():
    counts = TokenCounts(jnp.zeros((1, 4), bool), jnp.array([[0, 1, 3, 0]], jnp.int32))
    filters = Sampling(presence_penalty=0.5, frequency_penalty=0.25, temperature=0).filters(4)
    np.testing.assert_allclose(filtered(jnp.zeros((1, 4)), filters, counts), [[0, -0.75, -1.25, 0]])


def test_bad_and_forced_tokens():
    filters = Sampling(bad_tokens=(2, 5), forced_tokens=(7, 2), temperature=0).filters(V)
    logits_BV = jnp.asarray(LOGITS).at[:, jnp.array([2, 5])].set(99.0)
    assert not np.isin(sample(logits_BV, filters, index=2), (2, 5)).any()
    assert [sample(logits_BV, filters, index=n).tolist() for n in (0, 1)] == [[7] * B, [2] * B]
    for settings in ({"bad_tokens": (V,)}, {"forced_tokens": (-1,)}, {"bad_tokens": tuple(range(V))}):
        with pytest.raises(UserError, match="_tokens"):
            Sampling(**settings).filters(V)


# 200 rows; a third with many ties, also at the thresholds of the filters.
ROWS = (2.5 * np.random.default_rng(4).normal(size=(200, 37))).astype(np.float32)
ROWS[::3] = np.round(ROWS[::3] / 2) * 2


@pytest.mark.parametrize(
    ("name", "value", "processor", "argument"),
    [
        ("top_k", 1, "TopKLogitsWarper", "top_k"),
        ("top_k", 6, "TopKLogitsWarper", "top_k"),
        ("top_k", 50, "TopKLogitsWarper", "top_k"),
        ("top_p", 0.01, "TopPLogitsWarper", "top_p"),
        ("top_p", 0.57, "TopPLogitsWarper", "top_p"),
        ("top_p", 0.93, "TopPLogitsWarper", "top_p"),
        ("min_p", 0.04, "MinPLogitsWarper", "min_p"),
        ("min_p", 0.61, "MinPLogitsWarper", "min_p"),
        ("temperature", 0.3, "TemperatureLogitsWarper", "temperature"),
        ("repetition_penalty", 1.9, "RepetitionPenaltyLogitsProcessor", "penalty"),
        ("bad_tokens", (3, 30), "SuppressTokensLogitsProcessor", "suppress_tokens"),
    ],
)
def test_filters_equal_those_of_transformers(name, value, processor, argument):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    ids_BT = np.random.default_rng(5).integers(0, 37, (200, 9))
    theirs = getattr(processors, processor)(**{argument: list(value) if name == "bad_tokens" else value})
    expected_BV = theirs(torch.tensor(ids_BT), torch.tensor(ROWS)).numpy()
    prompt_BV = np.zeros(ROWS.shape, bool)
    np.put_along_axis(prompt_BV, ids_BT, True, axis=1)
    counts = TokenCounts(jnp.asarray(prompt_BV), jnp.zeros(ROWS.shape, jnp.int32))
    ours_BV = np.asarray(filtered(jnp.asarray(ROWS), Sampling(**{name: value}).filters(37), counts))
    if name == "top_p":  # torch.sort leaves open which of several ties is kept
        ours_BV, expected_BV = np.sort(ours_BV), np.sort(expected_BV)
    np.testing.assert_array_equal(ours_BV == -np.inf, expected_BV == -np.inf)
    np.testing.assert_allclose(ours_BV, expected_BV, rtol=1e-6)  # one float32 product
    assert (ours_BV == -np.inf).any() == (name not in ("temperature", "repetition_penalty") and value != 50)
