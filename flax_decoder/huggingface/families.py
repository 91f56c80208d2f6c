"""The table of each model family: its config.json fields, its tensors, and what is the same in all its models.

To add a family: compare its modeling file in `transformers` with `nn`, write its table here, and add shapes to
`tests/test_families.py`, which compares it with PyTorch. `register_family` adds one from outside.
"""

import dataclasses
from dataclasses import replace

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import REQUIRED, Family, Rotary, Rule, Setting, Windows, linear_rules, norm_rules
from flax_decoder.huggingface.pieces import (
    ATTENTION,
    ATTENTION_BIAS,
    ATTENTION_OUT,
    BIASES,
    BOTH_NORMS,
    FEED_FORWARD_NORMS,
    GATE_UP_MATRICES,
    GATED,
    GEMMA2_SETTINGS,
    GEMMA_ACT,
    GEMMA_SETTINGS,
    GLM4_NORMS,
    GPT2_ENDS,
    GPT2_SETTINGS,
    GROUPED_SIZES,
    LLAMA_SETTINGS,
    MATRICES,
    MLP_BIAS,
    MULTI_QUERY,
    OUTPUT_NORMS,
    PLAIN,
    PRE_NORMS,
    QK_NORMS,
    QKV,
    RMS_EPSILON,
    SIZES,
    UP_AND_DOWN,
    activation,
    ends,
    inverse,
    layer_norms,
    negated,
    num_layers,
    qk_norm,
    size,
    switch,
    with_defaults,
)

# Without "dynamic", which means something else there, or would count in some layers only.
STATIC_TYPES = ("default", "linear", "llama3", "yarn")

# --- The families, in the order in which `choose_family` prefers them ---


