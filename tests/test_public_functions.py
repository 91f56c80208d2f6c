"""Every public function against every kind of input: the numbers of the plain int32 call, or a refusal by name.

The table is generated: functions of token ids x kinds of ids, params x forms, arguments x values, functions x
transformations of JAX. A few of each stay in the short suite.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

import flax_decoder as fd
from flax_decoder.data.tokenizer import ByteTokenizer, make_tokenizer
from flax_decoder.nn.arguments import READ_WITH, check_params
from flax_decoder.nn.params import abstract_params

SIZES = {"model.num_layers": 2, "model.embed_dim": 8, "model.num_heads": 2, "model.context_length": 7}
B, T, V = 2, 5, 320  # a vocabulary beyond the largest int8 and uint8
IDS_BT = np.random.default_rng(0).integers(0, 100, (B, T)).astype(np.int32)
BATCH = {"inputs": IDS_BT, "targets": IDS_BT[:, ::-1].copy()}


@functools.cache
def make():
    config = fd.load_config(overrides=SIZES | {"model.vocab_size": V})
    model = fd.Decoder(config.model)
    return config, model, fd.init_state(model, config, rng=jax.random.key(0))


@functools.cache
def weights():
    _, model, state = make()
    return fd.capture(model, state.params, IDS_BT, names=("weights",))["weights"]


def same(found, expected):
    """The same numbers to the last bit, NaN included."""
    found, expected = (jax.tree.map(np.asarray, jax.tree.leaves(tree)) for tree in (found, expected))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def near(found, expected):
    """The same numbers but for the order of sums."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


# --- Token ids ---

# From ids (B, T) to arrays. Positions and segments are integers of the same shape.
OF_IDS = {
    "apply": lambda ids: make()[1].apply({"params": make()[2].params}, ids),
    "positions": lambda ids: make()[1].apply({"params": make()[2].params}, IDS_BT, positions_BT=ids),
    "segments": lambda ids: make()[1].apply({"params": make()[2].params}, IDS_BT, segments_BT=ids),
    "generate": lambda ids: fd.generate(make()[1], make()[2].params, ids, 2, temperature=0),
    "complete": lambda ids: [
        sample.tokens for row in fd.complete(make()[1], make()[2].params, ids, 2, temperature=0) for sample in row
    ],
    "score": lambda ids: fd.score(make()[1], make()[2].params, ids, IDS_BT)[0],
    "score continuations": lambda ids: fd.score(make()[1], make()[2].params, IDS_BT, ids)[0],
    "capture": lambda ids: fd.capture(make()[1], make()[2].params, ids, names=("logits",)),
    "attribute": lambda ids: fd.attribute(make()[1], make()[2].params, ids, IDS_BT),
    "attribute targets": lambda ids: fd.attribute(make()[1], make()[2].params, IDS_BT, ids),
    "attribute versus": lambda ids: fd.attribute(make()[1], make()[2].params, IDS_BT, IDS_BT, ids),
    "head_scores": lambda ids: fd.head_scores(weights(), ids),
    "train_step": lambda ids: fd.train_step(make()[2], BATCH | {"inputs": ids})[1],
    "eval_step": lambda ids: fd.eval_step(make()[2], BATCH | {"inputs": ids}),
    "eval_step targets": lambda ids: fd.eval_step(make()[2], BATCH | {"targets": ids}),
    "eval_step positions": lambda ids: fd.eval_step(make()[2], BATCH | {"positions": ids}),
    "eval_step segments": lambda ids: fd.eval_step(make()[2], BATCH | {"segments": ids}),
}
# Within jit, where values are not known.
OF_IDS |= {
    f"jit {name}": (lambda compute: lambda ids: jax.jit(compute)(ids))(OF_IDS[name])
    for name in ("apply", "positions", "segments", "capture", "head_scores", "eval_step", "eval_step positions")
}
POSITIONS_BT = np.asarray([[0, 1, 2, 3, 4], [1, 2, 3, 5, 6]], np.int32)  # fit a context of 7, and are out of step


def torch_tensor(ids):
    return pytest.importorskip("torch").tensor(ids)


DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
WORKS = {
    **{dtype: functools.partial(np.asarray, dtype=dtype) for dtype in DTYPES},
    **{f"jax {dtype}": functools.partial(jnp.asarray, dtype=dtype) for dtype in ("int8", "uint8", "int32", "uint32")},
    "list": np.ndarray.tolist,
    "list of arrays": list,
    "tuple": lambda ids: tuple(map(tuple, ids.tolist())),
    "torch": torch_tensor,
    "column-major": np.asfortranarray,
    "strided": lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
    "big-endian": lambda ids: ids.astype(">i4"),
}
NOT_AN_ARRAY = "must be an array of numbers, not "
NO_INTEGERS = "must be integers, not "
OTHER_SHAPE = "shape|shapes|must be tokens"
REFUSED = {
    **{
        dtype: (functools.partial(jnp.asarray, dtype=dtype), NO_INTEGERS + dtype)
        for dtype in ("bool", "float16", "bfloat16", "float32", "complex64")
    },
    "text": (lambda ids: ids.astype(str), NOT_AN_ARRAY),
    "objects": (lambda ids: ids.astype(object), NOT_AN_ARRAY),
    "ragged": (lambda ids: [ids[0].tolist(), ids[1, :2].tolist()], NOT_AN_ARRAY),
    "masked": (lambda ids: np.ma.masked_array(ids, ids > 50), NOT_AN_ARRAY),
    "nothing": (lambda ids: object(), NOT_AN_ARRAY),
    "keys": (lambda ids: jax.random.split(jax.random.key(0), ids.shape), NOT_AN_ARRAY),
    "no axis": (lambda ids: ids[0, 0], OTHER_SHAPE),
    "one axis": (lambda ids: ids[0], OTHER_SHAPE),
    "three axes": (lambda ids: ids[None], OTHER_SHAPE),
    "B = 0": (lambda ids: ids[:0], OTHER_SHAPE),
    "T = 0": (lambda ids: ids[:, :0], OTHER_SHAPE),
    "beyond int32": (lambda ids: ids + 2**32, "not in the vocabulary|does not fit into int32|from 0 to 6"),
}
OF_VALUES = {
    "negative": (lambda ids: ids - 200, "token id -.* is not in the vocabulary"),
    "beyond the vocabulary": (lambda ids: ids + V, "is not in the vocabulary: 0 to 319"),
}
# What jax.jit refuses itself, by name of the argument, before any of our code runs; and values that it does not know.
NOT_IN_JIT = {
    "list",
    "list of arrays",
    "tuple",
    "torch",
    "big-endian",
    "text",
    "objects",
    "ragged",
    "masked",
    "nothing",
}
OF_VALUES_ONLY = {"beyond int32"}


def ids_of(name):
    return POSITIONS_BT if "positions" in name else IDS_BT


def cases_of_ids():
    for name in OF_IDS:
        for kind in WORKS:
            if not (name.startswith("jit") and kind in NOT_IN_JIT):
                yield name, kind, None
        for kind, (_, message) in (REFUSED | OF_VALUES).items():
            in_jit = name.startswith("jit") and kind in NOT_IN_JIT | OF_VALUES_ONLY | OF_VALUES.keys()
            if in_jit or (kind in OF_VALUES and ("segments" in name or "positions" in name or "scores" in name)):
                continue
            if kind == "ragged" and name in ("generate", "complete", "score", "score continuations"):
                continue  # they take rows of different lengths
            if (name, kind) == ("head_scores", "beyond int32"):
                message = "does not fit into int32"
            # The inputs of the loss are looked up by the model, which checks them; ids of keys have no dtype of NumPy.
            yield name, kind, message


CASES_OF_IDS = list(cases_of_ids())


@pytest.mark.short(
    *("apply-uint8", "apply-list", "apply-float16", "apply-bool", "apply-ragged", "apply-one axis"),
    *("apply-B = 0", "apply-T = 0", "apply-beyond int32", "apply-masked", "positions-uint8", "positions-uint64"),
    *("positions-float32", "segments-uint8", "segments-bool", "segments-beyond int32", "capture-T = 0"),
    *("generate-keys", "generate-big-endian", "generate-no axis", "attribute-three axes", "head_scores-float16"),
    *("eval_step-list", "eval_step-nothing", "eval_step positions-uint32", "eval_step segments-beyond int32"),
)
@pytest.mark.parametrize(
    ("name", "kind", "message"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES_OF_IDS]
)
def test_ids(name, kind, message):
    compute, ids = OF_IDS[name], ids_of(name)
    if message is None:
        same(compute(WORKS[kind](ids)), expected_of(name))
    else:
        with pytest.raises(ValueError, match=message) as caught:
            compute((REFUSED | OF_VALUES)[kind][0](ids.astype(np.int64) if "int32" in kind else ids))
        assert len(str(caught.value).splitlines()) <= 2


