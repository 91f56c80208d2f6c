import dataclasses
import math
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P
from job import dotted

import flax_decoder as fd
from flax_decoder.errors import UserError
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.precision import rounding_of_products
from flax_decoder.parallel.mesh import (
    AXES,
    COMPILER_OPTIONS,
    DETERMINISTIC_OPTIONS,
    OPTIONS_OF_MANY,
    arrange,
    compiler_options,
    make_mesh,
    mesh_of,
    mesh_sizes,
    sharding_of,
    use_mesh,
)
from flax_decoder.planning.plan import abstract_arguments

NUM_DEVICES = 8
SIZES = {
    "model.vocab_size": 48,
    "model.context_length": 32,
    "model.embed_dim": 48,
    "model.num_heads": 12,
    "model.num_kv_heads": 6,
    "model.mlp_dim": 24,
    "training.batch_size": 24,
}


def make_config(**changes):
    """SIZES with some changes, named section__field."""
    return fd.load_config(None, SIZES | dotted(changes))


@pytest.mark.parametrize(
    ("changes", "num_devices", "expected"),
    [
        # By default as many devices as divide the batch.
        ({}, 8, (8, 1, 1, 1)),
        ({"training__batch_size": 11}, 8, (1, 1, 1, 1)),
        ({"training__batch_size": 12, "training__accumulation_steps": 3}, 8, (4, 1, 1, 1)),
        ({"mesh__fsdp": 2, "training__batch_size": 12}, 8, (3, 2, 1, 1)),
        ({"mesh__tensor": 3}, 8, (2, 1, 1, 3)),
        ({"mesh__tensor": 6, "model__vocab_size": 54}, 8, (1, 1, 1, 6)),  # the size that is advised below
        # -1 takes the remaining devices.
        ({"mesh__data": -1}, 8, (8, 1, 1, 1)),
        ({"mesh__fsdp": -1, "mesh__data": 2}, 8, (2, 4, 1, 1)),
        ({"mesh__context": -1, "mesh__tensor": 2}, 8, (1, 1, 4, 2)),
        ({"mesh__tensor": -1, "mesh__data": 4}, 12, (4, 1, 1, 3)),
        # A number may leave devices over.
        ({"mesh__data": 3}, 8, (3, 1, 1, 1)),
        ({"mesh__data": 2, "mesh__fsdp": 2, "mesh__context": 4, "mesh__tensor": 2}, 64, (2, 2, 4, 2)),
    ],
)
def test_devices_along_each_axis(changes, num_devices, expected):
    assert mesh_sizes(make_config(**changes), num_devices) == dict(zip(AXES, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__tensor": 8, "model__num_heads": 6}, "model.num_heads = 6 is not a multiple of mesh.tensor = 8"),
        ({"mesh__tensor": 4}, "model.num_kv_heads = 6 is not a multiple of mesh.tensor = 4"),
        ({"mesh__tensor": 2, "model__mlp_dim": 33}, "model.mlp_dim = 33 is not a multiple of mesh.tensor = 2"),
        (
            {"mesh__tensor": 6, "model__vocab_size": 50},
            "model.vocab_size = 50 is not a multiple of mesh.tensor = 6; set it to 54",
        ),
        ({"mesh__fsdp": 5, "training__batch_size": 25}, "model.embed_dim = 48 is not a multiple of mesh.fsdp = 5"),
        ({"mesh__fsdp": 5}, "training.batch_size = 24 is not a multiple of mesh.fsdp = 5"),
        (
            {"mesh__data": 7},
            "training.batch_size = 24 is not a multiple of mesh.data = 7; set it to 28, or use fewer devices",
        ),
        (
            {"mesh__data": 4, "mesh__fsdp": 2, "training__batch_size": 12},
            "training.batch_size = 12 is not a multiple of mesh.data x mesh.fsdp = 8",
        ),
        (
            {"mesh__data": 8, "training__accumulation_steps": 6},
            "training.batch_size / accumulation_steps = 4 is not a multiple of mesh.data = 8",
        ),
        (
            {"mesh__context": 8, "model__context_length": 40},
            "model.context_length = 40 is not a multiple of 2 x mesh.context = 16",
        ),
        (
            {"mesh__data": 3, "mesh__tensor": 3},
            "data 3 x fsdp 1 x context 1 x tensor 3 = 9 devices are more than the 8",
        ),
        ({"mesh__data": -1, "mesh__tensor": 3}, "8 devices are not a multiple of fsdp 1 x context 1 x tensor 3 = 3"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_both_numbers(changes, message):
    config = make_config(**changes)
    for refused in (mesh_sizes, lambda config, count: make_mesh(config, jax.devices()[:count])):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            refused(config, NUM_DEVICES)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "num_devices", "parts"),
    [(12, 1, 40), (12, 8, 5), (12, 16, 3), (12, 32, 3), (32, 8, 2), (1, 32, 15), (500, 1, 1), (7, 1, 80), (None, 8, 1)],
)
def test_the_parts_of_a_batch_follow_from_the_rows_that_a_device_computes_at_a_time(rows, num_devices, parts):
    changes = {} if rows is None else {"training.rows_per_device": rows}
    training = fd.load_config(None, {"training.batch_size": 480} | changes).training
    assert training.num_parts(num_devices) == parts


def test_a_state_has_the_parts_of_its_mesh():
    config = make_config(training__batch_size=48, training__rows_per_device=2, mesh__fsdp=2, mesh__tensor=2)
    devices = make_mesh(config, jax.devices())
    model, rng = fd.Decoder(config.model), jax.random.key(0)
    state = jax.eval_shape(lambda: fd.init_state(model, config, rng=rng, mesh=devices))
    assert state.accumulation_steps == abstract_arguments(config, devices)[0].accumulation_steps == 6
    assert jax.eval_shape(lambda: fd.init_state(model, config, rng=rng)).accumulation_steps == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": -1, "mesh__fsdp": -1}, "data and fsdp are -1, but only one axis can be the rest"),
        ({"mesh__tensor": 0}, "mesh.tensor: 0 is no number of devices; leave it out, or give -1"),
        (
            {"training__rows_per_device": 2, "training__accumulation_steps": 3},
            "rows_per_device = 2 says in how many parts a batch is computed, and so does accumulation_steps = 3: leave",
        ),
    ],
)
def test_an_impossible_split_is_refused_by_the_config(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_config(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.tensor", "3"], "model.num_heads = 4 is not a multiple of mesh.tensor = 3"),
        # The vocabulary is known only from the text.
        (["--mesh.tensor", "2"], "model.vocab_size = 27 is not a multiple of mesh.tensor = 2; set it to 28"),
    ],
)
def test_a_refused_run_leaves_nothing(arguments, message, refused):
    Path("input.txt").write_text("abcdefghijklmnopqrstuvwxyz\n" * 30)
    assert message in refused("train", "--run.folder", "run", *arguments)


