"""Every family has PyTorch's logits and greedy text, and is written exactly as it was read."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.nn.cache import empty_cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")
torch.set_num_threads(1)  # two test workers share two cores with JAX
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, CONTEXT, WINDOW, NEW_TOKENS = 59, 83, 5, 64
PROMPT_BT = np.random.default_rng(0).integers(0, V, (2, 11)).astype(np.int32)

SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": CONTEXT,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 29,
}
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}
GPT2 = {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GEMMA = SIZES | {"head_dim": 10}
GPT_NEO = {"vocab_size": V, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT}
GPT_NEO |= {"window_size": WINDOW}
MPT = {"vocab_size": V, "d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}
SLIDING_FIRST = ["sliding_attention", "full_attention"]
GEMMA3_ROPE = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}}

# The scale of their norms is 1 + weight.
OFFSET_NORMS = {"gemma", "gemma2", "gemma3_text", "vaultgemma", "nemotron"}

# Each family: grouped heads, windows shorter than the text, scaled rotary wavelengths, a tied and an untied head.
SHAPES = {
    "gpt2": [
        GPT2,
        GPT2 | {"n_head": 3, "n_inner": 37, "activation_function": "gelu", "tie_word_embeddings": False},
        GPT2 | {"n_layer": 3, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ],
    "llama": [
        SIZES,
        SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 10},
        SIZES | {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        SIZES | {"hidden_act": "gelu", "num_hidden_layers": 3, "rms_norm_eps": 0.1},
    ],
    "qwen2": [
        SIZES,
        SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 10},
        SIZES | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_hidden_layers": 3},
    ],
    "mistral": [
        SIZES | {"sliding_window": WINDOW},
        SIZES | {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": True},
        SIZES | {"sliding_window": WINDOW, "rope_parameters": LINEAR, "num_key_value_heads": 1},
    ],
    "qwen3": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        SIZES | {"head_dim": 10, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING_FIRST},
    ],
    "gpt_neox": [
        NEOX | {"rotary_pct": 0.34},
        NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False},
        NEOX | {"rotary_pct": 0.67, "tie_word_embeddings": True, "hidden_act": "gelu_new", "rope_scaling": LINEAR},
    ],
    "phi3": [
        SIZES,
        SIZES | {"sliding_window": WINDOW, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 10},
        SIZES | {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.34}, "num_key_value_heads": 4},
    ],
    "starcoder2": [
        SIZES,
        SIZES | {"sliding_window": WINDOW, "tie_word_embeddings": False, "hidden_act": "gelu", "head_dim": 10},
        SIZES | {"use_bias": False, "rope_parameters": LINEAR, "num_key_value_heads": 1, "norm_epsilon": 0.1},
    ],
    "olmo2": [
        SIZES,
        SIZES | {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 10},
        SIZES | {"num_key_value_heads": 1, "num_hidden_layers": 3, "rms_norm_eps": 0.1},
    ],
    "gemma": [
        GEMMA,
        GEMMA | {"attention_bias": True, "rope_parameters": LINEAR, "num_key_value_heads": 1},
        GEMMA | {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 6},
    ],
    "gemma2": [
        GEMMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 13},
        GEMMA | {"attn_logit_softcapping": 0.9, "final_logit_softcapping": 1.9, "sliding_window": 3},
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "full_attention"], "rope_parameters": LINEAR},
    ],
    "gemma3_text": [
        GEMMA | {"sliding_window": WINDOW, "layer_types": SLIDING_FIRST},
        GEMMA
        | {"sliding_window": WINDOW, "rope_parameters": GEMMA3_ROPE, "num_hidden_layers": 3}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        GEMMA | {"final_logit_softcapping": 1.9, "tie_word_embeddings": False, "query_pre_attn_scalar": 7},
    ],
    "vaultgemma": [
        GEMMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 13},
        GEMMA | {"attn_logit_softcapping": 0.9, "final_logit_softcapping": None, "tie_word_embeddings": False},
        GEMMA | {"sliding_window": WINDOW, "layer_types": SLIDING_FIRST, "rope_parameters": LINEAR},
    ],
    "arcee": [
        SIZES,
        SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 10},
        SIZES | {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ],
    "seed_oss": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 6, "attention_out_bias": True, "attention_bias": False, "tie_word_embeddings": True},
        SIZES | {"head_dim": 10, "mlp_bias": True, "rope_parameters": LLAMA3, "num_key_value_heads": 1},
    ],
    "ministral": [
        SIZES | {"sliding_window": WINDOW, "head_dim": 6},
        SIZES | {"layer_types": ["full_attention"] * 2, "head_dim": 10, "tie_word_embeddings": True},
        SIZES | {"sliding_window": WINDOW, "head_dim": 10, "layer_types": SLIDING_FIRST, "rope_parameters": LINEAR},
    ],
    "nemotron": [
        SIZES | {"head_dim": 8},
        SIZES | {"partial_rotary_factor": 0.34, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SIZES | {"num_key_value_heads": 4, "head_dim": 10, "partial_rotary_factor": 1.0, "rope_scaling": LINEAR},
    ],
    "stablelm": [
        SIZES | {"partial_rotary_factor": 0.34},
        SIZES | {"partial_rotary_factor": 1.0, "use_qkv_bias": True, "tie_word_embeddings": True},
        SIZES | {"partial_rotary_factor": 0.67, "num_key_value_heads": 1, "rope_scaling": LINEAR, "hidden_act": "gelu"},
    ],
    "gpt_bigcode": [
        GPT2,
        GPT2 | {"multi_query": False, "n_inner": 37, "tie_word_embeddings": False},
        GPT2 | {"n_layer": 3, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ],
    "gpt_neo": [
        GPT_NEO | {"attention_types": [[["global", "local"], 1]]},
        GPT_NEO | {"attention_types": [[["local"], 2]], "intermediate_size": 37, "tie_word_embeddings": False},
        GPT_NEO
        | {"num_layers": 3, "attention_types": [[["global"], 1], [["local"], 2]], "activation_function": "relu"},
    ],
    "mpt": [
        MPT,
        MPT | {"n_heads": 6, "attn_config": {"softmax_scale": 0.7}, "tie_word_embeddings": False},
        MPT | {"n_layers": 3, "n_heads": 3, "layer_norm_epsilon": 0.1},
    ],
}
SHAPES |= {
    "glm": [
        SIZES | {"head_dim": 10, "partial_rotary_factor": 0.4},
        SIZES | {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
        SIZES | {"head_dim": 8, "rope_scaling": LINEAR, "num_key_value_heads": 1},
    ],
    "glm4": [
        SIZES | {"head_dim": 8},
        SIZES | {"head_dim": 10, "partial_rotary_factor": 1.0, "attention_bias": False, "tie_word_embeddings": True},
        SIZES | {"head_dim": 8, "rope_scaling": LINEAR, "num_key_value_heads": 1},
    ],
    "ernie4_5": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 8, "use_bias": True, "tie_word_embeddings": False},
        SIZES | {"head_dim": 6, "rope_parameters": LLAMA3, "num_key_value_heads": 1},
    ],
    "helium": [
        SIZES | {"head_dim": 6},
        SIZES | {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        SIZES | {"head_dim": 12, "num_attention_heads": 2, "rope_parameters": LINEAR, "num_key_value_heads": 1},
    ],
}
SHAPES |= {
    "smollm3": [
        SIZES | {"no_rope_layer_interval": 2},
        SIZES | {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        SIZES | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 0], "rope_parameters": LLAMA3},
    ],
    "exaone4": [
        SIZES | {"sliding_window": WINDOW, "layer_types": SLIDING_FIRST, "head_dim": 6},
        SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
        SIZES
        | {"num_hidden_layers": 3, "sliding_window": WINDOW, "sliding_window_pattern": 2, "rope_parameters": LLAMA3},
    ],
}
SHAPES |= {
    "jais2": [
        SIZES,
        SIZES | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "head_dim": 10},
        SIZES | {"rope_parameters": LLAMA3, "num_key_value_heads": 1, "hidden_act": "gelu", "layer_norm_eps": 0.1},
    ],
    "internlm3": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": LINEAR},
        SIZES | {"head_dim": 10, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    ],
    "iquestcoder": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 6, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SIZES | {"head_dim": 10, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
    ],
}
SHAPES |= {
    "olmo": [
        SIZES,
        SIZES | {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LINEAR, "hidden_act": "gelu"},
        SIZES | {"num_key_value_heads": 1, "num_hidden_layers": 3, "rope_parameters": LLAMA3},
    ],
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 20}
YARN |= {"beta_fast": 3.0, "beta_slow": 0.4}
SHAPES["llama"].append(SIZES | {"rope_parameters": YARN, "head_dim": 20})
SHAPES["gpt_neox"].append(NEOX | {"rotary_pct": 0.67, "rope_scaling": YARN | {"attention_factor": 1.7}})
# At the length of the logits they are stretched, at that of greedy text not yet: there `transformers` takes the longest
# of a batch for the length of all.
BORDER = 80
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 9.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.3], "long_factor": [1.5, 4.0]}
SHAPES["llama"].append(SIZES | {"rope_parameters": DYNAMIC, "head_dim": 10, "max_position_embeddings": BORDER})
SHAPES["gpt_neox"].append(NEOX | {"rotary_pct": 0.67, "rope_scaling": DYNAMIC, "max_position_embeddings": BORDER})
SHAPES["phi3"].append(
    SIZES
    | {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.67, "original_max_position_embeddings": BORDER}
    | {"max_position_embeddings": 2 * CONTEXT}
)
FIRST_7 = {"original_max_position_embeddings": 7}
QUERY_SCALING = {"llama_4_scaling_beta": 0.3}
SHAPES["qwen3"].append(SIZES | {"rope_parameters": YARN | {"truncate": False}, "head_dim": 20})
SHAPES |= {
    "ministral3": [
        SIZES  # the ledger reads texts of 19 tokens
        | {"rope_parameters": YARN | QUERY_SCALING | {"mscale": 1.0, "mscale_all_dim": 1.0, **FIRST_7}, "head_dim": 20},
        SIZES
        | {"rope_parameters": LLAMA3 | QUERY_SCALING, "tie_word_embeddings": True, "head_dim": 10}
        | {"sliding_window": WINDOW, "num_key_value_heads": 1},
        SIZES | {"rope_parameters": YARN | QUERY_SCALING | {"truncate": False}, "hidden_act": "gelu", "head_dim": 20},
    ],
    "olmo3": [
        SIZES
        | {"sliding_window": WINDOW, "layer_types": SLIDING_FIRST, "head_dim": 16}
        | {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 70}}
        },
        SIZES | {"sliding_window": WINDOW, "num_hidden_layers": 5, "tie_word_embeddings": True, "attention_bias": True},
        SIZES | {"sliding_window": WINDOW, "rope_scaling": YARN, "num_key_value_heads": 1, "num_hidden_layers": 4},
    ],
}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
BLOOM = {"vocab_size": V, "hidden_size": 24, "n_layer": 2, "n_head": 4, "seq_length": CONTEXT}
SHAPES |= {
    "phi": [
        SIZES | {"partial_rotary_factor": 0.67},
        SIZES | {"tie_word_embeddings": True, "partial_rotary_factor": 0.34, "rope_parameters": LINEAR},
        SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 1, "hidden_act": "gelu", "partial_rotary_factor": 1.0},
    ],
    "gptj": [
        GPT2 | {"rotary_dim": 4},
        GPT2 | {"rotary_dim": 6, "n_inner": 37, "activation_function": "gelu"},
        GPT2 | {"rotary_dim": 2, "n_layer": 3, "layer_norm_epsilon": 0.1, "tie_word_embeddings": True},
    ],
    "granite": [
        SIZES | FACTORS | {"logits_scaling": 2.0},
        SIZES | {"attention_multiplier": 0.5, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SIZES | FACTORS | {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "hidden_act": "gelu"},
    ],
    "hyperclovax": [
        SIZES | FACTORS | {"logits_scaling": 0.3},
        SIZES | {"use_post_norm": False, "tie_word_embeddings": True, "head_dim": 10},
        SIZES | FACTORS | {"num_key_value_heads": 1, "rope_parameters": LLAMA3},
    ],
    "cohere": [
        SIZES | {"logit_scale": 0.3},
        SIZES | {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LINEAR, "logit_scale": 1.0},
        SIZES | {"num_key_value_heads": 1, "num_hidden_layers": 3, "layer_norm_eps": 0.1, "logit_scale": 1.0},
    ],
    "cohere2": [
        SIZES | {"sliding_window": WINDOW, "layer_types": SLIDING_FIRST, "logit_scale": 0.3},
        SIZES | {"num_hidden_layers": 5, "sliding_window": WINDOW, "attention_bias": True, "logit_scale": 1.0},
        SIZES | {"sliding_window": WINDOW, "rope_parameters": LINEAR, "num_key_value_heads": 1, "logit_scale": 1.0},
    ],
    "bloom": [
        BLOOM,
        BLOOM | {"n_head": 6, "tie_word_embeddings": False},
        BLOOM | {"n_layer": 3, "n_head": 3, "layer_norm_epsilon": 0.1},
    ],
    "hunyuan_v1_dense": [
        SIZES | {"head_dim": 10},
        SIZES | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True},
        SIZES | {"head_dim": 10, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
    ],
}
FALCON = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "intermediate_size")}
OPT = FALCON | {"ffn_dim": 37, "word_embed_proj_dim": 24}
SHAPES["olmo"].append(SIZES | {"clip_qkv": 0.7, "attention_bias": True})
SHAPES["phi"].append(SIZES | {"qk_layernorm": True, "partial_rotary_factor": 0.67})
SHAPES["cohere"].append(SIZES | {"use_qk_norm": True, "logit_scale": 0.3})
SHAPES["cohere"].append(SIZES | {"use_qk_norm": True, "num_key_value_heads": 1, "logit_scale": 1.0})
SHAPES["mpt"].append(MPT | {"attn_config": {"clip_qkv": 0.6}})
SHAPES |= {
    "exaone": [
        SIZES,
        SIZES | {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SIZES | {"num_key_value_heads": 1, "rope_parameters": LLAMA3},
    ],
    "codegen": [
        GPT2 | {"rotary_dim": 4},
        GPT2 | {"rotary_dim": 6, "n_inner": 37, "activation_function": "gelu"},
        GPT2 | {"rotary_dim": 2, "n_head": 3, "n_layer": 3, "tie_word_embeddings": True},
    ],
    "falcon": [
        FALCON,
        FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
        FALCON | {"ffn_hidden_size": 37, "rope_parameters": LINEAR, "num_hidden_layers": 3},
    ],
    "opt": [
        OPT,
        OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
        OPT | {"layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True, "num_hidden_layers": 3},
    ],
}
# What shows nothing new but another table runs with --full.
NEW_TABLES = {"vaultgemma", "arcee", "seed_oss", "ministral", "nemotron", "stablelm", "gpt_neo", "mpt"}
NEW_TABLES |= {"glm", "glm4", "ernie4_5", "helium", "smollm3", "exaone4"}
NEW_TABLES |= {"jais2", "internlm3", "iquestcoder", "gptj", "hyperclovax", "cohere", "cohere2"}
NEW_TABLES |= {"exaone", "codegen", "olmo3", "ministral3", "phi", "granite", "bloom", "hunyuan_v1_dense"}
# One shape per family, not the same number for all; with --full, all.
a_case_each = pytest.mark.parametrize(
    ("model_type", "number"),
    [
        pytest.param(name, number, marks=() if number == place % 3 and name not in NEW_TABLES else pytest.mark.full)
        for place, name in enumerate(SHAPES)
        for number in range(len(SHAPES[name]))
    ],
)


def test_every_family_is_here():
    assert SHAPES.keys() == FAMILIES.keys()


@functools.cache
def torch_model(model_type, number):
    """A PyTorch model with random weights, of a size at which every part of it matters."""
    settings = SHAPES[model_type][number] | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(settings)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(number)
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(parameter.shape)
        if parameter.ndim == 2:
            value = noise * parameter.shape[0 if model_type == "gpt2" else 1] ** -0.5
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            # Steps of 1/1024, so that adding 1 to a scale does not round and can be undone.
            value = np.round(300 * noise) / 1024 + (0 if model_type in OFFSET_NORMS else 1)
        if name.endswith("decoder.embed_positions.weight"):
            value[:2] = 0  # OPT's rows for padding are not read, and written as zeros
        parameter.data = torch.tensor(value, dtype=torch.float32)
    model.tie_weights()
    return model


def torch_logits(model, tokens_BT):
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()


@functools.cache
def saved(model_type, number):
    """The folder that transformers writes; shapes with an odd number have several files."""
    folder = tempfile.TemporaryDirectory()
    torch_model(model_type, number).save_pretrained(folder.name, max_shard_size="20KB" if number % 2 else "1GB")
    assert Path(folder.name, "model.safetensors.index.json").exists() == (number % 2 == 1)
    return folder


@functools.cache
def loaded(model_type, number):
    return fd.load(saved(model_type, number).name)


@a_case_each
def test_logits_equal_pytorchs(model_type, number):
    model, params, tokenizer = loaded(model_type, number)
    assert tokenizer is None
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    tokens_BT = np.random.default_rng(1).integers(0, V, (2, CONTEXT)).astype(np.int32)
    expected_BTV = torch_logits(torch_model(model_type, number), tokens_BT)
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT))
    assert expected_BTV.std() > 0.2
    assert np.abs(logits_BTV - expected_BTV).max() <= 2e-5 * np.abs(expected_BTV).max()


@a_case_each
def test_greedy_text_equals_transformers(model_type, number):
    """One prompt alone, and four of different lengths at once, which PyTorch must pad on the left."""
    model, params, _ = loaded(model_type, number)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, V, length).astype(np.int32) for length in (7, 13, 2, 11)]
    for batch in (prompts[:1], prompts):
        T = max(map(len, batch))
        tokens = torch.tensor(np.array([np.pad(prompt, (T - len(prompt), 0)) for prompt in batch]), dtype=torch.int64)
        mask = torch.tensor(np.array([np.arange(T) >= T - len(prompt) for prompt in batch]), dtype=torch.int64)
        expected = torch_model(model_type, number).generate(
            tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        assert expected.shape == (len(batch), T + NEW_TOKENS)
        rows = fd.generate(model, params, batch, NEW_TOKENS, temperature=0)
        for row, prompt, new_tokens in zip(rows, batch, expected[:, T:].numpy(), strict=True):
            np.testing.assert_array_equal(row, np.concatenate([prompt, new_tokens]))


@pytest.mark.full
@pytest.mark.parametrize("length", [77, 79, 80, 81])
@pytest.mark.parametrize(("model_type", "number"), [("llama", 5), ("gpt_neox", 4), ("phi3", 3)])
@pytest.mark.filterwarnings("ignore:.*past_key_values")
def test_a_text_crosses_the_original_context_as_with_transformers(model_type, number, length):
    """Prefilled whole; in part, and then token by token; and by both libraries' own loops."""
    model, params, _ = loaded(model_type, number)
    tokens_BT = np.random.default_rng(3).integers(0, V, (1, CONTEXT)).astype(np.int32)
    prompt_BT = tokens_BT[:, :length]
    # Models of their own, as they keep the frequencies of longer texts.
    expected_BT = torch_model.__wrapped__(model_type, number).generate(
        torch.tensor(prompt_BT, dtype=torch.int64),
        **{"attention_mask": torch.ones((1, length), dtype=torch.int64), "max_new_tokens": 20},
        **{"do_sample": False, "pad_token_id": 0},
    )
    found_BT = fd.generate(model, params, prompt_BT, 20, temperature=0)
    np.testing.assert_array_equal(found_BT, expected_BT.numpy())

    theirs = torch_model.__wrapped__(model_type, number)
    cache, their_cache = empty_cache(model.config, 1, CONTEXT), transformers.DynamicCache(config=theirs.config)
    for start, end in [(0, length), *((t, t + 1) for t in range(length, CONTEXT))]:
        logits_BTV, cache = model.apply({"params": params}, tokens_BT[:, start:end], cache=cache)
        with torch.no_grad():
            step_BT = torch.tensor(tokens_BT[:, start:end], dtype=torch.int64)
            expected_BTV = theirs(step_BT, past_key_values=their_cache).logits.numpy()
        np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=2e-5 * np.abs(expected_BTV).max())


@a_case_each
def test_a_round_trip_is_exact(model_type, number, tmp_path):
    model, params, _ = loaded(model_type, number)
    shard_bytes = 10_000 if number == 0 else 10**9
    write_folder(tmp_path, model.config, params, None, FAMILIES[model_type], shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (number == 0)
    expected, written = tensors_of(Path(saved(model_type, number).name)), tensors_of(tmp_path)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)

    read, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    original = torch_model(model_type, number)
    assert type(read) is type(original)
    # The two may choose different attention kernels.
    logits = [torch_logits(model.eval(), PROMPT_BT) for model in (read, original)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def tensors_of(folder):
    files = folder.glob("*.safetensors")
    return {name: array for path in files for name, array in safetensors.load_file(path).items()}
