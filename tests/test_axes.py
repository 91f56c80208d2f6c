import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import flax_decoder as fd
from flax_decoder.nn.axes import constrain, logical_axes, num_parts
from flax_decoder.nn.params import abstract_params
from flax_decoder.parallel.mesh import RULES, mesh_of, use_mesh

# Together they have every parameter that the network can have.
ARCHITECTURES = {
    "plain": {},
    "biased": {
        "norm_bias": True,
        "attention_in_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "norm_position": "both",
    },
    "gated": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "feed_forward": "swiglu",
        "num_kv_heads": 2,
        "tied_head": False,
        "qk_norm": "head",
    },
    "one key": {"positions": "alibi", "num_kv_heads": 1, "qk_norm": "all", "norm_position": "post"},
}
STACKED = {
    "attention/query/kernel": ("embed", "heads", "head_dim"),
    "attention/key/kernel": ("embed", "kv_heads", "head_dim"),
    "attention/value/kernel": ("embed", "kv_heads", "head_dim"),
    "attention/out/kernel": ("heads", "head_dim", "embed"),
    "feed_forward/up/kernel": ("embed", "mlp"),
    "feed_forward/gate/kernel": ("embed", "mlp"),
    "feed_forward/down/kernel": ("mlp", "embed"),
}
TABLES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "head_bias": ("vocab",),
    "positions": (None, "embed"),
}
# A name that no rule knows would be left whole without a word.
NAMES = {name for name, _ in RULES} | {"layers", "head_dim"}


def params_of(architecture, **changes):
    sizes = {"vocab_size": 24, "context_length": 16, "num_layers": 3, "embed_dim": 40, "num_heads": 4, "mlp_dim": 56}
    settings = sizes | ARCHITECTURES[architecture] | changes
    return abstract_params(fd.Decoder(fd.load_config(None, {f"model.{k}": v for k, v in settings.items()}).model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_parameter_of_each_architecture_has_its_axes(architecture):
    params = params_of(architecture)
    axes = logical_axes(params)
    assert jax.tree.structure(axes) == jax.tree.structure(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = tuple(functools.reduce(lambda tree, part: tree[part.key], path, axes))
        assert len(found) <= leaf.ndim
        if name in TABLES:
            assert found == TABLES[name], name
        elif name.removeprefix("layers/") in STACKED:
            assert found == ("layers", *STACKED[name.removeprefix("layers/")]), name
        else:  # a vector a layer, or a few heads of one: not worth a message
            assert name.endswith(("scale", "bias")), f"{name} is a matrix without axes"
            assert set(found) <= {"layers", None}, name
        assert set(found) <= {*NAMES, None}


def test_together_the_architectures_have_every_parameter():
    """Else the test above would look at less than there is."""
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("layers/")
        for architecture in ARCHITECTURES
        for path, _ in jax.tree.leaves_with_path(params_of(architecture))
    }
    assert names >= {*STACKED, *TABLES}
    assert {name.split("/")[-2] for name in names if name.endswith("/bias")} >= {"query", "out", "up", "final_norm"}


def test_layers_that_are_not_stacked_have_no_layer_axis():
    params = params_of("plain")
    kernel = params["layers"]["attention"]["query"]["kernel"]
    alone = {"layers": ({"attention": {"query": {"kernel": jax.ShapeDtypeStruct(kernel.shape[1:], kernel.dtype)}}},)}
    assert jax.tree.leaves(logical_axes(alone)) == [PartitionSpec("embed", "heads", "head_dim")]


def test_without_a_mesh_nothing_happens():
    x = np.ones((3, 5))
    assert num_parts("batch") == num_parts("heads") == 1
    jaxpr = str(jax.make_jaxpr(lambda x: constrain(x, "batch", "length"))(x))
    assert "sharding" not in jaxpr


def test_an_axis_that_the_devices_do_not_divide_stays_whole():
    mesh = mesh_of(jax.devices(), data=2, fsdp=2, tensor=2)
    with use_mesh(mesh):
        assert [num_parts(axis) for axis in ("batch", "heads", "embed", "length", "head_dim")] == [4, 2, 2, 1, 1]
        for shape, spec in [
            ((4, 3, 6), (("data", "fsdp"), None, "tensor")),
            ((3, 3, 6), (None, None, "tensor")),
            ((8, 2, 5), (("data", "fsdp"), None, None)),
            ((1, 1, 1), (None, None, None)),
        ]:
            x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            (constraint,) = jax.make_jaxpr(lambda x: constrain(x, "batch", None, "heads"))(x).eqns
            assert tuple(constraint.params["sharding"].spec) == spec
