import copy
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_decoder as fd
from flax_decoder.parallel.mesh import mesh_of, sharding_of, use_mesh
from flax_decoder.planning.collectives import collectives_of
from flax_decoder.planning.hlo import parse_hlo
from flax_decoder.training import step as step_module
from flax_decoder.training.step import accumulate, loss_sum, mean_gradients, state_shardings

B, T, V = 8, 5, 11
NUM_DEVICES = 8
RULES = {
    "model.vocab_size": V,
    "model.context_length": T,
    "model.num_layers": 1,
    "model.embed_dim": 12,
    "model.num_heads": 3,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 14,
    "training.num_steps": 100,
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0.01,
    # Adam hides wrong averages of gradients: it is nearly invariant to their scale, except with a large epsilon.
    "optimizer.epsilon": 1.0,
    "optimizer.clip_norm": 0.0,
}


@functools.cache  # equal states share their compiled step
def make_state(**changes):
    """A state whose settings differ from RULES by `changes`, named section__field."""
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    config = fd.load_config(None, RULES | overrides)
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))


def make_batch(seed=0, mask="none"):
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, V, (B, T), np.int32) for name in ("inputs", "targets")}
    if mask == "uneven":  # a row without targets, rows with few, a row of weight 2
        batch["mask"] = (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32)
        batch["mask"][-1] *= 2
        assert batch["mask"][0].sum() == 0 and len(set(batch["mask"].sum(1))) > 3
    return batch


take_step = jax.jit(fd.train_step)
score = jax.jit(fd.eval_step)
logits_of = jax.jit(lambda state, tokens_BT: state.apply_fn({"params": state.params}, tokens_BT))


