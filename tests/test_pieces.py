"""200 random settings for each piece of a network, beside `transformers`: all that open have its logits."""

import json

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# ruff: noqa: E402
from test_families import BLOOM, FACTORS, FALCON, GPT2, MPT, NEOX, OPT, SIZES, V

import flax_decoder as fd
from flax_decoder.huggingface.config import read_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.weights import flatten, split, tensor_specs
from flax_decoder.nn.params import abstract_params

COUNT = 200
T = 37
# Few shapes, so that few programs are compiled: key/value heads, heads, and their width.
HEADS = [(1, 3, 8), (2, 4, 6), (3, 3, 14)]


def rope(rng, *kinds):
    """Rotary settings of a random kind."""
    kind = kinds[rng.integers(len(kinds))]
    table = {"rope_type": kind, "rope_theta": float(rng.uniform(20, 20_000))}
    if kind == "linear":
        table |= {"factor": float(rng.uniform(1, 8))}
    elif kind == "llama3":
        low = float(rng.uniform(0.3, 3))
        table |= {"factor": float(rng.uniform(1, 9)), "low_freq_factor": low, "high_freq_factor": low * 3}
        table |= {"original_max_position_embeddings": int(rng.integers(5, 60))}
    elif kind == "yarn":
        table |= {"factor": float(rng.uniform(1, 9)), "original_max_position_embeddings": int(rng.integers(5, 60))}
        some = {"beta_fast": float(rng.uniform(3, 40)), "beta_slow": float(rng.uniform(0.2, 2))}
        some |= {"attention_factor": float(rng.uniform(0.5, 2))}
        table |= {name: value for name, value in some.items() if rng.random() < 0.5}
        if rng.random() < 0.3:
            table |= {"mscale": float(rng.uniform(0.3, 2)), "mscale_all_dim": float(rng.uniform(0.3, 2))}
    return table


def some(rng, **values):
    """Random ones of some settings, each with a random one of its values."""
    return {name: options[rng.integers(len(options))] for name, options in values.items() if rng.random() < 0.7}


def sizes(rng, **more):
    """Random sizes; the width is that of all heads, which some families want."""
    kv_heads, heads, width = HEADS[rng.integers(len(HEADS))]
    drawn = SIZES | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * width}
    drawn |= {"num_hidden_layers": int(rng.integers(1, 4)), "intermediate_size": 37}
    return drawn | some(rng, tie_word_embeddings=(True, False)) | more


def of_heads(rng, width, heads, layers, **names):
    """Random sizes by the names of families with as many keys as queries."""
    _, count, size = HEADS[rng.integers(len(HEADS))]
    return {width: count * size, heads: count, layers: int(rng.integers(1, 4))} | names


def longrope(rng):
    """Random settings with a factor for each pair of a head, for texts beyond the original context and within it."""
    drawn = sizes(rng, original_max_position_embeddings=int(rng.integers(5, 60)), max_position_embeddings=60)
    pairs = drawn["hidden_size"] // drawn["num_attention_heads"] // 2
    factors = {name: rng.uniform(1, 9, pairs).tolist() for name in ("short_factor", "long_factor")}
    chosen = some(rng, attention_factor=(0.7, 1.4), factor=(3.0, 0.8))
    return drawn | {"rope_scaling": {"rope_type": "longrope", "rope_theta": 100.0} | factors | chosen}


def dynamic(rng):
    """Random settings of a base that grows, for texts beyond the original context and within it."""
    table = {"rope_type": "dynamic", "rope_theta": float(rng.uniform(20, 20_000)), "factor": float(rng.uniform(1, 9))}
    return sizes(rng, rope_parameters=table, max_position_embeddings=int(rng.integers(5, 60)))