@functools.cache
def expected_of(name):
    return OF_IDS[name](ids_of(name))


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
@pytest.mark.parametrize("positions", ["learned", "alibi"])
def test_no_query_sees_a_later_key_by_unsigned_positions(positions, dtype):
    """The difference of two unsigned numbers is never negative: every key would be visible."""
    config = fd.load_config(overrides=SIZES | {"model.vocab_size": V, "model.positions": positions}).model
    model, order_1T = fd.Decoder(config), np.arange(T, dtype=dtype)[None]
    drawn = np.random.default_rng(0)
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS_BT)
    variables = jax.tree.map(lambda leaf: drawn.normal(size=leaf.shape).astype(np.float32), variables)
    same(model.apply(variables, IDS_BT, positions_BT=order_1T), model.apply(variables, IDS_BT))


@pytest.mark.full
def test_ids_of_16_bits_with_a_vocabulary_beyond_them():
    config = fd.load_config(overrides=SIZES | {"model.vocab_size": 65_600})
    model = fd.Decoder(config.model)
    params, ids = fd.init_state(model, config, rng=jax.random.key(0)).params, IDS_BT + 65_000
    arguments = {"max_new_tokens": 2, "temperature": 0}
    same(fd.generate(model, params, ids.astype(np.uint16), **arguments), fd.generate(model, params, ids, **arguments))


# --- Params ---


def by_number(params):
    return params | {"layers": {str(index): layer for index, layer in enumerate(fd.unstack_layers(params)["layers"])}}


def without(name):
    return lambda params: {other: params[other] for other in params if other != name}


PARAMS = {
    "numpy": (lambda params: jax.tree.map(np.asarray, params), None),
    "tuple": (fd.unstack_layers, None),
    "list": (lambda params: params | {"layers": list(fd.unstack_layers(params)["layers"])}, None),
    "by number": (by_number, None),
    "msgpack": (lambda params: serialization.msgpack_restore(serialization.to_bytes(params)), None),
    "msgpack unstacked": (lambda p: serialization.msgpack_restore(serialization.to_bytes(fd.unstack_layers(p))), None),
    "float64": (lambda params: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), None),
    "one layer": (lambda params: params | {"layers": fd.unstack_layers(params)["layers"][:1]}, "have 1 layers"),
    "integers": (lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.int32), params), "floating-point.*int32"),
    "complex": (lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), params), "point.*complex64"),
    "a head too many": (lambda params: params | {"head": np.zeros((8, V), np.float32)}, "'head'.* does not read"),
    "a bias too many": (lambda params: params | {"head_bias": np.zeros(V, np.float32)}, "'head_bias'.* does not read"),
    "variables": (lambda params: {"params": params}, "extra params layer|must be those of a Decoder.*dict of params"),
    "nothing": (lambda params: None, "should be a dictionary|must be those of a Decoder.*NoneType"),
    "no layers": (without("layers"), "layers|must be those of a Decoder"),
}
OF_PARAMS = {
    "apply": lambda params: make()[1].apply({"params": params}, IDS_BT),
    "generate": lambda params: fd.generate(make()[1], params, IDS_BT, 2, temperature=0),
    "prefill": lambda params: fd.prefill(make()[1], params, IDS_BT[0]).logits_BV,
    "capture": lambda params: fd.capture(make()[1], params, IDS_BT, names=("head_writes",)),
    "attribute": lambda params: fd.attribute(make()[1], params, IDS_BT, IDS_BT),
    "unstack_layers": fd.unstack_layers,
    "create": lambda params: jax.jit(fd.eval_step)(
        fd.TrainState.create(apply_fn=make()[1].apply, params=params, tx=optax.sgd(0.1)), BATCH
    ),
}
TOO_MANY = ("a head too many", "a bias too many")
CASES_OF_PARAMS = [
    (name, form)
    for name in OF_PARAMS
    for form in PARAMS
    # Only where there is a model are there dtypes and sizes to compare with.
    if not (name == "unstack_layers" and form in ("one layer", "integers", "complex", "float64", *TOO_MANY))
]


