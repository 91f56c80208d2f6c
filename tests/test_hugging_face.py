"""Hugging Face folders: what goes out comes in again. What is made to do harm is in faults/test_foreign_*.py."""

import dataclasses
import functools
import json
import re
import shutil
import tempfile
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import Config, ModelConfig
from flax_decoder.config_file import to_toml
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer, make_tokenizer
from flax_decoder.huggingface import tensor_file, weights
from flax_decoder.huggingface.choice import choose_family
from flax_decoder.huggingface.config import read_settings, write_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import read_folder, write_folder
from flax_decoder.huggingface.tensor_file import Tensor, read_header
from flax_decoder.loading import convert
from flax_decoder.nn.decoder import Decoder, abstract_params
from flax_decoder.training.checkpoint import save_params

SIZES = {
    "vocab_size": 256,
    "context_length": 32,
    "num_layers": 2,
    "embed_dim": 14,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 10,
    "mlp_dim": 13,
}
LLAMA = SIZES | {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "swiglu", "tied_head": False}
TOKENS_BT = np.random.default_rng(2).integers(0, 256, (2, 7)).astype(np.int32)


@functools.cache
def template():
    """A small model in a folder; each test changes its own copy."""
    folder = tempfile.TemporaryDirectory()
    model = Decoder(ModelConfig(**LLAMA))
    write_folder(Path(folder.name), model.config, reference.random_params(model), ByteTokenizer(), FAMILIES["llama"])
    return folder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(template().name, path)
    return path


def refusal(capsys, *arguments):
    """What a command says that refuses its input: a line or two, and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and len(output.err.splitlines()) <= 2
    return output.err


def refusal_of(capsys, folder):
    return refusal(capsys, "generate", folder, "--prompt", "To be", "--max-new-tokens", "1")


def change(path, **fields):
    """Sets fields of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def tensors_of(path):
    with open(path, "rb") as file:
        return {name: tensor.read() for name, tensor in read_header(file, path).items()}


