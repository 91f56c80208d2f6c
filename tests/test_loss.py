import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_decoder.training.loss import cross_entropy

B, T, V = 2, 3, 7
LOGITS = np.random.default_rng(0).normal(size=(B, T, V)).astype(np.float32)
TARGETS = np.array([[0, 6, 3], [2, 5, 1]], np.int32)


def loop(logits_BTV, targets_BT):
    """log Z and the loss, number by number in float64; sums start at the largest, as exp(800) is no float64."""
    log_z_BT, losses_BT = np.zeros((2, *targets_BT.shape))
    for b, t in np.ndindex(targets_BT.shape):
        logits = [float(logit) for logit in logits_BTV[b, t]]
        largest = max(logits)
        log_z_BT[b, t] = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
        losses_BT[b, t] = log_z_BT[b, t] - logits[targets_BT[b, t]]
    return log_z_BT, losses_BT


@pytest.mark.parametrize("scale", [1, 400])  # exp(400) overflows float32
def test_equals_a_loop_in_float64(scale):
    log_z_BT, expected_BT = loop(scale * LOGITS, TARGETS)
    losses_BT, penalties_BT = cross_entropy(jnp.asarray(scale * LOGITS), TARGETS, z_loss=0.25)
    assert losses_BT.dtype == penalties_BT.dtype == jnp.float32
    # A difference of two numbers as large as log Z: a few float32 roundings (6e-8) of that size.
    np.testing.assert_allclose(losses_BT, expected_BT, rtol=1e-6, atol=1e-6 * np.abs(log_z_BT).max())
    np.testing.assert_allclose(penalties_BT, 0.25 * log_z_BT**2, rtol=2e-6)


def test_there_is_no_penalty_unless_asked_for():
    assert not cross_entropy(jnp.asarray(LOGITS), TARGETS)[1].any()


@pytest.mark.parametrize("outside", [-1, -100, V, V + 50])
def test_a_target_outside_of_the_vocabulary_gives_nan_under_jit(outside):
    targets_BT = TARGETS.copy()
    targets_BT[1, 2] = outside
    losses_BT, _ = jax.jit(cross_entropy)(LOGITS, targets_BT)
    expected_BT = loop(LOGITS, TARGETS)[1]
    expected_BT[1, 2] = np.nan  # and only this one
    np.testing.assert_allclose(losses_BT, expected_BT, rtol=1e-6, atol=1e-6)


def test_where_all_tokens_are_as_frequent_the_best_logits_are_equal_ones():
    targets_1T = np.arange(V)[None]

    def mean_loss(logits_V):
        return cross_entropy(jnp.tile(logits_V, (1, V, 1)), targets_1T)[0].mean()

    loss, gradient_V = jax.value_and_grad(mean_loss)(jnp.full(V, 0.3))
    assert loss == pytest.approx(math.log(V), rel=1e-6)  # float32
    np.testing.assert_allclose(gradient_V, 0, atol=1e-7)  # probabilities of 1/7 in float32
    assert mean_loss(jnp.asarray(LOGITS[0, 0])) > math.log(V) + 0.01
