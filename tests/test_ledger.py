"""The ledger holds where PyTorch and ours agree, and names the first tensor and the cause where they do not."""

import dataclasses
import functools
import itertools
import json
import operator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# ruff: noqa: E402
import reference
from test_families import OFFSET_NORMS, SIZES, V, a_case_each, loaded, saved, torch_model

import flax_decoder as fd
from flax_decoder import cli
from flax_decoder.comparison import compare as comparison
from flax_decoder.comparison import ledger
from flax_decoder.comparison.jax_side import JaxSide, fit
from flax_decoder.comparison.observation import observe
from flax_decoder.comparison.torch_side import PyTorchSide
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.weights import flatten
from flax_decoder.nn import attention, linear
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.nn.positions import rotate
from flax_decoder.training import step
from flax_decoder.training.optimizer import is_decayed, learning_rate_schedule, make_optimizer
from flax_decoder.training.run_folder import write_run

STEPS = 3
OPTIMIZER = comparison.default_optimizer(STEPS)


def compare(model_type, number, *, config=None, edit=None, only_forward=False, **settings):
    """A comparison in which our model has another config, or other parameters."""
    model, params, _ = loaded(model_type, number)
    if config is not None:
        model = fd.Decoder(dataclasses.replace(model.config, **config))
    if edit is not None:
        params = edit(jax.tree.map(np.array, params))
    # 2 x 19 tokens are enough to see all of a tiny model.
    with mock.patch.object(comparison, "observe", observe_forward if only_forward else observe):
        settings = {"length": 19} | settings
        return comparison.compare_models(
            model, params, torch_model(model_type, number), FAMILIES[model_type], **settings
        )


def observe_forward(*arguments):
    """`observe` up to the loss: what comes after takes time to compile, and cannot be the first mistake."""
    return itertools.takewhile(lambda observation: observation.name != "loss", observe(*arguments))


# --- What agrees ---


def test_all_rows_hold_and_stand_in_the_order_of_computation():
    result = compare("llama", 1, steps=2)
    assert result.holds and result.cause is None and result.first_failure is None
    names = [row.name for row in result.rows]
    layer = [name.removeprefix("layers.1.") for name in names if name.startswith("layers.1.")]
    assert layer == [
        *("attention_norm", "attention.q", "attention.k", "attention.v", "attention.q_rotated", "attention.k_rotated"),
        *("attention.scores", "attention.weights", "attention.heads", "attention.out", "feed_forward_norm"),
        *("feed_forward.gate", "feed_forward.up", "feed_forward.hidden", "feed_forward.down", "residual"),
    ]
    others = [name for name in names if not name.startswith("layers.")]
    assert others[:4] == ["embeddings", "final_norm", "logits", "loss"]
    gradients = [name for name in names if name.startswith("gradient layers.0.")]
    assert len(gradients) == 9  # four of attention, three of feed-forward, two norms
    assert names.count("gradient norm") == 1
    assert [name.replace("gradient ", "clipped ") for name in gradients] == [
        n for n in names if "clipped layers.0" in n
    ]
    per_step = ["first moment", "second moment", "learning rate", "params"]
    assert names[-9:] == [f"step 1 {name}" for name in per_step] + [f"step 2 {name}" for name in ["loss", *per_step]]
    scores = next(row for row in result.rows if row.name == "layers.0.attention.scores")
    assert scores.shape == (2, 4, 19, 19) and 0 < scores.relative < scores.floor


