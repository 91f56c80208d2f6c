"""What recording attention costs a run: full runs of a config, alternating between its `lens.every` and 0.

    python benchmarks/lens_history.py [CONFIG.toml] [--pairs N] [--section.field value ...]

Each run is a process with an empty compilation cache, like a user's first run, so compiling counts. Its time and its
processor time (of all threads) are compared within pairs, whose order alternates. First, in this process, the time of a
record alone: the first one, which compiles, and the median of the others.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import flax_decoder as fd
from flax_decoder.lens.watch import Watch
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.step import init_state

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
NUM_RECORDS = 100


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Time and processor time of a run in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, TRAIN, *arguments, "--run.folder", f"{folder}/run"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def record_seconds(path: str | None) -> list[tuple[float, float]]:
    """Time and processor time of each record of a model with a vocabulary of 128."""
    config = fd.load_config(path, {"model.vocab_size": 128, "lens.every": 1, "training.num_steps": NUM_RECORDS})
    mesh = make_mesh(config, jax.devices())
    state = init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)
    tokens_T = np.arange(min(config.lens.prompt_tokens, config.model.context_length), dtype=np.int32)
    taken = []
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh):
        watch = Watch(config, Path(folder), tokens_T, 0, mesh)
        for step in range(NUM_RECORDS):
            start, busy = time.perf_counter(), time.process_time()
            watch.record(step, state.params)
            taken.append((time.perf_counter() - start, time.process_time() - busy))
    return taken


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("--pairs", type=int, default=5)
    options, settings = parser.parse_known_args()
    arguments = ([options.config] if options.config else []) + settings
    first, *others = record_seconds(options.config)
    usual, usual_busy = (1000 * statistics.median(column) for column in zip(*others, strict=True))
    print(f"the first record takes {first[0]:.2f} s ({first[1]:.2f} s of processor time), ", end="")
    print(f"the others {usual:.1f} ms ({usual_busy:.1f})")
    ratios = []
    for pair in range(options.pairs):
        kinds = {"watched": [], "not watched": ["--lens.every", "0"]}
        taken = {kind: seconds_of([*arguments, *kinds[kind]]) for kind in sorted(kinds, reverse=pair % 2 == 1)}
        ratios.append([w / n - 1 for w, n in zip(taken["watched"], taken["not watched"], strict=True)])
        shown = ", ".join(f"{kind} {seconds:.1f} s ({busy:.1f})" for kind, (seconds, busy) in taken.items())
        print(f"{shown}: {100 * ratios[-1][0]:+.1f} % ({100 * ratios[-1][1]:+.1f} %)", flush=True)
    if ratios:
        time_more, busy_more = (100 * statistics.median(column) for column in zip(*ratios, strict=True))
        print(f"median of {options.pairs} pairs: {time_more:+.1f} % of the time, {busy_more:+.1f} % of processor time")


if __name__ == "__main__":
    main()
