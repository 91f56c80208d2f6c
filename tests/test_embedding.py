import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loss import equations_in

import flax_decoder as fd
from flax_decoder.nn import embedding
from flax_decoder.nn.embedding import look_up, look_up_by_product, look_up_plain, look_up_sorted
from flax_decoder.nn.precision import add_parameter

V, D, B, T = 13, 3, 5, 7
WAYS = [look_up_plain, look_up_by_product, look_up_sorted]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request, monkeypatch):
    monkeypatch.setattr(embedding, "lookup_by_backend", lambda num_rows: request.param)


def draw():
    drawn = np.random.default_rng(0)
    table_VD, weights_BTD = (drawn.normal(size=shape).astype(np.float32) for shape in ((V, D), (B, T, D)))
    ids_BT = np.minimum(drawn.zipf(1.5, (B, T)) - 1, V - 1).astype(np.int32)
    return table_VD, ids_BT, weights_BTD


def test_the_gradient_of_a_row_is_the_sum_over_its_tokens(way):
    table_VD, ids_BT, weights_BTD = draw()
    expected_VD = np.zeros((V, D))
    for ids_T, weights_TD in zip(ids_BT, weights_BTD, strict=True):
        for token, weight_D in zip(ids_T, weights_TD, strict=True):
            expected_VD[token] += weight_D

    def total(table_VD):
        return jnp.sum(look_up(table_VD, ids_BT) * weights_BTD)

    np.testing.assert_array_equal(look_up(table_VD, ids_BT), table_VD[ids_BT])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(table_VD), expected_VD, rtol=1e-5, atol=1e-6)


@pytest.mark.short("look_up_sorted")
def test_forward_mode_and_second_derivatives_are_those_of_a_product(way):
    table_VD, ids_BT, weights_BTD = draw()
    change_VD = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)

    def losses(rows):
        return lambda table_VD: jnp.sum(jnp.sin(rows(table_VD) * weights_BTD))

    ours = losses(lambda table_VD: look_up(table_VD, ids_BT))
    plain = losses(lambda table_VD: jax.nn.one_hot(ids_BT, V) @ table_VD)
    for derivative in (
        lambda loss: jax.jvp(loss, (table_VD,), (change_VD,))[1],
        lambda loss: jax.jvp(jax.grad(loss), (table_VD,), (change_VD,))[1],
        lambda loss: jax.grad(lambda table_VD: jnp.sum(jax.grad(loss)(table_VD) * change_VD))(table_VD),
    ):
        np.testing.assert_allclose(derivative(ours), derivative(plain), rtol=1e-4, atol=1e-5)


def test_an_id_outside_of_the_table_is_no_other_row(way):
    rows_BTD, changes_BTD = jax.jvp(
        lambda table_VD: look_up(table_VD, np.array([[-1, V, 2]])), (jnp.ones((V, D)),), (jnp.ones((V, D)),)
    )
    assert np.isnan(rows_BTD[0]).all(-1).tolist() == [True, True, False] and (changes_BTD[0, 2] == 1).all()


@pytest.mark.short("look_up_plain-bfloat16", "look_up_sorted-bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_equal_contributions_to_a_row_are_all_counted(way, dtype):
    # In bfloat16 a sum of ones stays at 256.
    table_VD = jnp.ones((V, D), dtype)
    ids_BT = np.full((4, 1024), 2, np.int32)
    gradient_VD = jax.grad(lambda table_VD: jnp.sum(look_up(table_VD, ids_BT).astype(jnp.float32)))(table_VD)
    assert gradient_VD.dtype == dtype and float(gradient_VD[2, 0]) == 4096


def test_a_parameter_that_is_added_has_a_gradient_summed_in_float32():
    x_BTD, bias_D = jnp.ones((4, 1024, D), jnp.bfloat16), jnp.zeros(D, jnp.float32)
    gradient_D = jax.grad(lambda bias_D: jnp.sum(add_parameter(x_BTD, bias_D[None, None]).astype(jnp.float32)))(bias_D)
    assert gradient_D.tolist() == [4096] * D


# --- The whole step ---

SIZES = {
    "model.vocab_size": 17,
    "model.context_length": 8,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.dtype": "bfloat16",
}
WITH_BIASES = {f"model.{name}": True for name in ("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias")}
# What adds many numbers. A product adds in float32 on every device, and rounds once.
SUMS = ("reduce_sum", "cumsum", "scatter-add", "cumlogsumexp", "reduce_window_sum")
# Of a single number, the exact functions too.
CURVES = ("tanh", "erf", "erfc", "logistic", "exp", "rsqrt", "sin", "cos")


def equations_of_a_step(**changes):
    """Those of a training step in bfloat16, as it is traced."""
    config = fd.load_config(None, SIZES | {name.replace("__", "."): value for name, value in changes.items()})
    model = fd.Decoder(config.model)
    state = jax.eval_shape(lambda: fd.init_state(model, config, rng=jax.random.key(0)))
    tokens_BT = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    batch = {"inputs": tokens_BT, "targets": tokens_BT}
    return list(equations_in(jax.make_jaxpr(fd.train_step)(state, batch).jaxpr))


@pytest.mark.short("gpt2", "chunks")
@pytest.mark.parametrize(
    "changes",
    [
        WITH_BIASES | {"model__feed_forward": "gelu_tanh"},
        WITH_BIASES | {"training__loss_chunk_tokens": 8},
        {"model__feed_forward": "swiglu", "model__positions": "rotary", "model__norm": "rmsnorm"},
        {"model__feed_forward": "geglu", "model__positions": "sinusoidal", "model__qk_norm": "head"},
        {"model__remat": "full", "training__accumulation_steps": 2, "training__batch_size": 4},
    ],
    ids=["gpt2", "chunks", "llama", "gemma", "parts"],
)
def test_no_sum_and_no_curve_of_a_bfloat16_step_is_in_bfloat16(changes):
    found = [
        equation
        for equation in equations_of_a_step(**changes)
        if equation.primitive.name in SUMS + CURVES
        and equation.outvars[0].aval.dtype == jnp.bfloat16
        # An axis of one number is dropped by a sum, too.
        and (equation.primitive.name != "reduce_sum" or equation.outvars[0].aval.size < equation.invars[0].aval.size)
    ]
    assert not found, found


def test_learned_positions_are_a_slice_and_no_scatter():
    scatters = [e.outvars[0].aval.shape for e in equations_of_a_step(**WITH_BIASES) if "scatter" in e.primitive.name]
    assert scatters == [(17, 8)]  # of the tokens


@pytest.mark.parametrize(("precision", "expected"), [("highest", {jax.lax.Precision.HIGHEST}), ("default", {None})])
def test_the_precision_of_a_config_is_that_of_every_product_of_a_step(precision, expected):
    changes = {"model__dtype": "float32", "model__matmul_precision": precision, "training__loss_chunk_tokens": 8}
    products = [equation.params for equation in equations_of_a_step(**changes)]
    found = [parameters["precision"] for parameters in products if "precision" in parameters]
    assert len(found) > 20
    assert {one for pair in found for one in (pair if isinstance(pair, tuple) else (pair,))} == expected
