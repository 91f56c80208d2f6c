"""A training step beside PyTorch's: the same shapes, each in a process of its own, in turn.

    pip install -e ".[torch]" && python benchmarks/train_step.py [--rounds N] [--shape S] [--json FILE]

Ours is the plain step that a user writes, `jax.jit(fd.train_step, donate_argnums=0)`; `train.py` takes the same one.
Four PyTorch models take part: Hugging Face's GPT2LMHeadModel and a plain one with fused attention, each eager and under
torch.compile. All have GELU (erf), LayerNorm, learned positions, a tied head, no dropout; a step is forward, backward,
clipping to norm 1 and AdamW, in float32 on two threads.

Each has a process of its own, as what one library does to the C library's memory would change the other's time. Each
round takes every contestant once, while the others sleep, so that a machine that slows down slows all of them. The
median over all steps leaves out the first of a turn, which finds caches empty and threads asleep; the result is the
ratio of medians, the fastest PyTorch over ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from process_memory import mib_level

from flax_decoder.training.hardware import describe_cpu

NUM_THREADS = 2
VOCAB_SIZE = 65
# layers, width, heads, context, batch; and how many steps a turn takes
SHAPES = {"4/128/64/12": ((4, 128, 4, 64, 12), 10), "6/384/256/8": ((6, 384, 6, 256, 8), 4)}
OURS = "flax_decoder, jax.jit(fd.train_step)"
MODELS = ("fused attention", "GPT2LMHeadModel")
THEIRS = [f"PyTorch, {model}, {mode}" for model in MODELS for mode in ("eager", "torch.compile")]
WARM_UP_STEPS = 10
REST_SECONDS = 0.3  # in which the threads of whoever was last fall asleep
Step = Callable[[], None]


def random_tokens(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32 (B, T)."""
    *_, context, batch_size = shape
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (batch_size, context + 1), np.int32)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def our_step(shape: tuple[int, ...]) -> Step:
    """This package's training step."""
    import jax

    import flax_decoder as fd

    num_layers, width, num_heads, context, batch_size = shape
    config = fd.load_config(
        None,
        {
            "model.vocab_size": VOCAB_SIZE,
            "model.num_layers": num_layers,
            "model.embed_dim": width,
            "model.num_heads": num_heads,
            "model.context_length": context,
            "training.batch_size": batch_size,
        },
    )
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    take_step: Any = jax.jit(fd.train_step, donate_argnums=0)
    inputs, targets = random_tokens(shape)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(take_step(state, {"inputs": inputs, "targets": targets}))

    return step


def their_step(name: str, shape: tuple[int, ...]) -> Step:
    """A PyTorch training step, with its fused AdamW."""
    import torch
    from torch.nn import functional as F  # noqa: N812
    from torch_gpt2 import make_model

    torch.set_num_threads(NUM_THREADS)
    _, model_name, mode = name.split(", ")
    model = make_model(model_name, VOCAB_SIZE, shape)
    model.train()
    forward = torch.compile(model) if mode == "torch.compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, wanted = (torch.from_numpy(array).long() for array in random_tokens(shape))

    def step() -> None:
        output = forward(tokens)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def take_turns(name: str, shape_name: str) -> None:
    """The process of a contestant: for each line of standard input it takes some steps and prints their seconds."""
    shape, num_steps = SHAPES[shape_name]
    step = our_step(shape) if name == OURS else their_step(name, shape)
    for _ in range(WARM_UP_STEPS):  # compiles, and settles the memory
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float | None:
    """The most memory that this process has had, where the system says it."""
    try:
        return mib_level("VmHWM")
    except OSError:
        return None


class Contestant:
    """A contestant's process, asleep between its turns."""

    def __init__(self, name: str, shape_name: str):
        arguments = [sys.executable, __file__, "--contestant", name, "--shape", shape_name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen(arguments, **pipes)  # type: ignore[call-overload]
        self.answer("ready")

    def answer(self, expected: str = "") -> str:
        """The next line the process prints, which may also print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(expected or "{"):
                return line
        raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")

    def turn(self) -> dict[str, Any]:
        """The seconds of each step, and the peak of memory so far."""
        time.sleep(REST_SECONDS)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.answer())
        return result

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(shape_name: str, num_rounds: int) -> dict[str, dict[str, Any]]:
    """The median seconds per step and the peak memory of each contestant."""
    contestants = {name: Contestant(name, shape_name) for name in (OURS, *THEIRS)}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, contestant in contestants.items():
            turns[name].append(contestant.turn())
    for contestant in contestants.values():
        contestant.end()
    return {
        name: {
            "seconds": statistics.median(seconds for turn in results for seconds in turn["seconds"]),
            "peak_mib": results[-1]["peak_mib"],
        }
        for name, results in turns.items()
    }


def main() -> None:
    """Prints a table for each shape, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--contestant", choices=(OURS, *THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Before a library starts its threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    if options.contestant:
        take_turns(options.contestant, options.shape[0])
        return
    print(describe_cpu())
    results = {}
    for name in options.shape or SHAPES:
        contestants = measure(name, options.rounds)
        seconds = {contestant: result["seconds"] for contestant, result in contestants.items()}
        ratio = min(seconds[contestant] for contestant in THEIRS) / seconds[OURS]
        results[name] = {"contestants": contestants, "ratio": ratio}
        print(f"layers/width/context/batch {name}, median of {options.rounds}")
        for contestant, result in contestants.items():
            memory = "" if result["peak_mib"] is None else f"{result['peak_mib']:7,.0f} MiB"
            print(f"  {contestant:<42} {1000 * result['seconds']:9.1f} ms  {memory}")
        print(f"  fastest PyTorch over ours: {ratio:.3f}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"processor": describe_cpu(), "shapes": results}, file, indent=2)


if __name__ == "__main__":
    main()
