import json

import pytest

from flax_decoder.cli import main
from flax_decoder.planning import speed
from flax_decoder.training import hardware

SIZES = "--model.vocab-size=12 --model.context-length=8 --model.num-layers=1 --model.embed-dim=8 --model.num-heads=2"
MESH = "--mesh.fsdp=2 --mesh.context=2 --mesh.tensor=2"


def test_bench_reports_all_numbers(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *SIZES.split(), *MESH.split(), "--training.batch-size=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["parameters", "compile_seconds", "step_seconds", "tokens_per_second", "flops_per_token"]
    names += ["flops_per_token_causal", "decode_tokens_per_second"]
    assert all(result[name] > 0 for name in names) and "device" in result
    assert result["num_devices"] == 8
    assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
    assert result["mfu"] == result["mfu_causal"] == "unknown"  # no table has the peak of a CPU
    assert result["flops_per_token"] - result["flops_per_token_causal"] == 6 * 8 * 8
    assert list(tmp_path.iterdir()) == []


def test_mfu_is_relative_to_the_peak_of_all_devices(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "CHIPS", (hardware.Chip("cpu", 1e12, 1e9, 1e9, 1e9),))
    assert main(["bench", *SIZES.split(), *MESH.split(), "--training.batch-size=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("", "_causal"):
        flops_per_second = result[f"flops_per_token{name}"] * result["tokens_per_second"]
        assert result[f"mfu{name}"] == pytest.approx(flops_per_second / 8e12)


def test_bench_prints_a_line_per_number(monkeypatch, capsys):
    seen = {"device": "cpu", "tokens_per_second": 1234.5, "mfu": "unknown"}
    monkeypatch.setattr(speed, "measure_speed", lambda config: seen)
    assert main(["bench", *SIZES.split()]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["device", "cpu"],
        ["tokens_per_second", "1,234.5"],
        ["mfu", "unknown"],
    ]
