"""Attention over a ring of devices has the numbers of attention on one, shares the work and holds no whole sequence."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.nn.attention import dot_product_attention
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.block_pairs import AFTER_ALL, BEFORE_ALL, _to_blocks
from flax_decoder.nn.kernels.ring import find_ring
from flax_decoder.nn.kernels.ring_attention import ring_attention
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.nn.positions import alibi_slopes
from flax_decoder.parallel.mesh import mesh_of, sharding_of, use_mesh
from flax_decoder.parallel.zigzag import zigzag
from flax_decoder.training.step import mean_gradients, state_maker

B, H = 2, 5

# float32 rounds at 6e-8; sums of about a hundred products of order 1, joined in another order.
TOLERANCE = 5e-6


def use_devices(data=1, fsdp=1, context=1, tensor=1):
    """The ambient mesh of as many devices."""
    shape = (data, fsdp, context, tensor)
    return use_mesh(mesh_of(jax.devices()[: math.prod(shape)], *shape))


def random_arrays(length, num_heads, num_kv_heads, num_rows=B, dtype=np.float32):
    """q_BTNH, k_BSKH, v_BSKH and a gradient of the heads."""
    rng = np.random.default_rng(0)
    shapes = [(num_rows, length, heads, H) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(attend, q_BTNH, k_BSKH, v_BSKH, dheads_BTNH):
    heads_BTNH, pull = jax.vjp(attend, q_BTNH, k_BSKH, v_BSKH)
    return heads_BTNH, *pull(dheads_BTNH)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "scale"))
def on_one_device(arrays, positions_BT, window, slopes_N=None, **settings):
    mask = MaskSpec(jnp.asarray(positions_BT), jnp.asarray(positions_BT), slopes_N, window)
    return value_and_gradients(functools.partial(dot_product_attention, mask=mask, **settings), *arrays)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "scale", "dropout", "max_tokens"))
def around_the_ring(arrays, positions_BT, window, slopes_N=None, **settings):
    def attend(q_BTNH, k_BSKH, v_BSKH):
        mask = MaskSpec(positions_BT, positions_BT, slopes_N, window)
        return ring_attention(find_ring(q_BTNH.shape, k_BSKH.shape), q_BTNH, k_BSKH, v_BSKH, mask, **settings)

    return value_and_gradients(attend, *arrays)


def shuffled(length, num_parts):
    """Another order for each row."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(length) for _ in range(B)]).astype(np.int32)


def in_order(length, num_parts):
    return np.arange(length, dtype=np.int32)


@pytest.mark.short(
    "devices1-56-6-3-zigzag-3-settings1",
    "devices3-44-6-2-shuffled-17-settings3",
    "devices6-28-6-2-shuffled-None-settings6",
    "devices8-12-3-1-zigzag-7-settings8",
)
@pytest.mark.parametrize(
    ("devices", "length", "num_heads", "num_kv_heads", "order", "window", "settings"),
    [
        ({"context": 2}, 26, 3, 3, in_order, None, {}),
        ({"context": 4}, 56, 6, 3, zigzag, 3, {"soft_cap": 0.7}),
        ({"context": 8}, 48, 5, 1, zigzag, 29, {"scale": 0.3}),
        ({"context": 4}, 44, 6, 2, shuffled, 17, {"alibi": True}),
        ({"context": 8}, 8, 2, 1, in_order, None, {}),  # one token each
        ({"data": 2, "context": 4}, 24, 3, 3, zigzag, None, {"alibi": True, "soft_cap": 2.0}),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 28, 6, 2, shuffled, None, {"alibi": True, "scale": 0.5}),
        ({"context": 4, "tensor": 2}, 40, 4, 2, zigzag, 2, {}),
        ({"data": 4, "context": 2}, 12, 3, 1, zigzag, 7, {}),  # two rows for four devices
        ({"context": 2, "tensor": 4}, 12, 4, 2, zigzag, 7, {}),  # two heads of keys for four devices
    ],
)
def test_the_ring_gives_the_same_heads_and_gradients(devices, length, num_heads, num_kv_heads, order, window, settings):
    arrays = random_arrays(length, num_heads, num_kv_heads)
    positions_BT = np.atleast_2d(order(length, devices["context"]))
    arrays = [jnp.take_along_axis(array, positions_BT[:, :, None, None], axis=1) for array in arrays]
    slopes_N = jnp.asarray(alibi_slopes(num_heads)) if settings.get("alibi") else None
    settings = {name: value for name, value in settings.items() if name != "alibi"}
    expected = on_one_device(arrays, positions_BT, window, slopes_N, **settings)
    with use_devices(**devices):
        found = around_the_ring(arrays, positions_BT, window, slopes_N, max_tokens=3, **settings)
    for name, here, there in zip(["heads", "dq", "dk", "dv"], found, expected, strict=True):
        np.testing.assert_allclose(here, there, atol=TOLERANCE * np.abs(there).max(), rtol=0, err_msg=name)
        assert np.abs(there).max() > 0.5


