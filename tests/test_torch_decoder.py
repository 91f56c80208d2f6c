"""The PyTorch twin computes what our network does, whatever the config: every tensor, every gradient, AdamW."""

import dataclasses
import functools
import itertools
import typing

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
# ruff: noqa: E402
import reference

import flax_decoder as fd
from flax_decoder import cli
from flax_decoder.comparison.torch_decoder import TorchDecoder, make_twin, params_of_twin
from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.weights import flatten

SIZES = {"vocab_size": 31, "context_length": 24, "num_layers": 3, "embed_dim": 16, "num_heads": 4}
# Some values of every setting that changes the network; choices and switches are read off the config.
VALUES = {
    "num_kv_heads": (None, 2, 1),
    "head_dim": (None, 6),
    "mlp_dim": (None, 23),
    "rotary_base": (10_000.0, 501.0),
    "rotary_window_base": (None, 97.0),
    "rotary_fraction": (1.0, 0.5),
    "rotary_pattern": ((True,), (True, False)),
    "rotary_scaling_factor": (8.0, 3.0),
    "rotary_low_frequency_factor": (1.0, 1.5),
    "rotary_high_frequency_factor": (4.0, 6.0),
    "rotary_original_context": (8192, 11),
    "rotary_short_factors": ((), (1.3, 1.9)),
    "rotary_long_factors": ((), (2.3, 4.9)),
    "rotary_magnitude": (1.0, 1.3),
    "rotary_query_scaling": (0.0, 0.3),
    "embed_scale": (1.0, 3.7),
    "residual_scale": (1.0, 0.7),
    "qkv_clip": (None, 0.4),
    "logit_scale": (1.0, 1.9),
    "norm_epsilon": (1e-5, 0.3),
    "window": (None, 5),
    "window_pattern": ((True,), (True, False)),
    "attention_scale": (None, 0.31),
    "attention_soft_cap": (None, 1.3),
    "logit_soft_cap": (None, 2.1),
}
# What does not change the network without dropout.
NOT_COMPARED = {"dropout", "init_stddev", "output_init", "attention", "dtype", "scan_layers", "remat", *SIZES}
PLAIN = {
    "positions": "sinusoidal",
    "norm_position": "post",
    "final_norm": False,
    "feed_forward": "relu",
    "norm_bias": True,
    "attention_in_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tied_head": False,
    "head_bias": True,
}


def values_of(field):
    """The values of a setting that are tried."""
    if field.name in VALUES:
        return VALUES[field.name]
    kind = typing.get_type_hints(ModelConfig)[field.name]
    return (False, True) if kind is bool else typing.get_args(kind)


@functools.cache
def all_values():
    fields = [field for field in dataclasses.fields(ModelConfig) if field.name not in NOT_COMPARED]
    return {field.name: values_of(field) for field in fields}


def random_settings(rng):
    """Settings that fit together, drawn until some do."""
    while True:
        settings = {name: values[rng.integers(len(values))] for name, values in all_values().items()}
        try:
            ModelConfig(**SIZES, **settings)
        except ValueError:
            # Most draws fail by settings that belong to rotary positions or to windows.
            if settings["positions"] != "rotary":
                settings |= {name: values[0] for name, values in all_values().items() if name.startswith("rotary_")}
            if settings["window"] is None:
                settings |= {"window_pattern": (True,), "rotary_window_base": None}
            try:
                ModelConfig(**SIZES, **settings)
            except ValueError:
                continue
        return settings


def pairs(settings):
    return set(itertools.combinations(sorted((name, repr(value)) for name, value in settings.items()), 2))


@functools.cache
def pairwise(count):
    """Settings that have as many pairs of values as so few can have: each is the best of some random ones."""
    rng, found, chosen = np.random.default_rng(0), set(), []
    for _ in range(count):
        best = max((random_settings(rng) for _ in range(30)), key=lambda settings: len(pairs(settings) - found))
        found |= pairs(best)
        chosen.append(best)
    return chosen


def compare(settings, **options):
    model = fd.Decoder(ModelConfig(**SIZES, **settings))
    return fd.compare(model=model, params=reference.random_params(model), length=19, **options)


