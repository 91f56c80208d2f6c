import json

import jax
import pytest

from flax_decoder.cli import main
from flax_decoder.config import load_config
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training import speed

SIZES = "--model.vocab-size=11 --model.context-length=8 --model.num-layers=1 --model.embed-dim=8 --model.num-heads=2"


def test_bench_tells_all_numbers(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *SIZES.split(), "--training.batch-size=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    numbers = {
        "parameters",
        "compile_seconds",
        "step_seconds",
        "tokens_per_second",
        "flops_per_token",
        "decode_tokens_per_second",
    }
    assert result.keys() >= numbers | {"device", "mfu"}
    assert all(result[name] > 0 for name in numbers)
    assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
    assert result["mfu"] == "unknown"  # the peak of a CPU is in no table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary"}, {"tied_head": False}, {"num_kv_heads": 1}])
def test_flops_are_counted_by_matrix_products(changes):
    """Six for each weight that a token meets in a product, and twelve for each key it may meet, a layer and width."""
    settings = {"vocab_size": 11, "context_length": 8, "num_layers": 3, "embed_dim": 12, "num_heads": 2} | changes
    config = load_config(None, {f"model.{name}": value for name, value in settings.items()}).model
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.numpy.zeros((1, 1), int))["params"]
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    products = 3 * (12 * 12 * 2 + 2 * 12 * 6 * config.kv_heads + 2 * 12 * 48) + 11 * 12
    scales = 12 * (2 * 3 + 1)  # norms are counted, too, though they are no products: too few to matter
    assert speed.flops_per_token(config, num_params) == 6 * (products + scales) + 12 * 3 * 12 * 8
