"""Config files as they are published, old and new, open and mean to `transformers` what they mean here.

They are written from the structure of well-known models, at small sizes: names and values of settings are compared.
"""

import collections
import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.errors import FolderWarning
from flax_decoder.huggingface.config import read_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.fields import NO_BEARING, ONLY, is_of_network

V, CONTEXT = 59, 48
# The scale of their norms is 1 + weight.
OFFSET_NORMS = {"gemma", "gemma2", "gemma3_text", "vaultgemma", "nemotron"}
LAYERS = 3

# --- What was written around the model, by the tools and versions of their time ---

FIRST = {"initializer_range": 0.02, "use_cache": True}
V2 = FIRST | {
    "finetuning_task": None,
    "is_decoder": False,
    "num_labels": 2,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_past": True,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
}
V3 = V2 | {
    "_num_labels": 2,
    "bad_words_ids": None,
    "do_sample": False,
    "early_stopping": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pad_token_id": None,
    "prefix": None,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "xla_device": None,
}
V4 = FIRST | {"architectures": ["A"], "torch_dtype": "float16", "transformers_version": "4.31.0.dev0"}
V5 = FIRST | {"architectures": ["A"], "dtype": "bfloat16", "transformers_version": "5.0.0"}
# A config.json that `to_dict` wrote, not `to_json_file`: every field, most of them null.
WHOLE = V3 | {
    "_name_or_path": "./out",
    "add_cross_attention": False,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "num_beam_groups": 1,
    "output_scores": False,
    "problem_type": None,
    "remove_invalid_values": False,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "typical_p": 1.0,
}
UNSLOTH = {"unsloth_version": "2024.9", "unsloth_fixed": True, "pad_token_id": 3}


def without(document, *names):
    return {name: value for name, value in document.items() if name not in names}


