import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_decoder.comparison.schedule import learning_rate
from flax_decoder.config import OptimizerConfig
from flax_decoder.config_file import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.optimizer import learning_rate_schedule, make_optimizer

NUM_STEPS = 50
PEAK = 0.3
MATRICES = ("query", "key", "value", "out", "up", "gate", "down")


@pytest.fixture(autouse=True)
def optax_may_promote():
    """Optax computes `float ** int32`, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def params():
    """Random parameters of a model with every kind of parameter."""
    model = load_config(
        None,
        {
            "model.vocab_size": 11,
            "model.context_length": 5,
            "model.num_layers": 2,
            "model.embed_dim": 12,
            "model.num_heads": 3,
            "model.num_kv_heads": 1,
            "model.mlp_dim": 20,
            "model.feed_forward": "swiglu",
            "model.norm_bias": True,
            "model.mlp_bias": True,
            "model.attention_in_bias": True,
            "model.attention_out_bias": True,
            "model.qk_norm": "head",
            "model.tied_head": False,
            "model.head_bias": True,
        },
    ).model
    shapes = jax.eval_shape(Decoder(model).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return draw(shapes, seed=0)


def draw(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def update(config, params, all_gradients, num_steps=NUM_STEPS):
    """The params after one step per tree of gradients."""
    optimizer = make_optimizer(config, num_steps)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradients in all_gradients:
        params, state = step(params, state, gradients)
    return params


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_wsd_falls_only_after_the_warm_up():
    config = OptimizerConfig(schedule="wsd", warmup_steps=45, decay_fraction=0.4, learning_rate=PEAK)
    rates = learning_rate_schedule(config, NUM_STEPS)(jnp.array([44, 45, 50]))
    np.testing.assert_allclose(rates, [PEAK, PEAK, 0.1 * PEAK], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_restart_is_a_schedule_of_its_own_that_rises_from_where_it_was(schedule):
    """Before it the rates are those of a run that ends there; after it, those of a run of the rest."""
    config = OptimizerConfig(schedule=schedule, learning_rate=PEAK, restarts=30)
    rates = np.asarray(learning_rate_schedule(config, NUM_STEPS + 40)(jnp.arange(NUM_STEPS + 40)))
    plain = OptimizerConfig(schedule=schedule, learning_rate=PEAK)
    before, after = (np.asarray(learning_rate_schedule(plain, steps)(jnp.arange(steps))) for steps in (30, 60))
    np.testing.assert_allclose(rates[:30], before, rtol=1e-6)
    warmup = 60 // 20
    np.testing.assert_allclose(rates[30 + warmup :], after[warmup:], rtol=1e-6)
    rise = [0.1 * PEAK + 0.9 * PEAK * step / warmup for step in (1, 2, 3)]
    np.testing.assert_allclose(rates[30 : 30 + warmup], rise, rtol=1e-6)


def test_restarts_shorten_a_warm_up_that_does_not_end_before_them():
    config = OptimizerConfig(schedule="linear", warmup_steps=25, learning_rate=PEAK, restarts=(20, 60))
    rates = learning_rate_schedule(config, NUM_STEPS + 60)(jnp.array([0, 19, 60 - 1, 60 + 24, 109]))
    np.testing.assert_allclose(rates, PEAK * np.array([1, 1 - 0.9 * 18 / 19, 0.1 + 0.9 / 15, 1, 0.1 + 0.9 / 25]), 1e-6)


@pytest.mark.short("59-2")
@pytest.mark.parametrize(("num_steps", "warmup"), [(100, 5), (59, 2), (19, 0)])
def test_a_warm_up_left_out_is_a_twentieth(num_steps, warmup):
    left_out, given = OptimizerConfig(), OptimizerConfig(warmup_steps=warmup)
    rates = learning_rate_schedule(left_out, num_steps)(jnp.arange(num_steps))
    np.testing.assert_array_equal(rates, learning_rate_schedule(given, num_steps)(jnp.arange(num_steps)))
    assert rates[0] == pytest.approx(1e-3 / max(warmup, 1))


@pytest.mark.short("matrices-muon", "all-adamw")
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_what_decays(params, name, decay):
    """With zero gradients, an update is only the decay."""
    config = OptimizerConfig(
        name=name, decay=decay, learning_rate=0.5, muon_learning_rate=0.25, weight_decay=0.2, warmup_steps=0
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = named(update(config, params, [zeros]))
    for path, before in named(params).items():
        is_vector = path.endswith(("scale", "bias"))
        by_muon = name == "muon" and path.startswith("layers.") and path.endswith(".kernel")
        rate = 0.0 if is_vector and decay == "matrices" else 0.25 if by_muon else 0.5
        np.testing.assert_allclose(after[path], before * (1 - 0.2 * rate), rtol=1e-6, err_msg=path)
    assert any(path.endswith(".bias") for path in after) and any(path.endswith(".scale") for path in after)


def test_adamw_equals_numpy(params):
    config = OptimizerConfig(
        learning_rate=0.1, beta1=0.8, beta2=0.95, epsilon=0.5, weight_decay=0.3, warmup_steps=0, clip_norm=0.0
    )
    all_gradients = [draw(params, seed) for seed in (1, 2, 3)]
    after = named(update(config, params, all_gradients))
    for path, start in named(params).items():
        x = np.asarray(start, np.float64)
        mean = square = np.zeros_like(x)
        for step, gradients in enumerate(all_gradients):
            g = np.asarray(named(gradients)[path], np.float64)
            mean = 0.8 * mean + 0.2 * g
            square = 0.95 * square + 0.05 * g**2
            direction = (mean / (1 - 0.8 ** (step + 1))) / (np.sqrt(square / (1 - 0.95 ** (step + 1))) + 0.5)
            direction += 0.0 if path.endswith(("scale", "bias")) else 0.3 * x
            share = (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
            x = x - (0.01 + 0.09 * share) * direction
        # float32, numbers of order 1, three steps
        np.testing.assert_allclose(after[path], x, rtol=2e-6, atol=2e-6, err_msg=path)


@pytest.mark.short("0.5")
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping_scales_all_gradients_down_together(params, clip_norm):
    gradients = draw(params, 1)
    length = math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradients)))
    assert length > 10
    factor = min(clip_norm / length, 1) if clip_norm > 0 else 1
    # AdamW is nearly invariant to the scale of gradients, except with a large epsilon.
    after = update(OptimizerConfig(clip_norm=clip_norm, epsilon=1.0, learning_rate=1.0), params, [gradients])
    scaled = jax.tree.map(lambda leaf: leaf * factor, gradients)
    expected = update(OptimizerConfig(clip_norm=0.0, epsilon=1.0, learning_rate=1.0), params, [scaled])
    unclipped = update(OptimizerConfig(clip_norm=0.0, epsilon=1.0, learning_rate=1.0), params, [gradients])
    for path, leaf in named(after).items():
        np.testing.assert_allclose(leaf, named(expected)[path], rtol=1e-5, atol=1e-6, err_msg=path)
        assert np.allclose(leaf, named(unclipped)[path], atol=1e-3) == (factor == 1), path


def joined(path, array_L):
    """A stacked kernel as matrices to or from the residual stream, heads joined."""
    D = array_L.shape[-1] if path.split(".")[-2] == "out" else array_L.shape[1]
    shape = (len(array_L), -1, D) if path.split(".")[-2] == "out" else (len(array_L), D, -1)
    return np.asarray(array_L, np.float64).reshape(shape)


def matrix_gradients(params, seed):
    """Gradients whose matrices have known singular values, from 1 down to 0.1."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in named(draw(params, seed)).items():
        if path.split(".")[-1] == "kernel":
            u, s, vt = np.linalg.svd(rng.normal(size=joined(path, leaf).shape), full_matrices=False)
            leaf = (u * np.geomspace(1, 0.1, s.shape[-1])) @ vt
            leaves[path] = jnp.asarray(leaf, jnp.float32).reshape(named(params)[path].shape)
        else:
            leaves[path] = leaf
    return jax.tree.map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path, simple=True, separator=".")], params
    )