def test_bfloat16_sums_and_statistics_are_float32():
    length = 64
    arrays = random_arrays(length, 2, 1, dtype=jnp.bfloat16)
    order = zigzag(length, 4)
    expected = on_one_device([array.astype(jnp.float32) for array in arrays], np.arange(length)[None], None)
    with use_devices(context=4):
        found = around_the_ring([array[:, order] for array in arrays], order[None], None, max_tokens=4)
    for here, there in zip(found, expected, strict=True):
        assert here.dtype == jnp.bfloat16
        # Rounded once to 8 bits on the way in (weights, and gradients of scores), and once on the way out.
        np.testing.assert_allclose(
            here.astype(np.float32), there[:, order], atol=2**-8 * np.abs(there).max(), rtol=2**-7
        )


@pytest.mark.full
def test_a_program_in_float64_stays_in_it():
    with jax.enable_x64(True):
        arrays = random_arrays(24, 3, 3, dtype=np.float64)
        expected = on_one_device(arrays, np.arange(24)[None], None)
        with use_devices(context=4):
            found = around_the_ring(arrays, np.arange(24)[None], None, max_tokens=2)
        for here, there in zip(found, expected, strict=True):
            np.testing.assert_allclose(here, there, atol=1e-13)


# --- Dropout ---


@pytest.mark.full
def test_dropped_weights_are_the_same_in_both_passes():
    """Heads are linear in the values, so the gradient of these is exact; that of the queries by finite differences."""
    with jax.enable_x64(True):
        q, k, v, dheads = random_arrays(32, 4, 2, dtype=np.float64)
        direction = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape))
        run = functools.partial(around_the_ring, dropout=0.4, max_tokens=2)
        rng, other_rng = jax.random.key(0), jax.random.key(1)
        positions_BT = zigzag(32, 4)[None]
        with use_devices(context=4, tensor=2):
            heads, dq, _, dv = run([q, k, v, dheads], positions_BT, None, rng=rng)
            step = 1e-5 * direction
            ahead = run([q + step, k, v, dheads], positions_BT, None, rng=rng)[0]
            behind = run([q - step, k, v, dheads], positions_BT, None, rng=rng)[0]
            others = run([q, k, v, dheads], positions_BT, None, rng=other_rng)[0]
        np.testing.assert_allclose(jnp.vdot(dv, v), jnp.vdot(heads, dheads), rtol=1e-10)
        np.testing.assert_allclose(jnp.vdot(dq, direction), jnp.vdot((ahead - behind) / 2e-5, dheads), rtol=1e-6)
        assert np.abs(heads - others).max() > 0.1


def test_dropped_weights_keep_the_mean_and_differ_everywhere():
    """Values of 1 make each head the sum of its weights: 1 on average, and with its own variation."""
    q, k, v, dheads = random_arrays(64, 4, 2, num_rows=4)
    order = zigzag(64, 2)
    with use_devices(data=2, context=2, tensor=2):
        settings = {"dropout": 0.5, "rng": jax.random.key(0), "max_tokens": 4}
        sums = np.asarray(around_the_ring([q, k, jnp.ones_like(v), dheads], order[None], 64, **settings)[0])
    sums_BTN = sums[..., 0]
    assert abs(sums_BTN.mean() - 1) < 0.05
    sums_BTN = sums_BTN[:, order >= 8]  # the first tokens see so few that all may be dropped in two rows
    for axis in range(3):
        assert np.abs(np.diff(sums_BTN, axis=axis)).max(axis=axis).min() > 0, "two rows, tokens or heads are alike"


def test_devices_that_compute_the_same_rows_drop_the_same_weights():
    """Two rows are too few for four devices: all four compute both."""
    arrays = random_arrays(8, 2, 1)
    with use_devices(data=4, context=2):
        settings = {"dropout": 0.5, "rng": jax.random.key(0), "max_tokens": 2}
        heads = around_the_ring(arrays, np.arange(8)[None], None, **settings)[0]
    copies = {}
    for shard in heads.addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    assert [len(same) for same in copies.values()] == [4, 4]
    for first, *others in copies.values():
        for other in others:
            np.testing.assert_array_equal(first, other)


# --- The work, and who does it ---