@pytest.mark.short("gpt2-0", "gemma2-1")
@a_case_each
def test_float64_agrees_to_ten_digits_and_float32_to_what_is_promised(model_type, number):
    model, params, _ = loaded(model_type, number)
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    settings = comparison.default_optimizer(10)
    batches = [comparison._batch(model, 2, 19, seed) for seed in range(10)]
    worst = {}
    for exact in (False, True):
        tx = make_optimizer(settings, 10)
        ours = JaxSide(model, params, tx, settings, accumulation_steps=2, exact=exact)
        theirs = PyTorchSide(
            torch_model(model_type, number), FAMILIES[model_type], model.config, shapes, settings, 10, exact=exact
        )
        for observation in observe(ours, theirs, batches, 0 if exact else 10):
            name = observation.name
            kind = name.split()[-1 if name.startswith("step") else 0]
            # Unless they are rotated, key biases move all scores of a query alike: their gradient is zero.
            biases = tuple(f"{module}{mark}bias" for module in ("key", "key_norm") for mark in "./")
            tensors = [t for t in observation.tensors if not (t[0] or name).endswith(biases)]
            if tensors:
                row = comparison.compare_float32(dataclasses.replace(observation, tensors=tensors))
                worst[exact, kind] = max(worst.get((exact, kind), 0.0), row.relative)
        if exact:
            rms = model.config.norm == "rmsnorm"
            assert any("RMSNorm" in name for name in theirs.casts) == rms
    assert worst[False, "logits"] <= 2e-5 and worst[False, "gradient"] <= 1e-4
    assert worst[False, "loss"] <= 1e-5 and worst[False, "params"] <= 1e-4
    # The code of BLOOM has the constants of its GELU with eight digits.
    bound = 1e-8 if model_type == "bloom" else 1e-10
    assert max(value for (exact, _), value in worst.items() if exact) <= bound


def test_a_gradient_that_is_truly_zero_is_no_difference():
    result = compare("gpt2", 0, steps=2)
    assert result.holds
    zero = {row.name for row in result.rows if row.verdict == "zero"}
    expected = {f"{kind} layers.{layer}.attention.key.bias" for kind in ("gradient", "clipped") for layer in (0, 1)}
    assert zero == expected
    # Adam makes whole steps of the rounding in it, one way here and another there.
    params = next(row for row in result.rows if row.name == "step 2 params")
    assert params.worst == "layers/attention/key/bias" and params.relative > params.floor
    assert params.verdict == "rounding" and params.float64 < 1e-6
    assert "the true gradient is zero" in str(result)


# How families with names of their own call width, layers and heads.
OTHER_NAMES = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen"), ("n_embd", "n_layer", "n_head")),
    "gpt_neo": ("hidden_size", "num_layers", "num_heads"),
    "mpt": ("d_model", "n_layers", "n_heads"),
    "bloom": ("hidden_size", "n_layer", "n_head"),
}


def random_case(seed):
    """A model of any family, of random sizes and settings."""
    rng = np.random.default_rng(seed)
    names = list(FAMILIES)
    model_type = names[seed % len(names)]
    kv_heads, group, width = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(2, 7))
    heads = kv_heads * group
    sizes = SIZES | {
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(5, 60)),
        "vocab_size": int(rng.integers(11, 200)),
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    if model_type in OTHER_NAMES:
        common = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        named = {name: sizes[other] for name, other in zip(OTHER_NAMES[model_type], common, strict=True)}
        sizes = {"vocab_size": sizes["vocab_size"]} | named
    if model_type == "gpt_neo":
        sizes |= {"attention_types": [[["local"], sizes["num_layers"]]], "window_size": int(rng.integers(2, 12))}
    if model_type == "gpt_neox":
        sizes = {n: v for n, v in sizes.items() if n not in ("num_key_value_heads", "head_dim")} | {"rotary_pct": 0.5}
    if model_type == "codegen":
        sizes |= {"n_head": 4, "n_embd": 4 * width}
    if model_type in ("gptj", "codegen"):
        sizes |= {"rotary_dim": width}
    if model_type in ("opt", "falcon"):
        sizes = {n: v for n, v in sizes.items() if n not in ("num_key_value_heads", "head_dim", "intermediate_size")}
    if model_type == "opt":
        sizes |= {"word_embed_proj_dim": sizes["hidden_size"], "ffn_dim": int(rng.integers(5, 60))}
    if model_type in ("granite", "hyperclovax"):
        sizes |= {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}
    if model_type in ("nemotron", "stablelm", "glm", "glm4", "phi"):
        sizes |= {"partial_rotary_factor": 1.0}
    if model_type in ("gemma2", "gemma3_text", "vaultgemma", "mistral", "ministral", "phi3", "starcoder2", "cohere2"):
        sizes |= {"sliding_window": int(rng.integers(2, 12))}
    if model_type in ("gemma2", "gemma3_text", "vaultgemma", "ministral"):
        kinds = ("sliding_attention", "full_attention")
        sizes |= {"layer_types": [kinds[int(rng.integers(2))] for _ in range(sizes["num_hidden_layers"])]}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(sizes)), **special)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        size = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        mean = 1.0 if parameter.ndim == 1 and model_type not in OFFSET_NORMS else 0.0
        parameter.data = torch.tensor(mean + size * rng.standard_normal(parameter.shape), dtype=torch.float32)
    model.tie_weights()
    return model


