import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.nn.norm import Norm

B, T, D = 3, 7, 11
RNG = np.random.default_rng(0)
X_BTD = (RNG.standard_normal((B, T, D)) * 3 + 2).astype(np.float32)  # a mean that only LayerNorm takes away
SCALE_D = RNG.standard_normal(D).astype(np.float32)
BIAS_D = RNG.standard_normal(D).astype(np.float32)

# float32 rounds at 6e-8; a mean, a square, a root and a product of numbers of order 1 to 10.
TOLERANCE = 5e-6


@pytest.mark.parametrize("epsilon", [1e-6, 0.7])
def test_layer_norm(epsilon):
    params = {"scale": SCALE_D, "bias": BIAS_D}
    y_BTD = Norm("layernorm", epsilon, use_bias=True).apply({"params": params}, X_BTD)
    without_bias_BTD = Norm("layernorm", epsilon).apply({"params": {"scale": SCALE_D}}, X_BTD)
    for b, t in np.ndindex(B, T):
        expected_D = reference.layer_norm(X_BTD[b, t].astype(np.float64), SCALE_D, BIAS_D, epsilon)
        np.testing.assert_allclose(y_BTD[b, t], expected_D, atol=TOLERANCE)
        np.testing.assert_allclose(without_bias_BTD[b, t], expected_D - BIAS_D, atol=TOLERANCE)


@pytest.mark.parametrize("epsilon", [1e-6, 0.7])
def test_rms_norm(epsilon):
    y_BTD = Norm("rmsnorm", epsilon).apply({"params": {"scale": SCALE_D}}, X_BTD)
    for b, t in np.ndindex(B, T):
        expected_D = reference.rms_norm(X_BTD[b, t].astype(np.float64), SCALE_D, epsilon)
        np.testing.assert_allclose(y_BTD[b, t], expected_D, atol=TOLERANCE)


def test_a_new_norm_neither_scales_nor_shifts():
    params = Norm("layernorm", 1e-5, use_bias=True).init(jax.random.key(0), X_BTD)["params"]
    assert params.keys() == {"scale", "bias"}
    np.testing.assert_array_equal(params["scale"], np.ones(D))
    np.testing.assert_array_equal(params["bias"], np.zeros(D))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_bfloat16_is_normalised_in_float32(kind):
    """A mean of bfloat16 numbers in bfloat16 is off by whole units when the numbers are near 300."""
    x_BTD = jnp.asarray(X_BTD + 300, jnp.bfloat16)
    y_BTD = Norm(kind, 1e-5).apply({"params": {"scale": SCALE_D}}, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    for b, t in np.ndindex(B, T):
        x_D = np.float64(x_BTD[b, t])
        if kind == "layernorm":
            expected_D = reference.layer_norm(x_D, SCALE_D, 0.0, 1e-5)
        else:
            expected_D = reference.rms_norm(x_D, SCALE_D, 1e-5)
        # One rounding of the result, 2^-9; and the mean of numbers near 300 in float32.
        np.testing.assert_allclose(np.float64(y_BTD[b, t]), expected_D, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_zeros_stay_finite(kind):
    variables = {"params": {"scale": SCALE_D}}

    def total(x_BTD):
        return Norm(kind, 1e-5).apply(variables, x_BTD).sum()

    value, gradient_BTD = jax.value_and_grad(total)(jnp.zeros((B, T, D)))
    assert value == 0
    assert np.isfinite(gradient_BTD).all()