def test_params_of_another_model_are_refused_whatever_it_is_that_this_one_does_not_read():
    """All parameters that any model has, each given to every model that does not have it."""
    # Between them these have every parameter, and each is without some.
    others = [
        *({"norm_position": value} for value in ("pre", "post", "both", "output")),
        {"feed_forward": "swiglu", "qk_norm": "head", "tied_head": False, "head_bias": True, "final_norm": False},
        {"positions": "rotary", "norm_bias": True, "embedding_norm": True, "norm_position": "both"},
        {"qk_norm": "each_head", "qk_norm_kind": "layernorm", "qk_norm_bias": True},
        {"attention_in_bias": True, "attention_out_bias": True, "mlp_bias": True, "feed_forward": "geglu"},
    ]
    plain = {"norm_bias": False, "attention_in_bias": False, "attention_out_bias": False, "mlp_bias": False}
    configs = [dataclasses.replace(make()[0].model, **plain | other) for other in others]
    own = [flatten_dict(abstract_params(fd.Decoder(config)), sep="/") for config in configs]
    everything = {path: np.zeros((), np.float32) for params in own for path in params}
    assert all(any(path.endswith(end) for path in everything) for end in READ_WITH)
    for config, params in zip(configs, own, strict=True):
        check_params(config, unflatten_dict({path: everything[path] for path in params}, sep="/"))
        for path in everything.keys() - params:
            with pytest.raises(ValueError, match=f"{path}.* does not read"):
                check_params(config, unflatten_dict({path: everything[path]}, sep="/"))


@pytest.mark.short(
    *(
        "apply-integers",
        "apply-complex",
        "apply-a head too many",
        "apply-a bias too many",
        "generate-list",
        "generate-by number",
    ),
    *("generate-variables", "capture-list", "unstack_layers-by number", "create-variables", "create-nothing"),
)
@pytest.mark.parametrize(("name", "form"), CASES_OF_PARAMS, ids=[f"{name}-{form}" for name, form in CASES_OF_PARAMS])
def test_params(name, form):
    change, message = PARAMS[form]
    params = make()[2].params
    if message is None:
        near(jax.tree.leaves(OF_PARAMS[name](change(params))), jax.tree.leaves(OF_PARAMS[name](params)))
    else:
        with pytest.raises(Exception, match=message):  # Flax's own errors are of classes of their own
            OF_PARAMS[name](change(params))


# --- Other arguments ---


def generate(**options):
    _, model, state = make()
    return fd.generate(model, state.params, IDS_BT[:, :3], **{"max_new_tokens": 1, "temperature": 0} | options)


def apply(**options):
    return make()[1].apply({"params": make()[2].params}, IDS_BT, **options)


def cache(overrides=None, batch_size=B, capacity=T):
    return fd.empty_cache(fd.load_config(overrides=SIZES | (overrides or {})).model, batch_size, capacity)


def init(**options):
    config, model, _ = make()
    arguments = {"model": model, "config": config, "rng": jax.random.key(0)} | options
    return fd.init_state(arguments.pop("model"), arguments.pop("config"), **arguments)