def _gpt2_rules(*, transposed: bool) -> tuple[Rule, ...]:
    """The tensors of GPT-2, whose matrices are (in, out) as ours, or transposed."""
    return (
        *GPT2_ENDS,
        *linear_rules("h.{}.attn.c_attn", *QKV, transposed=transposed),
        *linear_rules("h.{}.attn.c_proj", "attention/out", transposed=transposed),
        *linear_rules("h.{}.mlp.c_fc", "feed_forward/up", transposed=transposed),
        *linear_rules("h.{}.mlp.c_proj", "feed_forward/down", transposed=transposed),
    )


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    constants={"positions": "learned", **dict.fromkeys(BIASES, True)},
    settings=GPT2_SETTINGS,
    rules=_gpt2_rules(transposed=False),
    prefix="transformer.",
    tied=True,
    rotary=None,
    supported={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    ignored=frozenset({"reorder_and_upcast_attn"}),
    ignored_tensors=r"h\.\d+\.attn\.(bias|masked_bias)",
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    constants={"positions": "rotary", "norm": "rmsnorm"},
    settings=(*LLAMA_SETTINGS, ATTENTION_BIAS, MLP_BIAS),
    rules=(*ends(), *layer_norms(PRE_NORMS), *MATRICES),
    divides_width=True,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    constants={**LLAMA.constants, "attention_in_bias": True},
    settings=with_defaults(LLAMA_SETTINGS, max_position_embeddings=32_768),
    rules=LLAMA.rules,
    windows=Windows("late", default=4096),
    supported={"use_mrope": (False,)},
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    constants=LLAMA.constants,
    settings=with_defaults(LLAMA_SETTINGS, num_key_value_heads=REQUIRED, max_position_embeddings=131_072),
    rules=LLAMA.rules,
    windows=Windows("all", default=4096),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    constants={**LLAMA.constants, "qk_norm": "head"},
    settings=(*with_defaults(LLAMA_SETTINGS, head_dim=128, max_position_embeddings=32_768), ATTENTION_BIAS),
    rules=(*LLAMA.rules, *layer_norms(QK_NORMS)),
    windows=Windows("late", default=4096),
)

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    constants={"positions": "rotary", "norm_bias": True, "mlp_bias": True},
    settings=(
        *with_defaults(SIZES, max_position_embeddings=2048),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", PLAIN, "gelu"),
        replace(ATTENTION_BIAS, default=True),
        Setting("use_parallel_residual", ("parallel_residual",), True),
    ),
    rules=(
        Rule("embed_in.weight", ("embedding",)),
        *norm_rules("final_layer_norm", "final_norm"),
        *layer_norms(PRE_NORMS),
        *linear_rules("layers.{}.attention.query_key_value", *QKV, by_head=True),
        *linear_rules("layers.{}.attention.dense", "attention/out"),
        *linear_rules("layers.{}.mlp.dense_h_to_4h", "feed_forward/up"),
        *linear_rules("layers.{}.mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    prefix="gpt_neox.",
    head="embed_out.weight",
    head_bias="",
    rotary=Rotary(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ignored_tensors=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    constants=LLAMA.constants,
    settings=with_defaults(LLAMA_SETTINGS, max_position_embeddings=4096, rms_norm_eps=1e-5),
    rules=(
        *ends(),
        *layer_norms(PRE_NORMS),
        *linear_rules("layers.{}.self_attn.qkv_proj", *QKV),
        *ATTENTION_OUT,
        *GATE_UP_MATRICES,
    ),
    rotary=Rotary(fraction="partial_rotary_factor", types=("default", "longrope"), original_context=4096),
    windows=Windows("all"),
)

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        *with_defaults(GROUPED_SIZES, num_key_value_heads=REQUIRED, max_position_embeddings=4096),
        Setting("norm_epsilon", ("norm_epsilon",), 1e-5),
        activation("hidden_act", PLAIN, "gelu_pytorch_tanh"),
        Setting("use_bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), True),
    ),
    rules=(
        *ends(),
        *layer_norms(PRE_NORMS),
        *ATTENTION,
        *linear_rules("layers.{}.mlp.c_fc", "feed_forward/up"),
        *linear_rules("layers.{}.mlp.c_proj", "feed_forward/down"),
    ),
    tied=True,
    windows=Windows("all"),
    supported={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    ignored=frozenset(
        # transformers reads hidden_act instead of the first, and computes softmaxes in float32 always.
        {"activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "layer_norm_epsilon"}
    ),
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    constants={**LLAMA.constants, "qk_norm": "all", "norm_position": "output"},
    settings=(*with_defaults(LLAMA_SETTINGS, rms_norm_eps=1e-5), ATTENTION_BIAS),
    rules=(*ends(), *layer_norms(OUTPUT_NORMS), *layer_norms(QK_NORMS), *MATRICES),
)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    constants=LLAMA.constants,
    settings=(*GEMMA_SETTINGS, activation("hidden_act", GEMMA_ACT, "gelu_pytorch_tanh")),
    rules=(*ends(1.0), *layer_norms(PRE_NORMS, 1.0), *MATRICES),
    tied=True,
    supported={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
    scales_embedding=True,
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    constants={**LLAMA.constants, "norm_position": "both"},
    settings=(
        *GEMMA2_SETTINGS,
        Setting("attn_logit_softcapping", ("attention_soft_cap",), 50.0),
        Setting("final_logit_softcapping", ("logit_soft_cap",), 30.0),
    ),
    rules=(*ends(1.0), *layer_norms(BOTH_NORMS, 1.0), *MATRICES),
    tied=True,
    windows=Windows("periodic", default=4096, period=2),
    supported={"use_bidirectional_attention": (None, False)},
    # transformers reads hidden_activation and sliding_window instead of the first two.
    ignored=frozenset({"hidden_act", "sliding_window_size"}),
    scales_embedding=True,
    divides_width=True,
)

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    constants={**GEMMA2.constants, "qk_norm": "head"},
    settings=(
        *with_defaults(GEMMA2_SETTINGS, max_position_embeddings=131_072),
        Setting("final_logit_softcapping", ("logit_soft_cap",), None),
    ),
    rules=(*ends(1.0), *layer_norms(BOTH_NORMS, 1.0), *layer_norms(QK_NORMS, 1.0), *MATRICES),
    rotary=Rotary(default_base=1_000_000.0, types=STATIC_TYPES, window_base="rope_local_base_freq"),
    windows=Windows("periodic", default=4096, period=6),
    supported={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
    ignored=frozenset({"hidden_act"}),
)

VAULTGEMMA = replace(
    GEMMA2,
    model_type="vaultgemma",
    architecture="VaultGemmaForCausalLM",
    constants=LLAMA.constants,
    rules=(*ends(1.0), *layer_norms(FEED_FORWARD_NORMS, 1.0), *MATRICES),
    ignored=frozenset({"hidden_act"}),
)

ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    constants=LLAMA.constants,
    settings=(
        *with_defaults(GROUPED_SIZES, max_position_embeddings=4096),
        replace(RMS_EPSILON, default=1e-5),
        activation("hidden_act", PLAIN, "relu2"),
        ATTENTION_BIAS,
        MLP_BIAS,
    ),
    rules=(*ends(), *layer_norms(PRE_NORMS), *ATTENTION, *UP_AND_DOWN),
    divides_width=True,
)

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    constants=LLAMA.constants,
    settings=(
        *with_defaults(LLAMA_SETTINGS, num_key_value_heads=REQUIRED, head_dim=128, max_position_embeddings=524_288),
        Setting("attention_bias", ("attention_in_bias",), True),
        Setting("attention_out_bias", ("attention_out_bias",), False),
        MLP_BIAS,
    ),
    rules=LLAMA.rules,
)

MINISTRAL = replace(
    MISTRAL, model_type="ministral", architecture="MinistralForCausalLM", windows=Windows("typed", default=4096)
)

MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    settings=with_defaults(
        LLAMA_SETTINGS, num_key_value_heads=REQUIRED, head_dim=128, max_position_embeddings=262_144, rms_norm_eps=1e-5
    ),
    rotary=Rotary(types=("yarn", "llama3"), scales_queries=True),
    windows=Windows("all"),
)

NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        *with_defaults(GROUPED_SIZES, max_position_embeddings=4096),
        Setting("norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", PLAIN, "relu2"),
        ATTENTION_BIAS,
        MLP_BIAS,
    ),
    rules=(*ends(1.0), *layer_norms(PRE_NORMS, 1.0), *ATTENTION, *UP_AND_DOWN),
    rotary=Rotary(fraction="partial_rotary_factor", default_fraction=0.5),
)

STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        *with_defaults(SIZES, max_position_embeddings=4096),
        size("num_key_value_heads", "num_kv_heads"),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", GATED, "silu"),
        Setting("use_qkv_bias", ("attention_in_bias",), False),
    ),
    rules=LLAMA.rules,
    rotary=Rotary(fraction="partial_rotary_factor", default_fraction=0.25),
    supported={"use_parallel_residual": (False,), "qk_layernorm": (False,)},
    divides_width=True,
)

GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    constants=GPT2.constants,
    settings=(
        *with_defaults(GPT2_SETTINGS, activation_function="gelu_pytorch_tanh"),
        MULTI_QUERY,
    ),
    rules=(
        *GPT2_ENDS,
        *linear_rules("h.{}.attn.c_attn", *QKV, by_head=True),
        *linear_rules("h.{}.attn.c_proj", "attention/out"),
        *linear_rules("h.{}.mlp.c_fc", "feed_forward/up"),
        *linear_rules("h.{}.mlp.c_proj", "feed_forward/down"),
    ),
    prefix="transformer.",
    tied=True,
    rotary=None,
    supported={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
    ignored=frozenset(
        # How softmaxes and caches are computed; the last one follows from multi_query.
        {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "validate_runner_input"}
        | {"pre_allocate_kv_cache", "pad_key_length", "max_batch_size", "num_key_value_heads"}
    ),
    ignored_tensors=GPT2.ignored_tensors,
    divides_width=True,
)

GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    constants={
        **{"positions": "learned", "attention_scale": 1.0},
        **{"norm_bias": True, "attention_out_bias": True, "mlp_bias": True},
    },
    settings=(
        size("vocab_size", "vocab_size"),
        size("hidden_size", "embed_dim"),
        Setting("num_layers", ("num_layers",), read=num_layers, also=("num_hidden_layers",)),
        size("num_heads", "num_heads", also=("num_attention_heads",)),
        size("intermediate_size", "mlp_dim", None),
        size("max_position_embeddings", "context_length", 2048),
        Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
        activation("activation_function", PLAIN, "gelu_new"),
    ),
    rules=(
        *GPT2_ENDS,
        *linear_rules("h.{}.attn.attention.q_proj", "attention/query"),
        *linear_rules("h.{}.attn.attention.k_proj", "attention/key"),
        *linear_rules("h.{}.attn.attention.v_proj", "attention/value"),
        *linear_rules("h.{}.attn.attention.out_proj", "attention/out"),
        *linear_rules("h.{}.mlp.c_fc", "feed_forward/up"),
        *linear_rules("h.{}.mlp.c_proj", "feed_forward/down"),
    ),
    prefix="transformer.",
    tied=True,
    rotary=None,
    windows=Windows("listed", default=256),
    ignored_tensors=r"h\.\d+\.attn\.attention\.(bias|masked_bias)",
    divides_width=True,
    has_own_attention=True,
)

