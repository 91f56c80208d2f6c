"""Settings and tensors that several families share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax_decoder.huggingface.family import REQUIRED, Rule, Setting, linear_rules, norm_rules

BIASES = ("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias")

# --- Settings ---

# All names that transformers has for one function; the first is written.
GELU = ("gelu", "gelu_python")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
PLAIN = {**dict.fromkeys(GELU, "gelu"), "gelu_new": "gelu_tanh", **dict.fromkeys(TANH, "gelu_tanh")}
PLAIN |= {"relu": "relu", "relu2": "relu_squared"}
TANH_GATED = dict.fromkeys(TANH, "geglu_tanh")
# In Gemma's first releases "gelu" means its approximation, also to transformers.
GEMMA_ACT = {**TANH_GATED, "gelu": "geglu_tanh"}
GATED = {"silu": "swiglu", "swish": "swiglu", **dict.fromkeys(GELU, "geglu"), **TANH_GATED}


def activation(name: str, values: Mapping[str, str], default: Any = REQUIRED) -> Setting:
    """The setting of the activation: its value -> our `feed_forward`."""
    return Setting(name, ("feed_forward",), default, values)


def positive(value: Any, maximum: int = 2**31 - 1) -> int:
    """The value, if it is a positive whole number. Raises ValueError with the reason."""
    if type(value) is not int or value < 1:
        raise ValueError("must be a positive whole number")
    if value > maximum:
        raise ValueError(f"is more than {maximum:,}, the maximum")
    return value


def inverse(value: Any) -> float:
    """1 over the value, if it is a positive number. Raises ValueError with the reason."""
    if type(value) not in (int, float) or not value > 0:
        raise ValueError("must be a positive number")
    return 1 / float(value)


def switch(value: Any) -> bool:
    """The value, if it is true or false. Raises ValueError with the reason."""
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def negated(value: Any) -> bool:
    """The other of true and false. Raises ValueError with the reason."""
    return not switch(value)


def num_layers(value: Any) -> int:
    """The value, if it is a number of layers. Raises ValueError with the reason."""
    return positive(value, 10_000)  # the deepest models have under 200


def size(name: str, field: str, default: Any = REQUIRED, also: tuple[str, ...] = ()) -> Setting:
    """A setting that is a positive whole number."""
    return Setting(name, (field,), default, read=positive, also=also)


def with_defaults(settings: tuple[Setting, ...], **defaults: Any) -> tuple[Setting, ...]:
    """The settings with other defaults, given by name."""
    return tuple(replace(setting, default=defaults.get(setting.name, setting.default)) for setting in settings)


MULTI_QUERY = Setting(
    "multi_query",
    ("num_kv_heads",),
    True,
    read=lambda value: 1 if switch(value) else None,
    write=lambda kv_heads: kv_heads == 1,
)


def qk_norm(name: str, kind: str) -> Setting:
    """The switch of a norm of queries and keys, of this kind."""
    return Setting(
        name,
        ("qk_norm",),
        False,
        read=lambda value: kind if switch(value) else "none",
        write=lambda found: found != "none",
    )


GPT2_SETTINGS = (
    size("vocab_size", "vocab_size"),
    size("n_embd", "embed_dim", also=("hidden_size",)),
    Setting("n_layer", ("num_layers",), read=num_layers, also=("num_hidden_layers",)),
    size("n_head", "num_heads", also=("num_attention_heads",)),
    size("n_inner", "mlp_dim", None),
    size("n_positions", "context_length", 1024, also=("max_position_embeddings",)),
    Setting("layer_norm_epsilon", ("norm_epsilon",), 1e-5),
    activation("activation_function", PLAIN, "gelu_new"),
)
SIZES = (
    size("vocab_size", "vocab_size"),
    size("hidden_size", "embed_dim"),
    Setting("num_hidden_layers", ("num_layers",), read=num_layers),
    size("num_attention_heads", "num_heads"),
    size("intermediate_size", "mlp_dim"),
    size("max_position_embeddings", "context_length"),
)
GROUPED_SIZES = (*SIZES, size("num_key_value_heads", "num_kv_heads", None), size("head_dim", "head_dim", None))
RMS_EPSILON = Setting("rms_norm_eps", ("norm_epsilon",))
MLP_BIAS = Setting("mlp_bias", ("mlp_bias",), False)
ATTENTION_BIAS = Setting("attention_bias", ("attention_in_bias", "attention_out_bias"), False)
LLAMA_SETTINGS = with_defaults(
    (*GROUPED_SIZES, RMS_EPSILON, activation("hidden_act", GATED)),
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
GEMMA_SETTINGS = with_defaults(
    (*GROUPED_SIZES, RMS_EPSILON, ATTENTION_BIAS),
    num_key_value_heads=REQUIRED,
    head_dim=REQUIRED,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
)
GEMMA2_SETTINGS = (
    *GEMMA_SETTINGS,
    activation("hidden_activation", TANH_GATED, "gelu_pytorch_tanh"),
    Setting(
        "query_pre_attn_scalar",
        ("attention_scale",),
        256,
        read=lambda value: positive(value) ** -0.5,
        write=lambda scale: round(scale**-2),
    ),
)

# --- Tensors ---


def layer_norms(tensors: Mapping[str, str], offset: float = 0.0) -> tuple[Rule, ...]:
    """The rules of norms of a layer, given as our module -> their tensor."""
    pairs = tensors.items()
    return tuple(
        rule for ours, tensor in pairs for rule in norm_rules(f"layers.{{}}.{tensor}", f"layers/{ours}", offset)
    )


def ends(offset: float = 0.0) -> tuple[Rule, ...]:
    """The rules of the embedding and of the final norm."""
    return Rule("embed_tokens.weight", ("embedding",)), *norm_rules("norm", "final_norm", offset)


QKV = ("attention/query", "attention/key", "attention/value")
ATTENTION_OUT = linear_rules("layers.{}.self_attn.o_proj", "attention/out")
ATTENTION = (
    *linear_rules("layers.{}.self_attn.q_proj", "attention/query"),
    *linear_rules("layers.{}.self_attn.k_proj", "attention/key"),
    *linear_rules("layers.{}.self_attn.v_proj", "attention/value"),
    *ATTENTION_OUT,
)
MLP_DOWN = linear_rules("layers.{}.mlp.down_proj", "feed_forward/down")
UP_AND_DOWN = (*linear_rules("layers.{}.mlp.up_proj", "feed_forward/up"), *MLP_DOWN)
MATRICES = (*ATTENTION, *linear_rules("layers.{}.mlp.gate_proj", "feed_forward/gate"), *UP_AND_DOWN)
GATE_UP_MATRICES = (
    *linear_rules("layers.{}.mlp.gate_up_proj", "feed_forward/gate", "feed_forward/up"),
    *MLP_DOWN,
)
PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
GPT2_ENDS = (
    Rule("wte.weight", ("embedding",)),
    Rule("wpe.weight", ("positions",)),
    *norm_rules("ln_f", "final_norm"),
    *norm_rules("h.{}.ln_1", "layers/attention_norm"),
    *norm_rules("h.{}.ln_2", "layers/feed_forward_norm"),
)
OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
GLM4_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_self_attn_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_mlp_layernorm",
}
FEED_FORWARD_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "pre_feedforward_layernorm"}
BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
QK_NORMS = {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