def test_a_mesh_takes_the_first_devices_in_order():
    mesh = make_mesh(make_config(mesh__data=3, mesh__tensor=2), jax.devices())
    assert mesh.shape == {"data": 3, "fsdp": 1, "context": 1, "tensor": 2} and mesh.axis_names == AXES
    # Neighbors along the last axis, which communicates most.
    assert [device.id for device in mesh.devices.flat] == list(range(6))
    assert mesh.devices[1, 0, 0].tolist() == jax.devices()[2:4]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_shardings_by_logical_axes():
    mesh = mesh_of(jax.devices(), data=2, fsdp=2, tensor=2)
    for axes, spec in [
        (("batch", "length", None), PartitionSpec(("data", "fsdp"), "context", None)),
        (("layers", "embed", "heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor", None)),
        (("layers", "mlp", "embed"), PartitionSpec(None, "tensor", "fsdp")),
        (("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        ((), PartitionSpec()),
    ]:
        assert sharding_of(mesh, *axes).spec == spec
    placed = jax.device_put(np.arange(8.0).reshape(8, 1), sharding_of(mesh, "batch", None))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}


PLACES = {
    "data": (P(), P("data")),
    "fsdp": (P(None, "fsdp"), P("data")),
    "tensor": (P("tensor"), P()),
}
REFUSED = r"make it with axis_types=\(jax.sharding.AxisType.Auto,\) \* 3"


@pytest.mark.short("fsdp")
@pytest.mark.parametrize("place", PLACES)
def test_explicit_axes_are_refused_and_automatic_ones_are_not(place):
    """Traced only. The embedding is split, or the batch, or both; `jax.make_mesh` makes explicit axes by default."""
    config = make_config(model__num_layers=1)
    model = fd.Decoder(config.model)
    state = fd.init_state(model, config, rng=jax.random.key(0))
    tokens_BT = np.zeros((24, 32), np.int32)

    def step(mesh):
        of_embedding, of_batch = (NamedSharding(mesh, spec) for spec in PLACES[place])
        params = state.params | {"embedding": jax.device_put(state.params["embedding"], of_embedding)}
        batch = dict.fromkeys(("inputs", "targets"), jax.device_put(tokens_BT, of_batch))
        return jax.eval_shape(fd.train_step, state.replace(params=params), batch)[1]["loss"]

    shape, names = (2, 2, 2), ("data", "fsdp", "tensor")
    with pytest.raises(UserError, match=REFUSED):
        step(jax.make_mesh(shape, names))
    assert step(jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)).shape == ()