@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(60) if seed != 3)])
def test_no_false_alarms(seed, tmp_path):
    random_case(seed).save_pretrained(tmp_path)
    result = fd.compare(tmp_path, steps=2, length=11 + seed % 5 * 2, seed=seed)
    assert result.holds, result.conclusion


# --- Planted mistakes ---


def edited(path, change):
    """Changes one of our parameters."""

    def edit(params):
        *branches, name = path.split("/")
        node = functools.reduce(lambda tree, branch: tree[branch], branches, params)
        node[name] = change(node[name])
        return params

    return edit


def swapped(group, one, other):
    return edited(f"layers/{group}", lambda params: params | {one: params[other], other: params[one]})


def mixed_up(kernel_LDKH):
    """Reads heads off a matrix as if they were its inner axis."""
    L, D, K, H = kernel_LDKH.shape
    return kernel_LDKH.reshape(L, D, H, K).swapaxes(2, 3)


def without_biases(params):
    for name in ("query", "key", "value"):
        del params["layers"]["attention"][name]["bias"]
    return params


def without(absent):
    return lambda params: {name: leaf for name, leaf in params.items() if name != absent}


def without_second_norm(params):
    return params | {"layers": without("feed_forward_norm")(params["layers"])}


def transposed(kernel_L):
    """Transposes each layer's square matrix."""
    size = round(kernel_L[0].size ** 0.5)
    return np.stack([kernel.reshape(size, size).T.reshape(kernel.shape) for kernel in kernel_L])


def reordered(kernel):
    return np.concatenate([kernel[..., ::2], kernel[..., 1::2]], -1)


def edited_token(embedding_VD):
    return embedding_VD + np.eye(len(embedding_VD))[SOME_TOKEN][:, None]


