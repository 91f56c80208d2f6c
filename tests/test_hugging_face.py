"""Hugging Face folders: what is written reads back. Hostile files are in faults/test_foreign_*.py."""

import dataclasses
import json
import operator
import re
import weakref

import jax
import numpy as np
import pytest
import reference
from chat_templates import PUBLISHED
from faults.model_folder import (
    INDEX,
    SETTINGS,
    WEIGHTS,
    change,
    entry,
    make_folder,
    safetensors_bytes,
    split_in_two,
    tensors_of,
)
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from test_conversations import SPECIAL, TALKS, make_library

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import ModelConfig
from flax_decoder.data.chat_template import load_chat_template
from flax_decoder.data.conversations import prompt_tokens
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer, make_tokenizer
from flax_decoder.huggingface import tensor_file, weights
from flax_decoder.huggingface.choice import choose_family
from flax_decoder.huggingface.config import read_settings, write_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import read_sampling, read_tokenizer, write_folder
from flax_decoder.huggingface.tensor_file import Tensor
from flax_decoder.loading import convert
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params
from flax_decoder.training.run_folder import write_run

LLAMA = ModelConfig(**SETTINGS)
TOKENS_BT = np.random.default_rng(2).integers(0, 256, (2, 7)).astype(np.int32)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model")