# --- The families, with the names that their first release had ---

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT, "n_ctx": CONTEXT}
GPT2 |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
GPT2 |= {"resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index"}
GPT2 |= {"summary_proj_to_labels": True, "summary_use_proj": True, "vocab_size": V}
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 37, "max_position_embeddings": CONTEXT}
LLAMA = SIZES | {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA2 = LLAMA | {"num_key_value_heads": 2, "pretraining_tp": 1, "rope_scaling": None}
LLAMA31 = LLAMA2 | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "rope_theta": 500000.0}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}
QWEN2 = SIZES | {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 2}
QWEN2 |= {"attention_dropout": 0.0, "max_window_layers": 2, "rope_theta": 1000000.0, "sliding_window": 7}
QWEN2 |= {"use_sliding_window": False, "tie_word_embeddings": False}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 8, "attention_bias": False, "rope_scaling": None}
QWEN3 |= {"sliding_window": None}
MISTRAL = SIZES | {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
MISTRAL |= {"rope_theta": 10000.0, "sliding_window": 7, "tie_word_embeddings": False}
NEOX = SIZES | {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000}
NEOX |= {"rotary_pct": 0.25, "use_parallel_residual": True, "tie_word_embeddings": False}
NEOX_457 = {"rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None, "attention_bias": True}
PHI3 = SIZES | {"model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
PHI3 |= {"attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "auto_map": {}}
PHI3 |= {"original_max_position_embeddings": CONTEXT, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 7}
STARCODER2 = SIZES | {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5}
STARCODER2 |= {"activation_function": "gelu", "attention_dropout": 0.1, "attention_softmax_in_fp32": True}
STARCODER2 |= {"embedding_dropout": 0.1, "layer_norm_epsilon": 1e-5, "mlp_type": "default", "norm_type": "layer_norm"}
STARCODER2 |= {"num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 100000, "use_bias": True}
STARCODER2 |= {"scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "sliding_window": 7}
OLMO2 = SIZES | {"model_type": "olmo2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 4}
OLMO2 |= {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "rope_theta": 500000}
OLMO2 |= {"tie_word_embeddings": False}
GEMMA = SIZES | {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-6}
GEMMA |= {"hidden_act": "gelu", "attention_bias": False, "attention_dropout": 0.0, "rope_theta": 10000.0}
GEMMA2 = GEMMA | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}
GEMMA2 |= {"sliding_window": 7, "sliding_window_size": 7, "cache_implementation": "hybrid"}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
GEMMA3 |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"}
GEMMA3 |= {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 7}
del GEMMA3["hidden_act"]


VAULTGEMMA = without(GEMMA2, "hidden_act", "sliding_window_size") | {"model_type": "vaultgemma"}
ARCEE = LLAMA2 | {"model_type": "arcee", "hidden_act": "relu2", "attention_bias": False, "attention_dropout": 0.0}
ARCEE |= {"mlp_bias": False, "rope_theta": 10000.0}
SEED_OSS = LLAMA2 | {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False, "head_dim": 6}
SEED_OSS |= {"attention_dropout": 0.1, "mlp_bias": False, "residual_dropout": 0.1, "rope_theta": 10000000.0}
SEED_OSS |= {"rope_scaling": {"rope_type": "default"}}
MINISTRAL = MISTRAL | {"model_type": "ministral", "head_dim": 8, "layer_types": ["sliding_attention"] * LAYERS}
NEMOTRON = SIZES | {"model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-5, "num_key_value_heads": 2}
NEMOTRON |= {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "partial_rotary_factor": 0.5}
NEMOTRON |= {"rope_theta": 10000, "tie_word_embeddings": False, "head_dim": 8}
STABLELM = SIZES | {"model_type": "stablelm", "hidden_act": "silu", "layer_norm_eps": 1e-5, "num_key_value_heads": 4}
STABLELM |= {"partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False, "use_qkv_bias": False}
BIGCODE = GPT2 | {"model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh", "multi_query": True}
BIGCODE |= {"attention_softmax_in_fp32": True, "inference_runner": 0, "max_batch_size": None, "pad_key_length": True}
BIGCODE |= {"pre_allocate_kv_cache": False, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}
BIGCODE |= {"validate_runner_input": True, "max_sequence_length": None, "n_inner": 40}
GPT_NEO = {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "vocab_size": V}
GPT_NEO |= {"max_position_embeddings": CONTEXT, "window_size": 7, "activation_function": "gelu_new"}
GPT_NEO |= {"attention_types": [[["global", "local", "global"], 1]], "attention_dropout": 0, "embed_dropout": 0}
GPT_NEO |= {"attention_layers": ["global", "local", "global"], "intermediate_size": None, "resid_dropout": 0}
GPT_NEO |= {"layer_norm_epsilon": 1e-5, "summary_type": "cls_index", "gradient_checkpointing": False}
GLM = LLAMA2 | {"model_type": "glm", "head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5}
GLM |= {"rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0}
ERNIE = LLAMA2 | {"model_type": "ernie4_5", "head_dim": 8, "use_bias": False, "rope_theta": 500000}
HELIUM = LLAMA2 | {"model_type": "helium", "head_dim": 8, "attention_bias": False, "mlp_bias": False}
HELIUM |= {"rms_norm_eps": 1e-8, "rope_theta": 100000.0}
SMOLLM3 = LLAMA31 | {"model_type": "smollm3", "no_rope_layer_interval": 3, "no_rope_layers": [1, 1, 0]}
SMOLLM3 |= {"layer_types": ["full_attention"] * LAYERS, "max_window_layers": 28, "sliding_window": None}
SMOLLM3 |= {"use_sliding_window": False, "rope_theta": 5000000.0, "tie_word_embeddings": True}
EXAONE4 = LLAMA2 | {"model_type": "exaone4", "rope_theta": 1000000, "sliding_window": 7, "attention_dropout": 0.0}
EXAONE4 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
JAIS2 = SIZES | {"model_type": "jais2", "hidden_act": "relu2", "layer_norm_eps": 1e-5, "num_key_value_heads": 2}
JAIS2 |= {"attention_bias": True, "mlp_bias": True, "rope_theta": 500000.0, "attention_dropout": 0.0}
OLMO = without(LLAMA2, "rms_norm_eps") | {"model_type": "olmo", "clip_qkv": None, "attention_bias": False}
PHI = SIZES | {"model_type": "phi", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
PHI |= {"num_key_value_heads": 4, "qk_layernorm": False, "rope_theta": 10000.0, "rope_scaling": None, "embd_pdrop": 0.0}
PHI |= {"attention_dropout": 0.0, "resid_pdrop": 0.1, "tie_word_embeddings": False}
GPTJ = GPT2 | {"model_type": "gptj", "rotary": True, "rotary_dim": 4, "scale_attn_weights": True}
GPTJ |= {"tie_word_embeddings": False, "gradient_checkpointing": False, "tokenizer_class": "GPT2Tokenizer"}
GRANITE = LLAMA31 | {"model_type": "granite", "attention_multiplier": 0.3, "embedding_multiplier": 12.0}
GRANITE |= {"logits_scaling": 2.0, "residual_multiplier": 0.22}
CLOVAX = GRANITE | {"model_type": "hyperclovax", "head_dim": 8, "use_post_norm": True, "logits_scaling": 0.5}
COHERE = SIZES | {"model_type": "cohere", "hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.7}
COHERE |= {"num_key_value_heads": 2, "rope_theta": 8000000.0, "use_qk_norm": False, "attention_bias": False}
COHERE |= {"attention_dropout": 0.0, "model_max_length": 131072}
COHERE2 = without(COHERE, "use_qk_norm") | {
    "model_type": "cohere2",
    "head_dim": 8,
    "layer_switch": 3,
    "rotary_pct": 1.0,
}
COHERE2 |= {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"}
COHERE2 |= {"sliding_window": 7, "sliding_window_pattern": 3, "use_embedding_sharing": True, "rope_scaling": None}
COHERE2 |= {"use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "seq_length": CONTEXT}
BLOOM |= {"vocab_size": V, "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False}
BLOOM |= {"attention_softmax_in_fp32": True, "masked_softmax_fusion": True, "bias_dropout_fusion": True}
BLOOM |= {"offset_alibi": 100, "pretraining_tp": 2, "skip_bias_add": True, "skip_bias_add_qkv": False, "n_inner": None}
BLOOM |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "slow_but_exact": False, "unk_token_id": 0}
HUNYUAN = LLAMA31 | {"model_type": "hunyuan_v1_dense", "head_dim": 8, "attention_head_dim": 8, "eod_token_id": 3}
HUNYUAN |= {"use_qk_norm": True, "norm_type": "rms", "use_cla": False, "cla_share_factor": 2, "rope_theta": 10000.0}
HUNYUAN_ROPE = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 6.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2, 4.0, 9.0]}
MINISTRAL3_ROPE = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 3.0, "llama_4_scaling_beta": 0.1}
MINISTRAL3_ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
MINISTRAL3_ROPE |= {"original_max_position_embeddings": 16, "type": "yarn"}
MINISTRAL3 = without(MISTRAL, "rope_theta") | {"model_type": "ministral3", "head_dim": 8, "sliding_window": None}
MINISTRAL3 |= {"attention_dropout": 0.0, "rope_parameters": MINISTRAL3_ROPE}
OLMO3 = OLMO2 | {"model_type": "olmo3", "sliding_window": 7, "rope_theta": 500000}
INTERNLM3 = LLAMA2 | {
    "model_type": "internlm3",
    "head_dim": 8,
    "qkv_bias": False,
    "bias": False,
    "rope_theta": 50000000,
}
INTERNLM3 |= {"attention_dropout": 0.0}
IQUEST = LLAMA31 | {"model_type": "iquestcoder", "head_dim": 8, "clip_qkv": None, "use_sliding_window": False}
IQUEST |= {"max_window_layers": 0, "sliding_window": None, "rope_theta": 500000.0}
EXAONE = LLAMA31 | {"model_type": "exaone", "num_layers": LAYERS, "layer_norm_epsilon": 1e-5, "rope_theta": 1000000.0}
EXAONE = without(EXAONE, "num_hidden_layers", "rms_norm_eps", "hidden_act") | {"activation_function": "silu"}
EXAONE |= {"embed_dropout": 0.0, "head_dim": 8}
CODEGEN = without(GPTJ, "rotary") | {"model_type": "codegen", "gradient_checkpointing": False}
FALCON = without(SIZES, "intermediate_size") | {
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "num_kv_heads": 4,
}
FALCON |= {"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}
FALCON |= {"layer_norm_epsilon": 1e-5, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}
OPT = without(SIZES, "intermediate_size") | {"model_type": "opt", "ffn_dim": 37, "word_embed_proj_dim": 32}
OPT |= {"_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu", "dropout": 0.1}
OPT |= {"attention_dropout": 0.0, "do_layer_norm_before": True, "init_std": 0.02, "layerdrop": 0.0, "prefix": "</s>"}
MPT_ATTENTION = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "prefix_lm": False}
MPT_ATTENTION |= {"attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None, "qk_ln": False}
MPT_ATTENTION |= {"softmax_scale": None}
MPT = {"model_type": "mpt", "d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": CONTEXT, "vocab_size": V}
MPT |= {"attn_config": MPT_ATTENTION, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4}
MPT |= {"init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "no_bias": True, "resid_pdrop": 0}
MPT |= {"norm_type": "low_precision_layernorm", "verbose": 0, "init_config": {"name": "kaiming_normal_"}}


def new_rope(document, **more):
    """As transformers 5 writes it."""
    table = {"rope_theta": document["rope_theta"], "rope_type": "default"} | more
    return without(document, "rope_theta", "rope_scaling") | {"rope_parameters": table} | V5


LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA3_NEW = {"full_attention": {"rope_type": "default", "rope_theta": 1000000.0}}
GEMMA3_NEW |= {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
LINEAR_GEMMA3 = {"factor": 8.0, "rope_type": "linear"}

COMMON = without(SIZES, "intermediate_size")

OPENS = {
    "gpt2": GPT2 | FIRST,
    "gpt2-medium": GPT2 | V2 | {"n_special": 0, "predict_special_tokens": True},
    "gpt2-xl": GPT2 | FIRST | {"output_past": True},
    "distilgpt2": GPT2 | FIRST | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "gpt2 saved by 2": GPT2 | V2,
    "gpt2 saved by 3": GPT2 | V3,
    "gpt2 as a whole": GPT2 | WHOLE,
    "gpt2 saved by 4": GPT2 | V4 | {"reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False},
    "gpt2 saved by 5": without(GPT2, "n_ctx") | V5 | {"n_inner": None, "tie_word_embeddings": True},
    "gpt2 with common names": without(GPT2, "n_embd", "n_layer", "n_head", "n_positions") | COMMON | V4,
    "gpt2 with both names": GPT2 | COMMON,
    "dialogpt": GPT2 | V3 | {"task_specific_params": {"conversational": {"max_length": 9}}},
    "gpt2 with gelu_fast": GPT2 | {"activation_function": "gelu_fast"},
    "gpt2 of chinese": GPT2 | V3 | {"gradient_checkpointing": False, "tokenizer_class": "BertTokenizer"},
    "cerebras-gpt": GPT2 | V4 | {"activation_function": "gelu", "n_inner": 40, "scale_attn_weights": True},
    "gpt2 of swedish": GPT2 | V3 | {"activation_function": "gelu", "unk_token_id": 3, "sep_token_id": 4},
    "gpt2 without a context": without(GPT2, "n_positions", "n_ctx"),
    "llama-1": without(LLAMA, "max_position_embeddings") | V4 | {"max_sequence_length": CONTEXT, "pad_token_id": 0},
    "vicuna": LLAMA | V4 | {"pad_token_id": 0, "num_key_value_heads": 4, "rope_scaling": None, "pretraining_tp": 1},
    "llama-2": LLAMA2 | V4,
    "llama-2 32k": LLAMA2 | V4 | {"rope_scaling": {"factor": 8.0, "type": "linear"}},
    "codellama": LLAMA2 | V4 | {"rope_theta": 1000000},
    "tinyllama": LLAMA2 | V4 | {"num_key_value_heads": 1},
    "llama-3": LLAMA31 | V4,
    "llama-3.1": LLAMA31 | V4 | {"rope_scaling": LLAMA3_ROPE, "eos_token_id": [7, 8, 9]},
    "llama-3.2": LLAMA31 | V4 | {"rope_scaling": LLAMA3_ROPE, "head_dim": 6, "tie_word_embeddings": True},
    "llama-3.2 of unsloth": LLAMA31 | V4 | {"rope_scaling": LLAMA3_ROPE, "head_dim": 6} | UNSLOTH,
    "llama-3.1 saved by 5": new_rope(LLAMA31, **LLAMA3_ROPE),
    "llama-3 as a whole": LLAMA31 | WHOLE,
    "smollm2": LLAMA31 | V4 | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"x": 1}},
    "yi": LLAMA2 | V4 | {"rope_theta": 5000000.0},
    "deepseek-coder": LLAMA2 | V4 | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    "mistral as llama": LLAMA2 | V4 | {"sliding_window": None},
    "window of zero": LLAMA2 | V4 | {"sliding_window": 0, "use_sliding_window": False},
    "llama with unk": LLAMA2 | V4 | {"unk_token_id": 0, "tokenizer_class": "LlamaTokenizer"},
    "llama with swish": LLAMA2 | V4 | {"hidden_act": "swish"},
    "openllama": LLAMA | V4 | {"hidden_dropout_prob": 0.1, "use_memory_efficient_attention": True},
    "falcon3": LLAMA31 | V4 | {"activation": None, "head_dim": 6, "rope_theta": 1000042},
    "llama for classes": LLAMA2 | V4 | {"id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression"},
    "minitron": LLAMA31 | V4 | {"head_dim": 8, "hidden_act": "silu"},
    "qwen1.5": QWEN2 | V4 | {"tie_word_embeddings": True},
    "qwen2": QWEN2 | V4,
    "qwen2.5": QWEN2 | V4 | {"rope_scaling": None, "bos_token_id": 3, "eos_token_id": 4},
    "qwen2.5-1m": QWEN2 | V4 | {"sliding_window": 32768},
    "qwen2 with windows": QWEN2 | V4 | {"use_sliding_window": True},
    "qwen2 with mrope off": QWEN2 | V4 | {"use_mrope": False},
    "qwen2 saved by 5": new_rope(QWEN2) | {"layer_types": ["full_attention"] * LAYERS},
    "deepseek-r1-distill-qwen": QWEN2 | V4 | {"_attn_implementation_autoset": True, "attention_bias": True},
    "qwen3": QWEN3 | V4,
    "qwen3 of unsloth": QWEN3 | V4 | UNSLOTH,
    "qwen3 saved by 5": new_rope(QWEN3) | {"layer_types": ["full_attention"] * LAYERS},
    "mistral-7b": MISTRAL | V4,
    "mistral-7b v0.2": MISTRAL | V4 | {"rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0},
    "mistral-nemo": MISTRAL | V4 | {"head_dim": 8, "rope_theta": 1e6, "sliding_window": None},
    "zephyr": MISTRAL | V4 | {"pad_token_id": 2, "use_cache": False, "_name_or_path": "x"},
    "mistral with window 0": MISTRAL | V4 | {"sliding_window": 0},
    "mistral saved by 5": new_rope(MISTRAL) | {"head_dim": 6},
    "pythia": NEOX | V4,
    "pythia saved by 4.57": NEOX | V4 | NEOX_457,
    "pythia as a whole": NEOX | WHOLE,
    "pythia saved by 5": without(NEOX, "rotary_emb_base", "rotary_pct")
    | {"rope_parameters": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 0.25}},
    "gpt-neox-20b": NEOX
    | V4
    | {"hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "stablelm-alpha": NEOX | V4 | {"rotary_pct": 0.5, "hidden_dropout": 0.0, "classifier_dropout": 0.1},
    "redpajama": NEOX | V4 | {"rotary_pct": 1.0, "use_parallel_residual": False},
    "dolly": NEOX | V4 | {"custom_pipelines": {"text-generation": {"impl": "x.Y", "pt": "AutoModel"}}},
    "phi-3-mini": PHI3 | V4 | {"_name_or_path": "Phi-3-mini-4k-instruct"},
    "phi-3-medium": PHI3 | V4 | {"num_key_value_heads": 2, "tokenizer_class": "LlamaTokenizer"},
    "phi-4": PHI3 | V4 | {"num_key_value_heads": 1, "sliding_window": None, "rope_theta": 250000},
    "phi-4-mini without longrope": PHI3 | V4 | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "phi-3 saved by 5": new_rope(PHI3, partial_rotary_factor=1.0),
    "starcoder2": STARCODER2 | V4,
    "starcoder2 saved by 5": new_rope(STARCODER2) | {"tie_word_embeddings": True},
    "olmo2": OLMO2 | V4,
    "olmo2 saved by 5": new_rope(OLMO2),
    "gemma": GEMMA | V4,
    "gemma of later": GEMMA | V4 | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None, "rope_scaling": None},
    "gemma saved by 5": new_rope(GEMMA) | {"use_bidirectional_attention": None},
    "gemma2": GEMMA2 | V4,
    "gemma2 of unsloth": GEMMA2 | V4 | UNSLOTH | {"_attn_implementation": "eager"},
    "gemma2 saved by 5": new_rope(GEMMA2) | {"layer_types": LAYER_TYPES},
    "gemma3-1b": GEMMA3 | V4 | {"sliding_window_pattern": 3},
    "gemma3-270m": GEMMA3 | V4 | {"_sliding_window_pattern": 3, "layer_types": LAYER_TYPES},
    "gemma3 with scaling": GEMMA3 | V4 | {"rope_scaling": LINEAR_GEMMA3, "sliding_window_pattern": 3},
    "gemma3 saved by 5": without(GEMMA3, "rope_theta", "rope_local_base_freq", "rope_scaling")
    | V5
    | {"rope_parameters": GEMMA3_NEW, "layer_types": LAYER_TYPES, "use_bidirectional_attention": False},
    "vaultgemma": VAULTGEMMA | V4,
    "vaultgemma saved by 5": new_rope(VAULTGEMMA) | {"layer_types": LAYER_TYPES},
    "afm without yarn": ARCEE | V4,
    "arcee saved by 5": new_rope(ARCEE),
    "seed-oss": SEED_OSS | V4,
    "seed-oss saved by 5": new_rope(SEED_OSS),
    "ministral": MINISTRAL | V4,
    "ministral saved by 5": new_rope(MINISTRAL) | {"layer_types": LAYER_TYPES},
    "minitron of nemotron": NEMOTRON | V4,
    "nemotron saved by 5": new_rope(NEMOTRON, partial_rotary_factor=0.5),
    "stablelm-3b": STABLELM | V4,
    "stablelm-2": STABLELM | V4 | {"use_qkv_bias": True, "qk_layernorm": False, "use_parallel_residual": False},
    "starcoder": BIGCODE | V4 | {"activation_function": "gelu"},
    "santacoder": without(BIGCODE, "n_inner") | V4 | {"n_inner": None},
    "gpt_bigcode with many heads": BIGCODE | V4 | {"multi_query": False},
    "gpt_bigcode saved by 5": without(BIGCODE, "n_ctx") | V5 | {"num_key_value_heads": 1},
    "gpt-neo": GPT_NEO | V3,
    "gpt-neo saved by 5": without(GPT_NEO, "attention_layers") | V5,
    "mpt": MPT | V4,
    "mpt saved by 5": MPT | V5 | {"attn_config": MPT_ATTENTION | {"dtype": None, "model_type": "", "id2label": {}}},
    "glm-4-9b": GLM | V4,
    "glm saved by 5": new_rope(GLM, partial_rotary_factor=0.5),
    "glm-4-0414": GLM | V4 | {"model_type": "glm4"},
    "ernie-4.5": ERNIE | V4 | {"tie_word_embeddings": True},
    "smollm3": SMOLLM3 | V4,
    "smollm3 saved by 5": new_rope(without(SMOLLM3, "no_rope_layers")),
    "exaone-4-32b": EXAONE4 | V4 | {"sliding_window_pattern": "LLG"},
    "exaone-4-1.2b": EXAONE4
    | V4
    | {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * LAYERS},
    "helium-1": HELIUM | V4,
    "jais-2-8b": JAIS2 | V4,
    "internlm3-8b": INTERNLM3 | V4,
    "iquest-coder-40b": IQUEST | V4,
    "phi-2": PHI | V4,
    "phi saved by 5": new_rope(PHI, partial_rotary_factor=0.5),
    "gpt-j-6b": GPTJ | V4 | {"task_specific_params": {"text-generation": {"do_sample": True}}},
    "gptj with common names": without(GPTJ, "n_embd", "n_layer", "n_head", "n_positions") | COMMON | V4,
    "granite-3.1": GRANITE | V4,
    "granite with the defaults": without(GRANITE, "attention_multiplier", "logits_scaling") | V4,
    "granite saved by 5": new_rope(GRANITE),
    "hyperclovax-seed": CLOVAX | V4,
    "hyperclovax without norms behind": without(CLOVAX, "attention_multiplier") | V4 | {"use_post_norm": False},
    "command-r": COHERE | V4,
    "command-r7b": COHERE2 | V4,
    "cohere2 saved by 5": new_rope(without(COHERE2, "sliding_window_pattern") | {"layer_types": LAYER_TYPES}),
    "bloom-560m": BLOOM | V4,
    "bloomz": BLOOM | V4 | {"n_embed": 32, "num_attention_heads": 4},
    "hunyuan-0.5b": HUNYUAN | V4 | {"rope_scaling": HUNYUAN_ROPE | {"type": "dynamic"}},
    "hunyuan saved by 5": new_rope(HUNYUAN, **HUNYUAN_ROPE | {"rope_type": "dynamic"}),
    "qwen2.5 with yarn": QWEN2 | V4 | {"rope_scaling": YARN},
    "qwen3 with yarn": QWEN3 | V4 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn with scales": LLAMA2 | V4 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8}},
    "gemma3 with yarn": GEMMA3 | V4 | {"rope_scaling": YARN},
    "neox with yarn": NEOX | V4 | {"rotary_pct": 0.5, "rope_scaling": YARN | {"attention_factor": 1.4, "factor": None}},
    "olmo-3-7b": OLMO3
    | V4
    | {"rope_scaling": without(YARN, "type") | {"rope_type": "yarn"}, "layer_types": LAYER_TYPES},
    "olmo-1b": OLMO | V4 | {"tie_word_embeddings": True, "rope_theta": 10000.0},
    "exaone-3.5": EXAONE | V4 | {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    "exaone saved by 5": new_rope(EXAONE),
    "codegen-350m": CODEGEN | V4,
    "falcon-7b": FALCON | V4,
    "falcon saved by 5": FALCON | V5 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "falcon with many heads": FALCON | V4 | {"multi_query": False, "parallel_attn": False, "bias": True},
    "opt-125m": OPT | V4,
    "opt without the last norm": OPT | V4 | {"_remove_final_layer_norm": True, "enable_bias": False},
    "mpt-7b storywriter": MPT | V4 | {"attn_config": MPT_ATTENTION | {"clip_qkv": 1.0}},
    "olmo-7b": OLMO | V4 | {"clip_qkv": 0.9},
    "phi-3-mini-128k": PHI3 | V4 | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
    "phi-3-medium-128k of su": PHI3
    | {"rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 16}}
    | {"original_max_position_embeddings": 16},
    "phi-4-mini": PHI3
    | V4
    | {"rope_scaling": {name: value[:3] if isinstance(value, list) else value for name, value in LONGROPE.items()}}
    | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    "phi-3.5 of version 5": without(PHI3, "rope_scaling", "rope_theta")
    | V5
    | {"rope_parameters": LONGROPE | {"rope_theta": 500.0, "attention_factor": 1.19, "factor": 3.0}}
    | {"original_max_position_embeddings": 16},
    "llama with dynamic": LLAMA2
    | V4
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "qwen with dynamic": QWEN2 | V4 | {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "internlm3 with dynamic": INTERNLM3 | V4 | {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "qwen3 with yarn of fractions": QWEN3 | V4 | {"rope_scaling": YARN | {"truncate": False}},
    "command-r-plus": COHERE | V4 | {"use_qk_norm": True},
    "phi with normalised queries": PHI | V4 | {"qk_layernorm": True},
    "ministral-3-8b": MINISTRAL3 | V5,
    "ministral-3 with the context in its table": MINISTRAL3
    | V5
    | {"rope_parameters": MINISTRAL3_ROPE | {"max_position_embeddings": CONTEXT}, "tie_word_embeddings": True},
    "mpt with a scale": MPT | V4 | {"attn_config": {"softmax_scale": 0.3}},
}
# It holds a field that nobody knows.
WARNED = {"dolly": "custom_pipelines"}
# What transformers cannot run; a window of no tokens means none elsewhere.
NOT_IN_TRANSFORMERS = {"mistral with window 0"}

REFUSED = {
    "llama-2-gptq": (LLAMA2 | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "quantised weights"),
    "qwen-mlx": (QWEN2 | {"quantization": {"group_size": 64, "bits": 4}}, "quantised weights"),
    "yarn without whole numbers in one kind of layer": (
        OLMO3 | {"rope_scaling": without(YARN, "type") | {"rope_type": "yarn", "truncate": False}},
        "truncate = False must be true, the only way supported for this type",
    ),
    "yarn with a number for a switch": (QWEN2 | {"rope_scaling": YARN | {"truncate": 1}}, "must be true or false"),
    "ministral-3 without its scaling": (
        MINISTRAL3 | {"rope_parameters": without(MINISTRAL3_ROPE, "llama_4_scaling_beta")},
        "llama_4_scaling_beta = None must be a number from 0 on",
    ),
    "llama with the scaling of ministral-3": (
        LLAMA2 | {"rope_parameters": MINISTRAL3_ROPE},
        "llama_4_scaling_beta = 0.1 is not known for rope_type = 'yarn'",
    ),
    "yarn of a word": (
        QWEN2 | {"rope_scaling": YARN | {"beta_fast": "x"}},
        "beta_fast = 'x' must be a positive number",
    ),
    "olmo3 with an old name": (OLMO3 | {"rope_scaling": YARN}, "rope_scaling.type = 'yarn' must be called rope_type"),
    "olmo3 with one table": (OLMO3 | {"rope_parameters": {"rope_theta": 5.0}}, "must hold full_attention"),
    "phi-3 128k of one factor": (PHI3 | {"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "a list of 4 positive"),
    "phi-3 128k of two contexts": (
        PHI3 | {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 5}},
        "original_max_position_embeddings = 5, but original_max_position_embeddings = 48",
    ),
    "gemma 3 with dynamic": (GEMMA3 | {"rope_scaling": DYNAMIC}, "rope_type = 'dynamic'"),
    "yarn-llama": (LLAMA2 | {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}}, "auto_map names Python"),
    "dynamic of a word": (LLAMA2 | {"rope_scaling": DYNAMIC | {"factor": "x"}}, "factor = 'x' must be a number"),
    "granite as llama": (LLAMA2 | {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    "llama with experts": (LLAMA2 | {"num_local_experts": 8}, "num_local_experts = 8"),
    "mixtral": (MISTRAL | {"model_type": "mixtral", "num_local_experts": 8}, "model_type = 'mixtral'"),
    "llama with a window": (LLAMA2 | {"sliding_window": 7}, "sliding_window = 7"),
    "llama with xielu": (LLAMA2 | {"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
    "gpt2 with inverse layers": (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gpt2 with pruned heads": (GPT2 | {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "gpt2 with two widths": (GPT2 | {"hidden_size": 33}, "n_embd = 32, but hidden_size = 33"),
    "neox with two bases": (NEOX | NEOX_457 | {"rope_theta": 500}, "rotary_emb_base = 10000, but rope_theta = 500"),
    "mpt without alibi": (MPT | {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
    "mpt with a switch that nobody knows": (MPT | {"attn_config": {"rope": True}}, "attn_config.rope = True"),
    "mpt with a word for an object": (MPT | {"attn_config": "x"}, "attn_config = 'x' must be an object"),
    "stablelm-2-12b": (STABLELM | {"qk_layernorm": True}, "qk_layernorm = True"),
    "gpt-neo of other layers": (
        GPT_NEO | {"attention_types": [[["global"], 2]]},
        "give a type to each of 3 layers",
    ),
    "gpt-neo of other kinds": (GPT_NEO | {"attention_types": [[["far"], 3]]}, "must be as in"),
    "gpt-neo that says two things": (GPT_NEO | {"attention_types": [[["local"], 3]]}, "attention_types says otherwise"),
    "gpt_bigcode with a number": (BIGCODE | {"multi_query": 1}, "multi_query = 1 must be true or false"),
    "smollm3 with windows": (SMOLLM3 | {"use_sliding_window": True}, "use_sliding_window = True"),
    "smollm3 of other layers": (
        SMOLLM3 | {"no_rope_layers": [1, 0]},
        "a list of 0 and 1, one for each of the 3",
    ),
    "smollm3 without a period": (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0"),
    "bloom with other residuals": (BLOOM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
    "command-r7b with normalised queries": (COHERE2 | {"use_qk_norm": True}, "use_qk_norm = True"),
    "gptj that rotates too much": (GPTJ | {"rotary_dim": 64}, "rotary_dim = 64 must be a whole number up to 8"),
    "hunyuan without alpha": (HUNYUAN | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    "granite that divides by zero": (GRANITE | {"logits_scaling": 0}, "logits_scaling = 0 must be a positive number"),
    "olmo that clips to nothing": (OLMO | {"clip_qkv": 0.0}, "clip_qkv = 0.0"),
    "exaone-3.5 with its code": (
        EXAONE | {"auto_map": {"AutoConfig": "configuration_exaone.X"}},
        "auto_map names Python",
    ),
    "falcon-40b": (FALCON | {"new_decoder_architecture": True}, "new_decoder_architecture = True"),
    "falcon-rw-1b": (FALCON | {"alibi": True}, "alibi = True"),
    "opt-350m": (OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, "word_embed_proj_dim = 16"),
    "opt with norms behind": (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    "embedding gemma": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
}


def test_there_are_enough():
    assert len(OPENS) + len(REFUSED) >= 100 and {d["model_type"] for d in OPENS.values()} == FAMILIES.keys()


def test_the_table_in_the_docs_is_of_these_settings():
    """Written by benchmarks/published.py."""
    page = (Path(__file__).parent.parent / "docs" / "hugging_face.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \| \d\.\de-\d\d \|$", page, re.MULTILINE))
    opened = collections.Counter(document["model_type"] for name, document in OPENS.items())
    opened.subtract(OPENS[name]["model_type"] for name in NOT_IN_TRANSFORMERS)
    assert rows == {model_type: str(count) for model_type, count in opened.items()}
    for part in (
        f"{len(OPENS) + len(REFUSED)} config files",
        f"{len(OPENS)} open, and the other\n{len(REFUSED)} say why",
    ):
        assert part in page


def test_published_settings_are_read():
    for name, document in OPENS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_settings(document, name)
        told = [str(warning.message) for warning in caught]
        assert (name in WARNED) == bool(told) and WARNED.get(name, "") in "".join(told), (name, told)


def test_the_others_are_refused_with_the_reason():
    for name, (document, reason) in REFUSED.items():
        with pytest.raises(fd.UserError, match=f"^{name}: ") as caught:
            read_settings(document, name)
        assert reason in str(caught.value)


def test_a_field_that_nobody_knows_is_told_of_or_with_strict_refused():
    document = LLAMA2 | {"colour": "green", "kept_for_later": None}
    with pytest.warns(FolderWarning, match=r"^x: colour = 'green' is not known for llama, and passed over"):
        config = read_settings(document, "x")
    assert config == read_settings(LLAMA2, "x", strict=True)
    with pytest.raises(fd.UserError, match="colour = 'green' is not known for llama"):
        read_settings(document, "x", strict=True)
    with pytest.raises(fd.UserError, match="kept_for_later = None"):
        read_settings(without(document, "colour"), "x", strict=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("num_experts", "attn_scale", "rope_fancy", "qk_norm", "use_alibi", "act_fn")),
        *((name, True) for name in ("embedding_multiplier", "logit_scale", "moe_layers", "norm_type", "kv_lora_rank")),
        *((name, False) for name in ("colour", "actual_size", "pad_to_multiple_of", "headline", "tokenizer_file")),
    ],
)
def test_names_of_the_network(name, expected):
    assert is_of_network(name) == expected


# --- Beside transformers ---


def torch_and_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    return torch, transformers


def torch_model(document):
    """A model of transformers with random weights, made from the settings of a file."""
    torch, transformers = torch_and_transformers()
    document = {"pad_token_id": None} | json.loads(json.dumps(document))
    config = transformers.AutoConfig.for_model(document.pop("model_type"), **document)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(parameter.shape)
        if parameter.ndim == 2:
            value = 0.7 * noise * parameter.shape[0 if config.model_type == "gpt2" else 1] ** -0.5
        else:
            value = 0.1 * noise + (not name.endswith("bias") and config.model_type not in OFFSET_NORMS)
        parameter.data = torch.tensor(value, dtype=torch.float32)
    model.tie_weights()
    return model


TOKENS_BT = np.random.default_rng(1).integers(0, V, (2, CONTEXT))


def torch_logits(model):
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT), use_cache=False).logits.numpy()


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in OPENS if name not in NOT_IN_TRANSFORMERS])
@pytest.mark.filterwarnings("ignore")
def test_published_settings_give_the_logits_of_transformers(name, tmp_path):
    import jax

    model = torch_model(OPENS[name])
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OPENS[name]))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    ours, params, _ = fd.load(tmp_path)
    expected_BTV = torch_logits(model)
    logits_BTV = np.asarray(jax.jit(ours.apply)({"params": params}, TOKENS_BT.astype(np.int32)))
    assert expected_BTV.std() > 0.2
    assert np.abs(logits_BTV - expected_BTV).max() <= 2e-6 * max(1, np.abs(expected_BTV).max())


BARE = {d["model_type"]: d for d in (GPT2, LLAMA2, QWEN2, QWEN3, MISTRAL, NEOX, PHI3, STARCODER2, OLMO2, GEMMA, GEMMA2)}
BARE["gemma3_text"] = GEMMA3
NEW = (VAULTGEMMA, ARCEE, SEED_OSS, MINISTRAL, NEMOTRON, STABLELM, BIGCODE, GPT_NEO, MPT, GLM)
NEW = (*NEW, GLM | {"model_type": "glm4"}, ERNIE, HELIUM, SMOLLM3, EXAONE4)
NEW = (*NEW, MINISTRAL3, EXAONE, CODEGEN, FALCON, without(OPT, "word_embed_proj_dim"))
NEW = (*NEW, OLMO3, PHI, GPTJ, GRANITE, CLOVAX, COHERE, COHERE2, BLOOM, HUNYUAN, OLMO, JAIS2, INTERNLM3, IQUEST)
BARE |= {document["model_type"]: document for document in NEW}
# Fields that the family reads under names that are no settings of their own.
OTHERS = {"rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers"}
OTHERS |= {
    "original_max_position_embeddings",
    "rotary_dim",
    "layer_types",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}
OTHERS |= {"no_rope_layers", "no_rope_layer_interval", "attention_types", "attention_layers", "window_size"}


@pytest.mark.full
@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_that_transformers_knows_is_in_the_tables(model_type):
    _, transformers = torch_and_transformers()
    family = FAMILIES[model_type]
    base = transformers.PretrainedConfig
    config = transformers.AutoConfig.for_model(model_type)
    known = set(config.to_dict()) | set(type(config).attribute_map)
    known |= set(transformers.GenerationConfig._get_default_generation_params())
    known |= {name for name, kind in base.__annotations__.items() if not str(kind).startswith("ClassVar")}
    sorted_out = NO_BEARING | ONLY.keys() | family.ignored | family.names_read | OTHERS | {*family.tables}
    assert known - sorted_out == set()


def changed(name, value):
    """Another value for a field, of a kind that transformers takes."""
    if name in ("dtype", "torch_dtype"):
        return "float16"
    if name == "problem_type":
        return "regression"
    if name in ("id2label", "label2id"):
        return {"0": "a", "1": "b", "2": "c"} if name == "id2label" else {"a": 0, "b": 1, "c": 2}
    if name == "attn_implementation" or name == "_attn_implementation":
        return "eager"
    if name.endswith("_token_id"):
        return 3
    if name == "layer_types":
        return ["full_attention"] * LAYERS
    if name == "cache_implementation":
        return "static"
    if name == "architectures":
        return ["Other"]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    return value


GUESSES = [True, False, 3, 0.5, "x", [1], {"0": 1}]


@functools.cache
def default_logits(model_type):
    return torch_logits(torch_model(BARE[model_type]))


@pytest.mark.full
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_fields_without_bearing_change_no_logit_of_transformers(model_type):
    """Each with another value of its kind, or with the first two of some values that transformers takes."""
    _, transformers = torch_and_transformers()
    family, document = FAMILIES[model_type], BARE[model_type]
    defaults = transformers.AutoConfig.for_model(model_type)
    names = (NO_BEARING | family.ignored) - family.names_read
    names -= {"model_type", "auto_map", "return_dict", "use_return_dict"}  # the last make a tuple of the logits
    for name in sorted(names):
        value = getattr(defaults, name, None)
        guessed = changed(name, value) in (None, value)
        taken = 0
        for candidate in GUESSES if guessed else [changed(name, value)]:
            if taken >= 2:
                break
            try:
                model = torch_model(document | {name: candidate})
            except Exception:  # a value of another kind
                continue
            taken += 1
            expected_BTV, told = default_logits(model_type), f"{name} = {candidate}"
            np.testing.assert_allclose(torch_logits(model), expected_BTV, rtol=0, atol=2e-6, err_msg=told)
        assert taken > 0, f"transformers takes no value for {name}"


@pytest.mark.full
def test_a_field_with_bearing_would_be_seen():
    """As `is_causal`, which no class of transformers has as a field, but the code of masks reads."""
    assert np.abs(torch_logits(torch_model(LLAMA2 | {"is_causal": False})) - default_logits("llama")).max() > 0.01


@pytest.mark.full
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_defaults_are_those_of_transformers(model_type):
    """Of each setting that a file may leave out."""
    document = BARE[model_type]
    if "max_position_embeddings" in FAMILIES[model_type].names_read:
        document = document | {"max_position_embeddings": CONTEXT}
    for setting in FAMILIES[model_type].all_settings:
        absent = without(document, setting.name)
        try:
            config = read_settings(absent, "x")
        except fd.UserError as error:
            assert "is missing, but required" in str(error)
            continue
        _, transformers = torch_and_transformers()
        if setting.name == "num_key_value_heads" and model_type in ("qwen2", "qwen3", "phi3", "ernie4_5"):
            continue  # some number there, whatever the number of heads; the shapes of the weights say
        fields = without(absent, "model_type")
        value = getattr(
            transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(fields))), setting.name, None
        )
        whole = read_settings(absent | ({} if value is None else {setting.name: value}), "x")
        same = {"num_kv_heads": config.kv_heads, "head_dim": config.head_width, "mlp_dim": config.mlp_width}
        config, whole = (
            dataclasses.replace(read, attention_scale=read.attention_scale or read.head_width**-0.5)
            for read in (config, whole)
        )
        assert dataclasses.replace(config, **same) == dataclasses.replace(whole, **same), setting.name
        assert config.kv_heads == whole.kv_heads
        assert (config.head_width, config.mlp_width) == (whole.head_width, whole.mlp_width), setting.name


def test_a_command_says_what_it_passes_over_and_strict_refuses(tmp_path, capsys):
    from faults.model_folder import change, make_folder

    folder = make_folder(tmp_path / "model")
    change(folder / "config.json", colour="green", num_labels=3)
    (folder / "tokenizer.json").unlink()  # ends the command once the model is read
    command = ["eval", str(folder), __file__]
    assert main([*command, "--strict"]) == 2
    assert "colour = 'green' is not known for llama" in capsys.readouterr().err
    assert main(command) == 2
    warning, error, _ = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {folder / 'config.json'}: colour = 'green' is not known for llama")
    assert error.startswith(f"error: {folder}: has no tokenizer.json")