SOME_TOKEN = np.random.default_rng(0).integers(0, V, (2, 20))[0, 0]  # the first one that is compared
QUERY, SCALE = "layers/attention/query/kernel", "layers/attention_norm/scale"
HIDDEN, Q, Q_ROTATED, SCORES = "feed_forward.hidden", "attention.q", "attention.q_rotated", "attention.scores"
UP = edited("layers/feed_forward/up/kernel", lambda kernel: kernel + 1e-2 * (kernel == kernel.max()))
GATE_AND_UP = swapped("feed_forward", "gate", "up")
# The model, what is different in ours (fields of its config, or an edit of its parameters), the first row, the cause.
FORWARD = {
    "tanh GELU": ("gpt2-1", {"feed_forward": "gelu_tanh"}, HIDDEN, "ours is GELU by tanh, PyTorch's GELU by erf"),
    "erf GELU in a gate": ("gemma2-0", {"feed_forward": "geglu"}, HIDDEN, "GELU by erf, PyTorch's GELU by tanh"),
    "epsilon of LayerNorm": ("gpt2-0", {"norm_epsilon": 1e-6}, "attention_norm", "norm: ours 1e-06, PyTorch's 1e-05"),
    "epsilon of RMSNorm": ("llama-0", {"norm_epsilon": 1e-5}, "attention_norm", "norm: ours 1e-05, PyTorch's 1e-06"),
    "scale of Gemma's norm": ("gemma-0", edited(SCALE, lambda s: s - 1), "attention_norm", "is 1 + weight on one side"),
    "rotary base": ("llama-0", {"rotary_base": 5e5}, Q_ROTATED, "rotary base: ours 500,000, PyTorch's 10,000"),
    "rotary fraction": ("gpt_neox-0", {"rotary_fraction": 0.67}, Q_ROTATED, "turns 4 numbers of a head, PyTorch 2"),
    "rotary pairs of halves": (
        "glm-0",
        {"rotary_layout": "half"},
        Q_ROTATED,
        "half-by-half pairs, PyTorch interleaved",
    ),
    "a layer that does not rotate": (
        *("smollm3-1", {"rotary_pattern": (True,)}),
        *(Q_ROTATED, "rotary positions: PyTorch does not turn it"),
    ),
    "linear scaling": ("llama-2", {"rotary_scaling": "none"}, Q_ROTATED, "positions count 3 times as much in ours"),
    "llama3 scaling": ("llama-1", {"rotary_scaling": "none"}, Q_ROTATED, "some wavelengths are stretched on one side"),
    "yarn": ("llama-4", {"rotary_magnitude": 1.0}, Q_ROTATED, "rotary magnitude: what ours turns is 0.8782"),
    "dynamic": (
        *("llama-5", {"rotary_original_context": 10}),
        *(Q_ROTATED, "rotary base: ours 7,902.63, PyTorch's 500"),
    ),
    "longrope": (
        *("phi3-3", {"rotary_original_context": 10}),
        *(Q_ROTATED, "some wavelengths are stretched on one side"),
    ),
    "RMSNorm of queries": (
        *("cohere-3", {"qk_norm_kind": "rmsnorm"}),
        *(Q, "ours is RMSNorm, PyTorch's LayerNorm"),
    ),
    "scaling of queries": (
        *("ministral3-0", {"rotary_query_scaling": 0.1}),
        *(Q_ROTATED, "those at 7 are 0.885235 times PyTorch's"),
    ),
    "rotary layout of weights": ("llama-0", edited(QUERY, reordered), Q, "are reordered, from adjacent pairs to pairs"),
    "scale of a norm": ("olmo-0", {"norm_epsilon": 1e-6}, "attention_norm", "norm: ours 1e-06, PyTorch's 1e-05"),
    "K and V swapped": ("gpt2-0", swapped("attention", "key", "value"), "attention.k", "keys and values are swapped"),
    "no 1 / sqrt(H)": ("gpt2-0", {"attention_scale": 1.0}, SCORES, "root of the head width, 2.449, in ours"),
    "window off by one": ("mistral-0", {"window": 6}, SCORES, "ours sees 6 positions, one of PyTorch's 5: off by one"),
    "no window": ("mistral-0", {"window": None}, SCORES, "ours sees all 19 positions, one of PyTorch's 5"),
    "soft cap of scores": ("gemma2-1", {"attention_soft_cap": None}, SCORES, "of 0.9 squashes the scores of PyTorch"),
    "soft cap of logits": ("gemma2-1", {"logit_soft_cap": None}, "logits", "cap of 1.9 squashes the logits of PyTorch"),
    "scaled embeddings": (
        "gemma-0",
        {"embed_scale": 1.0},
        "embeddings",
        "0.204124 times PyTorch's everywhere, the root",
    ),
    "tied head": ("llama-0", {"tied_head": True, "edit": without("head")}, "logits", "ours takes the embedding"),
    "no biases": ("qwen2-0", {"attention_in_bias": False, "edit": without_biases}, Q, "a bias is missing in ours"),
    "transposed output matrix": (
        *("gpt2-0", edited("layers/attention/out/kernel", transposed)),
        *("attention.out", "the matrix is transposed"),
    ),
    "transposed query matrix": ("llama-0", edited(QUERY, transposed), Q, "the matrix is transposed"),
    "one number of the weights": ("llama-0", UP, None, "largest difference in feed_forward/up/kernel is 1.0e-02"),
    "parallel residual": (
        *("gpt_neox-0", {"parallel_residual": False}),
        *("feed_forward_norm", "the feed-forward of PyTorch reads what attention reads"),
    ),
    "gate and up swapped": ("llama-0", GATE_AND_UP, "feed_forward.gate", "gate and up are swapped"),
    "heads and width mixed up": (
        *("llama-0", edited("layers/attention/value/kernel", mixed_up)),
        *("attention.v", "heads and head width are mixed up in a reshape"),
    ),
    "LayerNorm for RMSNorm": ("llama-0", {"norm": "layernorm"}, "attention_norm", "is LayerNorm, PyTorch's RMSNorm"),
    "other vectors of positions": (
        *("gpt2-0", edited("positions", lambda table: np.roll(table, 1, axis=0))),
        *("embeddings", "the vectors of positions differ"),
    ),
    "embedding of a token": ("llama-0", edited("embedding", edited_token), "embeddings", f"that of token {SOME_TOKEN}"),
    "no ALiBi": ("mpt-0", {"positions": "none"}, "attention.weights", "ALiBi: the weights of PyTorch fall faster"),
    "own attention scaled": ("gpt_neo-0", {"attention_scale": None}, SCORES, "root of the head width"),
    "residual multiplier": (
        *("granite-0", {"residual_scale": 1.0}),
        *("feed_forward_norm", "ours adds 1 times what attention writes, PyTorch 0.7 times"),
    ),
    "residual multiplier behind norms": (
        *("hyperclovax-0", {"residual_scale": 1.0}),
        *("feed_forward_norm", "ours adds 1 times what attention writes, PyTorch 0.7 times"),
    ),
    "multiplier of embeddings": ("granite-0", {"embed_scale": 1.0}, "embeddings", "ours is 0.333333 times PyTorch's"),
    "multiplier of logits": ("cohere-0", {"logit_scale": 1.0}, "logits", "ours is 3.33333 times PyTorch's everywhere"),
    "multiplier of scores": ("granite-0", {"attention_scale": 0.6}, SCORES, "ours are 2 times PyTorch's"),
    "no norm of embeddings": (
        *("bloom-0", {"embedding_norm": False, "edit": without("embedding_norm")}),
        *("embeddings", "the norm of embeddings: ours has none"),
    ),
    "norm of queries before the rotation": (
        *("hunyuan_v1_dense-0", {"qk_norm_position": "before"}),
        *(Q, "in ours before the rotation"),
    ),
    "bias of the head": (
        *("gptj-0", {"head_bias": False, "edit": without("head_bias")}),
        *("logits", "a bias differs, or is"),
    ),
    "ReLU without the square": ("arcee-0", {"feed_forward": "relu"}, HIDDEN, "ours is ReLU, PyTorch's ReLU squared"),
    "bias of the output": (
        *("seed_oss-1", edited("layers/attention/out/bias", np.zeros_like)),
        *("attention.out", "a bias is missing in ours"),
    ),
    "layers with a window": (
        *("ministral-2", {"window_pattern": (False, True)}),
        *(SCORES, "ours sees all 19 positions, one of PyTorch's 5"),
    ),
    "rotary base of windows": (
        *("gemma3_text-0", {"rotary_window_base": 900.0}),
        *(Q_ROTATED, "rotary base: ours 900, PyTorch's 10,000"),
    ),
    "shared norm": (
        *("gpt_neox-0", {"shared_norm": True, "edit": without_second_norm}),
        *("feed_forward.up", "shared norm: the feed-forward of ours reads the norm of attention"),
    ),
    "no clip": ("olmo-3", {"qkv_clip": None}, Q_ROTATED, "PyTorch clips queries and keys to ± 0.7"),
    "bfloat16": ("llama-0", {"dtype": "bfloat16"}, "embeddings", "reduced matmul precision"),
}


