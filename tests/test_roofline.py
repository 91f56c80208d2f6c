import jax
import jax.numpy as jnp
import pytest

from flax_decoder.config_file import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.planning.hlo import parse_hlo
from flax_decoder.planning.roofline import memory_bytes, product_flops, roofline
from flax_decoder.training.hardware import Chip
from flax_decoder.training.step import state_maker, train_step

SIZES = {
    "model.vocab_size": 53,
    "model.context_length": 32,
    "model.num_layers": 3,
    "model.embed_dim": 48,
    "model.num_heads": 6,
    "model.attention": "reference",
    "training.batch_size": 4,
}


def traced_step(changes):
    config = load_config(None, SIZES | changes)
    state = jax.eval_shape(lambda: state_maker(Decoder(config.model), config)(jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    return jax.jit(train_step).trace(state, {"inputs": tokens, "targets": tokens})


def products(changes):
    return product_flops(traced_step(changes).jaxpr.jaxpr)


def test_products_are_those_that_xla_counts():
    """XLA also counts elementwise operations, which are few; there are no loops here."""
    traced = traced_step({"model.num_layers": 1})
    counted = traced.lower().compile().cost_analysis()["flops"]
    ours = product_flops(traced.jaxpr.jaxpr)
    assert 0.85 * counted < ours < counted


def test_loops_count_every_iteration():
    plain = products({})
    assert products({"model.scan_layers": True}) == plain
    assert products({"training.accumulation_steps": 2}) == plain


def test_recomputation_counts():
    plain = products({})
    again = products({"model.remat": "full", "model.scan_layers": True})
    tokens, D = 4 * 32, 48
    layer = 2 * tokens * (4 * D * D + 2 * 4 * D * D) + 2 * 2 * tokens * 32 * D
    # All of a layer but its last product, whose result the backward pass does not need.
    assert plain < again <= plain + 3 * layer
    assert again >= plain + 3 * (layer - 2 * tokens * 4 * D * D)


def test_a_shard_map_counts_every_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    specs = (spec, jax.sharding.PartitionSpec())
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=spec)
    x, y = jax.ShapeDtypeStruct((16, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    assert product_flops(jax.jit(product).trace(x, y).jaxpr.jaxpr) == 2 * 16 * 3 * 5


def test_the_bounds_of_a_step():
    chip = Chip("x", peak_flops=100.0, memory_bytes=1.0, memory_bandwidth=10.0, interconnect_bandwidth=2.0)
    bounds = roofline(chip, flops=400, model_flops=300, memory_bytes=50, wire_bytes=6)
    assert (bounds.compute_seconds, bounds.memory_seconds, bounds.network_seconds) == (4, 5, 3)
    assert (bounds.overlapped_seconds, bounds.serial_seconds, bounds.mfu_bound) == (5, 12, 0.6)


PROGRAM = """HloModule step, num_partitions=1

%update (stack: f32[10,8], new: f32[1,8], i: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[10,8]{1,0} dynamic-update-slice(%stack, %new, %i, %i)
}

ENTRY %main (p: f32[10,8], q: f32[1,8], i: s32[]) -> f32[10,8] {
  %p = f32[10,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %fast = f32[100,8]{1,0:T(8,128)S(1)} broadcast(%q), dimensions={0,1}
  %room = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  %more = f32[1,8]{1,0} negate(%q)
  ROOT %kept = f32[10,8]{1,0} fusion(%p, %more, %i), kind=kLoop, calls=%update
}
"""


def test_memory_traffic():
    inputs = 10 * 8 * 4 + 8 * 4 + 4
    assert memory_bytes(parse_hlo(PROGRAM)) == inputs + 2 * 8 * 4 + 2 * 8 * 4
    slow = PROGRAM.replace("S(1)", "")
    assert memory_bytes(parse_hlo(slow)) - memory_bytes(parse_hlo(PROGRAM)) == 2 * 100 * 8 * 4


def test_memory_traffic_of_a_real_loop():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y @ x), None), x, length=7)[0]).lower(x).compile()
    traffic = memory_bytes(parse_hlo(program.as_text()))
    array = 64 * 64 * 4
    assert 7 * 2 * array < traffic == pytest.approx(7 * 3 * array, rel=0.7)