def expected_loss(state, batch):
    """The mean by its definition, in float64, from the model's logits."""
    logits_BTV = np.asarray(logits_of(state, batch["inputs"]), np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
    losses_BT = log_z_BT - np.take_along_axis(logits_BTV, batch["targets"][..., None], -1)[..., 0]
    mask_BT = batch.get("mask", np.ones((B, T)))
    return (losses_BT * mask_BT).sum() / mask_BT.sum()


def assert_same(states_and_metrics, others, atol=1e-6):
    """Equal but for the order in which float32 sums are added; losses are about 2, params at most 1."""
    for name, leaf in others[1].items():
        np.testing.assert_allclose(states_and_metrics[1][name], leaf, rtol=2e-6, err_msg=name)
    for (path, one), other in zip(
        jax.tree.leaves_with_path((states_and_metrics[0].params, states_and_metrics[0].opt_state)),
        jax.tree.leaves((others[0].params, others[0].opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mask", ["none", "uneven"])
def test_the_loss_is_the_mean_over_targets_that_count(mask):
    state, batch = make_state(), make_batch(mask=mask)
    _, metrics = take_step(state, batch)
    assert metrics.keys() == {"loss", "gradient_norm", "applied"} and metrics["applied"]
    assert float(metrics["loss"]) == pytest.approx(expected_loss(state, batch), rel=1e-6)
    sums = score(state, batch)
    assert float(sums["num_tokens"]) == batch.get("mask", np.ones((B, T))).sum()
    assert float(sums["loss"] / sums["num_tokens"]) == pytest.approx(expected_loss(state, batch), rel=1e-6)


def test_the_step_is_pure():
    state, batch = make_state(model__dropout=0.3), make_batch()
    before = jax.tree.map(np.array, (state.params, state.opt_state, state.step))
    results = [take_step(state, batch) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state, state.step), before)
    jax.tree.map(np.testing.assert_array_equal, *[(s.params, s.opt_state, metrics) for s, metrics in results])
    assert not np.array_equal(results[0][0].params["embedding"], state.params["embedding"])
    assert state.step.dtype == jnp.int32 and state.step == 0
    assert results[0][0].step.dtype == jnp.int32 and results[0][0].step == 1


def test_dropout_is_a_function_of_seed_and_step():
    state, batch = make_state(model__dropout=0.3), make_batch()
    losses = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        there = state.replace(seed=seed, step=jnp.asarray(step, jnp.int32))
        losses[seed, step] = float(take_step(there, batch)[1]["loss"])
        assert losses[seed, step] == float(take_step(there, batch)[1]["loss"])
    assert len(set(losses.values())) == 4
    assert float(score(state, batch)["loss"]) / (B * T) == pytest.approx(expected_loss(state, batch), rel=1e-6)


def test_a_batch_is_learned_by_heart_in_one_compiled_step_that_reuses_memory():
    """As in the training loop: jit with a donated state, compiled once."""
    traces = 0

    def step(state, batch):
        nonlocal traces
        traces += 1
        return fd.train_step(state, batch)

    state = make_state(optimizer__epsilon=1e-8, optimizer__clip_norm=1.0, optimizer__learning_rate=0.02)
    first = state = jax.tree.map(jnp.array, state)  # the cached one is shared
    take_own_step = jax.jit(step, donate_argnums=0)
    batch, losses = make_batch(), []
    # One target per input token, so that the batch can be memorized.
    batch["targets"] = (batch["inputs"] * 3 + 1) % V
    for _ in range(40):
        state, metrics = take_own_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert traces == 1
    assert first.params["embedding"].is_deleted()
    assert losses[0] == pytest.approx(math.log(V), rel=0.02)  # small weights at the start: all tokens about as likely
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.short("4-uneven")
@pytest.mark.parametrize(("parts", "mask"), [(2, "none"), (4, "uneven")])
def test_accumulation_equals_one_large_batch(parts, mask):
    batch = make_batch(mask=mask)
    whole = take_step(make_state(), batch)
    assert_same(take_step(make_state(training__batch_size=B, training__accumulation_steps=parts), batch), whole)


@pytest.mark.full
def test_gradients_accumulate_in_float32():
    """Parts are computed in bfloat16, but their sum has float32's digits: those of summing on the host in float64."""
    state, batch = make_state(model__dtype="bfloat16", training__batch_size=B), make_batch()
    in_parts = state.replace(accumulation_steps=B)
    rng = jax.random.key(0)  # without dropout nothing is drawn from it
    sums, total = jax.jit(accumulate)(in_parts, batch, rng)
    rows = [{name: array[i : i + 1] for name, array in batch.items()} for i in range(B)]
    parts = [jax.jit(accumulate)(state, row, rng)[1] for row in rows]
    expected = jax.tree.map(lambda *leaves: np.sum(np.asarray(leaves, np.float64), axis=0), *parts)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((sums, total)))

    def difference(tree):
        errors = jax.tree.map(lambda leaf, exact: np.abs(leaf - exact).max() / np.abs(exact).max(), tree, expected)
        return max(jax.tree.leaves(errors))

    assert difference(total) < 2e-7  # eight additions in float32
    narrow = jax.tree.map(lambda *leaves: sum(leaf.astype(jnp.bfloat16) for leaf in leaves), *parts)
    assert difference(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), narrow)) > 1e-3  # in bfloat16
    # All at once, each gradient is rounded to bfloat16's 8 bits in other places.
    assert difference(jax.jit(accumulate)(state, batch, rng)[1]) < 0.02


@pytest.mark.short("changes1-uneven-2e-06")
@pytest.mark.parametrize(
    ("changes", "mask", "rtol"),
    [
        ({}, "none", 2e-6),
        ({"training__z_loss": 0.3, "model__logit_soft_cap": 0.5}, "uneven", 2e-6),
        (
            {
                "model__tied_head": False,
                "model__head_bias": True,
                "training__batch_size": B,
                "training__accumulation_steps": 2,
            },
            "uneven",
            2e-6,
        ),
        ({"model__dropout": 0.3}, "none", 2e-6),
        # The gradient of the head is rounded to bfloat16 once per chunk.
        ({"model__dtype": "bfloat16"}, "uneven", 0.02),
    ],
)
def test_a_loss_in_chunks_changes_no_step(changes, mask, rtol):
    plain, chunked = make_state(**changes), make_state(**changes, training__loss_chunk_tokens=7)
    batch = make_batch(mask=mask)
    jaxpr = jax.make_jaxpr(fd.eval_step)
    assert "scan[" in str(jaxpr(chunked, batch)) and "scan[" not in str(jaxpr(plain, batch))
    (gradients, metrics), (expected, expected_metrics) = (
        jax.jit(mean_gradients)(state, batch) for state in (chunked, plain)
    )
    for name in expected_metrics:
        assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=rtol)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max()),
        gradients,
        expected,
    )
    for name, total in score(chunked, batch).items():
        assert float(total) == pytest.approx(float(score(plain, batch)[name]), rel=2e-6)