# Those of the weights alone share their programs; each other setting has its own, which take ten seconds to compile.
@pytest.mark.short(
    *("epsilon of RMSNorm", "K and V swapped", "window off by one", "one number of the weights"),
    *("gate and up swapped", "heads and width mixed up", "embedding of a token"),
)
@pytest.mark.parametrize("planted", FORWARD)
def test_mistakes_of_the_forward_pass_are_named(planted):
    case, change, row, cause = FORWARD[planted]
    model_type, number = case.split("-")
    config = dict(change) if isinstance(change, dict) else {"edit": change}
    edit = config.pop("edit", None)
    check(compare(model_type, int(number), config=config, edit=edit, only_forward=True), row, cause)


def check(result, row, cause):
    """The first row that differs, of layer 0 if it is of a layer, and what its cause says."""
    assert not result.holds
    first = result.first_failure.name
    assert row is None or first in (row, f"layers.0.{row}"), result.conclusion
    assert cause in result.cause, result.conclusion
    assert first in result.conclusion and result.cause in result.conclusion


def interleaved_rotate(x_BTNH, positions_BT, frequencies, **_):
    """`positions.rotate` for pairs of neighbours."""
    return rotate(x_BTNH, positions_BT, frequencies, "interleaved")


def tiled_attention(q_BTNH, k_BSKH, v_BSKH, *arguments, **settings):
    """`dot_product_attention` with the key heads in turns: 0 1 0 1 in place of 0 0 1 1."""
    count = q_BTNH.shape[2] // k_BSKH.shape[2]
    tiled = (jnp.tile(array, (1, 1, count, 1)) for array in (k_BSKH, v_BSKH))
    return DOT_PRODUCT_ATTENTION(q_BTNH, *tiled, *arguments, **settings)


