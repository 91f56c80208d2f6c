import typing

import jax
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig, fields_of
from flax_decoder.nn.call import Call
from flax_decoder.nn.feed_forward import FeedForward

B, T, D, F = 2, 5, 7, 11
KINDS = typing.get_args(fields_of("model")["feed_forward"].annotation)
CALL = Call(np.zeros((1, T), np.int32))
X_BTD = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)


def random_params(layer, seed=1):
    shapes = jax.eval_shape(lambda rng: layer.init(rng, X_BTD, CALL), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_feed_forward(kind, mlp_bias):
    config = ModelConfig(embed_dim=D, num_heads=1, mlp_dim=F, feed_forward=kind, mlp_bias=mlp_bias)
    layer = FeedForward(config)
    params = random_params(layer)
    assert params.keys() == ({"up", "gate", "down"} if "glu" in kind else {"up", "down"})
    y_BTD = jax.jit(lambda x_BTD: layer.apply({"params": params}, x_BTD, CALL))(X_BTD)
    exact = reference.map_leaves(np.float64, params)
    expected_BTD = [[reference.feed_forward(x_D, exact, config) for x_D in x_TD] for x_TD in X_BTD.astype(np.float64)]
    # Sums of 11 float32 products that reach 100 with relu_squared.
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-5, atol=1e-4 if kind == "relu_squared" else 2e-5)


def test_the_width_is_four_times_the_models_where_it_is_left_out():
    layer = FeedForward(ModelConfig(embed_dim=D, num_heads=1))
    params = random_params(layer)
    assert params["up"]["kernel"].shape == (D, 4 * D)
    assert params["down"]["kernel"].shape == (4 * D, D)


def test_each_position_is_worked_on_by_itself():
    layer = FeedForward(ModelConfig(embed_dim=D, num_heads=1, mlp_dim=F))
    params = random_params(layer)
    x_BTD = X_BTD.copy()
    x_BTD[1, 3] += 1
    changed = layer.apply({"params": params}, x_BTD, CALL) != layer.apply({"params": params}, X_BTD, CALL)
    only_there_BT = np.zeros((B, T), bool)
    only_there_BT[1, 3] = True
    np.testing.assert_array_equal(np.asarray(changed).any(-1), only_there_BT)


def test_what_each_kind_starts_from():
    """GPT-2's rule: the matrix that writes into the residual stream is smaller by sqrt(2 L)."""
    config = ModelConfig(embed_dim=101, num_heads=1, mlp_dim=103, num_layers=8, init_stddev=0.5, mlp_bias=True)
    params = FeedForward(config).init(jax.random.key(0), np.zeros((1, 1, 101), np.float32), CALL)["params"]
    # The deviation of 10,403 random numbers is itself off by 1 / sqrt(2 * 10403) = 0.7 %; 3 % is four times that.
    np.testing.assert_allclose(np.std(params["up"]["kernel"]), 0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(params["down"]["kernel"]), 0.5 / 4, rtol=0.03)
    assert not np.any(params["up"]["bias"]) and not np.any(params["down"]["bias"])
