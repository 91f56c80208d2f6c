import json

import pytest

from flax_decoder.cli import main

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
        "flops_per_token_causal",
        "decode_tokens_per_second",
    }
    assert result.keys() >= numbers | {"device", "mfu"}
    assert all(result[name] > 0 for name in numbers)
    assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
    assert result["mfu"] == result["mfu_causal"] == "unknown"  # the peak of a CPU is in no table
    assert result["flops_per_token"] - result["flops_per_token_causal"] == 6 * 8 * 8
    assert list(tmp_path.iterdir()) == []