def test_masked_targets_do_not_count_whatever_they_are():
    state, batch = make_state(), make_batch(mask="uneven")
    expected = take_step(state, batch)
    odd = batch | {"targets": np.where(batch["mask"] > 0, batch["targets"], -100)}
    assert (odd["targets"] == -100).any()
    for name, total in fd.eval_step(state, odd).items():  # not refused outside jit either
        assert float(total) == pytest.approx(float(score(state, batch)[name]), rel=1e-6)
    assert_same(take_step(state, odd), expected)
    other = batch | {"targets": np.where(batch["mask"] > 0, (batch["targets"] + 1) % V, batch["targets"])}
    assert float(take_step(state, other)[1]["loss"]) != pytest.approx(float(expected[1]["loss"]), rel=1e-4)


@pytest.mark.short("bool")
@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_a_mask_may_be_of_any_plain_dtype(dtype):
    state, batch = make_state(), make_batch(mask="uneven")
    batch["mask"] = (batch["mask"] > 0).astype(np.float32)
    expected = take_step(state, batch)
    assert_same(take_step(state, batch | {"mask": batch["mask"].astype(dtype)}), expected)


def test_where_no_target_counts_nothing_is_learned():
    state, batch = make_state(optimizer__weight_decay=0.0), make_batch()
    after, metrics = take_step(state, batch | {"mask": np.zeros((B, T), np.float32)})
    assert metrics["loss"] == metrics["gradient_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize("outside", [-1, -100, V])
def test_ids_outside_of_the_vocabulary_are_refused_where_they_are_known(name, outside):
    state, batch = make_state(), make_batch(mask="uneven")
    batch["mask"][-1, -1] = 1
    batch[name][-1, -1] = outside
    step = fd.train_step if name == "inputs" else fd.eval_step  # targets are checked late; gradients would be slow
    with pytest.raises(ValueError, match=f"token id {outside} is not in the vocabulary: 0 to 10"):
        step(state, batch)
    assert math.isnan(take_step(state, batch)[1]["loss"])  # under jit, where ids are not known


def test_the_penalty_moves_the_parameters_but_is_not_in_the_loss():
    weight, batch = 0.3, make_batch(mask="uneven")
    state = make_state(training__z_loss=weight)
    after, metrics = take_step(state, batch)
    plain_after, plain_metrics = take_step(make_state(), batch)
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-6)

    @jax.jit
    @jax.grad
    def gradient_with_penalty(params):
        logits_BTV = state.apply_fn({"params": params}, batch["inputs"])
        log_z_BT = jnp.log(jnp.exp(logits_BTV).sum(-1))
        log_probability_BT = jax.nn.log_softmax(logits_BTV)[*np.indices((B, T)), batch["targets"]]
        return ((weight * log_z_BT**2 - log_probability_BT) * batch["mask"]).sum() / batch["mask"].sum()

    gradients = gradient_with_penalty(state.params)
    length = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradients)))
    assert float(metrics["gradient_norm"]) == pytest.approx(length, rel=1e-5)
    assert abs(length - float(plain_metrics["gradient_norm"])) > 0.01
    expected = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))(state, gradients)
    assert_same((expected, {}), (after, {}))
    assert not np.allclose(after.params["embedding"], plain_after.params["embedding"], atol=1e-6)


def replicate(state):
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (NUM_DEVICES, *leaf.shape)), state)


axis_step = functools.partial(fd.train_step, axis_name="batch")


