import json

import pytest

from flax_decoder.cli import main
from flax_decoder.planning import speed
from flax_decoder.training import hardware

SIZES = "--model.vocab-size=12 --model.context-length=8 --model.num-layers=1 --model.embed-dim=8 --model.num-heads=2"
MESH = "--mesh.fsdp=2 --mesh.context=2 --mesh.tensor=2"


@pytest.mark.short("--mesh.fsdp=2 --mesh.context=2 --mesh.tensor=2-8")
@pytest.mark.parametrize(("mesh", "num_devices"), [("", 2), (MESH, 8)])
def test_bench_tells_all_numbers(monkeypatch, capsys, tmp_path, mesh, num_devices):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *SIZES.split(), *mesh.split(), "--training.batch-size=2", "--json"]) == 0
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
    assert result["num_devices"] == num_devices
    assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
    assert result["mfu"] == result["mfu_causal"] == "unknown"  # the peak of a CPU is in no table
    assert result["flops_per_token"] - result["flops_per_token_causal"] == 6 * 8 * 8
    assert list(tmp_path.iterdir()) == []


def test_bench_is_held_against_the_peak_of_all_devices(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "CHIPS", (hardware.Chip("cpu", 1e12, 1e9, 1e9, 1e9),))
    assert main(["bench", *SIZES.split(), *MESH.split(), "--training.batch-size=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("", "_causal"):
        flops_per_second = result[f"flops_per_token{name}"] * result["tokens_per_second"]
        assert result[f"mfu{name}"] == pytest.approx(flops_per_second / 8e12)


def test_bench_writes_a_line_a_number(monkeypatch, capsys):
    seen = {"device": "cpu", "tokens_per_second": 1234.5, "mfu": "unknown"}
    monkeypatch.setattr(speed, "measure_speed", lambda config: seen)
    assert main(["bench", *SIZES.split()]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["device", "cpu"],
        ["tokens_per_second", "1,234.5"],
        ["mfu", "unknown"],
    ]
