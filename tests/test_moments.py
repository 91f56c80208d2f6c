import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_decoder as fd
from flax_decoder.training.moments import round_stochastically, with_bfloat16_moments

MODEL = {"vocab_size": 11, "context_length": 5, "num_layers": 1, "embed_dim": 8, "num_heads": 2}
NUM_STEPS = 15


@pytest.fixture(autouse=True)
def optax_may_promote():
    """Optax computes `float ** int32`, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_rounding_takes_a_neighbour_and_is_right_on_average():
    x = jnp.asarray(np.random.default_rng(0).normal(size=7) * np.geomspace(1e-20, 1e20, 7), jnp.float32)
    rngs = jax.random.split(jax.random.key(0), 20_000)
    rounded = np.asarray(jax.jit(jax.vmap(round_stochastically, (None, 0)))(x, rngs), np.float64)
    x = np.asarray(x, np.float64)
    gap = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)  # between bfloat16 numbers there: they have 8 bits
    assert (np.abs(rounded - x) < gap).all()
    assert all(len(set(column)) == 2 for column in rounded.T)
    # The mean of 20,000 steps of one gap is off by at most gap / 2 / sqrt(20,000), times 5 to be sure.
    assert (np.abs(rounded.mean(0) - x) < 5 * gap / 2 / 20_000**0.5).all()


def test_rounding_keeps_what_bfloat16_has():
    kept = [0.0, -0.0, 1.0, -3.5, 2.0**-126, np.inf, -np.inf, np.nan]
    # The NaN of a GPU: adding anything to its bits would carry into the sign and make it zero.
    full_nan = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    x = jnp.concatenate([jnp.asarray(kept, jnp.float32), jnp.asarray(full_nan)])
    for seed in range(5):
        rounded = jax.jit(round_stochastically)(x, jax.random.key(seed))
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x)


def second_moment(round_to_bfloat16, num_steps, beta2):
    """Mean over 500 parameters of the second moment, after one large gradient and many that are zero."""
    adam = optax.scale_by_adam(b2=beta2)
    optimizer = with_bfloat16_moments(adam) if round_to_bfloat16 == "at random" else adam
    params = {"w": jnp.zeros(500)}

    def nearest(state):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim else x, state)

    @jax.jit
    def run():
        def step(state, gradient):
            _, state = optimizer.update({"w": jnp.full(500, gradient)}, state)
            return nearest(state) if round_to_bfloat16 == "to the nearest" else state, None

        gradients = jnp.zeros(num_steps).at[0].set(1.0)
        return jax.lax.scan(step, optimizer.init(params), gradients)[0]

    return float(optax.tree.get(run(), "nu")["w"].astype(jnp.float32).mean())


def test_the_second_moment_fades_as_it_should():
    """The reason for stochastic rounding: rounded to the nearest, the moment never decays."""
    exact = 0.001 * 0.999**999
    assert second_moment("no", 1000, 0.999) == pytest.approx(exact, rel=1e-3)
    # 500 walks of 1000 random steps, each of at most 2**-8 of the value: the mean strays by about a hundredth.
    assert second_moment("at random", 1000, 0.999) == pytest.approx(exact, rel=0.03)
    assert second_moment("to the nearest", 1000, 0.999) == pytest.approx(0.001, rel=0.01)


take_step = jax.jit(fd.train_step)
INPUTS = np.random.default_rng(0).integers(0, 11, (8, 5), np.int32)
BATCH = {"inputs": INPUTS, "targets": (INPUTS * 3 + 1) % 11}


def new_state(name, moments_dtype):
    settings = {f"model.{field}": value for field, value in MODEL.items()}
    settings |= {"optimizer.name": name, "optimizer.moments_dtype": moments_dtype, "optimizer.learning_rate": 0.01}
    config = fd.load_config(None, settings | {"training.num_steps": NUM_STEPS})
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))


make_state = functools.cache(new_state)  # equal states share their compiled step


@functools.cache
def trained(name, moments_dtype):
    """The losses of a short training, and the state after it."""
    state, losses = make_state(name, moments_dtype), []
    for _ in range(NUM_STEPS):
        state, metrics = take_step(state, BATCH)
        losses.append(float(metrics["loss"]))
    return losses, state


NAMES = pytest.mark.parametrize("name", ["adamw", "muon"])


@NAMES
def test_moments_take_half_the_memory_and_nothing_else_is_rounded(name):
    sizes = {"float32": {}, "bfloat16": {}}
    for moments_dtype, by_dtype in sizes.items():
        # Also after a step, evaluated abstractly.
        start = jax.eval_shape(functools.partial(new_state, name, moments_dtype))
        state, _ = jax.eval_shape(fd.train_step, start, BATCH)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        for leaf in jax.tree.leaves(state.opt_state):
            by_dtype[str(leaf.dtype)] = by_dtype.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    assert sizes["float32"].keys() == {"float32", "int32"}
    # All but a few numbers, such as the three coefficients of Muon.
    assert sizes["bfloat16"].pop("float32", 0) <= 64
    assert sizes["bfloat16"]["bfloat16"] == pytest.approx(sizes["float32"]["float32"] / 2, abs=64)


@pytest.mark.full
@NAMES
def test_training_goes_as_with_float32_moments(name):
    exact, rounded = (trained(name, moments_dtype)[0] for moments_dtype in ("float32", "bfloat16"))
    # The first update is the same: it precedes the first rounding.
    assert rounded[:2] == pytest.approx(exact[:2], rel=1e-6) and rounded != pytest.approx(exact, rel=1e-6)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert exact[-1] < 0.9 * exact[0]


def test_each_moment_is_rounded_with_different_random_numbers():
    """With shared random numbers, errors of parameters with equal gradients would not cancel out."""
    optimizer = with_bfloat16_moments(optax.scale_by_adam())
    gradients = {"a": jnp.full(100, 0.3), "b": jnp.full(100, 0.3)}
    first = optimizer.update(gradients, optimizer.init(gradients))[1]
    second = optimizer.update(gradients, first)[1]
    rounded = [optax.tree.get(state, name)[leaf] for state in (first, second) for name in ("mu", "nu") for leaf in "ab"]
    ups = [np.asarray(moment > moment.min()) for moment in rounded]
    assert all(10 < up.sum() < 100 for up in ups)
    assert len({up.tobytes() for up in ups}) == 8