def sharded(batch):
    """The batch with a leading device axis for pmap."""
    return {name: array.reshape(NUM_DEVICES, B // NUM_DEVICES, T) for name, array in batch.items()}


def test_pmap_equals_one_device():
    assert jax.local_device_count() == NUM_DEVICES
    state, batches = make_state(), [make_batch(seed, "uneven") for seed in (0, 1)]
    replicated, take_own_step = replicate(state), jax.pmap(axis_step, axis_name="batch")
    for batch in batches:
        replicated, metrics = take_own_step(replicated, sharded(batch))
        # On the host: indexing sharded arrays starts programs that can deadlock simulated devices on few cores.
        everywhere = jax.device_get((replicated, metrics))
        state, expected = take_step(state, batch)
        for device in range(NUM_DEVICES):
            there = jax.tree.map(lambda leaf, device=device: leaf[device], everywhere)
            assert_same(there, (state, expected))
    assert replicated.step.tolist() == [2] * NUM_DEVICES


@pytest.mark.short("True-changes1")
@pytest.mark.parametrize(
    ("follows", "changes"),
    [(False, {}), (True, {}), (True, {"training__accumulation_steps": 2, "training__loss_chunk_tokens": 3})],
)
def test_shard_map_equals_one_device(follows, changes):
    """Also with check_vma, which would psum the gradients of replicated params by itself."""
    num_devices = NUM_DEVICES // 2
    mesh = jax.make_mesh((num_devices,), ("batch",), devices=jax.devices()[:num_devices], axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(axis_step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=follows)
    # JAX 0.12 does not support the exact GELU (the default) under check_vma.
    changes = changes | {"model__feed_forward": "swiglu"}
    state, batch = make_state(training__batch_size=B, **changes), make_batch(mask="uneven")
    expected = take_step(make_state(model__feed_forward="swiglu"), batch)
    assert_same(jax.block_until_ready(jax.jit(mapped)(state, batch)), expected)


@pytest.mark.short("2")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_spread_over_a_mesh_equals_one_device(parts):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    state, batch = make_state(training__batch_size=B, training__accumulation_steps=parts), make_batch(mask="uneven")
    expected = take_step(make_state(), batch)
    spread = jax.device_put(batch, NamedSharding(mesh, P("batch")))
    result = jax.block_until_ready(take_step(jax.device_put(state, NamedSharding(mesh, P())), spread))
    assert len(result[0].params["embedding"].sharding.device_set) == 4
    assert_same(result, expected)


def test_devices_drop_different_numbers():
    """With one row for all devices, equal dropout would give each the same loss as one row alone has."""
    state = make_state(model__dropout=0.3)
    row = {name: array[:1] for name, array in make_batch().items()}
    rows = {name: np.repeat(array, NUM_DEVICES, 0) for name, array in row.items()}
    _, together = jax.device_get(jax.pmap(axis_step, axis_name="batch")(replicate(state), sharded(rows)))

    @jax.jit
    def lone_loss(params, row, rng):
        return loss_sum(params, state.apply_fn, row, rng=rng)[1]["loss"]

    alone = [
        lone_loss(state.params, row, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), device))
        for device in range(NUM_DEVICES)
    ]
    assert len({round(float(loss), 4) for loss in alone}) == NUM_DEVICES
    assert float(together["loss"][0]) == pytest.approx(float(sum(alone)) / (NUM_DEVICES * T), rel=1e-5)


def test_bfloat16_is_for_computing_only():
    state, batch = make_state(model__dtype="bfloat16"), make_batch()
    after, metrics = take_step(state, batch)
    for leaf in jax.tree.leaves((after.params, after.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert metrics["loss"].dtype == metrics["gradient_norm"].dtype == jnp.float32
    in_float32 = float(take_step(make_state(), batch)[1]["loss"])
    # bfloat16 has 8 bits; it must differ, and by little.
    assert float(metrics["loss"]) == pytest.approx(in_float32, rel=0.01)
    assert float(metrics["loss"]) != in_float32


@pytest.mark.short("float16-changes1")
@pytest.mark.parametrize("changes", [{}, {"training__batch_size": B, "training__accumulation_steps": 2}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_of_narrow_params_is_the_wide_one_rounded(dtype, changes):
    """Moments in float16 would lose Adam's epsilon, and a gradient of zero would make a parameter NaN."""
    wide, batch = make_state(**changes), make_batch()
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), wide.params)
    settings = {"apply_fn": wide.apply_fn, "tx": optax.adamw(0.01), "accumulation_steps": wide.accumulation_steps}
    state = fd.TrainState.create(params=narrow, **settings)
    same = fd.TrainState.create(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow), **settings)
    (after, metrics), (expected, expected_metrics) = (jax.jit(fd.train_step)(start, batch) for start in (state, same))
    assert metrics["applied"] and float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    for leaf, exact in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        np.testing.assert_allclose(leaf, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    for leaf, exact in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected.params), strict=True):
        assert leaf.dtype == dtype
        # An update is 0.01. Of a gradient as small as Adam's epsilon, the order of a sum shows in it.
        np.testing.assert_allclose(leaf.astype(np.float32), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)


OPTIMIZERS = {
    "plain": optax.adamw(0.01),
    "momentum": optax.sgd(0.01, 0.9),
    "plateau": optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau()),  # needs the loss, as `value`
    "sam": optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.1)),  # accepts nothing more
    "finite": optax.apply_if_finite(optax.adamw(0.01), 3),
    "polyak": optax.polyak_sgd(),  # needs `value`
    "lbfgs": optax.lbfgs(0.01, linesearch=None),
}


