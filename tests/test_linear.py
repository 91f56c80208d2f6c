import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_decoder.config_file import load_config
from flax_decoder.nn.linear import Linear, num_summed_axes, project
from flax_decoder.parallel.mesh import make_mesh, use_mesh

B, T, I, O = 2, 5, 7, 11  # noqa: E741


def of_float32(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def summed(x_BTI, matrix_IO, weights_BTO):
    """A number whose gradient at the product is `weights_BTO`, float32."""
    return jnp.sum(project(x_BTI, matrix_IO, jnp.float32) * weights_BTO)


def test_a_float32_product_of_bfloat16_factors_has_a_gradient_of_such_factors():
    """Float32 ones, which the gradient of float32 logits is, GPUs multiply at half the speed."""
    factors = of_float32(B, T, I).astype(jnp.bfloat16), of_float32(I, O).astype(jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(summed, (0, 1))).lower(*factors, of_float32(B, T, O)).as_text()
    types = re.findall(r"dot_general .*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", program)
    assert types == [("bf16", "bf16")] * 3


@pytest.mark.parametrize("axis", ["data", "fsdp", "context"])
def test_devices_sum_the_gradient_of_a_matrix_before_it_is_rounded(axis):
    x_BTI, matrix_IO = of_float32(8, 8, I).astype(jnp.bfloat16), of_float32(I, O).astype(jnp.bfloat16)
    with use_mesh(make_mesh(load_config(None, {f"mesh.{axis}": 8, "training.batch_size": 8}), jax.devices())):
        gradient = jax.jit(jax.grad(lambda matrix_IO: project(x_BTI, matrix_IO).sum()))
        program = gradient.lower(matrix_IO).as_text()
    assert re.findall(rf"dot_general .* -> tensor<{I}x{O}x(\w+)>", program) == ["f32"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_a_product_and_its_gradients(dtype, tolerance):
    """bfloat16 rounds the gradient that comes in and the one that goes out at 2^-9."""
    x_BTI, matrix_IO, weights_BTO = (of_float32(*shape).astype(dtype) for shape in ((B, T, I), (I, O), (B, T, O)))
    y_BTO = project(x_BTI, matrix_IO, jnp.float32)
    assert y_BTO.dtype == jnp.float32
    exact = [np.asarray(array, np.float64) for array in (x_BTI, matrix_IO, weights_BTO)]
    np.testing.assert_allclose(y_BTO, np.einsum("BTI,IO->BTO", *exact[:2]), rtol=1e-5, atol=1e-6)

    gradients = jax.grad(summed, (0, 1))(x_BTI, matrix_IO, np.asarray(weights_BTO, np.float32))
    expected = np.einsum("BTO,IO->BTI", exact[2], exact[1]), np.einsum("BTI,BTO->IO", exact[0], exact[2])
    for gradient, exact_gradient in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        size = np.abs(exact_gradient).max()
        np.testing.assert_allclose(np.asarray(gradient, np.float64), exact_gradient, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(
    ("equation", "expected"), [("BTD,DNH->BTNH", 1), ("BTNH,NHD->BTD", 2), ("BTD,DF->BTF", 1), ("TNH,NHD->TD", 2)]
)
def test_an_equation_says_how_many_axes_are_summed(equation, expected):
    assert num_summed_axes(equation) == expected


@pytest.mark.parametrize(
    "equation", ["BTD,NHD->BTNH", "DBT,DNH->BTNH", "BTD,DNH->BTHN", "BTNH,HND->BTD", "BT,NH->BTNH", "BTD,DN->BTD"]
)
def test_other_products_are_refused(equation):
    with pytest.raises(ValueError, match="sums over the last axes"):
        num_summed_axes(equation)


def test_a_linear_layer_is_the_einsum_of_its_equation():
    layer = Linear((3, 4), use_bias=True, init_stddev=1.0)
    x_BTI = of_float32(B, T, I)
    params = layer.init(jax.random.key(0), "BTI,INH->BTNH", x_BTI)["params"]
    params["bias"] = of_float32(3, 4)
    found = layer.apply({"params": params}, "BTI,INH->BTNH", x_BTI)
    np.testing.assert_allclose(found, np.einsum("BTI,INH->BTNH", x_BTI, params["kernel"]) + params["bias"], atol=1e-5)