def rounded_linear(self, equation, x):
    """`Linear` as a TPU multiplies float32 by default."""
    return LINEAR_CALL(self, equation, x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else x)


def scaled_accumulation(factor):
    def accumulate(state, batch, rng):
        sums, gradients = ACCUMULATE(state, batch, rng)
        return sums, jax.tree.map(lambda gradient: gradient * factor, gradients)

    return accumulate


def unshifted_accumulation(state, batch, rng):
    return ACCUMULATE(state, batch | {"targets": batch["inputs"]}, rng)


def rotate_at(positions):
    return lambda x_BTNH, positions_BT, *rest, **settings: ROTATE(x_BTNH, positions(positions_BT), *rest, **settings)


def softmax_over_queries(*arguments, hook, **settings):
    scores = []

    def other_weights(name, array):
        scores.append(array)
        return hook(name, array if name == "scores" else jax.nn.softmax(scores[0], axis=-2))

    return DOT_PRODUCT_ATTENTION(*arguments, hook=other_weights, **settings)


ROTATE = attention.rotate
DOT_PRODUCT_ATTENTION, LINEAR_CALL = attention.dot_product_attention, linear.Linear.__call__
ACCUMULATE, VISIBLE = step.accumulate, MaskSpec.visible_BTS
ATTENTION = attention, "dot_product_attention"
CODE = {
    "rotary layout": (attention, "rotate", interleaved_rotate, Q_ROTATED, "ours turns interleaved pairs"),
    "heads grouped in turns": (*ATTENTION, tiled_attention, SCORES, "in ours head n reads key/value head n mod K"),
    "reduced matmul precision": (linear.Linear, "__call__", rounded_linear, Q, "reduced matmul precision"),
    "positions from one": (
        *(attention, "rotate", rotate_at(lambda positions: positions + 1)),
        *(Q_ROTATED, "rotary positions: ours start at 1, PyTorch's at 0"),
    ),
    "rotation backwards": (attention, "rotate", rotate_at(operator.neg), Q_ROTATED, "the two turn opposite ways"),
    "a look at the future": (
        *(MaskSpec, "visible_BTS", lambda mask: VISIBLE(mask) | True),
        *(SCORES, "the mask: ours lets positions see later ones"),
    ),
    "softmax over the wrong axis": (*ATTENTION, softmax_over_queries, "attention.weights", "ours do not add up to 1"),
    "targets not shifted": (step, "accumulate", unshifted_accumulation, "loss", "are the inputs, not shifted by one"),
    "accumulation that divides twice": (
        *(step, "accumulate", scaled_accumulation(1 / 2)),
        *("gradient embedding", "gradient accumulation divides by its 2 parts twice"),
    ),
    "accumulation that sums": (
        *(step, "accumulate", scaled_accumulation(2)),
        *("gradient embedding", "gradient accumulation sums its 2 parts"),
    ),
}


