"""What kinds of heads there are: the scores that plain loops count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shape_names import checked_shape_names

import flax_decoder as fd
from flax_decoder.lens.head_scores import repeated_tokens

L, B, N, T = 2, 3, 5, 11
NAMES = ["previous_token", "first_token", "same_token", "induction"]


def pointed_at(name, tokens_T, t):
    """The keys at which a rule points the query at t."""
    if name == "previous_token":
        return [t - 1] if t >= 1 else []
    if name == "first_token":
        return [0] if t >= 1 else []
    if name == "same_token":
        return [s for s in range(t) if tokens_T[s] == tokens_T[t]]
    return [s for s in range(1, t + 1) if tokens_T[s - 1] == tokens_T[t]]


def by_loops(name, weights_BTS, tokens_BT):
    found = []
    for weights_TS, tokens_T in zip(weights_BTS, tokens_BT, strict=True):
        for t in range(len(tokens_T)):
            keys = pointed_at(name, tokens_T, t)
            if keys:
                found.append(sum(float(weights_TS[t, s]) for s in keys))
    return sum(found) / len(found)


def random_weights(rng, shape=(L, B, N, T, T)):
    """Rows that sum to 1, behind the causal mask."""
    weights_LBNTS = np.tril(rng.random(shape) ** 3 + 1e-3)
    return (weights_LBNTS / weights_LBNTS.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("jit", [False, True])
def test_scores_equal_plain_loops(jit):
    rng = np.random.default_rng(1)
    # Five kinds of tokens: many come again, some side by side, where a query follows its like itself.
    tokens_BT, weights_LBNTS = rng.integers(0, 5, (B, T)).astype(np.int32), random_weights(rng)
    scores = (jax.jit(fd.head_scores) if jit else fd.head_scores)(weights_LBNTS, tokens_BT)
    assert sorted(scores) == sorted(NAMES)
    for name, score_LN in scores.items():
        expected_LN = [[by_loops(name, weights_LBNTS[i, :, n], tokens_BT) for n in range(N)] for i in range(L)]
        assert score_LN.shape == (L, N) and score_LN.dtype == np.float32
        np.testing.assert_allclose(score_LN, expected_LN, atol=1e-5)


def test_what_the_text_does_not_say_is_not_a_number():
    weights_LBNTS = random_weights(np.random.default_rng(0), (1, 1, 2, 3, 3))
    scores = fd.head_scores(weights_LBNTS, np.array([[4, 0, 2]]))
    assert {name for name, score_LN in scores.items() if np.isnan(score_LN).all()} == {"same_token", "induction"}


def test_weights_in_bfloat16_are_added_in_float32():
    """A sum of 1,024 equal numbers stops growing at 256 of them in bfloat16, which has 8 bits."""
    tokens_BT = np.zeros((1, 1024), np.int32)
    weights_LBNTS = jnp.full((1, 1, 1, 1024, 1024), 1 / 1024, jnp.bfloat16)
    score_LN = fd.head_scores(weights_LBNTS, tokens_BT)["first_token"]
    assert score_LN.dtype == np.float32
    np.testing.assert_allclose(score_LN, 1 / 1024, rtol=1e-5)


@pytest.mark.parametrize("shape", [(L, B, N, 2, T), (L, B + 1, N, T, T), (L, B, N, T + 1, T + 1)])
def test_weights_of_other_tokens_are_refused(shape):
    with pytest.raises(fd.UserError, match="needs the weights of all these tokens on each other"):
        fd.head_scores(np.zeros(shape, np.float32), np.zeros((B, T), np.int32))


def test_the_probe_is_said_twice():
    tokens_BT = repeated_tokens(jax.random.key(0), 13, 200, batch_size=3)
    assert tokens_BT.shape == (3, 400) and tokens_BT.dtype == np.int32
    first_BT, second_BT = np.split(np.asarray(tokens_BT), 2, axis=1)
    np.testing.assert_array_equal(first_BT, second_BT)
    assert set(first_BT.flat) == set(range(13))
    assert (first_BT[0] != first_BT[1]).any()
    assert repeated_tokens(jax.random.key(0), 13, 7).shape == (1, 14)


def test_names_are_right():
    tokens_BT = np.zeros((B, T), np.int32)
    with checked_shape_names() as functions:
        fd.head_scores(random_weights(np.random.default_rng(0)), tokens_BT)
        repeated_tokens(jax.random.key(0), 13, T, B)
    assert functions >= {"head_scores.py:head_scores", "head_scores.py:mean_weight", "head_scores.py:repeated_tokens"}