def test_few_configs_have_every_value_of_every_setting_and_nearly_every_pair():
    chosen = pairwise(64)
    for name, values in all_values().items():
        assert {repr(settings[name]) for settings in chosen} == set(map(repr, values)), name
    rng = np.random.default_rng(1)
    found, possible = (set().union(*map(pairs, some)) for some in (chosen, [random_settings(rng) for _ in range(2000)]))
    assert len(possible - found) < 0.01 * len(possible)


@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n < 2 else pytest.mark.full) for n in range(64)])
def test_the_twin_has_the_numbers_of_our_model(number):
    settings = pairwise(64)[number]
    ledger = compare(settings, steps=3)
    assert ledger.holds, (settings, ledger.conclusion)
    assert {"logits", "loss", "gradient embedding", "step 3 params"} <= {row.name for row in ledger.rows}


@pytest.mark.full
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("feed_forward", ["relu", "gelu"])
@pytest.mark.parametrize("head_bias", [True, False])
@pytest.mark.parametrize("final_norm", [True, False])
def test_the_decoders_of_tutorials(norm_position, positions, feed_forward, head_bias, final_norm):
    changes = {"norm_position": norm_position, "positions": positions, "feed_forward": feed_forward}
    ledger = compare(PLAIN | changes | {"head_bias": head_bias, "final_norm": final_norm}, steps=10)
    assert ledger.holds, ledger.conclusion


@pytest.mark.parametrize(
    ("change", "row"),
    [
        pytest.param({"feed_forward": "gelu"}, "layers.0.feed_forward.hidden", id="activation"),
        pytest.param({"norm_epsilon": 1e-3}, "layers.0.attention_norm", id="epsilon", marks=pytest.mark.full),
        pytest.param({"attention_scale": 1.0}, "layers.0.attention.scores", id="scale", marks=pytest.mark.full),
        pytest.param({"window": 7}, "layers.0.attention.scores", id="window", marks=pytest.mark.full),
        pytest.param({"embed_scale": 4.0}, "embeddings", id="embedding", marks=pytest.mark.full),
        pytest.param({"positions": "none"}, "embeddings", id="positions", marks=pytest.mark.full),
        pytest.param({"logit_soft_cap": 1.0}, "logits", id="cap", marks=pytest.mark.full),
    ],
)
def test_another_network_is_found_at_its_first_tensor(change, row):
    model = fd.Decoder(ModelConfig(**SIZES, **PLAIN))
    params = reference.random_params(model)
    other = make_twin(ModelConfig(**SIZES, **PLAIN | change), params)
    ledger = fd.compare(model=model, params=params, torch_model=other, length=19)
    assert ledger.first_failure.name == row and ledger.cause


def test_params_go_to_pytorch_and_back():
    config = ModelConfig(**SIZES, **PLAIN | {"norm_position": "both", "qk_norm": "head", "final_norm": True})
    params = reference.random_params(fd.Decoder(config))
    twin = make_twin(config, params)
    assert twin.state_dict().keys() == TorchDecoder(config).state_dict().keys()
    jax.tree.map(np.testing.assert_array_equal, params_of_twin(twin), params)
    assert set(flatten(params)) == set(flatten(params_of_twin(twin)))
    tied = ModelConfig(**SIZES)
    params = reference.random_params(fd.Decoder(tied))
    jax.tree.map(np.testing.assert_array_equal, params_of_twin(make_twin(tied, params)), params)
    with pytest.raises(UserError, match="the parameters are not those of this model"):
        make_twin(config, params)
    with pytest.raises(UserError, match="needs a folder, or both model and params"):
        fd.compare(model=fd.Decoder(tied))


def test_a_run_that_no_model_type_can_express_is_compared(tmp_path, capsys):
    (tmp_path / "input.txt").write_text("To be, or not to be, that is the question:\n" * 40)
    sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "context_length": 16}
    settings = {f"model.{name}": value for name, value in (PLAIN | sizes).items()}
    settings |= {"data.path": tmp_path / "input.txt", "run.folder": tmp_path / "run", "training.num_steps": 2}
    settings |= {"training.sample_tokens": 0, "mesh.data": 1}
    assert cli.main(["train", *(f"--{name}={str(value).lower()}" for name, value in settings.items())]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "run"), "--steps", "2"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "PyTorch's side is the twin in flax_decoder/comparison/torch_decoder.py" in output
    assert "rows hold" in output and "gradient head_bias" in output