@pytest.mark.short("heads grouped in turns", "accumulation that sums")
@pytest.mark.parametrize("planted", CODE)
def test_mistakes_in_code_are_named(planted):
    owner, name, replacement, row, cause = CODE[planted]
    with mock.patch.object(owner, name, replacement):
        check(compare("llama", 0), row, cause)


def chain(*, clip=None, after=(), **changed):
    """AdamW as `OPTIMIZER` has it, except for what is given."""
    settings = {"learning_rate": learning_rate_schedule(OPTIMIZER, STEPS), "mask": is_decayed}
    settings |= {"b1": OPTIMIZER.beta1, "b2": OPTIMIZER.beta2, "eps": OPTIMIZER.epsilon}
    adamw = optax.adamw(**settings | {"weight_decay": OPTIMIZER.weight_decay} | changed)
    return optax.chain(clip or optax.clip_by_global_norm(OPTIMIZER.clip_norm), adamw, *after)


def later_schedule(count):
    return learning_rate_schedule(OPTIMIZER, STEPS)(count + 1)


def clip_each(updates, state, params=None):
    def clip(update):
        return update * jnp.minimum(1, OPTIMIZER.clip_norm / jnp.linalg.norm(update))

    return jax.tree.map(clip, updates), state


def adam(*, before=(), after=()):
    """AdamW from its parts."""
    return optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        *before,
        optax.scale_by_adam(OPTIMIZER.beta1, OPTIMIZER.beta2, OPTIMIZER.epsilon),
        *after,
        optax.scale_by_learning_rate(learning_rate_schedule(OPTIMIZER, STEPS)),
    )


def uncorrected(count):
    """Undoes the correction of the moments for their start at zero."""
    return (1 - OPTIMIZER.beta1 ** (count + 1)) / jnp.sqrt(1 - OPTIMIZER.beta2 ** (count + 1))


DECAY = optax.add_decayed_weights(OPTIMIZER.weight_decay, is_decayed)
GROW = optax.add_decayed_weights(-OPTIMIZER.weight_decay, is_decayed)
CLIP = optax.clip_by_global_norm(OPTIMIZER.clip_norm)
CLIP_EACH = optax.GradientTransformation(lambda params: optax.EmptyState(), clip_each)
PARAMS, RATE, CLIPPED = "step 1 params", "step 1 learning rate", "clipped embedding"
OPTIMIZERS = {
    "decay of norms": (chain(mask=None), PARAMS, "weight decay on norms or biases: "),
    "no decay": (chain(weight_decay=0.0), PARAMS, " does not decay in ours"),
    "coupled decay": (adam(before=[DECAY]), CLIPPED, "weight decay is coupled: 0.1 times the parameters"),
    "schedule off by one": (chain(learning_rate=later_schedule), RATE, "the schedule is one step ahead"),
    "clipping after the optimizer": (chain(clip=optax.identity(), after=[CLIP]), CLIPPED, "takes unclipped gradients"),
    "clipping tensor by tensor": (chain(clip=CLIP_EACH), CLIPPED, "each tensor is clipped by its own norm"),
    "clipping number by number": (chain(clip=optax.clip(OPTIMIZER.clip_norm / 50)), CLIPPED, "each number is clipped"),
    "beta 1": (chain(b1=0.8), CLIPPED, "beta 1 = 0.8, not 0.9"),
    "no bias correction": (
        adam(after=[optax.scale_by_schedule(uncorrected), DECAY]),
        # At step 1, the corrections of both moments cancel.
        *("step 2 learning rate", "the moments are not corrected for their start at zero"),
    ),
    "epsilon of AdamW": (chain(eps=1e-5), RATE, "AdamW's epsilon"),
    "decay apart from the rate": (chain(weight_decay=0.0, after=[GROW]), PARAMS, "not multiplied by the learning rate"),
    "beta 2": (chain(b2=0.999), "step 1 second moment", "beta 2: ours is 0.999, PyTorch's 0.99"),
}


