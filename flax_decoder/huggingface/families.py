"""The table of each model family: its config.json fields, its tensors, and what is the same in all its models.

To add a family: compare its modeling file in `transformers` with `nn`, write its table here, and add shapes to
`tests/test_families.py`, which compares it with PyTorch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax_decoder.huggingface.family import REQUIRED, Family, Rotary, Rule, Setting, Windows

BIASES = ("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias")

# --- Settings ---

# All names that transformers has for one function; the first is written.
_GELU = ("gelu", "gelu_python")
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
_PLAIN = {**dict.fromkeys(_GELU, "gelu"), "gelu_new": "gelu_tanh", **dict.fromkeys(_TANH, "gelu_tanh")}
_PLAIN |= {"relu": "relu", "relu2": "relu_squared"}
_TANH_GATED = dict.fromkeys(_TANH, "geglu_tanh")
# In Gemma's first releases "gelu" means its approximation, also to transformers.
_GEMMA_ACT = {**_TANH_GATED, "gelu": "geglu_tanh"}
_GATED = {"silu": "swiglu", "swish": "swiglu", **dict.fromkeys(_GELU, "geglu"), **_TANH_GATED}


def _activation(name: str, values: Mapping[str, str], default: Any = REQUIRED) -> Setting:
    return Setting(name, ("feed_forward",), default, values)


def _positive(value: Any, maximum: int = 2**31 - 1) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("must be a positive whole number")
    if value > maximum:
        raise ValueError(f"is more than {maximum:,}, the maximum")
    return value


def _num_layers(value: Any) -> int:
    return _positive(value, 10_000)  # the deepest models have under 200


def _size(name: str, field: str, default: Any = REQUIRED, also: tuple[str, ...] = ()) -> Setting:
    return Setting(name, (field,), default, read=_positive, also=also)


def _with_defaults(settings: tuple[Setting, ...], **defaults: Any) -> tuple[Setting, ...]:
    """The settings with other defaults, given by name."""
    return tuple(replace(setting, default=defaults.get(setting.name, setting.default)) for setting in settings)


_SIZES = (
    _size("vocab_size", "vocab_size"),
    _size("hidden_size", "embed_dim"),
    Setting("num_hidden_layers", ("num_layers",), read=_num_layers),
    _size("num_attention_heads", "num_heads"),
    _size("intermediate_size", "mlp_dim"),
    _size("max_position_embeddings", "context_length"),
)
_GROUPED_SIZES = (*_SIZES, _size("num_key_value_heads", "num_kv_heads", None), _size("head_dim", "head_dim", None))
_RMS_EPSILON = Setting("rms_norm_eps", ("norm_epsilon",))
_ATTENTION_BIAS = Setting("attention_bias", ("attention_in_bias", "attention_out_bias"), False)
_LLAMA_SETTINGS = _with_defaults(
    (*_GROUPED_SIZES, _RMS_EPSILON, _activation("hidden_act", _GATED)),
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
_GEMMA_SETTINGS = _with_defaults(
    (*_GROUPED_SIZES, _RMS_EPSILON, _ATTENTION_BIAS),
    num_key_value_heads=REQUIRED,
    head_dim=REQUIRED,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
)
_GEMMA2_SETTINGS = (
    *_GEMMA_SETTINGS,
    _activation("hidden_activation", _TANH_GATED, "gelu_pytorch_tanh"),
    Setting(
        "query_pre_attn_scalar",
        ("attention_scale",),
        256,
        read=lambda value: _positive(value) ** -0.5,
        write=lambda scale: round(scale**-2),
    ),
)

# --- Tensors ---


def linear_rules(tensor: str, *modules: str, transposed: bool = True, by_head: bool = False) -> tuple[Rule, ...]:
    """The rules of a Linear that holds some modules of a layer; it has a bias if they have."""
    kernels, biases = (tuple(f"layers/{module}/{leaf}" for module in modules) for leaf in ("kernel", "bias"))
    return Rule(f"{tensor}.weight", kernels, transposed, by_head), Rule(f"{tensor}.bias", biases, by_head=by_head)


def norm_rules(tensor: str, path: str, offset: float = 0.0) -> tuple[Rule, ...]:
    """The rules of a norm, whose parameters are at a path; it has a bias if they have."""
    return Rule(f"{tensor}.weight", (f"{path}/scale",), offset=offset), Rule(f"{tensor}.bias", (f"{path}/bias",))


def _layer_norms(tensors: Mapping[str, str], offset: float = 0.0) -> tuple[Rule, ...]:
    """The rules of norms of a layer, given as our module -> their tensor."""
    pairs = tensors.items()
    return tuple(
        rule for ours, tensor in pairs for rule in norm_rules(f"layers.{{}}.{tensor}", f"layers/{ours}", offset)
    )


def _ends(offset: float = 0.0) -> tuple[Rule, ...]:
    return Rule("embed_tokens.weight", ("embedding",)), *norm_rules("norm", "final_norm", offset)


_QKV = ("attention/query", "attention/key", "attention/value")
_ATTENTION_OUT = linear_rules("layers.{}.self_attn.o_proj", "attention/out")
_ATTENTION = (
    *linear_rules("layers.{}.self_attn.q_proj", "attention/query"),
    *linear_rules("layers.{}.self_attn.k_proj", "attention/key"),
    *linear_rules("layers.{}.self_attn.v_proj", "attention/value"),
    *_ATTENTION_OUT,
)
_MLP_DOWN = linear_rules("layers.{}.mlp.down_proj", "feed_forward/down")
_MATRICES = (
    *_ATTENTION,
    *linear_rules("layers.{}.mlp.gate_proj", "feed_forward/gate"),
    *linear_rules("layers.{}.mlp.up_proj", "feed_forward/up"),
    *_MLP_DOWN,
)
_PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
_BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}

# --- The families, in the order in which `choose_family` prefers them ---


def _gpt2_rules(*, transposed: bool) -> tuple[Rule, ...]:
    """The tensors of GPT-2, whose matrices are (in, out) as ours, or transposed."""
    return (
        Rule("wte.weight", ("embedding",)),
        Rule("wpe.weight", ("positions",)),
        *norm_rules("ln_f", "final_norm"),
        *norm_rules("h.{}.ln_1", "layers/attention_norm"),
        *norm_rules("h.{}.ln_2", "layers/feed_forward_norm"),
        *linear_rules("h.{}.attn.c_attn", *_QKV, transposed=transposed),
        *linear_rules("h.{}.attn.c_proj", "attention/out", transposed=transposed),
        *linear_rules("h.{}.mlp.c_fc", "feed_forward/up", transposed=transposed),
        *linear_rules("h.{}.mlp.c_proj", "feed_forward/down", transposed=transposed),
    )


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    constants={"positions": "learned", **dict.fromkeys(BIASES, True)},
    settings=(
        _size("vocab_size", "vocab_size"),
        _size("n_embd", "embed_dim", also=("hidden_size",)),
        Setting("n_layer", ("num_layers",), read=_num_layers, also=("num_hidden_layers",)),
        _size("n_head", "num_heads", also=("num_attention_heads",)),
        _size("n_inner", "mlp_dim", None),
        _size("n_positions", "context_length", 1024, also=("max_position_embeddings",)),
        Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
        _activation("activation_function", _PLAIN, "gelu_new"),
    ),
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
    settings=(*_LLAMA_SETTINGS, _ATTENTION_BIAS, Setting("mlp_bias", ("mlp_bias",), False)),
    rules=(*_ends(), *_layer_norms(_PRE_NORMS), *_MATRICES),
    divides_width=True,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    constants={**LLAMA.constants, "attention_in_bias": True},
    settings=_with_defaults(_LLAMA_SETTINGS, max_position_embeddings=32_768),
    rules=LLAMA.rules,
    windows=Windows("late", default=4096),
    supported={"use_mrope": (False,)},
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    constants=LLAMA.constants,
    settings=_with_defaults(_LLAMA_SETTINGS, num_key_value_heads=REQUIRED, max_position_embeddings=131_072),
    rules=LLAMA.rules,
    windows=Windows("all", default=4096),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    constants={**LLAMA.constants, "qk_norm": "head"},
    settings=(*_with_defaults(_LLAMA_SETTINGS, head_dim=128, max_position_embeddings=32_768), _ATTENTION_BIAS),
    rules=(*LLAMA.rules, *_layer_norms(_QK_NORMS)),
    windows=Windows("late", default=4096),
)

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    constants={"positions": "rotary", "norm_bias": True, "mlp_bias": True},
    settings=(
        *_with_defaults(_SIZES, max_position_embeddings=2048),
        Setting("layer_norm_eps", ("norm_epsilon",), 1e-5),
        _activation("hidden_act", _PLAIN, "gelu"),
        replace(_ATTENTION_BIAS, default=True),
        Setting("use_parallel_residual", ("parallel_residual",), True),
    ),
    rules=(
        Rule("embed_in.weight", ("embedding",)),
        *norm_rules("final_layer_norm", "final_norm"),
        *_layer_norms(_PRE_NORMS),
        *linear_rules("layers.{}.attention.query_key_value", *_QKV, by_head=True),
        *linear_rules("layers.{}.attention.dense", "attention/out"),
        *linear_rules("layers.{}.mlp.dense_h_to_4h", "feed_forward/up"),
        *linear_rules("layers.{}.mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    prefix="gpt_neox.",
    head="embed_out.weight",
    rotary=Rotary(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ignored_tensors=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    constants=LLAMA.constants,
    settings=_with_defaults(_LLAMA_SETTINGS, max_position_embeddings=4096, rms_norm_eps=1e-5),
    rules=(
        *_ends(),
        *_layer_norms(_PRE_NORMS),
        *linear_rules("layers.{}.self_attn.qkv_proj", *_QKV),
        *_ATTENTION_OUT,
        *linear_rules("layers.{}.mlp.gate_up_proj", "feed_forward/gate", "feed_forward/up"),
        *_MLP_DOWN,
    ),
    rotary=Rotary(fraction="partial_rotary_factor", types=("default",)),
    windows=Windows("all"),
    ignored=frozenset({"original_max_position_embeddings"}),  # only longrope reads it, which is refused
)

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    constants={"positions": "rotary", "norm_bias": True},
    settings=(
        *_with_defaults(_GROUPED_SIZES, num_key_value_heads=REQUIRED, max_position_embeddings=4096),
        Setting("norm_epsilon", ("norm_epsilon",), 1e-5),
        _activation("hidden_act", _PLAIN, "gelu_pytorch_tanh"),
        Setting("use_bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), True),
    ),
    rules=(
        *_ends(),
        *_layer_norms(_PRE_NORMS),
        *_ATTENTION,
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
    settings=(*_with_defaults(_LLAMA_SETTINGS, rms_norm_eps=1e-5), _ATTENTION_BIAS),
    rules=(*_ends(), *_layer_norms(_OUTPUT_NORMS), *_layer_norms(_QK_NORMS), *_MATRICES),
)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    constants=LLAMA.constants,
    settings=(*_GEMMA_SETTINGS, _activation("hidden_act", _GEMMA_ACT, "gelu_pytorch_tanh")),
    rules=(*_ends(1.0), *_layer_norms(_PRE_NORMS, 1.0), *_MATRICES),
    tied=True,
    supported={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
    scales_embedding=True,
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    constants={**LLAMA.constants, "norm_position": "both"},
    settings=(
        *_GEMMA2_SETTINGS,
        Setting("attn_logit_softcapping", ("attention_soft_cap",), 50.0),
        Setting("final_logit_softcapping", ("logit_soft_cap",), 30.0),
    ),
    rules=(*_ends(1.0), *_layer_norms(_BOTH_NORMS, 1.0), *_MATRICES),
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
        *_with_defaults(_GEMMA2_SETTINGS, max_position_embeddings=131_072),
        Setting("final_logit_softcapping", ("logit_soft_cap",), None),
    ),
    rules=(*_ends(1.0), *_layer_norms(_BOTH_NORMS, 1.0), *_layer_norms(_QK_NORMS, 1.0), *_MATRICES),
    rotary=Rotary(default_base=1_000_000.0, window_base="rope_local_base_freq"),
    windows=Windows("periodic", default=4096, period=6),
    supported={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
    ignored=frozenset({"hidden_act"}),
)

_ALL = (GPT2, LLAMA, QWEN2, MISTRAL, QWEN3, GPT_NEOX, PHI3, STARCODER2, OLMO2, GEMMA, GEMMA2, GEMMA3)
FAMILIES = {family.model_type: family for family in _ALL}

# Not of Hugging Face: the settings are the `model_args` of a ckpt.pt. Its matrices are those of nn.Linear, its GELU is
# the exact one, and its head is always the embedding.
NANOGPT = Family(
    "nanogpt",
    "GPT",
    constants={"positions": "learned", "feed_forward": "gelu", "norm_epsilon": 1e-5},
    settings=(
        _size("vocab_size", "vocab_size"),
        _size("n_embd", "embed_dim"),
        Setting("n_layer", ("num_layers",), read=_num_layers),
        _size("n_head", "num_heads"),
        _size("block_size", "context_length"),
        Setting("bias", BIASES, True),
        Setting("dropout", ("dropout",), 0.0),
    ),
    rules=_gpt2_rules(transposed=True),
    prefix="transformer.",
    tied=None,
    rotary=None,
    ignored_tensors=r"h\.\d+\.attn\.bias",  # the mask
)
