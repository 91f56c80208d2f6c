"""How long a user waits: for --help, for the first step, and for many layers to compile.

    python benchmarks/start.py [--rounds N]

Each is a separate process: `python train.py --help`; the default run up to its first step, with a cold and with a warm
compilation cache. Then, in this process, compiling a training step with 2 and with 48 scanned layers.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import flax_decoder as fd

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")


def seconds_of(command: list[str], cache: str) -> float:
    """Seconds of a process in a new folder, with the given compilation cache."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def seconds_to_first_step(cache: str) -> float:
    """From the start of `python train.py` to the end of its first step, when the log has a line."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "runs" / "default" / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, TRAIN, "--training.log-every", "1"], cwd=folder, env=environment, stdout=subprocess.DEVNULL
        )
        while not (log.exists() and log.stat().st_size > 0):
            if process.poll() is not None:
                raise RuntimeError(f"train.py ended with {process.returncode} before its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds


def compile_seconds(num_layers: int) -> float:
    """Seconds to trace and compile a training step of the default width with scanned layers, without a cache."""
    config = fd.load_config(None, {"model.vocab_size": 65, "model.num_layers": num_layers, "model.scan_layers": True})
    model = fd.Decoder(config.model)
    state = jax.eval_shape(lambda rng: fd.init_state(model, config, rng=rng), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((config.training.batch_size, config.model.context_length), np.int32)
    start = time.perf_counter()
    jax.jit(fd.train_step).lower(state, {"inputs": tokens, "targets": tokens}).compile()
    return time.perf_counter() - start


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    num_rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        seconds_to_first_step(warm)
        measurements: dict[str, Callable[[], float]] = {
            "python train.py --help": lambda: seconds_of([TRAIN, "--help"], warm),
            "first step, cold cache": lambda: seconds_to_first_step(tempfile.mkdtemp(dir=folder)),
            "first step, warm cache": lambda: seconds_to_first_step(warm),
            "2 layers": lambda: compile_seconds(2),
            "48 layers": lambda: compile_seconds(48),
        }
        rounds = [{name: measure() for name, measure in measurements.items()} for _ in range(num_rounds)]
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in measurements}
    for name, value in medians.items():
        print(f"{name:<24} {value:6.2f} s")
    print(f"compiling 48 scanned layers over compiling 2: {medians['48 layers'] / medians['2 layers']:.2f}")


if __name__ == "__main__":
    main()