ACTS = ("gelu", "relu", "gelu_new")
BIASES = {"attention_bias": (True, False), "mlp_bias": (True, False)}
NEW = ("default", "linear", "llama3", "yarn")
# A piece: a family that has it, and random settings of it.
PIECES = {
    "relu squared": ("arcee", lambda r: sizes(r, rope_parameters=rope(r, *NEW)) | some(r, **BIASES)),
    "norm with an offset": ("nemotron", lambda r: sizes(r, partial_rotary_factor=1.0) | some(r, **BIASES)),
    "interleaved pairs": ("ernie4_5", lambda r: sizes(r, rope_parameters=rope(r, *NEW)) | some(r, use_bias=(True,))),
    "longrope": ("phi3", longrope),
    "dynamic": ("llama", dynamic),
    "part of a head": (
        "glm",
        lambda r: sizes(r, head_dim=8, partial_rotary_factor=(0.25, 0.5, 0.75, 1.0)[r.integers(4)]),
    ),
    "layers that do not rotate": (
        "smollm3",
        lambda r: sizes(r, no_rope_layer_interval=int(r.integers(1, 5)), rope_parameters=rope(r, *NEW)),
    ),
    "norms behind, and windows": (
        "exaone4",
        lambda r: sizes(r, sliding_window=int(r.integers(1, 20)), sliding_window_pattern=int(r.integers(2, 4))),
    ),
    "yarn": ("llama", lambda r: sizes(r, rope_parameters=rope(r, "yarn"), head_dim=(6, 16, 22)[r.integers(3)])),
    "LayerNorm of queries": (
        "phi",
        lambda r: sizes(r, qk_layernorm=True, partial_rotary_factor=1.0, rope_parameters=rope(r, *NEW)),
    ),
    "LayerNorm of each head": (
        "cohere",
        lambda r: sizes(r, use_qk_norm=True, logit_scale=0.3, rope_parameters=rope(r, *NEW)) | some(r, **BIASES),
    ),
    "yarn of fractions": (
        "llama",
        lambda r: sizes(r, rope_parameters=rope(r, "yarn") | {"truncate": False}, head_dim=(6, 16, 22)[r.integers(3)]),
    ),
    "queries scaled by position": (
        "ministral3",
        lambda r: sizes(
            r,
            rope_parameters=rope(r, "yarn", "llama3") | {"llama_4_scaling_beta": float(r.uniform(0, 2))},
            head_dim=(6, 16, 22)[r.integers(3)],
        ),
    ),
    "yarn in part": (
        "gpt_neox",
        lambda r: NEOX | {"rotary_pct": (0.34, 0.67, 1.0)[r.integers(3)], "rope_scaling": rope(r, "yarn")},
    ),
    "a table for each kind of layer": (
        "olmo3",
        lambda r: sizes(
            r,
            sliding_window=int(r.integers(1, 20)),
            head_dim=(6, 16, 22)[r.integers(3)],
            rope_parameters={"full_attention": rope(r, "yarn", "default"), "sliding_attention": rope(r, "default")},
        ),
    ),
    "norm without scale": ("olmo", lambda r: sizes(r, rope_parameters=rope(r, *NEW)) | some(r, **BIASES)),
    "clipped queries": ("olmo", lambda r: sizes(r, clip_qkv=float(r.uniform(0.01, 2))) | some(r, **BIASES)),
    "clipped queries and slopes": (
        "mpt",
        lambda r: (
            MPT | of_heads(r, "d_model", "n_heads", "n_layers", attn_config={"clip_qkv": float(r.uniform(0.1, 2))})
        ),
    ),
    "shared norm": (
        "phi",
        lambda r: sizes(r, partial_rotary_factor=1.0, rope_parameters=rope(r, *NEW)) | some(r, hidden_act=ACTS),
    ),
    "bias of the head": (
        "gptj",
        lambda r: GPT2 | of_heads(r, "n_embd", "n_head", "n_layer", rotary_dim=4) | some(r, activation_function=ACTS),
    ),
    "multipliers": (
        "granite",
        lambda r: sizes(r, **{n: float(r.uniform(0.1, 3)) for n in FACTORS}, logits_scaling=float(r.uniform(0.1, 9))),
    ),
    "multipliers and norms behind": (
        "hyperclovax",
        lambda r: sizes(r, **{n: float(r.uniform(0.1, 3)) for n in FACTORS}) | some(r, use_post_norm=(True, False)),
    ),
    "multiplier of logits": ("cohere", lambda r: sizes(r, logit_scale=float(r.uniform(0.05, 3))) | some(r, **BIASES)),
    "norm of embeddings": ("bloom", lambda r: BLOOM | of_heads(r, "hidden_size", "n_head", "n_layer")),
    "queries normalised after": ("hunyuan_v1_dense", lambda r: sizes(r, head_dim=8, rope_parameters=rope(r, *NEW))),
    "interleaved in parts": (
        "codegen",
        lambda r: GPT2 | {"n_embd": 16 * int(r.integers(1, 4)), "n_head": 2, "rotary_dim": 4},
    ),
    "interleaved by key heads": (
        "falcon",
        lambda r: (
            FALCON
            | of_heads(r, "hidden_size", "num_attention_heads", "num_hidden_layers", rope_parameters=rope(r, *NEW))
            | some(r, multi_query=(True, False), parallel_attn=(True, False), bias=(True, False))
        ),
    ),
    "unread positions": (
        "opt",
        lambda r: (
            {name: size for name, size in OPT.items() if name != "word_embed_proj_dim"}
            | of_heads(r, "hidden_size", "num_attention_heads", "num_hidden_layers")
            | some(r, enable_bias=(True, False), layer_norm_elementwise_affine=(True, False))
        ),
    ),
}