def test_muon_straightens_each_hidden_matrix(params):
    """Singular values of an update are about equal, and it points along U V^T of the gradient."""
    config = OptimizerConfig(name="muon", muon_learning_rate=1.0, weight_decay=0.0, warmup_steps=0, clip_norm=0.0)
    gradients = matrix_gradients(params, 1)
    moved = jax.tree.map(jnp.subtract, update(config, params, [gradients]), params)
    straightened = set()
    for path, leaf in named(moved).items():
        if not path.endswith(".kernel"):
            continue
        straightened.add(path.split(".")[-2])
        for update_matrix, gradient in zip(joined(path, leaf), joined(path, named(gradients)[path]), strict=True):
            values = np.linalg.svd(update_matrix, compute_uv=False)
            # Five Newton-Schulz steps with Jordan's coefficients leave singular values between about 0.7 and 1.2.
            assert values.max() / values.min() < 1.9, path
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            cosine = -np.sum(update_matrix * (u @ vt)) / np.linalg.norm(update_matrix) / np.linalg.norm(u @ vt)
            assert cosine > 0.97, path
    assert straightened == set(MATRICES)


def test_muon_leaves_the_rest_to_adamw(params):
    all_gradients = [draw(params, seed) for seed in (1, 2)]
    options = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3, "clip_norm": 0.5}
    by_muon = named(update(OptimizerConfig(name="muon", **options), params, all_gradients))
    by_adamw = named(update(OptimizerConfig(name="adamw", **options), params, all_gradients))
    for path, leaf in by_muon.items():
        hidden = path.startswith("layers.") and path.endswith(".kernel")
        # Two programs may fuse differently: a few float32 roundings.
        assert np.allclose(leaf, by_adamw[path], rtol=1e-6, atol=1e-7) != hidden, path
    assert {"embedding", "head", "positions"} <= by_muon.keys()