def refusal(capsys, *arguments):
    """The error message of a command: a line or two, and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and len(output.err.splitlines()) <= 2
    return output.err


def refusal_of(capsys, folder):
    return refusal(capsys, "generate", folder, "--prompt", "To be", "--max-new-tokens", "1")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Round trips ---


def test_a_folder_is_enough_to_generate_and_evaluate(folder, capsys):
    model, params, tokenizer = fd.load(folder)
    assert model.config == LLAMA and isinstance(tokenizer, ByteTokenizer)
    assert_equal(params, reference.random_params(model))
    logits_BTV = jax.jit(model.apply)({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(logits_BTV, reference.decode(params, TOKENS_BT, model.config), atol=5e-5)

    assert main(["generate", str(folder), "--prompt", "To be", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("To be")
    text = folder.parent / "text.txt"
    text.write_text("To be, or not to be. " * 5)
    assert main(["eval", str(folder), str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 104


@pytest.mark.full
def test_commands_sample_as_generation_config_says_and_start_as_the_tokenizer_does(folder, capsys):
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<s>": 2}, []))
    library.add_special_tokens(["<s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 2)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.4, "top_k": 1}')
    command = ["generate", str(folder), "--prompt", "ab", "--max-new-tokens", "5"]

    def output(*more):
        assert main([*command, *more]) == 0
        return capsys.readouterr()

    told = f"sampling as {folder / 'generation_config.json'} says: temperature = 0.4, top_k = 1\n"
    as_told, greedy, given = output(), output("--temperature", "0"), output("--temperature", "9", "--top-k", "0")
    assert as_told.out == greedy.out != given.out
    assert (as_told.err, greedy.err, given.err) == (told, told.replace("temperature = 0.4, ", ""), "")
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    message = refusal(capsys, *command)
    assert f"{folder / 'generation_config.json'}: top_p = 7" in message

    (folder / "generation_config.json").unlink()
    text = folder.parent / "text.txt"
    text.write_text("abba" * 20)
    assert main(["eval", str(folder), str(text)]) == 0
    assert capsys.readouterr().out.endswith("over 80 tokens; each window begins with <s>\n")
    assert main(["eval", str(folder), str(text), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 80 and result["window_start"] == [2]


CHAT_FILES = {
    "chat_template.jinja": b"{% for m in messages %}\r\n{{ m.content }}{{ eos_token }}{% endfor %}",
    "tokenizer_config.json": b'{"eos_token":\n{"content": "<|im_end|>"},   "model_max_length": 1e30}',
    "special_tokens_map.json": b'{ "pad_token" : "\\u003cpad>" }',
    "generation_config.json": b'{"temperature":0.7, "pad_token_id": 2, "eos_token_id": [7, 11]}\n\n',
}


def write_chat_files(folder):
    for name, content in CHAT_FILES.items():
        (folder / name).write_bytes(content)


def test_a_round_trip_through_a_run_folder_is_exact(folder, capsys):
    run, again = folder.parent / "run", folder.parent / "again"
    again.mkdir()  # an empty folder is allowed
    write_chat_files(folder)
    assert main(["convert", str(folder), str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {"config.toml", "tokenizer.json", "checkpoints", *CHAT_FILES}
    model, params, tokenizer = fd.load(run)
    assert model.config == LLAMA and isinstance(tokenizer, ByteTokenizer)
    assert_equal(params, fd.load(folder)[1])
    assert main(["convert", str(run), str(again)]) == 0
    for name in ("tokenizer.json", WEIGHTS, *CHAT_FILES):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    for name, content in CHAT_FILES.items():
        assert (run / name).read_bytes() == content
    ends = {"eos_token_id": [7, 11]}
    assert json.loads((again / "config.json").read_bytes()) == json.loads((folder / "config.json").read_bytes()) | ends
    assert load_chat_template(run).render([{"content": "a"}]) == "a<|im_end|>"
    assert read_sampling(run) == {"temperature": 0.7} and tokenizer.end_ids == (7, 11)
    assert {path.name for path in folder.parent.iterdir()} == {"model", "run", "again"}
    capsys.readouterr()


def test_tokens_that_only_the_config_names_are_written_beside_the_others(folder):
    run = folder.parent / "run"
    write_chat_files(folder)
    change(folder / "config.json", eos_token_id=5, bos_token_id=3)
    convert(folder, run)
    assert json.loads((run / "generation_config.json").read_bytes()) == {
        **json.loads(CHAT_FILES["generation_config.json"]),
        "bos_token_id": 3,
        "eos_token_id": [7, 11, 5],
    }
    assert (run / "tokenizer_config.json").read_bytes() == CHAT_FILES["tokenizer_config.json"]


def test_a_chat_template_out_of_bounds_is_not_kept(folder, capsys):
    template = folder / "chat_template.jinja"
    template.write_bytes(b"x" * 1_000_001)
    assert f"{template}: has 1,000,001 bytes, over the limit" in refusal(
        capsys, "convert", folder, folder.parent / "run"
    )
    template.unlink()
    template.symlink_to("/etc/passwd")
    assert f"{template}: is a link out of its folder" in refusal(capsys, "convert", folder, folder.parent / "run")
    assert not (folder.parent / "run").exists()


@pytest.mark.full
def test_transformers_chats_with_what_comes_back(folder):
    transformers = pytest.importorskip("transformers")
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_library(SPECIAL["chatml"]), chat_template=PUBLISHED["chatml"], **special
    )
    theirs.save_pretrained(folder)
    convert(folder, folder.parent / "run")
    convert(folder.parent / "run", folder.parent / "again")
    back = transformers.AutoTokenizer.from_pretrained(folder.parent / "again")
    ours = load_chat_template(folder.parent / "run"), fd.load(folder.parent / "run")[2]
    for messages in TALKS.values():
        prompt = messages[:-1]
        how = {"add_generation_prompt": True, "return_dict": False}
        assert back.apply_chat_template(prompt, **how) == theirs.apply_chat_template(prompt, **how)
        assert back.apply_chat_template(prompt, **how) == prompt_tokens(prompt, ours[1], ours[0])
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert back.all_special_tokens == theirs.all_special_tokens


def test_missing_biases_are_written_as_zeros(tmp_path):
    model = Decoder(ModelConfig(vocab_size=4, context_length=8, embed_dim=12, num_heads=2, num_layers=2))
    params = reference.random_params(model)
    write_run(tmp_path / "run", model.config, params, CharTokenizer("abcd"), {})
    convert(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    biased, biased_params, tokenizer = fd.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("dab")) == "dab"
    assert biased.config.mlp_bias and not np.any(biased_params["layers"]["feed_forward"]["up"]["bias"])
    logits = [jax.jit(m.apply)({"params": p}, TOKENS_BT % 4) for m, p in ((biased, biased_params), (model, params))]
    np.testing.assert_allclose(*logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_transformers_loads_what_is_written(kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    text = "the cat sat on the mat; the cat sat again.  and again\n" * 5
    tokenizer = make_tokenizer(kind, text, 270)
    sizes = {"context_length": 32, "num_layers": 2, "embed_dim": 14, "num_heads": 2, "mlp_dim": 13}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = reference.random_params(model)
    write_folder(tmp_path, model.config, params, tokenizer, choose_family(model.config, "x"))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text)
    assert read(text)["input_ids"] == ids and read.decode(ids) == text
    torch_model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # Not token 50256, the default of gpt2.
    assert torch_model.config.eos_token_id is None and torch_model.generation_config.eos_token_id is None
    tokens_BT = TOKENS_BT % tokenizer.vocab_size
    with torch.no_grad():
        expected_BTV = torch_model(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens_BT), expected_BTV, atol=5e-5)


# --- The choice of a family ---

WIDE = dataclasses.replace(LLAMA, embed_dim=20)
PLAIN = {"num_kv_heads": 2, "norm": "layernorm", "feed_forward": "gelu"}
GEMMA = {"feed_forward": "geglu_tanh", "embed_scale": 20**0.5}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"dropout": 0.1, "scan_layers": True, "remat": "full", "init_stddev": 0.5}),
        ("mistral", {"embed_dim": 14, "num_heads": 6}),  # transformers has no llama of width 14 with 6 heads
        ("mistral", {"window": 3}),
        ("qwen2", {"attention_in_bias": True}),
        ("qwen3", {"qk_norm": "head"}),
        ("phi3", {"rotary_fraction": 0.4}),
        ("olmo2", {"norm_position": "output", "qk_norm": "all"}),
        ("starcoder2", {"norm": "layernorm", "feed_forward": "gelu"}),
        ("gpt_neox", {**PLAIN, "parallel_residual": True}),
        ("gpt2", {**PLAIN, "positions": "learned"}),
        ("gemma", GEMMA),
        ("gemma2", {**GEMMA, "norm_position": "both", "logit_soft_cap": 2.0}),
        ("gemma3_text", {**GEMMA, "norm_position": "both", "qk_norm": "head", "window": 3, "rotary_window_base": 90.0}),
        ("vaultgemma", {**GEMMA, "logit_soft_cap": 2.0}),
        ("arcee", {"feed_forward": "relu_squared"}),
        ("nemotron", {"feed_forward": "relu_squared", "norm": "layernorm", "rotary_fraction": 0.4}),
        ("gpt_neo", {**PLAIN, "positions": "learned", "attention_scale": 1.0, "window": 3}),
        ("gpt_bigcode", {**PLAIN, "positions": "learned", "num_kv_heads": 1}),
        ("granite", {"embed_scale": 3.0}),
        ("hyperclovax", {"residual_scale": 0.5, "norm_position": "both"}),
        ("olmo", {"norm": "layernorm", "norm_scale": False}),
        ("hunyuan_v1_dense", {"qk_norm": "head", "qk_norm_position": "after"}),
        ("mpt", {**PLAIN, "positions": "alibi", "mlp_dim": 80, "attention_scale": 0.3}),
    ],
)
def test_the_nearest_family_is_chosen(model_type, settings):
    assert choose_family(dataclasses.replace(WIDE, **settings), "x").model_type == model_type


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"positions": "alibi"}, "positions = 'alibi'"),
        ({"qk_norm": "head", "feed_forward": "gelu"}, "qwen3: feed_forward = 'gelu'"),
        ({"embed_scale": 3.0, "window": 3}, "mistral: embed_scale = 3.0"),
        ({"window": 3, "mlp_bias": True}, "mistral: mlp_bias = True"),
        ({"rotary_fraction": 0.4, "rotary_scaling": "linear"}, "rotary_"),
    ],
)
def test_a_model_that_no_family_can_express_is_refused(settings, part):
    with pytest.raises(fd.UserError, match="x: no Hugging Face model type") as caught:
        choose_family(dataclasses.replace(WIDE, **settings), "x")
    assert part in str(caught.value)


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
    assert "--step" in refusal(capsys, "eval", folder, __file__, "--step", "best")
    (folder / "tokenizer.json").unlink()
    assert fd.load(folder)[2] is None
    assert "has no tokenizer.json" in refusal_of(capsys, folder)
    assert "has no tokenizer.json" in refusal(capsys, "convert", folder, parent / "other")
    assert {path.name for path in parent.iterdir()} == {"model", "run"}


def test_special_tokens_come_from_all_files(folder):
    def special_tokens(path):
        tokenizer = fd.load(path)[2]
        return tokenizer.start_id, tokenizer.end_ids

    assert special_tokens(folder) == (None, ())
    change(folder / "config.json", eos_token_id=5, bos_token_id=3)
    assert special_tokens(folder) == (3, (5,))
    # 999 is outside of the vocabulary.
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 11, 999], "bos_token_id": 2}')
    assert special_tokens(folder) == (2, (7, 11, 5))
    convert(folder, folder.parent / "run")
    assert special_tokens(folder.parent / "run") == (2, (7, 11, 5))
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(fd.UserError, match="eos_token_id = 'end' must be a token id"):
        fd.load(folder)


def test_special_tokens_come_by_their_texts_too_and_by_guess_last(folder):
    """As in chat models that name the end of an answer in tokenizer_config.json only."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))

    def special_tokens():
        found = read_tokenizer(folder)
        return found.start_id, found.end_ids

    assert special_tokens() == (2, (3,))  # guessed
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>", "bos_token": {"content": "a"}}')
    assert special_tokens() == (0, (5,))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "bos_token": null}')
    assert special_tokens() == (0, (4,))
    change(folder / "config.json", eos_token_id=1)
    assert special_tokens() == (0, (1, 4))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "no such token"}')
    assert special_tokens() == (0, (1,))


