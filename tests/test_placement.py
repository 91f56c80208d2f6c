"""Training on a mesh: the same batches, state and numbers as on one device, correctly sharded."""

import functools

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.data.batches import train_batch
from flax_decoder.data.splits import MixedSplit, Split
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.parallel.zigzag import zigzag
from flax_decoder.training import loop
from flax_decoder.training.batch import checked_batch
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import jit_step, state_shardings

B, T, V, NUM_STEPS = 24, 16, 34, 3
NUM_DEVICES = 8
TOKENS = np.random.default_rng(0).integers(0, V, 5003).astype(np.uint16)
STARTS = np.arange(0, 5003, 7)  # of documents
SIZES = {
    "model.vocab_size": V,
    "model.context_length": T,
    "model.num_layers": 2,
    "model.scan_layers": True,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.embed_dim": 16,
    "model.mlp_dim": 24,
    "training.batch_size": B,
    "training.num_steps": 100,
    "optimizer.warmup_steps": 0,
    # Adam is nearly invariant to the scale of gradients; with a large epsilon it is not, and tiny ones stay small.
    "optimizer.epsilon": 1e-3,
}
MODERN = {
    "model.positions": "rotary",
    "model.norm": "rmsnorm",
    "model.feed_forward": "swiglu",
    "model.qk_norm": "head",
    "model.tied_head": False,
    "model.head_bias": True,
    "model.dropout": 0.2,
}
CLASSIC = {
    "model.norm_bias": True,
    "model.attention_in_bias": True,
    "model.attention_out_bias": True,
    "model.mlp_bias": True,
    "model.remat": "full",
    "model.window": 6,
    "training.z_loss": 1e-3,
}
IN_PARTS = {"training.accumulation_steps": 3}
MUON = {"optimizer.name": "muon"}


def make_config(*changes, **mesh):
    """SIZES with some changes, and mesh axes by name."""
    overrides = {f"mesh.{axis}": size for axis, size in mesh.items()}
    return fd.load_config(None, functools.reduce(dict.__or__, changes, SIZES) | overrides)


def one_mesh(config, num_devices=NUM_DEVICES):
    return make_mesh(config, jax.devices()[:num_devices])


def place(config, mesh, step, has_mask=False):
    return place_batch(Split(TOKENS, STARTS, 1, has_mask), config.training, T, mesh, step)


def expected_batch(step):
    return train_batch(TOKENS, seed=0, step=step, batch_size=B, context_length=T)


@functools.cache  # layouts share the run on one device
def run(changes, num_devices=NUM_DEVICES, **mesh):
    """Metrics and final parameters after a few steps; `changes` are pairs, so as to be hashable."""
    config = make_config(dict(changes), **mesh)
    devices = one_mesh(config, num_devices)
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=devices)
    take_step, metrics = jit_step(state, devices), []
    with use_mesh(devices):
        for step in range(NUM_STEPS):
            state, measured = take_step(state, place(config, devices, step))
            metrics.append(jax.device_get(measured))
    return jax.tree.map(lambda *values: np.stack(values), *metrics), jax.device_get(state.params)


# --- The same numbers ---


@pytest.mark.full  # in the short suite, a run does it on two meshes, and test_step.py on one
@pytest.mark.parametrize(
    ("architecture", "changes", "mesh"),
    [
        (MODERN, {}, {}),  # the default: data 8
        (MODERN, {}, {"data": 2, "fsdp": 2, "tensor": 2}),
        (CLASSIC, {}, {"fsdp": 4, "tensor": 2}),
        (CLASSIC, IN_PARTS, {"fsdp": 2, "context": 2, "tensor": 2}),
    ],
    ids=["default", "data fsdp tensor", "fsdp tensor", "in parts on fsdp context tensor"],
)
def test_a_mesh_gives_the_numbers_of_one_device(architecture, changes, mesh):
    metrics, params = run(tuple((architecture | changes).items()), **mesh)
    expected, expected_params = run(tuple(architecture.items()), num_devices=1)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    assert len(set(expected["loss"].tolist())) == NUM_STEPS
    for (path, one), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected_params), strict=True):
        # Sums of float32 in another order.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# --- Batches ---