def test_muon_takes_each_layer_by_itself(params):
    config = OptimizerConfig(name="muon", clip_norm=0.0, muon_learning_rate=1.0)
    all_gradients = [draw(params, seed) for seed in (1, 2)]
    for tree in all_gradients:  # scaled apart, so that mixed-up layers would show
        tree["layers"] = jax.tree.map(lambda leaf: np.stack([leaf[0], 30 * leaf[1]]), tree["layers"])
    stacked = update(config, params, all_gradients)["layers"]
    for layer in range(2):

        def pick(tree, layer=layer):
            return tree | {"layers": jax.tree.map(lambda both: both[layer : layer + 1], tree["layers"])}

        alone = update(config, pick(params), [pick(tree) for tree in all_gradients])["layers"]
        for path, leaf in named(alone).items():
            # Batched and single products may add in another order; updates are of order 1.
            np.testing.assert_allclose(named(stacked)[path][layer], leaf[0], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup_steps", [None, 0, 1, 7])
def test_schedule_is_that_of_plain_python_to_the_last_digit(schedule, warmup_steps):
    config = OptimizerConfig(
        schedule=schedule, warmup_steps=warmup_steps, learning_rate=PEAK, final_fraction=0.3, decay_fraction=0.4
    )
    with jax.enable_x64(True):
        rates = [float(learning_rate_schedule(config, NUM_STEPS)(jnp.int32(step))) for step in range(NUM_STEPS + 1)]
    expected = [learning_rate(config, NUM_STEPS, step) for step in range(NUM_STEPS + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-14)
    warmup = 2 if warmup_steps is None else warmup_steps
    assert [rates[0], rates[warmup]] == pytest.approx([PEAK / max(warmup, 1), PEAK])
    assert rates[-1] == pytest.approx(PEAK if schedule == "constant" else 0.3 * PEAK)
    middle = {"cosine": None, "linear": None, "wsd": PEAK, "constant": PEAK}[schedule]
    assert middle is None or rates[NUM_STEPS // 2] == pytest.approx(middle)  # wsd falls over the last 20 steps
