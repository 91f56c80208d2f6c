"""Model families: what each calls its settings and its tensors, and which choices of our network it always makes.

To add one: compare its modeling file in `transformers` with `nn`, write its table here, and add shapes of it to
`tests/test_families.py`, which holds it to PyTorch's numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_decoder.huggingface.family import REQUIRED, Family, Rotary, Rule, Setting, Windows

# --- Names that families share ---

_PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_PLAIN |= {"relu2": "relu_squared"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_TANH_GATED = {"gelu_pytorch_tanh": "geglu_tanh"}


def _activation(theirs: str, words: Mapping[str, str], default: Any = REQUIRED) -> Setting:
    return Setting(theirs, ("feed_forward",), default, words)


def _whole(value: Any, most: int = 2**31 - 1) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("must be a positive whole number")
    if value > most:
        raise ValueError(f"is more than {most:,}, the most that can be meant")
    return value


def _layers(value: Any) -> int:
    return _whole(value, 10_000)  # the deepest models have under 200


def _inverse_root(value: Any) -> float:
    return _whole(value) ** -0.5


def _size(theirs: str, ours: str, default: Any = REQUIRED) -> Setting:
    return Setting(theirs, (ours,), default, read=_whole)


_SIZES = (
    _size("vocab_size", "vocab_size"),
    _size("hidden_size", "embed_dim"),
    Setting("num_hidden_layers", ("num_layers",), read=_layers),
    _size("num_attention_heads", "num_heads"),
    _size("intermediate_size", "mlp_dim"),
    _size("max_position_embeddings", "context_length"),
)
_GROUPED = _size("num_key_value_heads", "num_kv_heads", None)
_HEAD_DIM = _size("head_dim", "head_dim", None)
_RMS = Setting("rms_norm_eps", ("norm_epsilon",))
_ATTENTION_BIAS = Setting("attention_bias", ("attention_in_bias", "attention_out_bias"), False)
_QUERY_SCALE = Setting(
    "query_pre_attn_scalar", ("attention_scale",), 256, read=_inverse_root, write=lambda scale: round(scale**-2)
)

_RMS_ROTARY = {"positions": "rotary", "norm": "rmsnorm"}


def _linear(theirs: str, *ours: str, by_head: bool = False) -> tuple[Rule, ...]:
    """A PyTorch Linear and its bias, which exists where ours does."""
    kernels, biases = (tuple(f"{path}/{part}" for path in ours) for part in ("kernel", "bias"))
    return (
        Rule(f"{theirs}.weight", kernels, transposed=True, by_head=by_head),
        Rule(f"{theirs}.bias", biases, by_head=by_head),
    )


def _norm(theirs: str, ours: str, offset: float = 0.0) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", (f"{ours}/scale",), offset=offset), Rule(f"{theirs}.bias", (f"{ours}/bias",))


_ATTENTION = (
    *_linear("layers.{}.self_attn.q_proj", "layers/attention/query"),
    *_linear("layers.{}.self_attn.k_proj", "layers/attention/key"),
    *_linear("layers.{}.self_attn.v_proj", "layers/attention/value"),
)
_ATTENTION_OUT = _linear("layers.{}.self_attn.o_proj", "layers/attention/out")
_GATED_MLP = (
    *_linear("layers.{}.mlp.gate_proj", "layers/feed_forward/gate"),
    *_linear("layers.{}.mlp.up_proj", "layers/feed_forward/up"),
)
_MLP_DOWN = _linear("layers.{}.mlp.down_proj", "layers/feed_forward/down")


def _ends(offset: float = 0.0) -> tuple[Rule, ...]:
    return Rule("embed_tokens.weight", ("embedding",)), *_norm("norm", "final_norm", offset)


def _norms(theirs_of_ours: Mapping[str, str], offset: float = 0.0) -> tuple[Rule, ...]:
    pairs = theirs_of_ours.items()
    return tuple(rule for ours, theirs in pairs for rule in _norm(f"layers.{{}}.{theirs}", f"layers/{ours}", offset))


_PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
_OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def _qk_norms(offset: float = 0.0) -> tuple[Rule, ...]:
    return _norms({"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}, offset)


_LLAMA_RULES = (*_ends(), *_norms(_PRE_NORMS), *_ATTENTION, *_ATTENTION_OUT, *_GATED_MLP, *_MLP_DOWN)

# --- The families, in the order in which a home for a model of ours is looked for ---

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    always={
        "positions": "learned",
        "norm_bias": True,
        "attention_in_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    settings=(
        _size("vocab_size", "vocab_size"),
        _size("n_embd", "embed_dim"),
        Setting("n_layer", ("num_layers",), read=_layers),
        _size("n_head", "num_heads"),
        _size("n_inner", "mlp_dim", None),
        _size("n_positions", "context_length"),
        Setting("layer_norm_epsilon", ("norm_epsilon",)),
        _activation("activation_function", _PLAIN, "gelu_new"),
    ),
    rules=(
        Rule("wte.weight", ("embedding",)),
        Rule("wpe.weight", ("positions",)),
        *_norm("ln_f", "final_norm"),
        *_norm("h.{}.ln_1", "layers/attention_norm"),
        *_norm("h.{}.ln_2", "layers/feed_forward_norm"),
        # GPT-2 keeps its matrices as (in, out), as we do.
        *(
            Rule(f"h.{{}}.{theirs}.{their_part}", tuple(f"layers/{path}/{part}" for path in ours))
            for theirs, ours in {
                "attn.c_attn": ("attention/query", "attention/key", "attention/value"),
                "attn.c_proj": ("attention/out",),
                "mlp.c_fc": ("feed_forward/up",),
                "mlp.c_proj": ("feed_forward/down",),
            }.items()
            for their_part, part in (("weight", "kernel"), ("bias", "bias"))
        ),
    ),
    prefix="transformer.",
    tied=True,
    rotary=None,
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    without_meaning=frozenset({"n_ctx", "reorder_and_upcast_attn"}),
    extra_tensors=r"h\.\d+\.attn\.(bias|masked_bias)",
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    always=_RMS_ROTARY,
    settings=(
        *_SIZES,
        _GROUPED,
        _HEAD_DIM,
        _RMS,
        _activation("hidden_act", _GATED),
        _ATTENTION_BIAS,
        Setting("mlp_bias", ("mlp_bias",), False),
    ),
    rules=_LLAMA_RULES,
    fixed={"rope_interleaved": (False,)},
    whole_heads=True,
    without_meaning=frozenset({"pretraining_tp", "is_llama_config"}),
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    always={**_RMS_ROTARY, "attention_in_bias": True},
    settings=(*_SIZES, _GROUPED, _HEAD_DIM, _RMS, _activation("hidden_act", _GATED)),
    rules=_LLAMA_RULES,
    windows=Windows("late", default=4096),
    fixed={"use_mrope": (False,)},
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    always=_RMS_ROTARY,
    settings=(
        *_SIZES,
        dataclasses.replace(_GROUPED, default=REQUIRED),
        _HEAD_DIM,
        _RMS,
        _activation("hidden_act", _GATED),
    ),
    rules=_LLAMA_RULES,
    windows=Windows("all", default=4096),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    always={**_RMS_ROTARY, "qk_norm": "head"},
    settings=(
        *_SIZES,
        _GROUPED,
        dataclasses.replace(_HEAD_DIM, default=128),
        _RMS,
        _activation("hidden_act", _GATED),
        _ATTENTION_BIAS,
    ),
    rules=(*_LLAMA_RULES, *_qk_norms()),
    windows=Windows("late", default=4096),
)

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    always={"positions": "rotary", "norm_bias": True, "mlp_bias": True},
    settings=(
        *_SIZES,
        Setting("layer_norm_eps", ("norm_epsilon",)),
        _activation("hidden_act", _PLAIN),
        dataclasses.replace(_ATTENTION_BIAS, default=True),
        Setting("use_parallel_residual", ("parallel_residual",), True),
    ),
    rules=(
        Rule("embed_in.weight", ("embedding",)),
        *_norm("final_layer_norm", "final_norm"),
        *_norms(_PRE_NORMS),
        *_linear(
            "layers.{}.attention.query_key_value",
            "layers/attention/query",
            "layers/attention/key",
            "layers/attention/value",
            by_head=True,
        ),
        *_linear("layers.{}.attention.dense", "layers/attention/out"),
        *_linear("layers.{}.mlp.dense_h_to_4h", "layers/feed_forward/up"),
        *_linear("layers.{}.mlp.dense_4h_to_h", "layers/feed_forward/down"),
    ),
    prefix="gpt_neox.",
    head="embed_out.weight",
    rotary=Rotary(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    extra_tensors=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    always=_RMS_ROTARY,
    settings=(*_SIZES, _GROUPED, _HEAD_DIM, _RMS, _activation("hidden_act", _GATED)),
    rules=(
        *_ends(),
        *_norms(_PRE_NORMS),
        *_linear(
            "layers.{}.self_attn.qkv_proj", "layers/attention/query", "layers/attention/key", "layers/attention/value"
        ),
        *_ATTENTION_OUT,
        *_linear("layers.{}.mlp.gate_up_proj", "layers/feed_forward/gate", "layers/feed_forward/up"),
        *_MLP_DOWN,
    ),
    rotary=Rotary(fraction="partial_rotary_factor", types=("default",)),
    windows=Windows("all"),
    fixed={"attention_bias": (False,)},
    without_meaning=frozenset({"original_max_position_embeddings"}),  # only longrope reads it, which is refused
)

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    always={"positions": "rotary", "norm_bias": True},
    settings=(
        *_SIZES,
        dataclasses.replace(_GROUPED, default=REQUIRED),
        _HEAD_DIM,
        Setting("norm_epsilon", ("norm_epsilon",)),
        _activation("hidden_act", _PLAIN),
        Setting("use_bias", ("attention_in_bias", "attention_out_bias", "mlp_bias"), True),
    ),
    rules=(
        *_ends(),
        *_norms(_PRE_NORMS),
        *_ATTENTION,
        *_ATTENTION_OUT,
        *_linear("layers.{}.mlp.c_fc", "layers/feed_forward/up"),
        *_linear("layers.{}.mlp.c_proj", "layers/feed_forward/down"),
    ),
    tied=True,
    windows=Windows("all"),
    fixed={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    without_meaning=frozenset(
        # transformers reads hidden_act instead of the first, and takes softmaxes in float32 always.
        {"activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "layer_norm_epsilon"}
    ),
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    always={**_RMS_ROTARY, "qk_norm": "all", "norm_position": "output"},
    settings=(*_SIZES, _GROUPED, _HEAD_DIM, _RMS, _activation("hidden_act", _GATED), _ATTENTION_BIAS),
    rules=(
        *_ends(),
        *_norms(_OUTPUT_NORMS),
        *_qk_norms(),
        *_ATTENTION,
        *_ATTENTION_OUT,
        *_GATED_MLP,
        *_MLP_DOWN,
    ),
)

_GEMMA_SIZES = (
    *_SIZES,
    dataclasses.replace(_GROUPED, default=REQUIRED),
    dataclasses.replace(_HEAD_DIM, default=REQUIRED),
    _RMS,
    _ATTENTION_BIAS,
)
_GEMMA_MATRICES = (*_ATTENTION, *_ATTENTION_OUT, *_GATED_MLP, *_MLP_DOWN)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    always=_RMS_ROTARY,
    # The first releases say "gelu" and mean its approximation; transformers reads them so.
    settings=(*_GEMMA_SIZES, _activation("hidden_act", {**_TANH_GATED, "gelu": "geglu_tanh"})),
    rules=(*_ends(1.0), *_norms(_PRE_NORMS, 1.0), *_GEMMA_MATRICES),
    tied=True,
    fixed={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
    scales_embedding=True,
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    always={**_RMS_ROTARY, "norm_position": "both"},
    settings=(
        *_GEMMA_SIZES,
        _activation("hidden_activation", _TANH_GATED, "gelu_pytorch_tanh"),
        _QUERY_SCALE,
        Setting("attn_logit_softcapping", ("attention_soft_cap",), 50.0),
        Setting("final_logit_softcapping", ("logit_soft_cap",), 30.0),
    ),
    rules=(*_ends(1.0), *_norms(_BOTH_NORMS, 1.0), *_GEMMA_MATRICES),
    tied=True,
    windows=Windows("periodic", default=4096, period=2),
    fixed={"use_bidirectional_attention": (None, False)},
    # What counts is hidden_activation and sliding_window.
    without_meaning=frozenset({"hidden_act", "sliding_window_size", "cache_implementation"}),
    scales_embedding=True,
    whole_heads=True,
)

GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    always={**_RMS_ROTARY, "norm_position": "both", "qk_norm": "head"},
    settings=(
        *_GEMMA_SIZES,
        _activation("hidden_activation", _TANH_GATED, "gelu_pytorch_tanh"),
        _QUERY_SCALE,
        Setting("final_logit_softcapping", ("logit_soft_cap",), None),
    ),
    rules=(*_ends(1.0), *_norms(_BOTH_NORMS, 1.0), *_qk_norms(1.0), *_GEMMA_MATRICES),
    tied=True,
    rotary=Rotary(default_base=1_000_000.0, window_base="rope_local_base_freq"),
    windows=Windows("periodic", default=4096, period=6),
    fixed={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
    without_meaning=frozenset({"cache_implementation"}),
    scales_embedding=True,
    whole_heads=True,
)

FAMILIES = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        QWEN2,
        MISTRAL,
        QWEN3,
        GPT_NEOX,
        PHI3,
        STARCODER2,
        OLMO2,
        GEMMA,
        GEMMA2,
        GEMMA3,
    )
}