def test_sampling_of_generation_config(folder):
    assert read_sampling(folder) == {}
    path = folder / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": null, "max_length": 4096}')
    assert read_sampling(folder) == {"temperature": 0.6, "top_p": 0.9}
    change(path, do_sample=False, repetition_penalty=1.1)
    assert read_sampling(folder) == {"temperature": 0, "top_p": 0.9, "repetition_penalty": 1.1}
    change(path, top_p="much")
    with pytest.raises(fd.UserError, match=r"generation_config.json: top_p = 'much' must be a number"):
        read_sampling(folder)


# --- config.json ---


def document_of(model_type, **settings):
    """A config.json of the family."""
    constants = FAMILIES[model_type].constants
    activation = "geglu_tanh" if "gemma" in model_type else "gelu" if "g" in model_type else "swiglu"
    sizes = {"vocab_size": 7, "embed_dim": 12, "num_heads": 2, "head_dim": 6, "num_layers": 4}
    config = ModelConfig(**sizes | {"tied_head": False, "feed_forward": activation} | constants | settings)
    return write_settings(config, FAMILIES[model_type])


# The fields that transformers 4 writes, those that version 5 writes instead, and what both mean.
OLD_AND_NEW = {
    "llama": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        {"rotary_base": 500, "rotary_scaling": "linear", "rotary_scaling_factor": 2},
    ),
    "gpt_neox": (
        {"rotary_pct": 0.34, "rotary_emb_base": 700, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700, "partial_rotary_factor": 0.34}},
        {"rotary_base": 700, "rotary_fraction": 0.34},
    ),
    "qwen2": (
        {"rope_theta": 500.0, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
        {
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
        },
        {"rotary_base": 500, "windows": (None, None, None, 5)},
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
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "_sliding_window_pattern": 2,
        },
        {"rotary_base": 900, "rotary_window_base": 90, "window_pattern": (True, False)},
    ),
}


