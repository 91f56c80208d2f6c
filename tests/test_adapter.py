"""Folders of PEFT: what is written reads back, PEFT computes and trains the same, and other methods are refused."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.model_folder import SETTINGS, change, make_folder
from safetensors.numpy import load_file, save_file

import flax_decoder as fd
from flax_decoder.config import Config, LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flax_decoder.huggingface.adapter import read_adapter, write_adapter
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import read_family
from flax_decoder.loading import convert, load
from flax_decoder.nn.lora import init_adapters, merged, with_adapters
from flax_decoder.nn.params import abstract_params
from flax_decoder.training.step import mean_gradients

LLAMA = ModelConfig(**SETTINGS)
NEOX = dataclasses.replace(LLAMA, num_kv_heads=2, feed_forward="gelu")
GPT2 = ModelConfig(vocab_size=31, context_length=16, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=17)
LORA = LoraConfig(rank=3, alpha=12.0)
WEIGHTS = "adapter_model.safetensors"


def adapters_of(config, lora, seed=0):
    base = abstract_params(fd.Decoder(config))
    like = jax.eval_shape(lambda base: init_adapters(lora, base, jax.random.key(0)), base)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(0.3 * rng.standard_normal(leaf.shape)), like)


def written(folder, config=LLAMA, lora=LORA, family="llama", seed=0):
    folder.mkdir()
    adapters = adapters_of(config, lora, seed)
    write_adapter(folder, config, lora, adapters, FAMILIES[family], "base")
    return adapters


FAMILY_OF = {"llama": LLAMA, "gpt2": GPT2, "phi3": LLAMA, "gpt_neox": NEOX}


@pytest.mark.short("two-gpt2", "all-gpt_neox")
@pytest.mark.parametrize("family", FAMILY_OF)
@pytest.mark.parametrize("targets", [None, ("key", "down")], ids=["all", "two"])
def test_what_is_written_reads_back(family, targets, tmp_path):
    """Also where one tensor holds several matrices: c_attn, qkv_proj, and query_key_value head by head."""
    config, lora = FAMILY_OF[family], dataclasses.replace(LORA, targets=targets, rank_stabilised=targets is not None)
    adapters = written(tmp_path / "adapter", config, lora, family)
    found_lora, found = read_adapter(tmp_path / "adapter", config, FAMILIES[family])
    assert (found_lora.rank, found_lora.alpha, found_lora.adapter) == (3, 12.0, lora.adapter)
    assert sorted(found_lora.targets) == sorted(
        targets or {name for part in adapters["layers"].values() for name in part}
    )
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_a_shared_adapter_of_peft_becomes_one_for_each_matrix(tmp_path):
    """PEFT's adapter of c_attn has one A for query, key and value; modules may have ranks and scales of their own."""
    folder = tmp_path / "adapter"
    written(folder, GPT2, LORA, "gpt2")
    tensors = {name: array for name, array in load_file(folder / WEIGHTS).items() if "mlp" not in name}
    rng = np.random.default_rng(1)
    for name in list(tensors):
        if "c_attn" in name:
            shape = (2, 12) if "lora_A" in name else (36, 2)
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, folder / WEIGHTS)
    change(folder / "adapter_config.json", alpha_pattern={"c_attn": 5})
    lora, found = read_adapter(folder, GPT2, FAMILIES["gpt2"])
    assert lora.rank == 3 and set(lora.targets) == {"query", "key", "value", "out"}
    attention = found["layers"]["attention"]
    for layer, (number, name) in itertools.product(range(2), enumerate(("query", "key", "value"))):
        a, b = (tensors[f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{half}.weight"] for half in "AB")
        wanted = 5 / 2 * (b[12 * number : 12 * (number + 1)] @ a).T
        own = attention[name]
        product = lora.adapter.scale * own["lora_a"][layer] @ own["lora_b"][layer].reshape(3, 12)
        np.testing.assert_allclose(product, wanted, atol=1e-5)


FIELDS = {
    "dora": ({"use_dora": True}, "use_dora = True is more than a LoRA adapter"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is more than"),
    "unknown": ({"kasa_config": {"a": 1}}, "kasa_config = {'a': 1} is more than"),
    "bias": ({"bias": "all"}, "bias = 'all' must be \"none\""),
    "method": ({"peft_type": "IA3"}, "peft_type = 'IA3' must be \"LORA\""),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed the base"),
    "rank 0": ({"r": 0}, "r = 0 must be a whole number from 1"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha = '16' must be a number above 0"),
    "pattern": ({"alpha_pattern": {"(a+)+b": 3}}, "alpha_pattern = {'(a+)+b': 3} must be names of modules"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout = 1.0 must be a number from 0"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_other_methods_are_refused(kind, tmp_path):
    fields, message = FIELDS[kind]
    written(tmp_path / "adapter")
    change(tmp_path / "adapter/adapter_config.json", **fields)
    with pytest.raises(fd.UserError) as refusal:
        read_adapter(tmp_path / "adapter", LLAMA, FAMILIES["llama"])
    assert message in str(refusal.value) and "adapter_config.json: " in str(refusal.value)


def test_tensors_that_do_not_belong_to_the_base_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    written(folder)
    wide, flat = dataclasses.replace(LLAMA, embed_dim=16), dataclasses.replace(LLAMA, num_layers=1)
    for config, family, message in (
        (wide, "llama", r"q_proj has shapes \(3, 14\) and \(20, 3\), but the base has \(20, 16\) there"),
        (flat, "llama", r"tensor \S*layers\.1\.\S+ \(14 in all\) has no matrix in the base"),
    ):
        with pytest.raises(fd.UserError, match=message):
            read_adapter(folder, config, FAMILIES[family])
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if ".1." in name)
    save_file({other: array for other, array in tensors.items() if other != name}, folder / WEIGHTS)
    with pytest.raises(fd.UserError, match=f"tensor {name} is missing"):
        read_adapter(folder, LLAMA, FAMILIES["llama"])
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(fd.UserError, match="holds NaN"):
        read_adapter(folder, LLAMA, FAMILIES["llama"])


@pytest.mark.full
def test_an_adapter_and_its_base_become_a_run(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "base")
    adapters = written(tmp_path / "adapter")
    assert "give it its base" in refused("generate", "adapter", "--prompt=a")
    assert "give the model that it belongs to, --base PATH" in refused("convert", "adapter", "run")
    assert "base: leave out --base" in refused("convert", "base", "run", "--base=base")
    assert "base: has no adapters to merge" in refused("convert", "base", "run", "--merge")
    written(tmp_path / "wide", dataclasses.replace(LLAMA, embed_dim=16))
    assert "but the base has (20, 14) there" in refused("convert", "wide", "run", "--base=base")
    convert("adapter", "run", base="base")
    _, params, _ = load("run")
    whole = merged(load("base")[1], adapters, LORA.adapter.scale)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    convert("run", "again")
    assert (Path("again") / WEIGHTS).read_bytes() == (Path("adapter") / WEIGHTS).read_bytes()
    config = json.loads(Path("again/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    convert("run", "whole", merge=True)
    jax.tree.map(np.testing.assert_array_equal, load("whole")[1], params)
    assert "for which --to nanogpt has no place" in refused("convert", "run", "x.pt", "--to=nanogpt")
    shutil.rmtree("run/base")
    with pytest.raises(fd.FaultError, match=r"0/manifest\.json: cannot be read"):
        load("run")


# --- PEFT itself ---


@pytest.fixture(scope="module")
def peft():
    """Is in no extra: pip install peft==0.21.2 beside the extra `torch`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("peft", reason="needs PEFT: pip install peft==0.21.2")


ALL = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LIKE_LLAMA = ALL | {
    **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 37, "max_position_embeddings": 16},
}
LIKE_NEOX = {name: size for name, size in LIKE_LLAMA.items() if name != "num_key_value_heads"}
PEFT_MODELS = {
    "llama": LIKE_LLAMA,
    "qwen3": LIKE_LLAMA | {"head_dim": 10},
    "gpt2": ALL | {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16},
    "phi3": LIKE_LLAMA,
    "gpt_neox": LIKE_NEOX | {"rotary_pct": 0.34},
}
TOKENS_BT = np.random.default_rng(0).integers(0, 256, (4, 17)).astype(np.int32)


def base_folder(family, folder):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **PEFT_MODELS[family])
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    (make_folder(folder.parent / "tokens") / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder


def open_base(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(module):
    import torch

    with torch.no_grad():
        return module(torch.tensor(TOKENS_BT[:, :-1])).logits.numpy()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank, stabilised", [(4, False), (16, True)])
@pytest.mark.parametrize("family", PEFT_MODELS)
def test_peft_computes_with_our_adapters_and_we_with_its(family, rank, stabilised, peft, tmp_path):
    folder = base_folder(family, tmp_path / "base")
    model, params, _ = load(folder)
    lora = LoraConfig(rank=rank, alpha=12.0, rank_stabilised=stabilised)
    adapters = adapters_of(model.config, lora)
    adapters = jax.tree.map(lambda leaf: leaf / 3, adapters)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model.config, lora, adapters, read_family(folder), str(folder))
    theirs = peft.PeftModel.from_pretrained(open_base(folder), tmp_path / "ours").eval()
    adapted = model.clone(adapter=lora.adapter)
    found = np.asarray(adapted.apply({"params": with_adapters(params, adapters)}, TOKENS_BT[:, :-1]))
    plain = np.asarray(model.apply({"params": params}, TOKENS_BT[:, :-1]))
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, logits_of(theirs), atol=2e-6)
    whole = merged(params, adapters, lora.adapter.scale)
    np.testing.assert_allclose(model.apply({"params": whole}, TOKENS_BT[:, :-1]), found, atol=2e-6)
    np.testing.assert_allclose(logits_of(theirs.merge_and_unload()), found, atol=2e-6)

    made = made_by_peft(peft, open_base(folder), rank, stabilised)
    made.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "run", base=folder)
    opened, whole, _ = load(tmp_path / "run")
    np.testing.assert_allclose(opened.apply({"params": whole}, TOKENS_BT[:, :-1]), logits_of(made), atol=2e-6)


def made_by_peft(peft, base, rank, stabilised):
    """A model of PEFT whose adapters are random, all of them."""
    import torch

    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    settings = peft.LoraConfig(r=rank, lora_alpha=12, use_rslora=stabilised, **targets)
    made = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return made.eval()


def as_ours(theirs, family):
    """Numbers of PEFT's adapters by the paths of ours, with merged axes."""
    found = {}
    for rule in family.all_rules:
        if "{}" not in rule.tensor or not rule.paths[0].endswith("kernel"):
            continue
        ((*place, _),) = (path.split("/") for path in rule.paths)
        for half, leaf in (("A", "lora_a"), ("B", "lora_b")):
            module = f"base_model.model.model.{rule.tensor.removesuffix('.weight')}.lora_{half}.default.weight"
            found[*place, leaf] = np.stack([theirs[module.format(layer)].detach().numpy().T for layer in range(3)])
    return found


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("rank, stabilised", [(4, False), (16, True)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_and_ten_steps_are_those_of_peft(family, rank, stabilised, exact, peft, tmp_path):
    """Families without fused matrices: PEFT learns one A for all that one tensor holds, and we one for each."""
    import torch

    from flax_decoder.comparison import torch_side

    folder = base_folder(family, tmp_path / "base")
    made = made_by_peft(peft, open_base(folder), rank, stabilised)
    made.save_pretrained(tmp_path / "theirs")
    if exact:
        made = made_by_peft(peft, torch_side._in_float64(open_base(folder)), rank, stabilised)
    model, params, _ = load(folder)
    lora, adapters = read_adapter(tmp_path / "theirs", model.config, read_family(folder))
    tolerance = 1e-10 if exact else 2e-5
    # In float32, gradients near 1e-7 have few digits, of which Adam with a smaller epsilon makes whole steps.
    rate, decay, epsilon = 1e-3, 0.1, 1e-8 if exact else 1e-6
    rules = {"schedule": "constant", "warmup_steps": 0, "weight_decay": decay, "clip_norm": 0.0, "beta2": 0.99}
    optimizer = OptimizerConfig(learning_rate=rate, epsilon=epsilon, **rules)
    with jax.enable_x64(exact), torch_side.Lift() if exact else contextlib.nullcontext():
        config = dataclasses.replace(model.config, dtype="float64" if exact else "float32")
        run = Config(model=config, lora=lora, optimizer=optimizer, training=TrainingConfig(num_steps=10))
        wide = np.float64 if exact else np.float32
        params, adapters = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, wide), (params, adapters))
        state = fd.init_state(fd.Decoder(config), run, rng=jax.random.key(0), params=params)
        state = state.replace(params=adapters)
        learned = [parameter for name, parameter in made.named_parameters() if "lora_" in name]
        stepper = torch.optim.AdamW(learned, rate, (0.9, 0.99), epsilon, weight_decay=decay)
        step = jax.jit(fd.train_step)

        def alike(tree, theirs):
            wanted = as_ours(dict(theirs), read_family(folder))
            flat = {tuple(part.key for part in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
            assert flat.keys() == wanted.keys()
            for path, leaf in flat.items():
                found = np.asarray(leaf).reshape(wanted[path].shape)
                size = max(1.0, float(np.abs(wanted[path]).max()))
                np.testing.assert_allclose(found, wanted[path], atol=tolerance * size, rtol=0, err_msg="/".join(path))

        rng = np.random.default_rng(5)
        for number in range(10):
            tokens = rng.integers(0, 256, TOKENS_BT.shape).astype(np.int32)
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
            stepper.zero_grad()
            logits = made(torch.tensor(batch["inputs"])).logits
            labels = torch.tensor(batch["targets"]).long().reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), labels)
            loss.backward()
            if number == 0:
                gradients, _ = jax.jit(mean_gradients)(state, batch)
                alike(gradients, [(name, p.grad) for name, p in made.named_parameters() if p.requires_grad])
            stepper.step()
            state, metrics = step(state, batch)
            np.testing.assert_allclose(float(metrics["loss"]), float(loss), atol=tolerance)
        alike(state.params, list(made.named_parameters()))
