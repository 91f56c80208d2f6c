"""The GPU benchmark, on CPU: both sides compute the same, and it runs from end to end."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flax_decoder.config_file import load_config

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_train")


@pytest.fixture
def torch_decoder(benchmark):
    return importlib.import_module("torch_decoder")


def test_the_124m_shape_is_that_of_the_config_file(benchmark):
    """Of which it computes as many rows as that does at a time."""
    expected = load_config(ROOT / "configs" / "gpt2_124m.toml")
    config = benchmark.config_of("124M", {})
    assert config.model == expected.model
    assert config.training.batch_size == expected.training.rows_per_device
    for rows in ("32", "64"):
        assert benchmark.config_of("124M", {"training.batch_size": rows}).training.num_parts(1) == 1
    assert config.training.loss_chunk_tokens == expected.training.loss_chunk_tokens == 0


@pytest.mark.short("1B")
@pytest.mark.parametrize("shape", ["124M", "1B"])
def test_both_take_the_same_steps(benchmark, shape):
    benchmark.check_losses(shape, {})


@pytest.mark.short("changes0")
@pytest.mark.parametrize("changes", [{"model.window": 9}, {"model.norm_epsilon": 1e-3}])
def test_a_different_step_is_noticed(benchmark, torch_decoder, monkeypatch, changes):
    """PyTorch's model has no windows; in the other case the change is kept from it."""
    if "model.window" not in changes:
        unchanged = benchmark.config_of("1B", {"model.dtype": "float32"}, tiny=True)
        decoder = torch_decoder.Decoder
        monkeypatch.setattr(torch_decoder, "Decoder", lambda _: decoder(unchanged.model))
    with pytest.raises(SystemExit, match="losses of the same steps differ"):
        benchmark.check_losses("1B", changes)


TINY = ["--tiny", "--eager", "--rounds", "1", "--shape", "1B"]


def test_a_tiny_run_from_end_to_end(benchmark, monkeypatch, tmp_path, capsys):
    def start(arguments, folder, *, platform):
        """A turn in this process, to save starting Python."""
        assert platform == "cpu"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = benchmark.main(arguments)
        return subprocess.CompletedProcess(arguments, code, stdout=output.getvalue(), stderr="")

    monkeypatch.setattr(benchmark, "start", start)
    assert benchmark.main([*TINY, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())["1B"]
    ours, theirs = result["contestants"].values()
    assert result["ratio"] == pytest.approx(theirs["step_seconds"] / ours["step_seconds"])
    for contestant in (ours, theirs):
        assert contestant["tokens_per_second"] == pytest.approx(8 * 32 / contestant["step_seconds"])
        assert contestant["mfu"] == contestant["mfu_causal"] == "unknown"
        assert len(contestant["turns"][0]["seconds"]) == benchmark.TIMED_CALLS
    assert f"fastest PyTorch over ours: {result['ratio']:.3f}" in capsys.readouterr().out


def test_a_turn_in_its_own_process(benchmark, tmp_path):
    done = benchmark.start([*TINY, "--turn", "PyTorch, flash attention"], str(tmp_path), platform="cpu")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["seconds"]) == benchmark.TIMED_CALLS


def test_our_turn_does_not_load_pytorch():
    """Both load CUDA libraries of the same name, maybe of two versions; a process keeps the first."""
    program = "import sys, gpu_train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT / "benchmarks").returncode == 0


@pytest.mark.parametrize("failing", [{"PyTorch, cuDNN attention"}, {"flax_decoder"}, {"check"}])
def test_only_one_of_two_pytorch_contestants_may_fail(benchmark, monkeypatch, failing):
    def start(arguments, folder, *, platform):
        name = arguments[-1]
        assert platform == (None if name == "flax_decoder" else "cpu")
        if name in failing:
            return subprocess.CompletedProcess(arguments, 1, stdout="", stderr="Traceback ...\nNo available kernel.\n")
        return subprocess.CompletedProcess(arguments, 0, stdout=f'noise\n{{"seconds": [1], "name": "{name}"}}\n')

    monkeypatch.setattr(benchmark, "start", start)
    if failing & {"flax_decoder", "check"}:
        with pytest.raises(SystemExit, match="No available kernel"):
            benchmark.measure("1B", [], 2, tiny=False)
        return
    turns = benchmark.measure("1B", [], 2, tiny=False)
    assert turns.keys() == benchmark.CONTESTANTS.keys() - failing
    assert all([one["name"] for one in own] == [name] * 2 for name, own in turns.items())


@pytest.mark.parametrize(("device", "mfu"), [("NVIDIA H100 80GB HBM3", True), ("cpu", False)])
def test_the_table(benchmark, capsys, device, mfu):
    config = benchmark.config_of("124M", {})
    turns = {
        "flax_decoder": [{"device": device, "seconds": [0.06, 0.07, 0.5], "peak_bytes": 3 * 2**30}],
        "PyTorch, flash attention": [{"device": device, "seconds": [0.077, 0.07], "peak_bytes": 2**31}] * 2,
    }
    result = benchmark.summary(config, turns)
    assert result["ratio"] == pytest.approx(0.0735 / 0.07)
    benchmark.print_table("124M", config, result, 2)
    ours = capsys.readouterr().out.splitlines()[1]
    assert "70.0 ms" in ours and "468,114 tokens/s" in ours and "3.0 GiB" in ours
    # 32 x 1,024 tokens of 854.7 MFLOP each (test_flops.py) in 70 ms
    assert ("MFU 40.5% (37.8%)" if mfu else "MFU unknown") in ours


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops(benchmark, capsys):
    assert benchmark.main([]) == 2
    assert capsys.readouterr().err == "there is no GPU that PyTorch can use; --tiny runs tiny shapes on the CPU\n"


@pytest.mark.parametrize("arguments", [["--model.num-layer=2"], ["--model.num-layers"], ["--layers", "2"]])
def test_bad_arguments_are_refused(benchmark, capsys, arguments):
    assert benchmark.main(["--tiny", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