def test_every_piece_is_of_a_family():
    assert {model_type for model_type, _ in PIECES.values()} <= FAMILIES.keys() and len(PIECES) == 28


def logits_of_both(model_type, settings, seed):
    """The logits of a model of transformers with random weights, and ours with its weights and settings."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(settings)), **special)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        mean, size = (0.7, 0.3) if parameter.ndim == 1 else (0.0, parameter.shape[-1] ** -0.5)
        parameter.data = torch.tensor(mean + size * rng.standard_normal(parameter.shape), dtype=torch.float32)
    model.tie_weights()
    document = config.to_dict() | {"architectures": None}
    family = FAMILIES[model_type]
    ours = fd.Decoder(read_settings(document, "config.json"))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(ours)).items()}
    head = model.get_output_embeddings().weight
    tensors = dict(model.named_parameters()) | {family.head: head}
    params = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for spec in tensor_specs(family, shapes):
        parts = split(spec.rule, tensors.pop(spec.name).detach().numpy(), spec.param_shapes)
        for path, part in zip(spec.rule.paths, parts, strict=True):
            params[path][... if spec.layer is None else spec.layer] = part
    assert all(tensor is head for tensor in tensors.values()), tensors.keys()
    tokens_BT = rng.integers(0, V, (1, T))
    with torch.no_grad():
        expected_BTV = model(torch.tensor(tokens_BT), use_cache=False).logits.numpy()
    logits_BTV = np.asarray(ours.apply({"params": unflatten_dict(params, sep="/")}, tokens_BT.astype(np.int32)))
    return logits_BTV, expected_BTV


@pytest.mark.full
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.filterwarnings("ignore")
def test_random_settings_have_the_logits_of_transformers(piece):
    """Some are refused, by name: what opens is right."""
    model_type, draw = PIECES[piece]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    opened, worst = 0, 0.0
    for seed in range(COUNT):
        settings = draw(np.random.default_rng(seed))
        try:
            logits_BTV, expected_BTV = logits_of_both(model_type, settings, seed)
        except fd.UserError:
            continue
        opened += 1
        difference = np.abs(logits_BTV - expected_BTV).max() / max(1.0, np.abs(expected_BTV).max())
        worst = max(worst, float(difference))
        assert difference <= 2e-5, (seed, settings)
    print(f"{piece}: {opened} of {COUNT} open, largest difference {worst:.1e}")
    assert opened >= COUNT // 2