ARGUMENTS = {
    "generate": (
        generate,
        {
            "max_new_tokens": [1.0, True, -1, "1", None],
            "num_samples": [1.5, 0],
            "end_ids": [[3.7], [V], [-1], 2, None, [[1]]],
            "bad_tokens": [[3.5], 3],
            "forced_tokens": [[3.5], [V]],
            "vocab_size": [10.5, 0],
            "temperature": ["1", None, np.nan, -1],
            "top_k": [2.5, -1],
            "top_p": ["x", 0],
            "repetition_penalty": [None],
            "draft": [3, fd.PromptLookup(num_tokens=2.5)],
            "prefix": [3],
        },
    ),
    "generate drawn": (lambda **options: generate(temperature=1, **options), {"rng": [None, 0, "x", np.zeros(5)]}),
    "complete": (
        lambda **options: fd.complete(make()[1], make()[2].params, IDS_BT, 1, temperature=0, **options),
        {"top_logprobs": [-1, 2.5, V + 1]},
    ),
    "init_state": (
        init,
        {
            "rng": [0, None, np.zeros(5, np.uint32), jax.random.split(jax.random.key(0))],
            "config": [None, {}, fd.ModelConfig()],
            "model": [fd.ModelConfig(), fd.Decoder],
            "mesh": [2],
        },
    ),
    "empty_cache": (
        lambda **options: fd.empty_cache(
            **{"config": make()[0].model, "batch_size": 1, "capacity": 1, "rollback_slots": 0} | options
        ),
        {"config": [fd.Config()], "batch_size": [0, 1.0, True], "capacity": [0, -3, 1.5], "rollback_slots": [-1]},
    ),
    "apply": (
        apply,
        {
            "cache": [5, cache(batch_size=1), cache({"model.num_layers": 1}), cache({"model.embed_dim": 16})],
            "num_tokens_B": [2, [1.0, 2.0], [1], [-1, 1], [1, 9]],
            "positions_BT": [np.full((B, T), -1), np.full((B, T), 7)],
        },
    ),
    "load_config": (
        fd.load_config,
        {"path": [5, b"x", ""], "overrides": [["model.num_layers=2"], {3: 4}, {None: 1}, {"model.num_layers": 2.0}]},
    ),
    "load": (fd.load, {"path": [5, None, b"x", "", "/no/such/folder"]}),
    "compare": (lambda path="run", **options: fd.compare(path, **options), {"path": [5, None, ""], "model": [3]}),
    "encode": (ByteTokenizer().encode, {"text": [b"ab", None, 5, ["a"]]}),
    "encode_array": (
        lambda dtype: make_tokenizer("bpe", "hello", 260).encode_array("hello", dtype),
        {"dtype": [np.uint8, np.int8, np.float32, np.bool_]},
    ),
    "decode": (
        ByteTokenizer().decode,
        {"ids": [[1.0], [True, None], [-1], [256], [2**70], [[1]], 5, None, "12", np.ones((1, 2), int), np.ones(2)]},
    ),
    "Decoder": (
        lambda config: fd.Decoder(config).init(jax.random.key(0), IDS_BT),
        {"config": [None, {}, fd.Config(), fd.ModelConfig()]},
    ),
    "train_step": (lambda batch: fd.train_step(make()[2], batch), {"batch": [None, (IDS_BT, IDS_BT), {}]}),
    "plot_attention": (
        lambda **options: fd.plot_attention(**{"weights": np.eye(2), "labels": "ab", "path": "no.txt"} | options),
        {"path": ["a.txt"], "weights": [np.eye(2) * 2, np.zeros((0, 0)), [["a"]]], "labels": ["a"]},
    ),
}
CASES_OF_ARGUMENTS = [
    pytest.param(function, name, value, id=f"{function}-{name}-{index}")
    for function, (_, names) in ARGUMENTS.items()
    for name, values in names.items()
    for index, value in enumerate(values)
]


# Python, NumPy and JAX raise a ValueError, too, in words of their own.
OUR_WORDS = "must|there is no|needs|the cache|in the vocabulary|vocab_size is not|the batch has no|cannot hold"
OUR_WORDS += "|valid integer|labels: |weights: "


@pytest.mark.parametrize(("function", "name", "value"), CASES_OF_ARGUMENTS)
def test_an_argument_that_is_none_is_refused_in_two_lines(function, name, value):
    with pytest.raises(ValueError, match=OUR_WORDS) as caught:
        ARGUMENTS[function][0](**{name: value})
    message = str(caught.value)
    assert len(message.splitlines()) <= 2 and len(message) < 400 and "0x" not in message, message


# Numbers of NumPy and JAX are numbers: the result is that of Python's.
SCALARS = {
    "max_new_tokens": (lambda number: generate(max_new_tokens=number), 2),
    "num_samples": (lambda number: generate(num_samples=number), 2),
    "top_k": (lambda number: generate(temperature=1, rng=jax.random.key(0), top_k=number), 2),
    "end_ids": (lambda number: generate(end_ids=[number]), 2),
    "forced_tokens": (lambda number: generate(forced_tokens=np.asarray([number])), 2),
    "temperature": (lambda number: generate(temperature=number, rng=jax.random.key(0)), 2),
    "override": (lambda number: fd.load_config(overrides={"model.num_layers": number}).model.num_layers, 2),
    "override of a rate": (lambda x: fd.load_config(overrides={"optimizer.weight_decay": x}).optimizer, 2),
    "capacity": (lambda number: fd.empty_cache(make()[0].model, 1, number), 2),
    "decode": (lambda number: np.frombuffer(ByteTokenizer().decode([number]).encode(), np.uint8), 65),
}