@pytest.mark.short("plain-float32", "plateau-bfloat16", "sam-float32", "finite-float16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_all_dtypes_with_optimizers_of_optax(name, dtype):
    """Traced only, with strict promotion of dtypes and ranks, as in all tests."""
    model, params = make_state().apply_fn, jax.tree.map(lambda leaf: leaf.astype(dtype), make_state().params)
    state = fd.TrainState.create(apply_fn=model, params=params, tx=OPTIMIZERS[name])
    after, _ = jax.eval_shape(fd.train_step, state, make_batch())
    jax.tree.map(lambda new, old: (new.shape, new.dtype) == (old.shape, old.dtype) or pytest.fail(), after, state)


def test_a_state_of_a_config_takes_another_optimizer():
    """Traced only."""
    tx = optax.sgd(0.01, 0.9)

    def made(tx=tx, **changes):
        config = fd.load_config(None, RULES | {name.replace("__", "."): value for name, value in changes.items()})
        return jax.eval_shape(lambda: fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), tx=tx))

    plain = made()
    assert plain.tx is tx and isinstance(plain.opt_state[0], optax.TraceState)
    more = made(optimizer__ema_decay=0.9, training__skip_spikes=3.0)
    state, _ = jax.eval_shape(fd.train_step, more, make_batch())
    assert jax.tree.structure(state) == jax.tree.structure(more)
    assert [type(part).__name__ for part in more.opt_state] == ["tuple", "LossMemory", "Average"]
    with pytest.raises(fd.UserError, match=r"tx must be of type GradientTransformation, such as optax\.adamw\(1e-3\)"):
        made(optax.adamw)


def test_an_optimizer_that_calls_the_loss_by_itself_is_refused():
    state = fd.TrainState.create(apply_fn=make_state().apply_fn, params=make_state().params, tx=optax.lbfgs())
    with pytest.raises(fd.UserError, match=r"calls the loss by itself \(value_fn\)"):
        jax.eval_shape(fd.train_step, state, make_batch())


def test_a_state_of_narrow_moments_keeps_them():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_state().params)
    state = fd.TrainState.create(apply_fn=make_state().apply_fn, params=params, tx=optax.adam(0.01))
    state = state.replace(opt_state=state.tx.init(params))
    after, _ = jax.eval_shape(fd.train_step, state, make_batch())
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


@pytest.mark.short("B, 5-7")
@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("shape", ["B, T", "8, T", "B, 5"])
def test_a_step_can_be_exported_with_a_free_batch_and_length(shape, chunk_tokens):
    state = make_state(training__loss_chunk_tokens=chunk_tokens)
    leaves, structure = jax.tree.flatten(state)
    constraints = [f"T<={T}"] if "T" in shape else []
    tokens_BT = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, constraints=constraints), jnp.int32)

    @jax.jit
    def loss_of(leaves, batch):
        return fd.train_step(jax.tree.unflatten(structure, leaves), batch)[1]["loss"]

    exported = jax.export.export(loss_of)(leaves, dict.fromkeys(("inputs", "targets"), tokens_BT))
    expected = float(take_step(make_state(), make_batch())[1]["loss"])
    assert float(exported.call(leaves, make_batch())) == pytest.approx(expected, rel=1e-6)