MPT = Family(
    "mpt",
    "MptForCausalLM",
    constants={"positions": "alibi", "feed_forward": "gelu"},
    settings=(
        size("vocab_size", "vocab_size"),
        size("d_model", "embed_dim", also=("hidden_size",)),
        Setting("n_layers", ("num_layers",), read=num_layers, also=("num_hidden_layers",)),
        size("n_heads", "num_heads", also=("num_attention_heads",)),
        size("max_seq_len", "context_length", 2048),
        Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
        Setting("attn_config.softmax_scale", ("attention_scale",), None),
        Setting("attn_config.clip_qkv", ("qkv_clip",), None, read=lambda limit: limit or None),
    ),
    rules=(
        Rule("wte.weight", ("embedding",)),
        *norm_rules("norm_f", "final_norm"),
        *norm_rules("blocks.{}.norm_1", "layers/attention_norm"),
        *norm_rules("blocks.{}.norm_2", "layers/feed_forward_norm"),
        *linear_rules("blocks.{}.attn.Wqkv", *QKV),
        *linear_rules("blocks.{}.attn.out_proj", "attention/out"),
        *linear_rules("blocks.{}.ffn.up_proj", "feed_forward/up"),
        *linear_rules("blocks.{}.ffn.down_proj", "feed_forward/down"),
    ),
    prefix="transformer.",
    tied=True,
    rotary=None,
    tables=("attn_config",),
    # With other values MosaicML's own code computes something else; transformers passes over most of them.
    supported={
        **{"expansion_ratio": (4,), "no_bias": (True,), "logit_scale": (None,), "embedding_fraction": (1.0,)},
        **{"norm_type": ("low_precision_layernorm", "layernorm"), "attn_config.attn_type": ("multihead_attention",)},
        **{"attn_config.alibi": (True,), "attn_config.alibi_bias_max": (8,)},
        **{"attn_config.prefix_lm": (False,), "attn_config.qk_ln": (False,)},
        **{"attn_config.attn_uses_sequence_id": (False,)},
    },
    # The positions that could be learned are not used beside ALiBi.
    ignored=frozenset({"learned_pos_emb", "init_device", "init_config", "emb_pdrop", "verbose", "attn_impl"}),
    divides_width=True,
    has_own_attention=True,
)

GLM = Family(
    "glm",
    "GlmForCausalLM",
    constants={**LLAMA.constants, "rotary_layout": "interleaved"},
    settings=(
        *with_defaults(
            LLAMA_SETTINGS,
            num_key_value_heads=REQUIRED,
            head_dim=128,
            max_position_embeddings=131_072,
            rms_norm_eps=1.5625e-07,
        ),
        Setting("attention_bias", ("attention_in_bias",), True),
    ),
    rules=(*ends(), *layer_norms(PRE_NORMS), *ATTENTION, *GATE_UP_MATRICES),
    rotary=Rotary(fraction="partial_rotary_factor", default_fraction=0.5),
)

GLM4 = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    constants={**GLM.constants, "norm_position": "both"},
    rules=(*ends(), *layer_norms(GLM4_NORMS), *ATTENTION, *GATE_UP_MATRICES),
)

ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    constants=GLM.constants,
    settings=(
        *with_defaults(LLAMA_SETTINGS, head_dim=128, max_position_embeddings=131_072, rms_norm_eps=1e-5),
        Setting("use_bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), False),
    ),
    rules=LLAMA.rules,
    tied=True,
    rotary=Rotary(default_base=500_000.0),
)

HELIUM = Family(
    "helium",
    "HeliumForCausalLM",
    constants=GLM.constants,
    settings=(
        *with_defaults(
            LLAMA_SETTINGS, num_key_value_heads=REQUIRED, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-8
        ),
        Setting("attention_bias", ("attention_in_bias",), False),
        MLP_BIAS,
    ),
    rules=LLAMA.rules,
    rotary=Rotary(default_base=100_000.0),
    fills_width=True,
)

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    settings=(
        *with_defaults(SIZES, max_position_embeddings=32_768),
        size("num_key_value_heads", "num_kv_heads"),
        replace(RMS_EPSILON, default=1e-6),
        activation("hidden_act", GATED, "silu"),
        ATTENTION_BIAS,
        MLP_BIAS,
    ),
    tied=True,
    rotary=Rotary(default_base=2_000_000.0, layers="listed"),
    ignored=frozenset({"layer_types", "max_window_layers"}),  # they count only with use_sliding_window
)

EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    constants={**LLAMA.constants, "qk_norm": "head", "norm_position": "output"},
    settings=with_defaults(LLAMA_SETTINGS, num_key_value_heads=REQUIRED, rms_norm_eps=1e-5),
    rules=OLMO2.rules,
    rotary=Rotary(layers="windowed"),
    windows=Windows("periodic", default=4096, period=4, writes_null=True),
)