@pytest.mark.short("numpy-max_new_tokens", "jax-override", "numpy-override", "jax-decode", "numpy-capacity")
@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("kind", [np.int32, jnp.int32], ids=["numpy", "jax"])
def test_a_number_may_be_of_numpy_or_jax(kind, name):
    compute, number = SCALARS[name]
    found, expected = compute(kind(number)), compute(number)
    if name.startswith("override"):
        assert found == expected
    else:
        same(found, expected)


@pytest.mark.full
def test_both_kinds_of_random_keys_give_the_same_numbers():
    same(*(init(rng=rng).params["embedding"] for rng in (jax.random.key(3), jax.random.PRNGKey(3))))


# --- Transformations ---


def mean_loss(params):
    sums = fd.eval_step(make()[2].replace(params=params), BATCH)
    return sums["loss"] / sums["num_tokens"]


def over_devices(map_step):
    """The metrics of a step whose rows are on two devices."""
    state = make()[2]
    return jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, map_step(state))


def pmap(state):
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    step = jax.pmap(functools.partial(fd.train_step, axis_name="batch"), axis_name="batch", devices=jax.devices()[:2])
    return step(copies, jax.tree.map(lambda rows: rows.reshape(2, 1, T), BATCH))[1]


def shard_map(state, check_vma):
    mesh, all_of_it = Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec()
    step = functools.partial(fd.train_step, axis_name="batch")
    specs = {"in_specs": (all_of_it, PartitionSpec("batch")), "out_specs": all_of_it}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))(state, BATCH)[1]


def vmap_over_seeds():
    rngs = jax.random.split(jax.random.key(0), 2)
    states = jax.vmap(lambda rng: init(rng=rng))(rngs)
    metrics = jax.jit(jax.vmap(fd.train_step, in_axes=(0, None)))(states, BATCH)[1]
    return [jax.tree.map(lambda leaf: leaf[1], metrics), fd.train_step(init(rng=rngs[1]), BATCH)[1]]


def plain_step():
    return fd.train_step(make()[2], BATCH)[1]


def scanned():
    batches = jax.tree.map(lambda rows: np.stack([rows] * 2), BATCH)
    metrics = jax.lax.scan(fd.train_step, make()[2], batches)[1]
    return jax.tree.map(lambda leaf: leaf[0], metrics)


TRANSFORMED = {
    "jit": lambda: [jax.jit(fd.train_step)(make()[2], BATCH)[1], plain_step()],
    "grad": lambda: [optax.tree.norm(jax.grad(mean_loss)(make()[2].params)), plain_step()["gradient_norm"]],
    "checkpoint": lambda: [jax.checkpoint(fd.train_step)(make()[2], BATCH)[1], plain_step()],
    "scan": lambda: [scanned(), plain_step()],
    "vmap over seeds": vmap_over_seeds,
    "vmap over rows": lambda: [
        jax.vmap(lambda ids_T: OF_IDS["apply"](ids_T[None])[0])(jnp.asarray(IDS_BT)),
        OF_IDS["apply"](IDS_BT),
    ],
    "pmap": lambda: [over_devices(pmap), plain_step()],
    "shard_map": lambda: [over_devices(functools.partial(shard_map, check_vma=True)), plain_step()],
    "shard_map unchecked": lambda: [over_devices(functools.partial(shard_map, check_vma=False)), plain_step()],
    "accumulation": lambda: [jax.jit(fd.train_step)(make()[2].replace(accumulation_steps=2), BATCH)[1], plain_step()],
}


@pytest.mark.full
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transformed_function_gives_the_plain_numbers(name):
    near(*TRANSFORMED[name]())


ABSTRACT = {
    "train_step": lambda: (fd.train_step, make()[2], BATCH),
    "eval_step": lambda: (fd.eval_step, make()[2], BATCH),
    "init_state": lambda: (lambda: init(),),
    "apply": lambda: (make()[1].apply, {"params": make()[2].params}, IDS_BT),
    "capture": lambda: (lambda ids: fd.capture(make()[1], make()[2].params, ids), IDS_BT),
    "attribute": lambda: (lambda ids: fd.attribute(make()[1], make()[2].params, ids, ids), IDS_BT),
    "head_scores": lambda: (fd.head_scores, weights(), IDS_BT),
    "unstack_layers": lambda: (fd.unstack_layers, make()[2].params),
    "empty_cache": lambda: (lambda: fd.empty_cache(make()[0].model, B, T),),
}