@pytest.mark.parametrize(
    "mesh", [{}, {"data": 1}, {"data": 4, "tensor": 2}, {"data": 3}, {"data": 2, "fsdp": 4}, {"context": 2, "data": 4}]
)
def test_what_is_in_a_batch_does_not_depend_on_the_devices(mesh):
    config = make_config(**mesh)
    devices = one_mesh(config)
    placed = place(config, devices, 7)
    expected = expected_batch(7)
    assert placed.keys() - {"positions"} == expected.keys()
    rows_here, tokens_here = B // (devices.shape["data"] * devices.shape["fsdp"]), T // devices.shape["context"]
    for name, array in expected.items():
        assert placed[name].dtype == np.int32
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(rows_here, tokens_here)}
        there = np.asarray(placed[name])
        if devices.shape["context"] > 1:  # in another order, and "positions" says in which
            there = np.take_along_axis(there, np.argsort(placed["positions"], axis=-1), axis=-1)
        np.testing.assert_array_equal(there, array)
    assert ("positions" in placed) == (devices.shape["context"] > 1)


def test_each_row_is_read_once_and_only_where_it_is_needed(monkeypatch):
    asked = []

    def record(self, rows, **options):
        asked.append((rows.start, rows.stop))
        return train_batch(self.tokens, rows=rows, **options)

    monkeypatch.setattr(Split, "train_batch", record)
    config = make_config(data=2, fsdp=2, tensor=2)
    jax.block_until_ready(place(config, one_mesh(config), 0))
    assert sorted(asked) == [(0, 6), (6, 12), (12, 18), (18, 24)]  # "inputs" and "targets" of two devices each


def test_a_mixture_is_the_same_on_any_devices():
    config = make_config(data=4, fsdp=2)
    split = MixedSplit((Split(TOKENS, STARTS, 1), Split(TOKENS[::-1], STARTS, 1)), (0.5, 0.5))
    placed = place_batch(split, config.training, T, one_mesh(config), 7)
    expected = split.train_batch(seed=0, step=7, batch_size=B, context_length=T)
    for name, array in expected.items():
        np.testing.assert_array_equal(placed[name], array)