def test_what_no_query_sees_is_not_computed():
    """Zero times NaN is NaN: values that are NaN would reach every query whose block meets theirs."""
    C, length, size = 4, 64, 4
    q, k, v, dheads = random_arrays(length, 2, 2)
    poisoned = v.at[:, 40:].set(np.nan)
    order = zigzag(length, C)
    with use_devices(context=C):
        arrays = [array[:, order] for array in (q, k, poisoned, dheads.at[:, 40:].set(0))]
        heads, dq, dk, _ = around_the_ring(arrays, order[None], None, max_tokens=size)
    for found in (heads, dq):
        np.testing.assert_array_equal(np.isfinite(found).all(axis=(0, 2, 3)), order < 40)
    assert np.isfinite(dk[:, order >= 40 + size]).sum() == 0
    with use_devices(context=C):
        arrays = [array[:, order] for array in (q, k, v.at[:, :16].set(np.nan), dheads)]
        heads = around_the_ring(arrays, order[None], 5, max_tokens=size)[0]
    np.testing.assert_array_equal(np.isfinite(heads).all(axis=(0, 2, 3)), order >= 20)


def count_block_pairs(positions_T, C, window, max_tokens):
    """Pairs that each device computes, (C, C): row i is the device, column j the turn, with the keys of i - j."""
    parts = jnp.asarray(positions_T.reshape(C, 1, -1))
    queries, keys = ([_to_blocks(part, max_tokens, end) for part in parts] for end in (BEFORE_ALL, AFTER_ALL))

    def count(i, j):
        return sum(bool(MaskSpec(q, k, window=window).any_visible()) for q in queries[i] for k in keys[j])

    return np.array([[count(i, (i - j) % C) for j in range(C)] for i in range(C)])


@pytest.mark.parametrize("C", [2, 4, 8])
def test_in_zigzag_order_every_device_has_the_same_work_at_every_turn(C):
    length, size = 32 * C, 4
    counts = count_block_pairs(zigzag(length, C), C, None, size)
    num_blocks = length // size
    assert counts.sum() == num_blocks * (num_blocks + 1) // 2  # the causal half, and the diagonal
    assert (counts == counts[0]).all()
    unbalanced = count_block_pairs(np.arange(length), C, None, size)
    assert unbalanced.sum() == counts.sum()
    # A turn takes as long as its slowest device: in order, after the first turn one always has all pairs to compute.
    assert (unbalanced.max(axis=0)[1:] == 2 * counts.max(axis=0)[1:]).all()


@pytest.mark.parametrize("window", [1, 5, 16, 40, None])
@pytest.mark.parametrize("order", [zigzag, in_order])
def test_only_blocks_that_see_each_other_are_counted(order, window):
    C, size, length = 4, 4, 64
    positions_T = order(length, C)
    distance_TS = positions_T[:, None] - positions_T
    seen_TS = (distance_TS >= 0) & (distance_TS < (window or length))
    per_device = length // C
    blocks = seen_TS.reshape(C, per_device // size, size, C, per_device // size, size).any(axis=(2, 5)).sum(axis=(1, 3))
    expected = [[blocks[i, (i - j) % C] for j in range(C)] for i in range(C)]
    np.testing.assert_array_equal(count_block_pairs(positions_T, C, window, size), expected)


# --- What the program holds and sends ---


def compiled(length, num_heads=4, num_kv_heads=2, **devices):
    """The program of heads and gradients for arrays that lie on the devices as training has them."""
    with use_devices(**devices) as mesh:
        sharding = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
        shapes = [(B, length, heads, H) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
        arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for shape in shapes]
        positions_BT = jax.ShapeDtypeStruct(
            (1, length), np.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "context"))
        )
        return around_the_ring.lower(arrays, positions_BT, 100, max_tokens=16).compile()