@pytest.mark.parametrize("model_type", OLD_AND_NEW)
def test_old_and_new_names_mean_the_same(model_type):
    old, new, expected = OLD_AND_NEW[model_type]
    names = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_local_base_freq", "layer_types"}
    document = {name: value for name, value in document_of(model_type).items() if name not in names}
    config = read_settings(document | old, "x")
    assert config == read_settings(document | new, "x")
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_original_context_defaults_to_the_context():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    document = document_of("llama", context_length=31) | {"rope_scaling": scaling, "auto_map": {}}
    assert read_settings(document, "x").rotary_original_context == 31
    scaling["original_max_position_embeddings"] = 17
    assert read_settings(document, "x").rotary_original_context == 17


TWO_BASES = {"full_attention": {}, "sliding_attention": {"rope_theta": 8.0}}


@pytest.mark.parametrize(
    ("model_type", "fields", "part"),
    [
        ("llama", {"model_type": "bert"}, "model_type = 'bert' is not supported, only gpt2, llama"),
        ("llama", {"model_type": ["llama"]}, "model_type = ['llama']"),
        ("llama", {"model_type": None}, "model_type = None"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names Python code"),
        ("llama", {"number_of_experts": 8}, "number_of_experts = 8 is not known for llama"),
        ("llama", {"sliding_window": 4}, "sliding_window = 4"),
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported, only silu"),
        ("llama", {"hidden_act": 3}, "hidden_act = 3"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("llama", {"per_layer_config": {"0": {"num_attention_heads": 1}}}, "per_layer_config"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("gpt2", {"hidden_size": 13}, "n_embd = 12, but hidden_size = 13, another name of it"),
        ("gpt_neox", {"rope_theta": 3.0}, "rotary_emb_base = 10000.0, but rope_theta = 3.0"),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, "rotary_pct = 1.0, but partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_scaling.rope_type = 'llama3'"),
        (
            "gemma3_text",
            {
                "rope_local_base_freq": 9.0,
                "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 8.0}},
            },
            "rope_local_base_freq = 9.0, but rope_parameters.sliding_attention.rope_theta = 8.0",
        ),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "14"}, "hidden_size = '14' must be a positive whole number"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale = 1.0"),
        ("llama", {"rope_scaling": [2.0]}, "rope_scaling = [2.0] must be an object"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 3.0}},
            "but rope_parameters.rope_theta = 3.0",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'"),
        ("qwen2", {"max_window_layers": "2"}, "max_window_layers = '2'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "chunked_attention"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor = [1.0] must"),
        ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar = -4"),
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
def test_settings_that_are_not_supported_are_refused(model_type, fields, part):
    document = document_of(model_type)
    read_settings(document, "x")
    with pytest.raises(fd.UserError, match=r"^x: ") as caught:
        read_settings(document | fields, "x")
    assert part in str(caught.value)


# --- Weights ---


def test_half_precision_is_read_exactly(folder):
    """float32 holds each number of float16 and bfloat16."""
    header, numbers, expected = {}, b"", {}
    for number, (name, array) in enumerate(tensors_of(folder / WEIGHTS).items()):
        dtype, kind = [("BF16", jax.numpy.bfloat16), ("F16", np.float16)][number % 2]
        half = array.astype(kind)
        header[name] = entry(dtype, half.shape, len(numbers), len(numbers) + half.nbytes)
        numbers += half.tobytes()
        expected[name] = half.astype(np.float32)
    (folder / WEIGHTS).write_bytes(safetensors_bytes(header, numbers))
    params = fd.load(folder)[1]
    save_file(expected, folder / WEIGHTS)
    assert_equal(params, fd.load(folder)[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jax.numpy.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_non_finite_number_is_found(value, dtype, monkeypatch):
    numbers = np.random.default_rng(5).normal(size=(7, 5, 3)).astype(dtype)
    numbers[0, 0, :2] = jax.numpy.finfo(dtype).max, jax.numpy.finfo(dtype).min
    monkeypatch.setattr(weights, "_BLOCK_NUMBERS", 10)
    assert weights.first_non_finite(numbers) is None and weights.first_non_finite(numbers[:0]) is None
    for index in ((0, 0, 0), (3, 2, 1), (6, 4, 2)):
        broken = numbers.copy()
        broken[index] = broken[6, 4, 2] = value
        assert weights.first_non_finite(broken) == index


@pytest.mark.short("generate", "convert")
@pytest.mark.parametrize("kind", ["generate", "draft", "eval", "convert"])
def test_non_finite_weights_are_read_only_with_allow_nan(folder, capsys, kind):
    tensors = tensors_of(folder / WEIGHTS)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / WEIGHTS)
    text, run, good = folder.parent / "text.txt", folder.parent / "run", make_folder(folder.parent / "good")
    text.write_text("To be, or not to be. " * 5)
    options = ["--prompt", "To be", "--max-new-tokens", "1"]
    command = {
        "generate": ["generate", folder, *options],
        "draft": ["generate", good, *options, "--draft", folder],
        "eval": ["eval", folder, text],
        "convert": ["convert", folder, run],
    }[kind]
    message = refusal(capsys, *command)
    assert "tensor model.norm.weight holds nan at [3]" in message and "--allow-nan" in message
    assert main([str(word) for word in [*command, "--allow-nan"]]) == 0
    if kind == "convert":
        params = fd.load(run)[1]
        assert np.isnan(params["final_norm"]["scale"][3])
        assert_equal(params["layers"], fd.load(good)[1]["layers"])


def test_ignored_tensors_and_a_missing_prefix_are_accepted(folder):
    expected = fd.load(folder)[1]
    tensors = {name.removeprefix("model."): array for name, array in tensors_of(folder / WEIGHTS).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5)
    save_file(tensors, folder / WEIGHTS)
    assert_equal(fd.load(folder)[1], expected)


@pytest.mark.parametrize(
    ("model_type", "name", "is_ignored"),
    [
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "h.11.attn.masked_bias", True),
        ("gpt2", "h.0.attn.c_attn.bias", False),
        ("gpt_neox", "layers.3.attention.bias", True),
        ("gpt_neox", "layers.3.attention.rotary_emb.inv_freq", True),
        ("gpt_neox", "layers.3.attention.dense.bias", False),
        ("mistral", "layers.3.self_attn.q_proj.bias", False),
    ],
)
def test_only_masks_and_frequencies_are_ignored(model_type, name, is_ignored):
    assert bool(re.fullmatch(FAMILIES[model_type].ignored_tensors, name)) == is_ignored


def test_a_tied_head_must_equal_the_embedding(folder, capsys):
    change(folder / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal_of(capsys, folder)
    tensors = tensors_of(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / WEIGHTS)
    assert "head" not in fd.load(folder)[1]


def test_one_tensor_at_a_time_is_in_memory(folder, monkeypatch):
    read, references = Tensor.read, {}

    def tracked(tensor):
        alive = [name for name, reference_of in references.items() if reference_of() is not None]
        assert not alive, f"{alive} while {tensor.name} is read"
        numbers = read(tensor).copy()  # a copy owns its numbers, so that views of it keep it alive
        references[tensor.name] = weakref.ref(numbers)
        return numbers

    monkeypatch.setattr(Tensor, "read", tracked)
    fd.load(folder)
    assert references.keys() == tensors_of(folder / WEIGHTS).keys()


def test_large_tensors_are_written_in_blocks(folder, tmp_path, monkeypatch):
    model, params, tokenizer = fd.load(folder)
    monkeypatch.setattr(tensor_file, "_BLOCK_BYTES", 300)
    (tmp_path / "again").mkdir()
    write_folder(tmp_path / "again", model.config, params, tokenizer, FAMILIES["llama"])
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


# --- Onto devices ---


def mesh_of(*sizes):
    return jax.make_mesh(sizes, tuple("abc"[: len(sizes)]), axis_types=(AxisType.Auto,) * len(sizes))


def spread(leaf):
    """Split in two by its first axis, in two by its second if that is even, and replicated."""
    even = leaf.ndim > 1 and leaf.shape[1] % 2 == 0
    return NamedSharding(mesh_of(2, 2, 2), P("a", "b") if even else P("a"))


def tracked_buffers(monkeypatch):
    """The buffers that parameters are read into from now on."""
    allocate, buffers = weights._HostBuffers._aligned, []
    monkeypatch.setattr(
        weights._HostBuffers, "_aligned", lambda *given: buffers.append(allocate(*given)) or buffers[-1]
    )
    return buffers


SHARDINGS = {
    "none": lambda params: None,
    "for each": lambda params: jax.tree.map(spread, params),
    "for branches": lambda params: {
        name: SingleDeviceSharding(jax.devices()[number]) for number, name in enumerate(params)
    },
    "for all": lambda params: NamedSharding(mesh_of(2), P("a")),
}


@pytest.mark.short("none-model", "for each-run", "for each-model", "for branches-run", "for all-model")
@pytest.mark.parametrize("kind", ["model", "run"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_parameters_go_where_they_are_wanted(name, kind, folder, monkeypatch):
    """And on CPU a model folder's are not copied: JAX takes the buffers, of each device's part only."""
    model, expected, _ = fd.load(folder)
    if kind == "run":
        convert(folder, folder.parent / "run")
    buffers = tracked_buffers(monkeypatch)
    shardings = SHARDINGS[name](abstract_params(model))
    params = fd.load(folder.parent / kind, shardings=shardings)[1]
    assert_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, expected))
    leaves = jax.tree.leaves(params)
    if shardings is None:
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in leaves)
    else:
        assert [leaf.sharding for leaf in leaves] == jax.tree.leaves(jax.tree.broadcast(shardings, params))
    if kind == "model":
        shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
        assert {shard.unsafe_buffer_pointer() for shard in shards} == {buffer.ctypes.data for buffer in buffers}
        assert sum(buffer.size for buffer in buffers) == sum(leaf.size for leaf in leaves)
        assert all(leaf.committed == (shardings is not None) for leaf in leaves)


@pytest.mark.short("True-bfloat16")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("unstacked", [False, True])
def test_parameters_are_read_as_they_are_wanted_without_a_copy(unstacked, dtype, folder, monkeypatch):
    whole_model, whole, _ = fd.load(folder)
    buffers = tracked_buffers(monkeypatch)
    model, params, _ = fd.load(folder, dtype=dtype, unstacked=unstacked)
    assert model.config.dtype == (dtype or whole_model.config.dtype)
    expected = fd.unstack_layers(whole) if unstacked else whole
    assert_equal(params, jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), expected))
    leaves = jax.tree.leaves(params)
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == {buffer.ctypes.data for buffer in buffers}
    assert sum(buffer.nbytes for buffer in buffers) == sum(leaf.nbytes for leaf in leaves)
    if unstacked:  # generation takes them as they are
        assert all(map(operator.is_, jax.tree.leaves(fd.unstack_layers(params)), leaves))


