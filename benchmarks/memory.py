"""Memory saved by the memory settings, and their cost in time: the tables of docs/memory.md.

    python benchmarks/memory.py [--json FILE]

Memory is what the compiler allocates for one training step beside the state and the batch; the step is compiled but
not run, so shapes may be large. Time is the median over steps of a smaller shape. On CPU it is processor time of all
cores, which does not depend on other work of the machine.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
from measuring import random_batch

import flax_decoder as fd

MIB = 2**20
ROUNDS = 5
LARGE_VOCABULARY = {
    "model.vocab_size": 128_256,
    "model.context_length": 1024,
    "model.num_layers": 2,
    "model.embed_dim": 256,
    # So that little else takes memory.
    "model.scan_layers": True,
    "model.remat": "full",
    "training.batch_size": 8,
}
# GPT-2 small with a small vocabulary; attention stores all scores, as on a GPU without a fused kernel.
DEEP = {
    "model.vocab_size": 256,
    "model.context_length": 1024,
    "model.num_layers": 12,
    "model.embed_dim": 768,
    "model.num_heads": 12,
    "model.scan_layers": True,
    "model.attention": "reference",
    "model.dtype": "bfloat16",
    "training.batch_size": 8,
}
TIMED = {
    "model.context_length": 256,
    "model.num_layers": 4,
    "model.embed_dim": 256,
    "model.num_heads": 4,
    "training.batch_size": 4,
}
CHUNKS = (0, None, 1024, 512, 256)
POLICIES = ("none", "attention", "dots", "full")


def main() -> None:
    """Prints three tables, and writes them to a file with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the numbers to a file")
    options = parser.parse_args()
    chunk = "training.loss_chunk_tokens"
    figures = {
        "loss_chunk_tokens, 128,256 tokens, 8 x 1024": {
            str(tokens): {
                "MiB": temporaries(LARGE_VOCABULARY | {chunk: tokens}) / MIB,
                "seconds": step_seconds(TIMED | {"model.vocab_size": 32_000, chunk: tokens}),
            }
            for tokens in CHUNKS
        },
        "remat, 12 x 768, 8 x 1024": {
            policy: {
                "MiB": temporaries(DEEP | {"model.remat": policy}) / MIB,
                "seconds": step_seconds(TIMED | {"model.vocab_size": 256, "model.remat": policy}),
            }
            for policy in POLICIES
        },
        "moments_dtype": {
            dtype: {
                "MiB": moments_bytes(DEEP | {"optimizer.moments_dtype": dtype}) / MIB,
                "seconds": step_seconds(TIMED | {"model.vocab_size": 256, "optimizer.moments_dtype": dtype}),
            }
            for dtype in ("float32", "bfloat16")
        },
    }
    for title, rows in figures.items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"{name:>10}  {row['MiB']:10,.0f} MiB  {row['seconds']:7.3f} s per step")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


def make(settings: dict[str, Any]) -> tuple[Any, Any]:
    """A function that makes the state, and a random batch."""
    config = fd.load_config(None, {name: value for name, value in settings.items() if value is not None})
    return lambda: fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0)), random_batch(config)


def temporaries(settings: dict[str, Any]) -> int:
    """Bytes that a step allocates beside its inputs and outputs."""
    make_state, batch = make(settings)
    step = jax.jit(fd.train_step, donate_argnums=0).lower(jax.eval_shape(make_state), batch)
    analysis = step.compile().memory_analysis()
    assert analysis is not None, "this backend has no memory analysis"
    return analysis.temp_size_in_bytes


def moments_bytes(settings: dict[str, Any]) -> int:
    """Bytes of the optimizer state."""
    state = jax.eval_shape(make(settings)[0])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))


def step_seconds(settings: dict[str, Any]) -> float:
    """Median time of a step, without the first one, which compiles."""
    make_state, batch = make(settings)
    state, take_step, seconds = make_state(), jax.jit(fd.train_step, donate_argnums=0), []
    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for _ in range(1 + ROUNDS):
        start = now()
        state, _ = jax.block_until_ready(take_step(state, batch))
        seconds.append(now() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