def test_explicit_axes_are_refused_for_a_new_state_the_rules_and_a_cache():
    config = make_config(model__num_layers=1)
    model = fd.Decoder(config.model)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match=REFUSED):
        fd.init_state(model, config, rng=jax.random.key(0), mesh=mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    with use_mesh(mesh), pytest.raises(UserError, match=REFUSED):
        jax.eval_shape(model.apply, params, np.zeros((2, 3), np.int32))
    # In full on each device: a cache would have to follow it at each write.
    tokens_BT = jax.device_put(np.zeros((1, 1), np.int32), NamedSharding(mesh, P()))
    with pytest.raises(UserError, match=REFUSED):
        jax.eval_shape(model.apply, params, tokens_BT, empty_cache(config.model, 1, 8))
    assert jax.eval_shape(model.apply, params, tokens_BT).shape == (1, 1, 48)


def mesh_for(platform, size=1):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]), size=size)


def test_options_of_the_gpu_compiler_exist():
    deterministic, of_many = DETERMINISTIC_OPTIONS["gpu"], OPTIONS_OF_MANY["gpu"]
    options = deterministic | of_many
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # which refuses unknown ones and wrong types
    for platform in ("gpu", "cuda"):
        assert compiler_options(mesh_for(platform), deterministic=True) == deterministic
        assert compiler_options(mesh_for(platform, 8), deterministic=True) == options
        assert compiler_options(mesh_for(platform, 8)) == of_many
        assert compiler_options(mesh_for(platform)) is None
    assert compiler_options(mesh_for("cpu", 8), deterministic=True) is None


def test_an_option_that_xla_flags_names_is_left_to_it(monkeypatch):
    """But not what a deterministic step needs."""
    (name,) = OPTIONS_OF_MANY["gpu"]
    monkeypatch.setenv("XLA_FLAGS", f"--other=1 --{name}=false --xla_gpu_autotune_level=4")
    assert compiler_options(mesh_for("gpu", 8)) is None
    assert compiler_options(mesh_for("gpu", 8), deterministic=True) == DETERMINISTIC_OPTIONS["gpu"]
    assert compiler_options(mesh_for("tpu")) == COMPILER_OPTIONS["tpu"]


@pytest.mark.parametrize(
    ("changes", "platform", "line"),
    [
        ({}, "gpu", "TF32"),
        ({}, "tpu", "bfloat16"),
        ({}, "cpu", None),
        ({"model__matmul_precision": "highest"}, "gpu", None),
        ({"model__dtype": "bfloat16"}, "gpu", None),
    ],
)
def test_a_run_says_to_what_products_are_rounded(changes, platform, line):
    found = rounding_of_products(make_config(**changes).model, platform)
    assert found is None if line is None else f"rounded to {line}" in found


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU in a slice that is a line of chips."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "unknown"
    process_index: int = 0


def two_slices(num_chips):
    half = num_chips // 2
    return [Chip(id, id // half, (id % half, 0, 0)) for id in range(num_chips)]


@pytest.mark.parametrize(
    ("shape", "crossing"), [((2, 4, 1, 2), 0), ((4, 2, 2, 1), 0), ((1, 8, 1, 2), 1), ((3, 4, 1, 2), 1)]
)
def test_only_rows_and_parameters_are_split_over_slices(shape, crossing):
    slices = np.vectorize(lambda chip: chip.slice_index)(arrange(two_slices(math.prod(shape)), shape))
    assert slices.shape == shape and slices.mean() == 0.5
    for axis in range(4):
        assert (np.ptp(slices, axis=axis) > 0).any() == (axis == crossing)


def test_slices_that_neither_rows_nor_parameters_can_cross_are_refused():
    with pytest.raises(UserError, match="2 TPU slices divide neither data = 1 nor fsdp = 3"):
        arrange(two_slices(12), (1, 3, 1, 4))