@pytest.mark.full
@pytest.mark.parametrize("name", SHARDINGS)
def test_layers_that_are_read_one_by_one_go_where_stacked_ones_would(name, folder):
    shardings = SHARDINGS[name](abstract_params(fd.load(folder)[0]))
    expected = jax.tree.map(np.asarray, fd.unstack_layers(fd.load(folder)[1]))
    params = fd.load(folder, shardings=shardings, unstacked=True)[1]
    assert_equal(jax.tree.map(np.asarray, params), expected)
    if isinstance(shardings, NamedSharding):
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {shardings.mesh}


def test_only_of_a_model_folder_the_form_of_parameters_can_be_chosen(folder):
    convert(folder, folder.parent / "run")
    with pytest.raises(fd.UserError, match="run: is no Hugging Face folder, of which alone dtype and unstacked"):
        fd.load(folder.parent / "run", unstacked=True)


@pytest.mark.parametrize("kind", ["model", "run"])
def test_a_sharding_that_does_not_fit_is_refused(kind, folder):
    convert(folder, folder.parent / "run")
    by_eight = NamedSharding(mesh_of(8), P("a"))
    fits = {"embedding": by_eight, "final_norm": None, "head": None}
    for shardings, message in (
        (by_eight, r"final_norm/scale of shape \(14,\) cannot be split so"),
        (fits, "a tree like the parameters"),
        ({**fits, "layers": P("a")}, r"layers/attention/key/kernel has P.* is no jax.sharding.Sharding"),
    ):
        with pytest.raises(fd.UserError, match=message):
            fd.load(folder.parent / kind, shardings=shardings)