def test_positions_say_where_tokens_stand_and_the_load_is_balanced():
    config = make_config(context=4)
    placed = place(config, one_mesh(config), 0)["positions"]
    looked_at = {shard.device.id: int((shard.data[0] + 1).sum()) for shard in placed.addressable_shards}
    assert set(looked_at.values()) == {T * (T + 1) // 2 // 4}  # tokens that a device's queries see


@pytest.fixture
def _documents(monkeypatch):
    """Batches with documents whose ids come back; one begins where a device's part does."""

    def with_documents(self, rows, **options):
        ids_BT = np.broadcast_to(np.repeat([3, 1, 3, 1], [4, 5, 3, 4]), (B, T))
        return train_batch(self.tokens, rows=rows, **options) | {"segments": ids_BT[rows].astype(np.int32)}

    monkeypatch.setattr(Split, "train_batch", with_documents)


@pytest.mark.usefixtures("_documents")
def test_documents_keep_their_positions_and_borders_where_sequences_are_split():
    config = make_config(context=4)
    placed = {name: np.asarray(array) for name, array in place(config, one_mesh(config), 7).items()}
    order_T = zigzag(T, 4)
    lengths = [4, 5, 3, 4]
    np.testing.assert_array_equal(placed["positions"][0], np.concatenate([np.arange(n) for n in lengths])[order_T])
    np.testing.assert_array_equal(placed["segments"][0], np.repeat([0, 4, 9, 12], lengths)[order_T])
    is_end_T = np.isin(np.arange(T), [3, 8, 11])
    found = np.asarray(checked_batch(placed, V)["mask"])
    np.testing.assert_array_equal(found, np.broadcast_to(~is_end_T[order_T], (B, T)))
    np.testing.assert_array_equal(placed["inputs"], expected_batch(7)["inputs"][:, order_T])


@pytest.mark.full
@pytest.mark.usefixtures("_documents")
@pytest.mark.parametrize("mesh", [{}, {"context": 4, "data": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
@pytest.mark.parametrize("changes", [MODERN | {"model.dropout": 0.0}, CLASSIC | IN_PARTS], ids=["modern", "classic"])
def test_documents_have_the_numbers_of_one_device(changes, mesh):
    run.cache_clear()
    metrics, params = run(tuple(changes.items()), **mesh)
    expected, expected_params = run(tuple(changes.items()), num_devices=1)
    run.cache_clear()
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- State ---


@pytest.mark.parametrize("changes", [{}, MUON], ids=["adamw", "muon"])
def test_moments_lie_where_their_parameters_do(changes):
    config = make_config(changes)
    devices = make_mesh(make_config(changes, data=2, fsdp=2, tensor=2), jax.devices())
    state = jax.eval_shape(lambda rng: fd.init_state(fd.Decoder(config.model), config, rng=rng), jax.random.key(0))
    shardings = state_shardings(devices, state)
    specs = {named(path): sharding.spec for path, sharding in jax.tree.leaves_with_path(shardings.params)}
    shapes = {named(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(state.params)}
    found = []
    for (path, sharding), leaf in zip(
        jax.tree.leaves_with_path(shardings.opt_state), jax.tree.leaves(state.opt_state), strict=True
    ):
        name = named(path)
        if name not in specs:  # counts, and the constants that Muon keeps
            assert sharding.is_fully_replicated and leaf.size <= 3
            continue
        assert sharding.spec == specs[name] and leaf.shape == shapes[name], name
        found.append(name)
    # Two moments of AdamW; Muon has one.
    assert sorted(set(found)) == sorted(specs)
    assert found.count("embedding") == 2 and found.count("layers/feed_forward/up/kernel") == (1 if changes else 2)


def named(path):
    """The name of the parameter at a path in the params or in an optimizer state."""
    names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
    return "/".join(name for name in names if name not in ("muon", "adamw", "adam"))


@pytest.mark.short("adamw")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_fsdp_a_device_holds_its_part_of_the_state(name):
    """With the default model, whose replicated vectors are a small part."""
    changes = {"model.vocab_size": 256, "training.batch_size": 8, "optimizer.name": name, "mesh.fsdp": 8}
    config = fd.load_config(None, changes)
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=one_mesh(config))
    for tree in (state.params, state.opt_state):
        leaves = jax.tree.leaves(tree)
        whole = sum(leaf.nbytes for leaf in leaves)
        for device in jax.devices():
            here = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device]
            assert whole / 8 <= sum(here) <= 1.05 * whole / 8


def test_the_parameters_drawn_do_not_depend_on_the_mesh():
    config = make_config(MODERN, data=2, fsdp=2, tensor=2)
    model = fd.Decoder(config.model)
    spread = fd.init_state(model, config, rng=jax.random.key(5), mesh=one_mesh(config))
    alone = fd.init_state(model, config, rng=jax.random.key(5))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), spread.params, alone.params)
    assert not spread.params["head"].is_fully_replicated


# --- Checkpoints ---


@pytest.mark.full  # another case of it is in tests/faults/test_resume.py
def test_a_run_goes_on_with_the_same_batches_and_losses_on_other_devices(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question:\n" * 40)
    settings = {
        "data.path": str(tmp_path / "text.txt"),
        "data.tokenizer": "byte",
        "model.vocab_size": 258,
        "optimizer.schedule": "constant",
        "training.log_every": 1,
        "training.eval_every": 4,
        "training.sample_tokens": 0,
    }

    def train(folder, num_steps, **mesh):
        changes = {"run.folder": str(tmp_path / folder), "training.num_steps": num_steps}
        assert loop.train(make_config(settings, changes, **mesh), tmp_path / folder) == 0
        return {row["step"]: row for row in read_metrics(tmp_path / folder / "metrics.jsonl")}

    expected = train("alone", 8, data=1)
    assert list(train("moved", 4, data=3)) == [1, 2, 3, 4]
    rows = train("moved", 8, fsdp=2, context=2, tensor=2)
    assert list(rows) == list(expected)
    for step, row in expected.items():
        assert rows[step].keys() == row.keys()
        for name in row.keys() & {"train_loss", "gradient_norm", "val_loss"}:
            assert rows[step][name] == pytest.approx(row[name], rel=1e-5), (step, name)
    _, params, _ = fd.load(tmp_path / "moved")  # and on one device, wherever it was trained
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(params)} == {1}