@pytest.mark.short("decay of norms", "clipping after the optimizer")
@pytest.mark.parametrize("planted", OPTIMIZERS)
def test_mistakes_of_the_optimizer_are_named(planted):
    tx, row, cause = OPTIMIZERS[planted]
    check(compare("llama", 0, steps=STEPS, tx=tx), row, cause)


def test_mistakes_on_the_side_of_pytorch_are_named_too():
    config = dataclasses.replace(OPTIMIZER, learning_rate=1e-3)
    model = torch_model("llama", 0)
    wrong = type(model)(model.config)
    wrong.load_state_dict(model.state_dict())
    wrong.model.layers[1].mlp.act_fn = torch.nn.GELU()
    result = fd.compare(saved("llama", 0).name, torch_model=wrong, optimizer=config, length=19)
    check(result, "layers.1.feed_forward.hidden", "the activation: ours is SiLU, PyTorch's GELU by erf")


def test_a_fit_to_nan_is_nan():
    """So the learning rate of a model that computes NaN is a row that fails."""
    assert np.isnan(fit(np.array([np.nan, 1.0]), np.ones(2), np.arange(2.0))).all()


# --- The command ---


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["compare", saved("gpt2", 0).name, "--steps", "1", "--json", str(file), "--length", "19"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    document = json.loads(file.read_text())
    assert document["holds"] and document["conclusion"] == f"All {len(document['rows'])} rows hold."
    assert printed.splitlines()[-1] == document["conclusion"]
    for row in document["rows"]:
        assert row["name"] in printed and row.keys() >= {"shape", "absolute", "relative", "floor", "verdict"}


def test_command_ends_with_1_where_a_row_does_not_hold(capsys):
    rows = (ledger.Row("logits", (2, 3), 1.0, float("inf"), 1e-6, 1.0, "DIFFERS"),)
    failing = ledger.Ledger(rows, "a cause")
    with mock.patch.object(comparison, "compare_models", lambda *_, **__: failing):
        assert cli.main(["compare", saved("gpt2", 0).name]) == 1
        with mock.patch("flax_decoder.cli.write_text", side_effect=OSError("disk full")):
            assert cli.main(["compare", saved("gpt2", 0).name, "--json", "rows.json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "fault: rows.json: cannot be written: disk full\n"
    assert "1 of 1 rows do not hold; the first is logits: a cause" in captured.out
    assert json.loads(failing.to_json())["rows"][0]["relative"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "-1"], "steps = -1"),
        (["--batch-size", "3"], "batch_size = 3"),
        (["--length", "4"], "number of heads"),
        (["--length", "1"], "from 2 to"),
        (["--json", "/"], "must name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, capsys):
    assert cli.main(["compare", saved("gpt2", 0).name, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_run_folder(tmp_path):
    sizes = {"vocab_size": 5, "context_length": 11, "num_layers": 2, "embed_dim": 8, "num_heads": 2, "dropout": 0.3}
    model = fd.Decoder(fd.ModelConfig(**sizes))
    write_run(tmp_path / "run", model.config, reference.random_params(model), CharTokenizer("abc"), {})
    result = fd.compare(tmp_path / "run", steps=2)
    assert result.holds, result.conclusion
    assert any("Dropout was left out" in note for note in result.notes)
    # Where the family has biases and the run has none, PyTorch's are zeros, and are not trained.
    assert not any("bias" in row.name for row in result.rows)