JAIS2 = Family(
    "jais2",
    "Jais2ForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        *with_defaults(GROUPED_SIZES, max_position_embeddings=8192),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", PLAIN, "relu2"),
        replace(ATTENTION_BIAS, default=True),
        replace(MLP_BIAS, default=True),
    ),
    rules=(*ends(), *layer_norms(PRE_NORMS), *ATTENTION, *UP_AND_DOWN),
    divides_width=True,
)

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    constants={"positions": "rotary", "norm": "layernorm", "norm_scale": False, "norm_epsilon": 1e-5},
    settings=(
        *(setting for setting in LLAMA_SETTINGS if setting.name != RMS_EPSILON.name),
        ATTENTION_BIAS,
        Setting("clip_qkv", ("qkv_clip",), None),
    ),
    rules=LLAMA.rules,
    divides_width=True,
)

INTERNLM3 = replace(
    LLAMA,
    model_type="internlm3",
    settings=with_defaults(
        LLAMA_SETTINGS, num_key_value_heads=REQUIRED, head_dim=128, max_position_embeddings=32_768, rms_norm_eps=1e-5
    ),
    supported={"attention_bias": (False,), "qkv_bias": (False,), "mlp_bias": (False,), "bias": (False,)},
)

IQUESTCODER = replace(
    LLAMA,
    model_type="iquestcoder",
    settings=(
        *with_defaults(
            LLAMA_SETTINGS,
            num_key_value_heads=REQUIRED,
            head_dim=128,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
        ),
        ATTENTION_BIAS,
        MLP_BIAS,
    ),
    supported={"clip_qkv": (None,)},
    ignored=frozenset({"max_window_layers"}),  # it counts only with use_sliding_window
)

OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    rotary=Rotary(default_base=500_000.0, types=STATIC_TYPES, default_window_base=500_000.0, by_kind=True),
    windows=Windows("periodic", default=4096, period=4),
)

PHI = Family(
    "phi",
    "PhiForCausalLM",
    constants={
        **{"positions": "rotary", "parallel_residual": True, "shared_norm": True, "head_bias": True},
        **{"qk_norm_kind": "layernorm", "qk_norm_bias": True},
        **dict.fromkeys(BIASES, True),
    },
    settings=(
        *with_defaults(SIZES, max_position_embeddings=2048),
        size("num_key_value_heads", "num_kv_heads", None),
        size("head_dim", "head_dim", None),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", PLAIN, "gelu_new"),
        qk_norm("qk_layernorm", "head"),
    ),
    rules=(
        Rule("embed_tokens.weight", ("embedding",)),
        *norm_rules("final_layernorm", "final_norm"),
        *layer_norms({"attention_norm": "input_layernorm"}),
        *layer_norms({"attention/query_norm": "self_attn.q_layernorm", "attention/key_norm": "self_attn.k_layernorm"}),
        *linear_rules("layers.{}.self_attn.q_proj", "attention/query"),
        *linear_rules("layers.{}.self_attn.k_proj", "attention/key"),
        *linear_rules("layers.{}.self_attn.v_proj", "attention/value"),
        *linear_rules("layers.{}.self_attn.dense", "attention/out"),
        *linear_rules("layers.{}.mlp.fc1", "feed_forward/up"),
        *linear_rules("layers.{}.mlp.fc2", "feed_forward/down"),
    ),
    rotary=Rotary(fraction="partial_rotary_factor", default_fraction=0.5),
)

GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    constants={
        **{"positions": "rotary", "rotary_layout": "interleaved", "norm_bias": True, "mlp_bias": True},
        **{"parallel_residual": True, "shared_norm": True, "head_bias": True},
    },
    settings=with_defaults(GPT2_SETTINGS, n_positions=2048),
    rules=(
        Rule("wte.weight", ("embedding",)),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.ln_1", "layers/attention_norm"),
        *linear_rules("h.{}.attn.q_proj", "attention/query"),
        *linear_rules("h.{}.attn.k_proj", "attention/key"),
        *linear_rules("h.{}.attn.v_proj", "attention/value"),
        *linear_rules("h.{}.attn.out_proj", "attention/out"),
        *linear_rules("h.{}.mlp.fc_in", "feed_forward/up"),
        *linear_rules("h.{}.mlp.fc_out", "feed_forward/down"),
    ),
    prefix="transformer.",
    rotary=Rotary(width="rotary_dim"),
    supported={"rotary": (True,), "scale_attn_weights": (True,)},
    ignored_tensors=GPT2.ignored_tensors,
    divides_width=True,
)