def test_a_deep_copy_has_own_arrays_and_one_structure():
    state = make_state()
    copied = copy.deepcopy(state)
    assert jax.tree.structure(copied) == jax.tree.structure(state) and bits(copied) == bits(state)
    copied.params["embedding"].delete()  # as donating it does
    assert not state.params["embedding"].is_deleted()


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "primitive"),
    [
        ({"model__scan_layers": True}, "scan["),
        ({"model__remat": "full"}, "remat"),
        ({"model__remat": "attention"}, "remat"),
        ({"model__scan_layers": True, "model__remat": "dots"}, "remat"),
    ],
)
def test_loops_and_recomputing_change_no_loss(changes, primitive):
    def losses(state):
        result = []
        for step in range(3):
            state, metrics = take_step(state, make_batch(step))
            result.append(float(metrics["loss"]))
        return result

    settings = {"model__num_layers": 2, "optimizer__epsilon": 1e-8, "model__dropout": 0.2}
    state, plain = make_state(**settings, **changes), make_state(**settings)
    # The programs do differ: only one has the primitive.
    assert primitive in str(jax.make_jaxpr(fd.eval_step)(state, make_batch()))
    assert primitive not in str(jax.make_jaxpr(fd.eval_step)(plain, make_batch()))
    np.testing.assert_allclose(losses(state), losses(plain), rtol=1e-5)  # three float32 steps


def bits(state):
    """Parameters and optimizer state as bytes: NaNs and signs of zeros count."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state))]


def by_pmap(state, batch):
    after, metrics = jax.device_get(jax.pmap(axis_step, axis_name="batch")(replicate(state), sharded(batch)))
    for leaf in jax.tree.leaves(after):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], (after, metrics))


def by_shard_map(state, batch):
    mesh = jax.make_mesh((NUM_DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(axis_step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()))(state, batch)


def by_mesh(state, batch):
    return on_mesh(state, batch, {"data": 2, "fsdp": 2, "tensor": 2}, fd.train_step)[0]


@pytest.mark.short("jit-nan")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("take", [take_step, by_pmap, by_shard_map, by_mesh], ids=["jit", "pmap", "shard_map", "mesh"])
def test_a_batch_that_gives_no_finite_loss_changes_nothing_but_the_step(take, bad):
    """One non-finite token weight on one device makes loss and gradients non-finite on all devices."""
    # JAX 0.12 does not support the exact GELU (the default) under check_vma.
    changes = {"model__feed_forward": "swiglu", "model__vocab_size": 38, "model__embed_dim": 16, "model__num_heads": 4}
    changes |= {"model__context_length": 6, "model__num_kv_heads": 2}
    state, _ = take_step(make_state(**changes), make_batch())  # its moments are not zero
    batch = make_batch(3) | {"mask": np.ones((B, T), np.float32)}
    broken = batch | {"mask": batch["mask"].copy()}
    broken["mask"][5, 2] = bad
    after, metrics = take(state, broken)
    assert not metrics["applied"] and not np.isfinite(metrics["loss"])
    assert bits(after) == bits(state)
    assert int(after.step) == int(state.step) + 1 == 2
    # The same step with the original batch is applied.
    after, metrics = take(state, batch)
    assert metrics["applied"] and bits(after) != bits(state)


def test_gradients_too_large_for_the_squares_of_adam_are_not_applied():
    state = make_state()

    def scaled(params, *args, **options):
        total, sums = loss_sum(params, *args, **options)
        return total * 1e25, sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "loss_sum", scaled)
        after, metrics = jax.jit(lambda state, batch: fd.train_step(state, batch))(state, make_batch())
    assert np.isfinite(metrics["loss"]) and np.isinf(metrics["gradient_norm"]) and not metrics["applied"]
    assert bits(after) == bits(state)


@pytest.mark.short("adamw")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_spike_is_passed_over_and_does_not_become_usual(name):
    settings = {"training__skip_spikes": 3.0, "optimizer__name": name}
    state = make_state(**settings)
    state, metrics = take_step(state, make_batch())
    first = float(metrics["loss"])
    assert metrics["applied"] and float(optax.tree.get(state.opt_state, "usual_loss")) == pytest.approx(first)
    batch = make_batch(1)

    def five_times(*args, **options):
        total, sums = loss_sum(*args, **options)
        return 5 * total, sums | {"loss": 5 * sums["loss"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "loss_sum", five_times)
        after, metrics = jax.jit(lambda state, batch: fd.train_step(state, batch))(state, batch)
    assert float(metrics["loss"]) > 3 * first and np.isfinite(metrics["gradient_norm"]) and not metrics["applied"]
    assert bits(after) == bits(state) and int(after.step) == 2
    after, metrics = take_step(after, batch)
    assert metrics["applied"]
    expected = 0.99 * first + 0.01 * float(metrics["loss"])
    assert float(optax.tree.get(after.opt_state, "usual_loss")) == pytest.approx(expected)


def test_without_spikes_to_skip_the_optimizer_remembers_no_loss():
    plain, remembers = make_state(), make_state(training__skip_spikes=3.0)
    assert len(jax.tree.leaves(remembers.opt_state)) == len(jax.tree.leaves(plain.opt_state)) + 1


LAYOUTS = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"tensor": 2}]


def on_mesh(state, batch, sizes, compute):
    """Runs a computation on a sharded state and batch; returns its result and the compiled program's text."""
    mesh = mesh_of(jax.devices()[: math.prod(sizes.values())], **sizes)
    spread = jax.device_put(batch, sharding_of(mesh, "batch", "length"))
    with use_mesh(mesh):
        program = jax.jit(compute).lower(jax.device_put(state, state_shardings(mesh, state)), spread).compile()
        result = program(jax.device_put(state, state_shardings(mesh, state)), spread)
    return jax.device_get(jax.block_until_ready(result)), program.as_text()