def test_keys_travel_round_a_ring_and_are_never_gathered():
    program = compiled(64, data=2, context=2, tensor=2).as_text()
    assert "collective-permute" in program
    assert not any(f" {name}(" in program for name in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"))
    # One row, half of the tokens and half of the heads of keys, not of queries.
    assert "f32[2,1,1,16,5]" in program and "collective-permute(f32[2,1,1,2,16,5]" not in program


def test_sequences_can_grow_with_the_devices():
    """Eight devices hold eight times the tokens that one may hold, in the memory of one."""
    few, many = (compiled(512 * C, context=C).memory_analysis() for C in (2, 8))
    assert few.temp_size_in_bytes > 0
    assert many.temp_size_in_bytes < 1.1 * few.temp_size_in_bytes
    scores_bytes = 4 * B * 4 * (512 * 8) ** 2
    assert many.temp_size_in_bytes < scores_bytes / 100


# --- In the network ---

SIZES = {"vocab_size": 16, "context_length": 32, "num_layers": 2, "embed_dim": 12, "mlp_dim": 14}
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
SCANNED = {"positions": "rotary", "window": 9, "window_pattern": (True, False), "scan_layers": True}
UNROLLED = {"positions": "alibi", "attention_soft_cap": 5.0, "attention_scale": 0.4, "remat": "full"}


@pytest.mark.short("unrolled")
@pytest.mark.parametrize("settings", [SCANNED, UNROLLED], ids=["scanned", "unrolled"])
def test_a_model_has_the_same_loss_and_gradients_on_a_ring(settings):
    model = Decoder(ModelConfig(**SIZES, **GROUPED, **settings))
    params = reference.random_params(model)
    tokens_BT = np.random.default_rng(0).integers(0, 16, (2, 32), np.int32)
    weights_BTV = np.random.default_rng(1).standard_normal((2, 32, 16)).astype(np.float32)

    def loss(params, tokens_BT, weights_BTV, positions_BT=None):
        return (weights_BTV * model.apply({"params": params}, tokens_BT, positions_BT=positions_BT)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(params, tokens_BT, weights_BTV)
    with use_devices(data=2, context=2, tensor=2):
        order = zigzag(32, 2)
        arrays = tokens_BT[:, order], weights_BTV[:, order], order[None]
        program = jax.jit(jax.value_and_grad(loss)).lower(params, *arrays)
        assert "collective_permute" in program.as_text()
        found = program.compile()(params, *arrays)
    for (path, here), there in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4 * np.abs(there).max(), err_msg=where)


@pytest.mark.full
def test_gradients_on_eight_devices_take_less_than_an_eighth_of_the_memory_each():
    """All that lives while they are computed: activations, logits and whatever attention holds."""

    def temporaries(context, length):
        settings = {f"model.{name}": value for name, value in (SIZES | GROUPED).items()}
        settings |= {"model.context_length": length, "model.num_layers": 1, "model.attention": "reference"}
        config = fd.load_config(None, settings | {"mesh.context": context, "training.batch_size": 2})
        with use_devices(context=context) as mesh:
            state = jax.eval_shape(state_maker(fd.Decoder(config.model), config), jax.random.key(0))
            tokens = jax.ShapeDtypeStruct((2, length), np.int32, sharding=sharding_of(mesh, "batch", "length"))
            batch = dict.fromkeys(("inputs", "targets", "positions"), tokens)
            return jax.jit(mean_gradients).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8, 512) < temporaries(1, 512) / 8


def test_a_model_that_looks_inside_or_generates_has_no_ring():
    config = ModelConfig(**SIZES, **GROUPED)
    model = Decoder(config)
    params = reference.random_params(model)
    tokens_BT = np.zeros((2, 32), np.int32)

    def permutes(**settings):
        apply = functools.partial(model.apply, **settings)
        return "ppermute" in str(jax.make_jaxpr(apply)({"params": params}, tokens_BT))

    with use_devices(data=2, context=4):
        assert permutes()
        assert not permutes(mutable=["intermediates"])
        assert not permutes(cache=empty_cache(config, 2, 32))


def test_dropout_in_a_model_reaches_the_weights():
    model = Decoder(ModelConfig(**SIZES, **GROUPED, dropout=0.5))
    params = reference.random_params(model)

    def keys_of(**settings):
        apply = functools.partial(model.apply, **settings)
        text = str(jax.make_jaxpr(apply)({"params": params}, np.zeros((2, 32), np.int32)))
        return text[text.index("ppermute") :].count("random_bits")

    with use_devices(context=4):
        assert keys_of(deterministic=False, rngs={"dropout": jax.random.key(0)}) > 0
        assert keys_of() == 0


# --- Where there is a ring ---


def test_the_ring_is_found_by_logical_axes():
    shape = (4, 16, 6, 5)
    assert find_ring(shape, shape) is None
    with use_devices(data=2, tensor=2):
        assert find_ring(shape, shape) is None
    with use_devices(data=2, context=2, tensor=2):
        ring = find_ring(shape, shape)
        assert (ring.size, ring.axes) == (2, ("context",))
        assert (ring.rows, ring.heads) == (("data", "fsdp"), ("tensor",))
        ring = find_ring((1, 16, 6, 5), (1, 16, 3, 5))
        assert (ring.rows, ring.axes, ring.heads) == ((), ("context",), ())
        assert find_ring((1, 1, 6, 5), (1, 1, 6, 5)) is None
    with use_devices(context=2), nn.logical_axis_rules(()):
        assert find_ring(shape, shape) is None