@pytest.mark.short("eval_step", "empty_cache", "unstack_layers")
@pytest.mark.parametrize("name", ABSTRACT)
def test_shapes_are_known_without_computing(name):
    function, *arguments = ABSTRACT[name]()
    expected = jax.eval_shape(function, *arguments)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), arguments)
    found = jax.eval_shape(function, *abstract)
    assert jax.tree.leaves(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found)) == jax.tree.leaves(
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    )


# Not "jax_debug_infs": the scores of masked keys are minus infinity, and so are the logits of tokens never drawn.
SWITCHES = ("jax_debug_nans", "jax_disable_jit", "jax_enable_checks", "jax_check_tracer_leaks")
SWITCHES += ("jax_enable_x64",)
SWITCHED = {
    "apply": lambda: OF_IDS["apply"](IDS_BT),
    "train_step": lambda: jax.jit(fd.train_step)(make()[2], BATCH)[1],
    "accumulation": lambda: jax.jit(fd.train_step)(make()[2].replace(accumulation_steps=2), BATCH)[1],
    "generate": lambda: generate(max_new_tokens=3),
    "draft": lambda: generate(max_new_tokens=3, draft=fd.PromptLookup(num_tokens=2)),
    "draft drawn": lambda: (
        generate(max_new_tokens=3, temperature=1, rng=jax.random.key(0), draft=fd.PromptLookup(num_tokens=2)).shape
    ),
    "complete": lambda: [sample.tokens for row in complete_all() for sample in row],
    "capture": lambda: OF_IDS["capture"](IDS_BT),
    "attribute": lambda: OF_IDS["attribute"](IDS_BT),
    "prefill": lambda: OF_PARAMS["prefill"](make()[2].params),
    "unstack_layers": lambda: fd.unstack_layers(make()[2].params),
}


def complete_all():
    return fd.complete(make()[1], make()[2].params, IDS_BT, 2, temperature=0, top_logprobs=2)


@pytest.mark.full
@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_of_jax_changes_no_number(switch, name):
    make(), weights()
    expected = jax.tree.map(np.asarray, SWITCHED[name]())
    with jax.numpy_dtype_promotion("standard"):
        jax.config.update(switch, True)
        try:
            found = SWITCHED[name]()
        finally:
            jax.config.update(switch, False)
    near(found, expected)


@pytest.mark.full
def test_a_compiled_step_moves_nothing_between_host_and_device():
    """Outside of jit JAX itself sends the numbers of a program one by one, which the guard refuses."""
    step, state, batch = jax.jit(fd.train_step), make()[2], jax.device_put(BATCH)
    step(state, batch)
    with jax.transfer_guard("disallow"):
        step(state, batch)


@pytest.mark.full
@pytest.mark.parametrize("chunk_tokens", [0, 3])
def test_a_hessian_vector_product_has_the_digits_of_its_dtype(chunk_tokens):
    def product(dtype):
        settings = {"model.dtype": dtype, "training.loss_chunk_tokens": chunk_tokens if dtype == "float32" else 0}
        config = fd.load_config(overrides=SIZES | {"model.vocab_size": V} | settings)
        model, drawn = fd.Decoder(config.model), np.random.default_rng(0)
        state = fd.init_state(model, config, rng=jax.random.key(0))
        params, changes = (
            jax.tree.map(lambda leaf: drawn.normal(0, 0.1, leaf.shape).astype(np.float32).astype(dtype), state.params)
            for _ in range(2)
        )

        def loss(params):
            return fd.eval_step(state.replace(params=params), BATCH)["loss"]

        leaves = jax.tree.leaves(
            jax.jit(lambda p, change: jax.jvp(jax.grad(loss), (p,), (change,))[1])(params, changes)
        )
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    with jax.enable_x64(True):
        ours, exact = product("float32"), product("float64")
    assert 1e-9 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 2e-6


def test_every_public_function_is_in_a_table():
    """Or holds no array and is tested where it is: errors, configs, files that are read, and pictures of a log."""
    elsewhere = {"FaultError", "UserError", "Config", "ModelConfig", "History", "read_history", "plot_losses"}
    elsewhere |= {"Attribution", "KVCache", "Draft", "PromptLookup", "write_lens_page"}
    elsewhere |= {"adamw_from_torch", "adamw_to_torch", "register_family", "load_corpus", "harness_model"}
    tables = {*OF_IDS, *OF_PARAMS, *ARGUMENTS, *SWITCHED, "TrainState"}
    names = {re.sub(" .*", "", name) for name in tables}
    assert set(fd.__all__) - names - elsewhere == set()