@pytest.mark.full
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied_head", [True, False])
def test_each_device_cuts_its_own_tokens_into_chunks(sizes, tied_head):
    changes = {
        "model__tied_head": tied_head,
        "model__head_bias": True,
        "model__vocab_size": 38,
        "model__context_length": 6,
    }
    changes |= {"model__num_heads": 4, "model__num_kv_heads": 2, "training__z_loss": 0.1, "model__embed_dim": 16}
    plain, chunked = make_state(**changes), make_state(**changes, training__loss_chunk_tokens=2)
    batch = {name: np.random.default_rng(0).integers(0, 38, (B, 6), np.int32) for name in ("inputs", "targets")}
    batch["mask"] = np.random.default_rng(1).random((B, 6)).astype(np.float32)
    expected = jax.jit(mean_gradients)(plain, batch)
    result, program = on_mesh(chunked, batch, sizes, mean_gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), result, expected)
    # Per chunk devices exchange only activations; the head and its gradient are communicated once.
    head_size = 38 * 16 // sizes["tensor"] if "tensor" in sizes else 38 * 16
    assert largest_message(program, in_loops=True) < head_size // 4
    if "fsdp" in sizes:
        assert largest_message(program, in_loops=False) >= head_size // 4


@pytest.mark.parametrize(
    ("dropout", "sizes", "attention"),
    [
        (0.0, {"data": 4}, "auto"),
        pytest.param(0.0, {"data": 2, "fsdp": 2}, "auto", marks=pytest.mark.full),
        pytest.param(0.0, {"data": 2, "fsdp": 2}, "splash", marks=pytest.mark.full),  # split over devices by hand
        pytest.param(0.0, {"data": 2, "context": 2, "tensor": 2}, "auto", marks=pytest.mark.full),
        pytest.param(0.3, {"data": 4}, "auto", marks=pytest.mark.full),
    ],
)
@pytest.mark.full  # tests/test_collectives.py counts what is sent
def test_copies_sum_their_gradients_once_whatever_the_number_of_parts(dropout, sizes, attention):
    changes = {"model__dropout": dropout, "model__context_length": 8, "model__num_heads": 4, "model__vocab_size": 38}
    changes |= {"model__num_kv_heads": 2, "model__embed_dim": 16, "training__batch_size": 8}
    state = make_state(**changes, training__accumulation_steps=2, model__attention=attention)
    batch = {name: np.random.default_rng(0).integers(0, 38, (8, 8), np.int32) for name in ("inputs", "targets")}
    batch["mask"] = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    expected = jax.jit(mean_gradients)(state, batch)
    result, program = on_mesh(state, batch, sizes, mean_gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), result, expected)
    if sizes == {"data": 4}:
        sent = sum(one.operand_bytes * one.times for one in collectives_of(parse_hlo(program)))
        num_sums = sent / sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        assert num_sums > 2 if dropout > 0 else num_sums < 1.1


def largest_message(program, in_loops):
    """Elements in the largest collective of a compiled program, inside or outside of its loops."""
    bodies = set(re.findall(r"body=%([\w.-]+)", program))
    largest, is_in_loop = 0, False
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            is_in_loop = start[1] in bodies
        if is_in_loop == in_loops and re.search(r" (?:all-|reduce-scatter|collective-)[\w-]*\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", line.split(" = ", 1)[1].split("(", 2)[0] + line.split(" = ", 1)[1])
            sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes[:1]]
            largest = max([largest, *sizes])
    return largest
