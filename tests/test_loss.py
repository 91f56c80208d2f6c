import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_decoder.training.loss import chunk_size, chunked_losses, cross_entropy, summed_losses

B, T, V = 2, 3, 7
LOGITS = np.random.default_rng(0).normal(size=(B, T, V)).astype(np.float32)
TARGETS = np.array([[0, 6, 3], [2, 5, 1]], np.int32)


def loop(logits_BTV, targets_BT):
    """log Z and the loss by loops in float64; relative to the largest logit, as exp(800) overflows."""
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


# --- The same in chunks ---

D = 5
X = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
HEAD = {"head": np.random.default_rng(2).normal(size=(D, V)).astype(np.float32)}
MASK = np.array([[1, 0, 2], [0.5, 1, 1]], np.float32)


def make_logits(head, x_BTD):
    return 2 * jnp.tanh(x_BTD @ head["head"])


def at_once(head, x_BTD, targets_BT, mask_BT, z_loss=0.25):
    return summed_losses(make_logits(head, x_BTD), targets_BT, mask_BT, z_loss)


def in_chunks(head, x_BTD, targets_BT, mask_BT, z_loss=0.25, *, chunk_tokens):
    return chunked_losses(make_logits, head, x_BTD, targets_BT, mask_BT, z_loss, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 5, 6, 100])  # of 6 tokens: also sizes that do not divide 6
def test_chunks_change_neither_loss_nor_gradient(chunk_tokens):
    both = []
    for compute in (at_once, functools.partial(in_chunks, chunk_tokens=chunk_tokens)):
        # The program without gradients is another one.
        sums = jax.jit(compute)(HEAD, X, TARGETS, MASK)
        sums_too, gradients = jax.jit(jax.value_and_grad(compute, argnums=(0, 1), has_aux=True))(HEAD, X, TARGETS, MASK)
        both.append((sums, sums_too, gradients))
    for ours, expected in zip(*map(jax.tree.leaves, both), strict=True):
        # A few dozen float32 roundings (6e-8), in another order on each processor.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    assert both[0][0][0] != both[0][0][1] and np.abs(both[0][2][0]["head"]).min() > 1e-4


def by_jvp(compute, arguments, directions):
    return jax.jvp(compute, arguments, directions)[1]


def by_linearize(compute, arguments, directions):
    return jax.linearize(compute, *arguments)[1](*directions)


def by_jvp_of_grad(compute, arguments, directions):
    return jax.jvp(jax.grad(compute, argnums=(0, 1)), arguments, directions)[1]


def by_grad_of_jvp(compute, arguments, directions):
    return jax.grad(lambda *arguments: by_jvp(compute, arguments, directions), argnums=(0, 1))(*arguments)


def by_grad_of_grad(compute, arguments, directions):
    def slope(*arguments):
        gradients = jax.grad(compute, argnums=(0, 1))(*arguments)
        return sum(jax.tree.leaves(jax.tree.map(lambda one, other: (one * other).sum(), gradients, directions)))

    return jax.grad(slope, argnums=(0, 1))(*arguments)


@pytest.mark.short("by_jvp", "by_jvp_of_grad")
@pytest.mark.parametrize("derive", [by_jvp, by_linearize, by_jvp_of_grad, by_grad_of_jvp, by_grad_of_grad])
def test_chunks_change_no_derivative_forward_or_of_second_order(derive):
    rng = np.random.default_rng(4)
    directions = {"head": rng.normal(size=(D, V)).astype(np.float32)}, rng.normal(size=X.shape).astype(np.float32)

    def derivative(compute):
        return jax.jit(functools.partial(derive, lambda head, x_BTD: compute(head, x_BTD, TARGETS, MASK)[0]))(
            (HEAD, X), directions
        )

    both = derivative(functools.partial(in_chunks, chunk_tokens=4)), derivative(at_once)
    for ours, expected in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_chunks_pass_on_what_follows_the_sum_and_only_that():
    def gradients(factor, other):
        def loss(head, x_BTD):
            total, alone = in_chunks(head, x_BTD, TARGETS, MASK, chunk_tokens=2)
            return factor * total + other * alone

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(HEAD, X)

    once, thrice, nothing = gradients(1.0, 5.0), gradients(3.0, 0.0), gradients(0.0, 5.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), nothing)


def test_chunks_sum_the_gradient_of_a_bfloat16_head_in_float32():
    """64 chunks of equal tokens: a bfloat16 sum would stop growing when addends fall below its last digit."""
    chunks = 64
    x_BTD = jnp.tile(jnp.asarray(X[:1, :1]), (1, 4 * chunks, 1)).astype(jnp.bfloat16)
    targets_BT, mask_BT = np.full((1, 4 * chunks), 3), np.ones((1, 4 * chunks), np.float32)

    def loss(head, chunk_tokens, tokens=4 * chunks):
        def make_logits(head, x_BTD):
            return jnp.einsum("BTD,DV->BTV", x_BTD, head["head"], preferred_element_type=jnp.float32)

        args = (x_BTD[:, :tokens], targets_BT[:, :tokens], mask_BT[:, :tokens])
        return chunked_losses(make_logits, head, *args, chunk_tokens=chunk_tokens)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    of_all, of_one = gradient(HEAD, 4)["head"], gradient(HEAD, 4, 4)["head"]
    assert of_all.dtype == jnp.float32
    np.testing.assert_allclose(of_all, chunks * of_one, rtol=1e-5)


def equations_in(jaxpr):
    """All equations of a program, inside of its loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations_in(inner)


def test_chunks_never_hold_all_logits():
    def most_logits(compute):
        program = jax.make_jaxpr(jax.value_and_grad(compute, argnums=(0, 1), has_aux=True))(HEAD, X, TARGETS, MASK)
        results = (variable for equation in equations_in(program.jaxpr) for variable in equation.outvars)
        shapes = [array.aval.shape for array in results]
        shapes = [shape for shape in shapes if shape[-1:] == (V,) and shape[-2:] != (D, V)]
        return max(map(math.prod, shapes))

    assert most_logits(at_once) == B * T * V
    assert most_logits(functools.partial(in_chunks, chunk_tokens=2)) == 2 * V


def test_a_loop_over_chunks_is_given_nothing_as_large_as_logits():
    """JAX would take constants out of the loop, and then keep them in memory."""
    compute = functools.partial(in_chunks, chunk_tokens=2)
    program = jax.make_jaxpr(jax.value_and_grad(compute, argnums=(0, 1), has_aux=True))(HEAD, X, TARGETS, MASK)
    (loop,) = (equation for equation in equations_in(program.jaxpr) if equation.primitive.name == "scan")
    shapes = [variable.aval.shape for variable in loop.invars]
    assert {shape[-2:] for shape in shapes if shape[-1:] == (V,)} == {(D, V)}  # the head, and its gradient so far


def test_a_chunk_is_chosen_by_what_its_logits_take():
    assert chunk_size(8192, 65) is None  # 2 MiB: not worth a loop
    assert chunk_size(8192, 128_256) == 2092  # 2**30 bytes, less than one token short
    assert chunk_size(8192, 128_256, 512) == 512 and chunk_size(8192, 65, 512) == 512
    assert chunk_size(8192, 128_256, 0) is None
    assert chunk_size(8192, 128_256, 8192) is None  # one chunk is no chunk
    assert chunk_size(8, 2**40) == 1