def safetensors_bytes(header, numbers=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + numbers


def entry(dtype="F32", shape=(1,), start=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_float32(path, arrays):
    """A safetensors file of arrays, written without the library's own writer."""
    header, numbers = {}, b""
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = entry("F32", array.shape, len(numbers), len(numbers) + len(data))
        numbers += data
    path.write_bytes(safetensors_bytes(header, numbers))


# --- Out and in again ---


def equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


def test_a_folder_is_enough(folder, capsys):
    model, params, tokenizer = fd.load(folder)
    assert model.config == ModelConfig(**LLAMA)
    assert equal_trees(params, reference.random_params(model))
    assert isinstance(tokenizer, ByteTokenizer)
    logits_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(logits_BTV, reference.decode(params, TOKENS_BT, model.config), atol=5e-5)

    assert main(["generate", str(folder), "--prompt", "To be", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("To be")
    text = folder.parent / "text.txt"
    text.write_text("To be, or not to be. " * 5)
    assert main(["eval", str(folder), str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 104


def test_there_and_back_through_a_run_folder(folder, capsys):
    run, again = folder.parent / "run", folder.parent / "again"
    (again).mkdir()  # an empty folder will do
    assert main(["convert", str(folder), str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {
        "config.toml",
        "tokenizer.json",
        "generation_config.json",
        "checkpoints",
    }
    model, params, tokenizer = fd.load(run)
    assert model.config == ModelConfig(**LLAMA) and isinstance(tokenizer, ByteTokenizer)
    assert equal_trees(params, fd.load(folder)[1])
    assert main(["convert", str(run), str(again)]) == 0
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    assert {path.name for path in folder.parent.iterdir()} == {"model", "run", "again"}
    capsys.readouterr()


def run_folder(path, model, params, tokenizer):
    """What training leaves behind, as far as it is read."""
    path.mkdir()
    (path / "config.toml").write_text(to_toml(Config(model=model.config)))
    (path / "tokenizer.json").write_text(tokenizer.to_json())
    save_params(path, 7, params)


def test_the_default_architecture_goes_out_with_zeros_for_its_biases(tmp_path):
    model = Decoder(ModelConfig(vocab_size=4, context_length=8, embed_dim=12, num_heads=2, num_layers=2))
    params = reference.random_params(model)
    run_folder(tmp_path / "run", model, params, CharTokenizer("abcd"))
    convert(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    back, wider, tokenizer = fd.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("dab")) == "dab"
    assert back.config.mlp_bias and not np.any(wider["layers"]["feed_forward"]["up"]["bias"])
    tokens_BT = TOKENS_BT % 4
    both = (jax.jit(one.apply)({"params": its}, tokens_BT) for one, its in ((back, wider), (model, params)))
    np.testing.assert_allclose(*both, atol=1e-6)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_transformers_loads_what_goes_out(kind, tmp_path):
    pytest.importorskip("torch").set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    text = "the cat sat on the mat; the cat sat again.  and again\n" * 5
    tokenizer = make_tokenizer(kind, text, 270)
    model = Decoder(ModelConfig(**SIZES | {"vocab_size": tokenizer.vocab_size, "num_kv_heads": 2, "head_dim": 7}))
    params = reference.random_params(model)
    write_folder(tmp_path, model.config, params, tokenizer, choose_family(model.config, "x"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # Not token 50256, which is what a gpt2 ends with by default.
    assert back.config.eos_token_id is None and back.generation_config.eos_token_id is None
    torch = pytest.importorskip("torch")
    tokens_BT = TOKENS_BT % tokenizer.vocab_size
    with torch.no_grad():
        expected_BTV = back(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens_BT), expected_BTV, atol=5e-5)


def test_the_nearest_family_is_named():
    def choice(**settings):
        return choose_family(ModelConfig(**LLAMA | {"embed_dim": 20} | settings), "x").model_type

    assert choice() == "llama"
    assert choice(embed_dim=14, num_heads=6) == "mistral"  # transformers has no llama of width 14 with 6 heads
    assert choice(window=3) == "mistral"
    assert choice(attention_in_bias=True) == "qwen2"
    assert choice(qk_norm="head") == "qwen3"
    assert choice(rotary_fraction=0.4) == "phi3"
    assert choice(norm_position="output", qk_norm="all") == "olmo2"
    assert choice(norm="layernorm", feed_forward="gelu") == "starcoder2"
    plain = {"num_kv_heads": 2, "norm": "layernorm", "feed_forward": "gelu"}
    assert choice(**plain, parallel_residual=True) == "gpt_neox"
    assert choice(**plain, positions="learned") == "gpt2"
    gemma = {"feed_forward": "geglu_tanh", "embed_scale": 20**0.5}
    assert choice(**gemma) == "gemma"
    assert choice(**gemma, norm_position="both", logit_soft_cap=2.0) == "gemma2"
    assert choice(**gemma, norm_position="both", qk_norm="head", window=3, rotary_window_base=90.0) == "gemma3_text"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"positions": "alibi"}, ["no Hugging Face model type", "positions = 'alibi'"]),
        ({"qk_norm": "head", "feed_forward": "gelu"}, ["qwen3: feed_forward = 'gelu'"]),
        ({"embed_scale": 3.0}, ["llama: embed_scale = 3.0"]),
        ({"window": 3, "mlp_bias": True}, ["mistral: mlp_bias = True"]),
        ({"rotary_fraction": 0.4, "rotary_scaling": "linear"}, ["rotary_"]),
    ],
)
def test_what_no_family_can_express_is_refused(settings, parts, tmp_path, capsys):
    model = Decoder(ModelConfig(**LLAMA | settings | {"embed_dim": 20}))
    run_folder(tmp_path / "run", model, reference.random_params(model), ByteTokenizer())
    message = refusal(capsys, "convert", tmp_path / "run", tmp_path / "out")
    for part in parts:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_convert_refuses_what_it_cannot_do(folder, capsys):
    parent = folder.parent
    assert "is not empty" in refusal(capsys, "convert", folder, folder)
    assert "leave out --model-type" in refusal(capsys, "convert", folder, parent / "run", "--model-type", "llama")
    assert "there is no such folder" in refusal(capsys, "convert", parent / "absent", parent / "run")
    assert main(["convert", str(folder), str(parent / "run")]) == 0
    capsys.readouterr()
    message = refusal(capsys, "convert", parent / "run", parent / "out", "--model-type", "gpt2")
    assert "gpt2" in message and "positions = 'rotary'" in message
    assert "'bert'" in refusal(capsys, "convert", parent / "run", parent / "out", "--model-type", "bert")
    assert "--step" in refusal(capsys, "eval", folder, folder / "config.json", "--step", "best")
    (folder / "tokenizer.json").unlink()
    assert fd.load(folder)[2] is None
    assert "has no tokenizer.json" in refusal_of(capsys, folder)
    assert "has no tokenizer.json" in refusal(capsys, "convert", folder, parent / "other")
    assert {path.name for path in parent.iterdir()} == {"model", "run"}


def test_special_tokens_come_from_generation_config(folder):
    assert fd.load(folder)[2].end_ids == ()
    change(folder / "config.json", eos_token_id=5, bos_token_id=3)
    (folder / "generation_config.json").unlink()
    tokenizer = fd.load(folder)[2]
    assert (tokenizer.start_id, tokenizer.end_ids) == (3, (5,))
    # 999 is beyond the vocabulary: no text can end with it.
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 11, 999], "bos_token_id": 2}')
    tokenizer = fd.load(folder)[2]
    assert (tokenizer.start_id, tokenizer.end_ids) == (2, (7, 11))
    convert(folder, folder.parent / "run")
    tokenizer = fd.load(folder.parent / "run")[2]
    assert (tokenizer.start_id, tokenizer.end_ids) == (2, (7, 11))
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(fd.UserError, match="eos_token_id = 'end' must be a token id"):
        fd.load(folder)


# --- config.json ---

# The fields that transformers 4 writes, and what version 5 writes instead.
OLD_AND_NEW = {
    "llama": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "gpt_neox": (
        {"rotary_pct": 0.34, "rotary_emb_base": 700, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700, "partial_rotary_factor": 0.34}},
    ),
    "qwen2": (
        {"rope_theta": 500.0, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
        {
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
        },
    ),
    "gemma3_text": (
        {
            "rope_theta": 900.0,
            "rope_local_base_freq": 90.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": None,
            "sliding_window_pattern": 2,
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "_sliding_window_pattern": 2,
        },
    ),
}
ROTARY_NAMES = ("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_local_base_freq", "layer_types")


def document_of(model_type, **settings):
    sizes = {"vocab_size": 7, "embed_dim": 12, "num_heads": 2, "head_dim": 6, "num_layers": 4}
    always = FAMILIES[model_type].always
    return write_settings(ModelConfig(**sizes | {"tied_head": False} | always | settings), FAMILIES[model_type])


def activation_of(model_type):
    return {"feed_forward": "geglu_tanh" if "gemma" in model_type else "gelu" if "g" in model_type else "swiglu"}


@pytest.mark.parametrize("model_type", OLD_AND_NEW)
def test_old_and_new_names_mean_the_same(model_type):
    document = document_of(model_type, **activation_of(model_type))
    document = {name: value for name, value in document.items() if name not in ROTARY_NAMES}
    old, new = (read_settings(document | fields, "x") for fields in OLD_AND_NEW[model_type])
    assert old == new
    expected = {
        "llama": {"rotary_base": 500, "rotary_scaling": "linear", "rotary_scaling_factor": 2},
        "gpt_neox": {"rotary_base": 700, "rotary_fraction": 0.34},
        "qwen2": {"rotary_base": 500, "windows": (None, None, None, 5)},
        "gemma3_text": {"rotary_base": 900, "rotary_window_base": 90, "window_pattern": (True, False)},
    }
    assert {name: getattr(old, name) for name in expected[model_type]} == expected[model_type]


def test_the_original_context_is_the_context_where_it_is_left_out():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    document = document_of("llama", **activation_of("llama"), context_length=31) | {"rope_scaling": scaling}
    assert read_settings(document, "x").rotary_original_context == 31
    scaling["original_max_position_embeddings"] = 17
    assert read_settings(document, "x").rotary_original_context == 17


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model_type": "bert"}, ["model_type = 'bert'", "llama"]),
        ({"model_type": ["llama"]}, ["model_type = ['llama']"]),
        ({"model_type": None}, ["model_type = None"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["auto_map names Python code", "remove auto_map"]),
        ({"number_of_experts": 8}, ["number_of_experts = 8", "not known for llama"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"sliding_window": 4}, ["sliding_window = 4"]),
        ({"hidden_act": "mish"}, ["hidden_act = 'mish'", "silu"]),
        ({"hidden_act": 3}, ["hidden_act = 3"]),
        ({"rope_interleaved": True}, ["rope_interleaved = True"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "14"}, ["hidden_size = '14' must be a positive whole number"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads = 3"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps = 'small'"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps = -1.0"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings = 'no'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type = 'yarn'", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, ["mscale = 1.0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": [2.0]}, ["rope_scaling = [2.0] must be an object"]),
        ({"rope_parameters": {"rope_theta": 3.0}}, ["rope_theta is both 10000.0 and 3.0"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
    ],
)
def test_settings_that_the_network_lacks_are_refused(fields, parts, folder, capsys):
    change(folder / "config.json", **fields)
    message = refusal_of(capsys, folder)
    assert message.startswith(f"error: {folder / 'config.json'}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("model_type", "fields", "part"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'"),
        ("qwen2", {"max_window_layers": "2"}, "max_window_layers = '2'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "chunked_attention"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type = 'longrope'"),
        ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar = -4"),
        ("gemma2", {"hidden_size": "12"}, "hidden_size = '12'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "layers with a window",
        ),
    ],
)
def test_settings_of_other_families_are_refused(model_type, fields, part):
    document = document_of(model_type, **activation_of(model_type))
    read_settings(document, "x")
    document = {name: value for name, value in (document | fields).items() if value is not None}
    with pytest.raises(fd.UserError) as caught:
        read_settings(document, "x")
    assert part in str(caught.value)


def test_an_auto_map_that_names_nothing_does_not_matter(folder):
    change(folder / "config.json", auto_map={})
    fd.load(folder)


# --- Weights ---


def test_half_precision_is_read_exactly(folder):
    """Half precision numbers, infinities left out, are float32 numbers."""
    bits = np.arange(0, 0x7F00, 97, dtype="<u2")
    halves = bits[: len(bits) // 2 * 2].reshape(2, -1)
    header = {
        "a": entry("BF16", halves.shape, 0, halves.nbytes),
        "b": entry("F16", halves.shape, halves.nbytes, 2 * halves.nbytes),
    }
    path = folder / "halves.safetensors"
    path.write_bytes(safetensors_bytes(header, halves.tobytes() * 2))
    read = tensors_of(path)
    wide = {name: array.astype(np.float32) for name, array in read.items()}
    jax_bfloat16 = np.asarray(jax.lax.bitcast_convert_type(halves, "bfloat16").astype("float32"))
    np.testing.assert_array_equal(wide["a"].view(np.uint32), jax_bfloat16.view(np.uint32))
    finite = halves < 0x7C00
    np.testing.assert_array_equal(wide["b"][finite], halves.view(np.float16)[finite].astype(np.float32))


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bfloat16"])
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_the_first_number_that_is_none_is_found(value, dtype, monkeypatch):
    dtype = jax.numpy.bfloat16 if dtype == "bfloat16" else dtype
    numbers = np.random.default_rng(5).normal(size=(7, 5, 3)).astype(dtype)
    numbers[0, 0, :2] = jax.numpy.finfo(dtype).max, jax.numpy.finfo(dtype).min
    monkeypatch.setattr(weights, "_BLOCK_NUMBERS", 10)
    assert weights.first_not_finite(numbers) is None and weights.first_not_finite(numbers[:0]) is None
    number = -np.float32("nan") if value == "-nan" else np.float32(value)
    for place in ((0, 0, 0), (3, 2, 1), (6, 4, 2)):
        broken = numbers.copy()
        broken[place] = broken[6, 4, 2] = number
        assert weights.first_not_finite(broken) == place


@pytest.mark.short("generate", "convert")
@pytest.mark.parametrize("kind", ["generate", "draft", "eval", "convert"])
def test_weights_that_are_no_numbers_are_read_where_asked_for(folder, capsys, kind):
    path = folder / "model.safetensors"
    tensors = {name: array.copy() for name, array in tensors_of(path).items()}
    tensors["model.norm.weight"][3] = np.nan
    write_float32(path, tensors)
    text, run = folder.parent / "text.txt", folder.parent / "run"
    text.write_text("To be, or not to be. " * 5)
    generating = ["generate", folder, "--prompt", "To be", "--max-new-tokens", "1"]
    good = shutil.copytree(template().name, folder.parent / "good")
    command = {
        "generate": generating,
        "draft": ["generate", good, *generating[2:], "--draft", folder],
        "eval": ["eval", folder, text],
        "convert": ["convert", folder, run],
    }[kind]
    message = refusal(capsys, *command)
    assert "tensor model.norm.weight holds nan at [3]" in message and "--allow-nan" in message
    assert main([str(word) for word in [*command, "--allow-nan"]]) == 0
    if kind == "convert":
        read = fd.load(run)[1]
        assert np.isnan(read["final_norm"]["scale"][3])
        assert equal_trees(read["layers"], fd.load(good)[1]["layers"])


def test_known_extras_and_a_left_out_prefix_are_welcome(folder):
    expected = fd.load(folder)[1]
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): array for name, array in tensors_of(path).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5)
    write_float32(path, tensors)
    assert equal_trees(fd.load(folder)[1], expected)


@pytest.mark.parametrize(
    ("model_type", "name", "is_extra"),
    [
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "h.11.attn.masked_bias", True),
        ("gpt2", "h.0.attn.c_attn.bias", False),
        ("gpt_neox", "layers.3.attention.bias", True),
        ("gpt_neox", "layers.3.attention.rotary_emb.inv_freq", True),
        ("gpt_neox", "layers.3.attention.dense.bias", False),
        ("mistral", "layers.3.self_attn.rotary_emb.inv_freq", True),
        ("mistral", "layers.3.self_attn.q_proj.bias", False),
    ],
)
def test_only_masks_and_waves_are_extras(model_type, name, is_extra):
    assert bool(re.fullmatch(FAMILIES[model_type].extra_tensors, name)) == is_extra


def test_a_head_that_should_be_the_embedding_must_be_equal(folder, capsys):
    change(folder / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal_of(capsys, folder)
    tensors = tensors_of(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_float32(folder / "model.safetensors", tensors)
    assert "head" not in fd.load(folder)[1]


def test_one_tensor_at_a_time_is_in_memory(folder, monkeypatch):
    read, seen = Tensor.read, []

    def tracked(tensor):
        alive = [name for name, number in seen if number() is not None]
        assert not alive, f"{alive} while {tensor.name} is read"
        numbers = read(tensor).copy()  # a copy owns its numbers, so that each view of them keeps it alive
        seen.append((tensor.name, weakref.ref(numbers)))
        return numbers

    monkeypatch.setattr(Tensor, "read", tracked)
    fd.load(folder)
    monkeypatch.undo()
    assert sorted(name for name, _ in seen) == sorted(tensors_of(folder / "model.safetensors"))


def test_large_tensors_are_written_in_pieces(folder, tmp_path, monkeypatch):
    model, params, tokenizer = fd.load(folder)
    monkeypatch.setattr(tensor_file, "_BLOCK_BYTES", 300)
    (tmp_path / "again").mkdir()
    write_folder(tmp_path / "again", model.config, params, tokenizer, FAMILIES["llama"])
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


# --- Onto devices ---


def mesh_of(*sizes):
    return jax.make_mesh(sizes, tuple("abc"[: len(sizes)]), axis_types=(AxisType.Auto,) * len(sizes))


def spread(leaf):
    """Split in two by its first axis, in two by its second where that is even, and there twice."""
    even = leaf.ndim > 1 and leaf.shape[1] % 2 == 0
    return NamedSharding(mesh_of(2, 2, 2), P("a", "b") if even else P("a"))


SHARDINGS = {
    "none": lambda params: None,
    "for each": lambda params: jax.tree.map(spread, params),
    "for branches": lambda params: {
        name: SingleDeviceSharding(jax.devices()[number]) for number, name in enumerate(params)
    },
    "for all": lambda params: NamedSharding(mesh_of(2), P("a")),
}


@pytest.mark.short("none-model", "for each-run", "for branches-run", "for all-model")
@pytest.mark.parametrize("kind", ["model", "run"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_parameters_go_where_they_are_wanted(name, kind, folder):
    model, expected, _ = fd.load(folder)
    if kind == "run":
        convert(folder, folder.parent / "run")
    shardings = SHARDINGS[name](abstract_params(model))
    params = fd.load(folder.parent / kind, shardings=shardings)[1]
    assert equal_trees(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))
    if shardings is None:
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(params))
    else:
        wanted = jax.tree.broadcast(shardings, params)
        jax.tree.map(
            lambda leaf, sharding: leaf.sharding == sharding or pytest.fail(f"{leaf.sharding}"), params, wanted
        )


@pytest.mark.parametrize("name", SHARDINGS)
def test_what_is_read_is_not_copied_again(name, folder, monkeypatch):
    """On CPU, JAX takes the arrays that were filled, on each device just its part."""
    make, rooms = weights._Parameter._room, []

    def tracked(parameter, bounds):
        rooms.append(make(parameter, bounds))
        return rooms[-1]

    monkeypatch.setattr(weights._Parameter, "_room", tracked)
    shardings = SHARDINGS[name](abstract_params(Decoder(ModelConfig(**LLAMA))))
    params = fd.load(folder, shardings=shardings)[1]
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert {shard.unsafe_buffer_pointer() for shard in shards} == {room.ctypes.data for room in rooms}
    assert sum(room.size for room in rooms) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all(leaf.committed == (shardings is not None) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", ["model", "run"])
def test_a_sharding_that_does_not_fit_is_refused(kind, folder):
    convert(folder, folder.parent / "run")
    mesh = mesh_of(8)
    with pytest.raises(fd.UserError, match=r"final_norm/scale of shape \(14,\) cannot be split so"):
        fd.load(folder.parent / kind, shardings=NamedSharding(mesh, P("a")))
    fits = {"embedding": NamedSharding(mesh, P("a")), "final_norm": None, "head": None}
    with pytest.raises(fd.UserError, match="a tree like the parameters"):
        fd.load(folder.parent / kind, shardings=fits)
    with pytest.raises(fd.UserError, match=r"layers/attention/key/kernel has P.* is no jax.sharding.Sharding"):
        fd.load(folder.parent / kind, shardings={**fits, "layers": P("a")})


def split_in_two(folder):
    """Spreads the weights of a folder over two files and an index, which is returned."""
    model, params, _ = read_folder(folder)
    (folder / "model.safetensors").unlink()
    write_folder(folder, model.config, params, None, FAMILIES["llama"], shard_bytes=26_000)
    path = folder / "model.safetensors.index.json"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == 2
    return path, json.loads(path.read_text())["weight_map"]


def test_shards_are_read(folder):
    expected = fd.load(folder)[1]
    split_in_two(folder)
    assert equal_trees(fd.load(folder)[1], expected)


def test_index_and_shards_must_agree(folder, capsys):
    path, weight_map = split_in_two(folder)
    first, last = next(iter(weight_map)), list(weight_map)[-1]
    change(path, weight_map=weight_map | {first: weight_map[last]})
    assert f"tensor {first} is in {weight_map[first]}" in refusal_of(capsys, folder)
    change(path, weight_map=weight_map | {"more": weight_map[last]})
    assert "tensor more should be in" in refusal_of(capsys, folder)
    change(path, weight_map=weight_map)
    (folder / weight_map[last]).unlink()
    assert weight_map[last] in refusal_of(capsys, folder)


def test_a_folder_without_weights_is_refused(folder, capsys):
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal_of(capsys, folder)
    (folder / "config.json").unlink()
    message = refusal_of(capsys, folder)
    assert "no config.toml" in message and "no config.json" in message


def test_settings_of_training_do_not_matter_for_the_choice():
    model = ModelConfig(**LLAMA | {"embed_dim": 20})
    trained = dataclasses.replace(model, dropout=0.1, scan_layers=True, remat="full", init_stddev=0.5)
    assert choose_family(trained, "x") == choose_family(model, "x") == FAMILIES["llama"]