# --- Several files ---


def test_index_and_shards_must_agree(folder, capsys):
    expected = fd.load(folder)[1]
    weight_map, index = split_in_two(folder), folder / INDEX
    assert len(set(weight_map.values())) == len(list(folder.glob("model-*-of-*.safetensors"))) == 2
    assert_equal(fd.load(folder)[1], expected)
    first, last = next(iter(weight_map)), list(weight_map)[-1]
    change(index, weight_map=weight_map | {first: weight_map[last]})
    assert f"tensor {first} is in {weight_map[first]}" in refusal_of(capsys, folder)
    change(index, weight_map=weight_map | {"more": weight_map[last]})
    assert "tensor more should be in" in refusal_of(capsys, folder)
    change(index, weight_map=weight_map)
    (folder / weight_map[last]).unlink()
    assert weight_map[last] in refusal_of(capsys, folder)


def test_a_folder_without_weights_is_refused(folder, capsys):
    (folder / WEIGHTS).unlink()
    assert "has no model.safetensors" in refusal_of(capsys, folder)
    (folder / "config.json").unlink()
    message = refusal_of(capsys, folder)
    assert "no config.toml" in message and "no config.json" in message


# --- Families from outside ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "model type 'llama' is there already"),
        ({"model_type": "x", "constants": {"colour": 1}}, "x sets colour, which is no field of ModelConfig"),
        ({"model_type": "x", "settings": ()}, "x has no setting of vocab_size"),
    ],
)
def test_a_table_that_cannot_be_is_refused(changes, reason):
    with pytest.raises(fd.UserError, match=reason):
        fd.register_family(dataclasses.replace(FAMILIES["llama"], **changes))
    assert "x" not in FAMILIES


def test_a_parameter_without_a_tensor_is_refused(tmp_path):
    family = dataclasses.replace(FAMILIES["llama"], rules=FAMILIES["llama"].rules[:-2])
    params = weights.flatten(abstract_params(Decoder(LLAMA)))
    with pytest.raises(fd.UserError, match="llama: its table has no rule for layers/feed_forward/down/kernel"):
        weights.complete_specs(family, {path: leaf.shape for path, leaf in params.items()})
