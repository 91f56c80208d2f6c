"""What kinds of heads there are: scores as plain loops count them, 1 for a head that does nothing else."""

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


def perfect_weights(name, tokens_BT):
    """Each query shares its attention among the keys the rule points at; without any, it looks at itself."""
    weights_BTS = np.zeros((*tokens_BT.shape, tokens_BT.shape[1]), np.float32)
    for b, tokens_T in enumerate(tokens_BT):
        for t in range(len(tokens_T)):
            keys = pointed_at(name, tokens_T, t) or [t]
            weights_BTS[b, t, keys] = 1 / len(keys)
    return weights_BTS


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_plain_loops(seed, jit):
    rng = np.random.default_rng(seed)
    # Five kinds of tokens: many come again, some side by side, where a query follows its like itself.
    tokens_BT, weights_LBNTS = rng.integers(0, 5, (B, T)).astype(np.int32), random_weights(rng)
    scores = (jax.jit(fd.head_scores) if jit else fd.head_scores)(weights_LBNTS, tokens_BT)
    assert sorted(scores) == sorted(NAMES)
    for name, score_LN in scores.items():
        expected_LN = [[by_loops(name, weights_LBNTS[i, :, n], tokens_BT) for n in range(N)] for i in range(L)]
        assert score_LN.shape == (L, N) and score_LN.dtype == np.float32
        np.testing.assert_allclose(score_LN, expected_LN, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_head_scores_one(name):
    tokens_BT = np.random.default_rng(4).integers(0, 7, (B, T)).astype(np.int32)
    weights_LBNTS = random_weights(np.random.default_rng(5))
    weights_LBNTS[1, :, 3] = perfect_weights(name, tokens_BT)
    score_LN = np.array(fd.head_scores(weights_LBNTS, tokens_BT)[name])
    assert score_LN[1, 3] == pytest.approx(1, abs=1e-6)
    score_LN[1, 3] = 0
    assert score_LN.max() < 0.9


def test_what_the_text_does_not_say_is_not_a_number():
    weights_LBNTS = random_weights(np.random.default_rng(0), (1, 1, 2, 3, 3))
    scores = fd.head_scores(weights_LBNTS, np.array([[4, 0, 2]]))
    assert {name: bool(np.isnan(score_LN).all()) for name, score_LN in scores.items()} == {
        "previous_token": False,
        "first_token": False,
        "same_token": True,
        "induction": True,
    }


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
