"""The first ten minutes on a GPU, on the CPU: its parts run, and one that fails stops no other."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCTS = ("product_bfloat16_default", "product_float32_default", "product_float32_highest")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("first_gpu")


def read(folder):
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.iterdir())}


@pytest.fixture
def started(monkeypatch, benchmark):
    """The parts that were started, with the seconds each may take; instead of running, they end as `acts` says."""
    acts, found = {}, []

    def run(command, environment, limit):
        name = command[command.index("--part") + 1]
        found.append((name, round(limit), environment["XLA_FLAGS"]))
        return acts.get(name, (0, ""))

    monkeypatch.setenv("XLA_FLAGS", "--given")
    monkeypatch.setattr(benchmark, "run_command", run)
    return acts, found


def test_a_part_that_fails_or_hangs_stops_no_other(benchmark, started, tmp_path, capsys):
    acts, found = started

    acts["correctness"] = 1, "No kernel"
    acts["step"] = 1, "still ran after 225 s"
    assert benchmark.main(["--out", str(tmp_path / "out"), "--seconds", "5000"]) == 1
    assert [name for name, *_ in found] == list(benchmark.PARTS)
    assert found[2] == ("step", benchmark.PATIENCE * benchmark.PARTS["step"].seconds, "--given")
    assert found[-1][2] == "--given --xla_gpu_enable_command_buffer="
    assert read(tmp_path / "out") == {
        "correctness": {"failed": "No kernel"},
        "step": {"failed": "still ran after 225 s"},
    }
    assert "step: failed still ran after 225 s" in capsys.readouterr().out


def test_what_a_command_has_started_ends_with_it(benchmark):
    sleep = "import subprocess, sys; print('x', file=sys.stderr); subprocess.run(['sleep', '1000'])"
    assert benchmark.run_command([sys.executable, "-c", sleep], {}, 0.5) == (1, "still ran after 0 s")
    fail = "import sys; sys.exit('first\\nlast')"
    assert benchmark.run_command([sys.executable, "-c", fail], {}, 60) == (1, "last")


def test_a_part_for_which_no_time_is_left_is_left_out(benchmark, started, tmp_path):
    _, found = started
    assert benchmark.main(["--out", str(tmp_path), "--seconds", "60"]) == 0
    short = [name for name, part in benchmark.PARTS.items() if part.seconds <= 59]
    assert [name for name, *_ in found] == short
    assert read(tmp_path).keys() == benchmark.PARTS.keys() - set(short)
    assert read(tmp_path)["step"] == {"left out": "takes about 90 s, and 60 s are left"}


def test_without_a_gpu_it_ends(benchmark, started, tmp_path):
    acts, found = started
    acts["machine"] = 2, "JAX sees no GPU"
    assert benchmark.main(["--out", str(tmp_path)]) == 2
    assert len(found) == 1


def test_kernels_and_gaps(benchmark):
    ms = 1_000_000
    kernels = [(0, 2 * ms, "add_1"), (1 * ms, 3 * ms, "dot"), (5 * ms, 6 * ms, "add_2"), (6 * ms, 10 * ms, "dot")]
    found = benchmark.summary_of(kernels, num_steps=2)
    assert (found["ms per step"], found["idle ms per step"], found["idle"]) == (5, 1, 0.2)
    assert found["top"] == [
        {"name": "dot", "ms": 3, "count": 1, "part": 0.6},
        {"name": "add", "ms": 1.5, "count": 1, "part": 0.3},
    ]
    assert found["longest gaps (ms, after, before)"] == [(2, "dot", "add_2")]


def test_a_part_that_costs_little(benchmark, tmp_path):
    assert benchmark.main(["--cpu", "--out", str(tmp_path), "--part", "machine"]) == 0
    found = read(tmp_path)
    assert found["machine_versions"]["device"] == "cpu"
    assert found.keys() == {f"machine_{name}" for name in ("versions", "copy", *PRODUCTS)}
    assert not [name for name, result in found.items() if "failed" in result]
    assert benchmark.bias_sums(tiny=True)["right"]


def test_a_measurement_that_fails_stops_no_other(benchmark, tmp_path):
    reporter = benchmark.Reporter(tmp_path, "part", tiny=True)
    reporter.attempt("one", lambda: {"x": 1 / 0})
    reporter.attempt("two", lambda: {"x": 1})
    found = read(tmp_path)
    assert found["part_one"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["part_two"] == {"x": 1}


@pytest.mark.full
def test_all_of_it(benchmark, tmp_path):
    pytest.importorskip("torch")
    parts = [name for name in benchmark.PARTS if not name.startswith("variant_")]
    parts += ["variant_rows_64", "variant_scan", "variant_latency_hiding"]
    command = [sys.executable, ROOT / "benchmarks" / "first_gpu.py", "--cpu", "--seconds", "86400", "--out", tmp_path]
    command += ["--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    assert not [name for name, result in found.items() if "failed" in result or not result.get("right", True)]
    assert len([name for name in found if name.startswith("scatter_")]) == 2 * (3 + 3 + 2)
    assert {"step", "step_profile", "torch_flash", "train", "variant_scan", "correctness_doctor"} <= found.keys()
