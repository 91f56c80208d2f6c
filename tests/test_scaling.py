"""The benchmark of how cost grows: its exponents, and a tiny series from end to end."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling")


@pytest.mark.parametrize("power", [-0.5, 0, 1.7])
def test_the_exponent_of_a_power_is_the_power(benchmark, power):
    sizes = np.array([2, 3, 5, 11, 31])
    assert benchmark.exponent(sizes, 7 * sizes**power) == pytest.approx(power, abs=1e-9)
    assert benchmark.exponent(sizes[::-1], 7 * sizes[::-1] ** power) == pytest.approx(power, abs=1e-9)


def test_the_exponent_is_that_of_the_larger_half(benchmark):
    """A fixed cost per call hides the growth at small sizes."""
    assert benchmark.exponent([1, 2, 3, 10, 20, 40], [1, 1, 1, 100, 400, 1600]) == pytest.approx(2)
    assert benchmark.exponent([1, 10], [1, 10]) == pytest.approx(1)
    noisy = benchmark.exponent([1, 1, 10, 100, 1000], [9, 9, 10 * 1.1, 100 / 1.1, 1000 * 1.1])
    assert noisy == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("sizes", "costs"), [([], []), ([3], [5]), ([1, 2], [0, 3])])
def test_no_exponent_without_two_positive_costs(benchmark, sizes, costs):
    assert math.isnan(benchmark.exponent(sizes, costs))


def test_a_tiny_series_from_end_to_end(benchmark, monkeypatch, tmp_path, capsys):
    """In this process, to save starting Python for each point; one of them fails."""

    def start(name, size, rounds, folder):
        if size == 3:
            return {"size": size, "failed": "exit code 1: MemoryError"}
        return {"size": size, **benchmark.SERIES[name].measure(size, rounds, folder)}

    tiny = benchmark.dataclasses.replace(benchmark.SERIES["text_char"], quick_sizes=(3, 20_000, 40_000))
    monkeypatch.setitem(benchmark.SERIES, "text_char", tiny)
    monkeypatch.setattr(benchmark, "start_point", start)
    table, picture = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--quick", "--rounds", "1", "--json", str(table), "--plot", str(picture)]
    benchmark.main(["--only", "text_char", *options])
    result = json.loads(table.read_text())
    failed, *points = result["points"]["text_char"]
    assert failed["failed"].endswith("MemoryError")
    assert [point["size"] for point in points] == [20_000, 40_000]
    assert all(point["seconds"] > 0 and point["work"]["seconds"] == point["size"] for point in points)
    assert result["exponents"]["text_char"]["seconds"]["work"] == pytest.approx(1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for words in (result["processor"], "MemoryError", "| preparing a text, char over bytes |"):
        assert words in output