# Its factors of scores and logits, which are 1 by default, are not 1 / sqrt(H).
GRANITE_SETTINGS = (
    *LLAMA_SETTINGS,
    ATTENTION_BIAS,
    MLP_BIAS,
    Setting("embedding_multiplier", ("embed_scale",), 1.0),
    Setting("residual_multiplier", ("residual_scale",), 1.0),
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    settings=(
        *GRANITE_SETTINGS,
        Setting("attention_multiplier", ("attention_scale",), 1.0),
        Setting("logits_scaling", ("logit_scale",), 1.0, read=inverse, write=inverse),
    ),
    divides_width=False,
)

HYPERCLOVAX = replace(
    GRANITE,
    model_type="hyperclovax",
    architecture="HyperCLOVAXForCausalLM",
    settings=(
        *GRANITE_SETTINGS,
        Setting("attention_multiplier", ("attention_scale",), None),
        Setting("logits_scaling", ("logit_scale",), 1.0),
        Setting(
            "use_post_norm",
            ("norm_position",),
            True,
            read=lambda value: "both" if switch(value) else "pre",
            write=lambda position: position == "both",
        ),
    ),
    rules=(
        *LLAMA.rules,
        *layer_norms({"attention_output_norm": "post_norm1", "feed_forward_output_norm": "post_norm2"}),
    ),
    divides_width=True,
)

COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    constants={
        **{"positions": "rotary", "rotary_layout": "interleaved", "norm": "layernorm"},
        **{"parallel_residual": True, "shared_norm": True, "qk_norm_kind": "layernorm"},
    },
    settings=(
        *with_defaults(GROUPED_SIZES, max_position_embeddings=8192),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        activation("hidden_act", GATED, "silu"),
        ATTENTION_BIAS,
        Setting("logit_scale", ("logit_scale",), 0.0625),
        qk_norm("use_qk_norm", "each_head"),
    ),
    rules=(*ends(), *layer_norms({"attention_norm": "input_layernorm"}), *layer_norms(QK_NORMS), *MATRICES),
    tied=True,
    rotary=Rotary(default_base=500_000.0),
    divides_width=True,
)

COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    settings=tuple(setting for setting in COHERE.settings if setting.name != "use_qk_norm"),
    rotary=Rotary(layers="windowed"),
    windows=Windows("periodic", default=4096, period=4),
    supported={
        **{"position_embedding_type": ("rope_gptj",), "rotary_pct": (1.0,), "use_gated_activation": (True,)},
        **{"use_parallel_block": (True,), "order_of_interleaved_layers": ("local_attn_first",)},
    },
    ignored=frozenset({"layer_switch", "use_parallel_embedding", "use_embedding_sharing"}),
    fills_width=True,
)

BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    constants={
        **{"positions": "alibi", "feed_forward": "gelu_tanh", "embedding_norm": True},
        **dict.fromkeys(BIASES, True),
    },
    settings=(
        size("vocab_size", "vocab_size"),
        size("hidden_size", "embed_dim", also=("n_embed",)),
        Setting("n_layer", ("num_layers",), read=num_layers, also=("num_hidden_layers",)),
        size("n_head", "num_heads", also=("num_attention_heads",)),
        size("seq_length", "context_length", 2048),
        Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
    ),
    rules=(
        Rule("word_embeddings.weight", ("embedding",)),
        *norm_rules("word_embeddings_layernorm", "embedding_norm"),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.input_layernorm", "layers/attention_norm"),
        *norm_rules("h.{}.post_attention_layernorm", "layers/feed_forward_norm"),
        *linear_rules("h.{}.self_attention.query_key_value", *QKV, by_head=True),
        *linear_rules("h.{}.self_attention.dense", "attention/out"),
        *linear_rules("h.{}.mlp.dense_h_to_4h", "feed_forward/up"),
        *linear_rules("h.{}.mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    prefix="transformer.",
    tied=True,
    rotary=None,
    supported={"apply_residual_connection_post_layernorm": (False,), "n_inner": (None,)},
    ignored=frozenset(
        # How products and softmaxes were computed in training; the offset of ALiBi changes no weight.
        {"slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"}
        | {"skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "unk_token_id"}
    ),
    divides_width=True,
    has_own_attention=True,
)

HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    constants={**LLAMA.constants, "qk_norm": "head", "qk_norm_position": "after"},
    settings=(*with_defaults(LLAMA_SETTINGS, rms_norm_eps=1e-5), ATTENTION_BIAS),
    rules=(
        *LLAMA.rules,
        *layer_norms(
            {"attention/query_norm": "self_attn.query_layernorm", "attention/key_norm": "self_attn.key_layernorm"}
        ),
    ),
    rotary=Rotary(types=STATIC_TYPES, has_alpha=True),
    supported={
        "norm_type": ("rms",),
        "use_cla": (False,),
        "position_embedding_xdrope": (False,),
        "use_qk_norm": (True,),
    },
    ignored=frozenset({"eod_token_id", "cla_share_factor", "attention_head_dim"}),
)

EXAONE_NAMES = {
    **{"num_hidden_layers": ("num_layers",), "rms_norm_eps": ("layer_norm_epsilon",)},
    "hidden_act": ("activation_function",),
}
EXAONE = replace(
    LLAMA,
    model_type="exaone",
    settings=tuple(
        replace(setting, also=EXAONE_NAMES.get(setting.name, setting.also))
        for setting in with_defaults(
            LLAMA.settings, num_key_value_heads=REQUIRED, max_position_embeddings=4096, rms_norm_eps=1e-5
        )
    ),
    rules=(
        Rule("wte.weight", ("embedding",)),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.ln_1", "layers/attention_norm"),
        *norm_rules("h.{}.ln_2", "layers/feed_forward_norm"),
        *linear_rules("h.{}.attn.attention.q_proj", "attention/query"),
        *linear_rules("h.{}.attn.attention.k_proj", "attention/key"),
        *linear_rules("h.{}.attn.attention.v_proj", "attention/value"),
        *linear_rules("h.{}.attn.attention.out_proj", "attention/out"),
        *linear_rules("h.{}.mlp.c_fc_0", "feed_forward/gate"),
        *linear_rules("h.{}.mlp.c_fc_1", "feed_forward/up"),
        *linear_rules("h.{}.mlp.c_proj", "feed_forward/down"),
    ),
    prefix="transformer.",
    rotary=Rotary(default_base=500_000.0),
    modules="llama",
)

CODEGEN = replace(
    GPTJ,
    model_type="codegen",
    architecture="CodeGenForCausalLM",
    rules=(
        Rule("wte.weight", ("embedding",)),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.ln_1", "layers/attention_norm"),
        # In the order and the four parts in which it was trained on as many devices.
        *linear_rules("h.{}.attn.qkv_proj", QKV[0], QKV[2], QKV[1], parts=4),
        *linear_rules("h.{}.attn.out_proj", "attention/out"),
        *linear_rules("h.{}.mlp.fc_in", "feed_forward/up"),
        *linear_rules("h.{}.mlp.fc_out", "feed_forward/down"),
    ),
    supported={"scale_attn_weights": (True,)},
    ignored_tensors=r"h\.\d+\.attn\.(causal_mask|bias|masked_bias)",
)

FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        size("vocab_size", "vocab_size"),
        size("hidden_size", "embed_dim", also=("n_embed",)),
        Setting("num_hidden_layers", ("num_layers",), read=num_layers),
        size("num_attention_heads", "num_heads"),
        size("ffn_hidden_size", "mlp_dim", None),
        size("max_position_embeddings", "context_length", 2048),
        Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
        activation("activation", PLAIN, "gelu"),
        Setting("bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), False),
        Setting("parallel_attn", ("parallel_residual", "shared_norm"), True),
        MULTI_QUERY,
    ),
    rules=(
        Rule("word_embeddings.weight", ("embedding",)),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.input_layernorm", "layers/attention_norm"),
        *norm_rules("h.{}.post_attention_layernorm", "layers/feed_forward_norm"),
        *linear_rules("h.{}.self_attention.query_key_value", *QKV, by_head=True),
        *linear_rules("h.{}.self_attention.dense", "attention/out"),
        *linear_rules("h.{}.mlp.dense_h_to_4h", "feed_forward/up"),
        *linear_rules("h.{}.mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    prefix="transformer.",
    tied=True,
    supported={
        **{"alibi": (False,), "new_decoder_architecture": (False,)},
        "apply_residual_connection_post_layernorm": (False,),
    },
    ignored=frozenset({"num_kv_heads", "num_ln_in_parallel_attn"}),  # they count only in the new architecture
    divides_width=True,
    has_own_attention=True,
)

OPT = Family(
    "opt",
    "OPTForCausalLM",
    constants={"positions": "learned", "norm_epsilon": 1e-5},
    settings=(
        size("vocab_size", "vocab_size"),
        # What projects embeddings of another width is not supported.
        size("hidden_size", "embed_dim", also=("word_embed_proj_dim",)),
        Setting("num_hidden_layers", ("num_layers",), read=num_layers),
        size("num_attention_heads", "num_heads"),
        size("ffn_dim", "mlp_dim"),
        size("max_position_embeddings", "context_length", 2048),
        activation("activation_function", PLAIN, "relu"),
        Setting("enable_bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), True),
        Setting("layer_norm_elementwise_affine", ("norm_scale", "norm_bias"), True),
        Setting("_remove_final_layer_norm", ("final_norm",), False, read=negated, write=negated),
    ),
    rules=(
        Rule("embed_tokens.weight", ("embedding",)),
        # Two rows for padding, which it counts as positions.
        Rule("embed_positions.weight", ("positions",), unused=2),
        *norm_rules("final_layer_norm", "final_norm"),
        *layer_norms({"attention_norm": "self_attn_layer_norm", "feed_forward_norm": "final_layer_norm"}),
        *linear_rules("layers.{}.self_attn.q_proj", "attention/query"),
        *linear_rules("layers.{}.self_attn.k_proj", "attention/key"),
        *linear_rules("layers.{}.self_attn.v_proj", "attention/value"),
        *linear_rules("layers.{}.self_attn.out_proj", "attention/out"),
        *linear_rules("layers.{}.fc1", "feed_forward/up"),
        *linear_rules("layers.{}.fc2", "feed_forward/down"),
    ),
    prefix="model.decoder.",
    tied=True,
    rotary=None,
    supported={"do_layer_norm_before": (True,)},
    ignored=frozenset({"layerdrop", "init_std", "activation_dropout"}),
    divides_width=True,
)

_ALL = (
    *(GPT2, LLAMA, QWEN2, MISTRAL, QWEN3, GPT_NEOX, PHI3, STARCODER2, OLMO2, GEMMA, GEMMA2, GEMMA3, VAULTGEMMA),
    *(ARCEE, SEED_OSS, MINISTRAL, MINISTRAL3, NEMOTRON, STABLELM, GPT_BIGCODE, GPT_NEO, MPT),
    *(GLM, GLM4, ERNIE4_5, HELIUM, SMOLLM3, EXAONE4),
    *(JAIS2, INTERNLM3, IQUESTCODER, OLMO, PHI, GPTJ, GRANITE, HYPERCLOVAX, COHERE, COHERE2, BLOOM, HUNYUAN, OLMO3),
    *(EXAONE, CODEGEN, FALCON, OPT),
)
FAMILIES = {family.model_type: family for family in _ALL}

# Not of Hugging Face: the settings are the `model_args` of a ckpt.pt. Its matrices are those of nn.Linear, its GELU is
# the exact one, and its head is always the embedding.
NANOGPT = Family(
    "nanogpt",
    "GPT",
    constants={"positions": "learned", "feed_forward": "gelu", "norm_epsilon": 1e-5},
    settings=(
        size("vocab_size", "vocab_size"),
        size("n_embd", "embed_dim"),
        Setting("n_layer", ("num_layers",), read=num_layers),
        size("n_head", "num_heads"),
        size("block_size", "context_length"),
        Setting("bias", BIASES, True),
        Setting("dropout", ("dropout",), 0.0),
    ),
    rules=_gpt2_rules(transposed=True),
    prefix="transformer.",
    tied=None,
    rotary=None,
    ignored_tensors=r"h\.\d+\.attn\.bias",  # the mask
)


def register_family(family: Family) -> None:
    """Makes a model type known: folders of it open, and models can be written as it.

    Args:
        family: its table; the types in it are in `flax_decoder.huggingface.family`.

    Raises:
        UserError: the name is taken, or the table sets what is no setting of a model, or leaves out a size.
    """
    if not isinstance(family, Family):
        raise UserError(f"register_family wants a Family, not {family!r}")
    name = family.model_type
    if name in FAMILIES:
        raise UserError(f"register_family: model type {name!r} is there already; give yours another name")
    own = [field for setting in family.settings for field in setting.fields]
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for field in (*family.constants, *own):
        if field not in known:
            raise UserError(f"register_family: {name} sets {field}, which is no field of ModelConfig")
    for field in ("vocab_size", "embed_dim", "num_layers", "num_heads", "context_length"):
        if field not in (*family.constants, *own):
            raise UserError(f"register_family: {name} has no setting of {field}; add Setting(NAME, ({field!r},))")
    FAMILIES[name] = family
