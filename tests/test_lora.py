"""Low-rank adapters: what a frozen matrix learns, in a step, in a run, and in what is made of a run."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_start import QUICK, train_and_convert
from test_start import SIZES as TINY

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import Config, LoraConfig, MeshConfig, ModelConfig, TrainingConfig
from flax_decoder.nn.lora import init_adapters, merged, with_adapters
from flax_decoder.parallel.mesh import mesh_of, sharding_of, use_mesh
from flax_decoder.planning.plan import make_plan
from flax_decoder.training import loop
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.run_folder import BASE_MANIFEST
from flax_decoder.training.step import state_maker, state_shardings

SIZES = {"vocab_size": 29, "context_length": 11, "num_layers": 2, "embed_dim": 24, "num_heads": 4, "num_kv_heads": 2}
LLAMA = ModelConfig(**SIZES, mlp_dim=37, feed_forward="swiglu", positions="rotary", tied_head=False)
LORA = LoraConfig(rank=5, alpha=7.0)


def config_of(model=LLAMA, lora=LORA, **training):
    return Config(model=model, lora=lora, training=TrainingConfig(num_steps=10, batch_size=4, **training))


@functools.cache
def base_of(model):
    """Parameters of which none are zeros or ones."""
    shapes = jax.eval_shape(fd.Decoder(model).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return random_like(shapes, 1, 0.2)


def random_like(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype), tree)


def batch_of(model, num_rows=4):
    tokens = np.random.default_rng(3).integers(0, model.vocab_size, (num_rows, model.context_length + 1), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def trained_state(model=LLAMA, lora=LORA, tx=None, **training):
    """A state whose adapters add something, in each matrix."""
    config = config_of(model, lora, **training)
    state = fd.init_state(fd.Decoder(model), config, rng=jax.random.key(0), params=base_of(model))
    state = state.replace(params=random_like(state.params, 2, 0.1))
    return state if tx is None else state.replace(tx=tx, opt_state=tx.init(state.params))


def test_a_step_moves_adapters_alone_along_their_gradients():
    """Against the gradient of the whole matrix W + s A B: that of A is s G B^T, that of B is s A^T G."""
    descend = optax.sgd(1.0)
    model = dataclasses.replace(LLAMA, scan_layers=True)  # quicker to compile
    state, scale = trained_state(model, tx=descend), LORA.adapter.scale
    whole = merged(state.frozen, state.params, scale)
    plain = fd.TrainState.create(apply_fn=fd.Decoder(model).apply, params=whole, tx=descend)
    step = jax.jit(fd.train_step)
    after, metrics = step(state, batch_of(LLAMA))
    plain_after, plain_metrics = step(plain, batch_of(LLAMA))
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)
    gradients = jax.tree.map(lambda old, new: np.asarray(old - new), whole["layers"], plain_after.params["layers"])
    names = {"attention": ("query", "key", "value", "out"), "feed_forward": ("up", "gate", "down")}
    assert jax.tree.structure(after.params) == jax.tree.structure(
        {"layers": {part: {name: {"lora_a": 0, "lora_b": 0} for name in own} for part, own in names.items()}}
    )
    for part, own in names.items():
        for name in own:
            before, now = (s.params["layers"][part][name] for s in (state, after))
            a, b = np.asarray(before["lora_a"]), np.asarray(before["lora_b"])
            L, rank = b.shape[:2]
            a_LIR, b_LRO = a.reshape(L, -1, rank), b.reshape(L, rank, -1)
            g_LIO = gradients[part][name]["kernel"].reshape(L, a_LIR.shape[1], -1)
            for half, wanted in (
                ("lora_a", scale * g_LIO @ b_LRO.swapaxes(1, 2)),
                ("lora_b", scale * a_LIR.swapaxes(1, 2) @ g_LIO),
            ):
                found = np.asarray(before[half] - now[half])
                np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=2e-6, err_msg=f"{name} {half}")


def test_new_adapters_add_nothing_and_targets_choose():
    lora = LoraConfig(rank=4, targets=("query", "down"))
    adapters = init_adapters(lora, base_of(LLAMA), jax.random.key(0))
    shapes = jax.tree.map(np.shape, adapters["layers"])
    assert shapes == {
        "attention": {"query": {"lora_a": (2, 24, 4), "lora_b": (2, 4, 4, 6)}},
        "feed_forward": {"down": {"lora_a": (2, 37, 4), "lora_b": (2, 4, 24)}},
    }
    a = np.asarray(adapters["layers"]["feed_forward"]["down"]["lora_a"])
    assert 0.9 < np.abs(a).max() * 37**0.5 <= 1 and abs(a.mean()) < 0.02
    unchanged = merged(base_of(LLAMA), adapters, 3.0)
    jax.tree.map(np.testing.assert_array_equal, unchanged, base_of(LLAMA))
    assert LoraConfig(rank=16, alpha=8.0, rank_stabilised=True).adapter.scale == 2.0


def test_params_with_adapters_need_a_model_that_reads_them():
    shapes = jax.eval_shape(state_maker(fd.Decoder(LLAMA), config_of()), jax.random.key(0))
    with pytest.raises(ValueError, match="the params have adapters: make a Decoder"):
        jax.eval_shape(fd.Decoder(LLAMA).apply, {"params": shapes.all_params}, batch_of(LLAMA)["inputs"])
    with pytest.raises(fd.UserError, match="not those of the model"):
        others = base_of(LLAMA) | {"x": 1}
        fd.init_state(fd.Decoder(LLAMA), config_of(), rng=jax.random.key(0), params=others)


WAYS = {
    "scan": {"scan_layers": True},
    "remat dots": {"remat": "dots"},
    "scan, remat full": {"scan_layers": True, "remat": "full"},
    "attention remat": {"remat": "attention"},
    "biases": {"attention_in_bias": True, "attention_out_bias": True, "mlp_bias": True, "feed_forward": "gelu"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_through_the_layers_agree(way):
    model = dataclasses.replace(LLAMA, **WAYS[way])
    state, inputs = trained_state(model), batch_of(model)["inputs"]
    alike = functools.partial(np.testing.assert_allclose, atol=2e-6 if model.dtype == "float32" else 0.1)
    one = state.apply_fn({"params": state.all_params}, inputs)
    alike(fd.Decoder(model).apply({"params": merged(state.frozen, state.params, LORA.adapter.scale)}, inputs), one)
    alike(state.apply_fn({"params": fd.unstack_layers(state.all_params)}, inputs), one)
    reference = dataclasses.replace(model, scan_layers=False, remat="none")
    step = jax.jit(fd.train_step)
    after, other = step(state, batch_of(model))[0], step(trained_state(reference), batch_of(model))[0]
    jax.tree.map(alike, after.params, other.params)


@pytest.mark.full
def test_dropout_acts_on_adapters_alone():
    state = trained_state(lora=dataclasses.replace(LORA, dropout=0.5))
    inputs = batch_of(LLAMA)["inputs"]
    call = functools.partial(state.apply_fn, {"params": state.all_params}, inputs)
    plain = call()
    dropped = [call(deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3 < np.abs(dropped[0] - plain).max()
    silent = with_adapters(state.frozen, jax.tree.map(jnp.zeros_like, state.params))
    base = fd.Decoder(LLAMA).apply({"params": state.frozen}, inputs)
    found = state.apply_fn({"params": silent}, inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(found, base, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 8, 1, 1), (4, 1, 1, 2), (2, 1, 2, 2), (1, 4, 2, 1)])
def test_meshes_train_as_one_device(shape):
    model = dataclasses.replace(LLAMA, vocab_size=32, mlp_dim=40, context_length=12)
    training = {"accumulation_steps": 1}
    losses = []
    for devices, sizes in ((jax.devices()[:1], (1, 1, 1, 1)), (jax.devices()[: np.prod(shape)], shape)):
        mesh = mesh_of(devices, *sizes)
        with use_mesh(mesh):
            state = fd.init_state(
                fd.Decoder(model), config_of(model, **training), rng=jax.random.key(0), mesh=mesh, params=base_of(model)
            )
            adapters = random_like(state.params, 2, 0.1)
            state = state.replace(params=jax.device_put(adapters, state_shardings(mesh, adapters)))
            kernel, a = (state.all_params["layers"]["attention"]["query"][name] for name in ("kernel", "lora_a"))
            assert a.sharding.spec[:2] == kernel.sharding.spec[:2]
            batch = jax.device_put(batch_of(model, 8), sharding_of(mesh, "batch", "length"))
            step = jax.jit(fd.train_step)
            found = []
            for _ in range(3):
                state, metrics = step(state, batch)
                found.append(float(metrics["loss"]))
        losses.append(found)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


@pytest.mark.full
def test_a_plan_counts_adapters_and_what_is_frozen():
    lora = LoraConfig(rank=1)
    whole, adapted = (make_plan(config_of(lora=one), jax.devices()[:1]) for one in (LoraConfig(), lora))
    num_adapters = sum(leaf.size for leaf in jax.tree.leaves(trained_state(lora=lora).params))
    assert adapted.parameters == whole.parameters + num_adapters
    assert adapted.memory.params == 4 * adapted.parameters
    assert 8 * num_adapters <= adapted.memory.optimizer < 8 * num_adapters + 100
    assert adapted.model_flops < whole.model_flops
    across = make_plan(dataclasses.replace(config_of(), mesh=MeshConfig(fsdp=4)), jax.devices()[:4])
    assert 0 < across.paper_bytes["reduce-scatter"] < across.paper_bytes["all-gather"] / 4


# --- Runs ---

TUNE = ["train", *QUICK, "--training.num-steps=4", "--run.folder=tuned", "--data.path=other.txt", "--lora.rank=3"]
TUNE += ["--optimizer.learning-rate=0.003"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_and_convert(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logged(folder, name):
    return {row["step"]: row[name] for row in read_metrics(Path(folder, "metrics.jsonl")) if name in row}


def arrays_of(folder):
    return jax.tree.map(np.asarray, fd.load(folder)[1])


@pytest.mark.full
@pytest.mark.parametrize("source", ["run", "hf"])
def test_a_run_of_adapters_holds_all_it_needs(source, here, capsys):
    assert main([*TUNE, f"--run.start-from={source}", "--lora.dropout=0.1"]) == 0
    base = arrays_of(source)
    jax.tree.map(np.testing.assert_array_equal, arrays_of("tuned/base"), base)
    shutil.rmtree(source)
    assert main(["train", "tuned/config.toml", "--training.num-steps=6"]) == 0
    again = ["--run.folder=straight", f"--run.start-from={here / 'tuned/base'}", "--lora.dropout=0.1"]
    assert main([*TUNE, *again, "--training.num-steps=6"]) == 0
    # The schedule of the first four steps was another, so only the first steps of both are alike.
    tuned, straight = logged("tuned", "val_loss"), logged("straight", "val_loss")
    assert tuned[0] == straight[0] and tuned[6] < tuned[0]
    capsys.readouterr()
    assert main(["verify", "tuned"]) == 0
    told = capsys.readouterr().out
    assert "tuned/base: is that of the adapters" in told and "tuned/base/checkpoints/0" in told
    saved = sum(file.stat().st_size for file in Path("tuned/checkpoints/6/params").rglob("*") if file.is_file())
    assert saved < sum(file.stat().st_size for file in Path("tuned/base/checkpoints/0").rglob("*") if file.is_file())
    for command in (
        ["eval", "tuned", "other.txt"],
        ["generate", "tuned", "--prompt=To", "--max-new-tokens=3"],
        ["lens", "tuned", "--prompt=To be", "--out=page.html"],
        ["convert", "tuned", "whole", "--merge"],
    ):
        assert main(command) == 0
    kernels = [
        arrays_of(folder)["layers"]["feed_forward"]["down"]["kernel"] for folder in ("whole", "tuned", "tuned/base")
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[1] != kernels[2]).any()
    evaluated = read_metrics(Path("tuned/metrics.jsonl"))[-1]["val_loss"]
    assert main([*TUNE, "--lora.rank=none", "--run.folder=next", "--run.start-from=tuned"]) == 0
    np.testing.assert_allclose(read_metrics(Path("next/metrics.jsonl"))[0]["val_loss"], evaluated, rtol=1e-5)


@pytest.mark.full
def test_a_run_that_is_interrupted_goes_on_with_the_same_numbers(here, monkeypatch):
    arguments = [*TUNE, "--run.start-from=run", "--lora.dropout=0.1", "--training.num-steps=6"]
    arguments += ["--training.log-every=1", "--training.save-every=2"]
    assert main([*arguments, "--run.folder=straight"]) == 0
    steps = []

    def killed(state, mesh, before=loop.jit_step):
        take = before(state, mesh)

        def one(state, batch):
            steps.append(int(state.step))
            if len(steps) == 4:  # after the checkpoint of step 2
                raise KeyboardInterrupt
            return take(state, batch)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(loop, "jit_step", killed)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert logged("straight", "train_loss") == logged("tuned", "train_loss")
    jax.tree.map(np.testing.assert_array_equal, arrays_of("straight"), arrays_of("tuned"))


@pytest.mark.full
def test_another_base_is_refused(here, capsys):
    for run in ("tuned", "other"):
        assert main([*TUNE, "--run.start-from=run", f"--run.folder={run}", "--training.num-steps=2"]) == 0
    another = ["--data.path=input.txt", "--run.folder=run2", "--training.seed=3", "--training.num-steps=2"]
    assert main(["train", *TINY, *QUICK, *another]) == 0
    assert main([*TUNE, "--run.start-from=run2", "--run.folder=third", "--training.num-steps=2"]) == 0
    shutil.rmtree("tuned/base")
    shutil.copytree("third/base", "tuned/base")
    capsys.readouterr()
    for command in ("verify tuned", "generate tuned --prompt=To", "convert tuned adapter", "train tuned/config.toml"):
        assert main(command.split()) == 1
        assert f"{BASE_MANIFEST}: has changed" in "".join(capsys.readouterr())
    assert not Path("adapter").exists()
    # A flipped bit in the weights of the base.
    files = [path for path in Path("other/base/checkpoints/0/params").rglob("*") if path.is_file()]
    weights = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["generate", "other", "--prompt=To"]) == 1
    assert "is damaged" in capsys.readouterr().err
    # Another strength of the adapters than that of the training.
    path = Path("third/config.toml")
    path.write_text(path.read_text().replace("alpha = 16.0", "alpha = 32.0"))
    assert main(["generate", "third", "--prompt=To"]) == 1
    assert "lora.alpha is 32.0, but the checkpoints were saved with 16.0" in capsys.readouterr().err


BEFORE_JAX = {
    "no model": (["--run.start-from=none"], "lora.rank = 3 needs a trained model: give --run.start-from PATH"),
    "rank 0": (["--lora.rank=0"], "lora.rank = 0: input should be greater than 0"),
    "unknown target": (['--lora.targets=["qkv"]'], "lora.targets = 'qkv': input should be 'query', 'key'"),
    "muon": (["--optimizer.name=muon"], 'lora.rank needs "adamw"'),
}


@pytest.mark.parametrize("kind", BEFORE_JAX)
def test_what_cannot_be_is_refused(kind, refused):
    changes, message = BEFORE_JAX[kind]
    assert message in refused("train", "--lora.rank=3", *changes)


REFUSED = {
    "no gate": (['--lora.targets=["gate"]'], "lora.targets: the model has no gate, only key, out, query, value, down"),
    "other settings": (["--run.folder=begun", "--lora.alpha=8"], "lora.alpha: saved 16.0, asked 8.0"),
    "whole weights": (["--run.folder=begun", "--lora.rank=none"], "lora.rank: saved 3, asked None"),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", REFUSED)
def test_what_contradicts_is_refused(kind, here, refused):
    changes, message = REFUSED[kind]
    if "--run.folder=begun" in changes:
        assert main([*TUNE, "--run.start-from=run", "--run.folder=begun"]) == 0
    assert message in refused(*TUNE, "--run.start-from=run", *changes)


@pytest.mark.full
def test_other_weights_than_at_the_start_are_refused(here, monkeypatch, refused):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_steps", killed)
        assert main([*TUNE, "--run.start-from=run"]) == 130
    record = json.loads(Path("tuned/start_from.json").read_text())
    assert "model_type" not in record
    assert main(["train", "run/config.toml", *QUICK, "--training.num-steps=5"]) == 0
    assert "has now; give another --run.folder" in refused(*TUNE, "--run.start-from=run")
