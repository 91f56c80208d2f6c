"""Compares a training step with PyTorch's: the same shapes, each in a separate process, in turn.

    pip install -e ".[torch]" && python benchmarks/train_step.py [--rounds N] [--shape S] [--json FILE]

Ours is `jax.jit(fd.train_step, donate_argnums=0)`, the step that users write and that `train.py` takes. Four PyTorch
contestants: Hugging Face's GPT2LMHeadModel and the decoder in torch_decoder.py, each eager and with torch.compile. All
have GELU (erf), LayerNorm, learned positions, a tied head and no dropout; a step is forward, backward, clipping to norm
1 and AdamW, in float32 on two threads.

Each contestant has its own process, because one library's use of the C library's memory would change the other's time.
Each round runs every contestant once while the others sleep, so that a machine that slows down slows all of them. The
result is the ratio of the medians over all steps, the fastest PyTorch over ours.
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

from measuring import mib_level, random_batch

from flax_decoder.config import Config
from flax_decoder.config_file import load_config
from flax_decoder.training.hardware import describe_cpu

NUM_THREADS = 2
# layers, width, heads, context, batch; and the steps of a turn
SHAPES = {"4/128/64/12": ((4, 128, 4, 64, 12), 10), "6/384/256/8": ((6, 384, 6, 256, 8), 4)}
OURS = "flax_decoder, jax.jit(fd.train_step)"
MODELS = ("fused attention", "GPT2LMHeadModel")
THEIRS = [f"PyTorch, {model}, {mode}" for model in MODELS for mode in ("eager", "torch.compile")]
WARM_UP_STEPS = 10
REST_SECONDS = 0.3  # until the threads of the previous contestant sleep
Step = Callable[[], None]


def config_of(shape: tuple[int, ...]) -> Config:
    """The run that a shape stands for."""
    names = ("model.num_layers", "model.embed_dim", "model.num_heads", "model.context_length", "training.batch_size")
    return load_config(None, {"model.vocab_size": 65, **dict(zip(names, shape, strict=True))})


def our_step(config: Config) -> Step:
    """A training step of this package, of adapters if the config has some."""
    import jax

    import flax_decoder as fd

    state = fd.init_state(fd.Decoder(config.model, config.lora.adapter), config, rng=jax.random.key(0))
    take_step: Any = jax.jit(fd.train_step, donate_argnums=0)
    batch = random_batch(config)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(take_step(state, batch))

    return step


def their_step(name: str, config: Config) -> Step:
    """A PyTorch training step, with its fused AdamW."""
    import torch
    from torch.nn import functional as F  # noqa: N812
    from torch_decoder import Decoder

    torch.set_num_threads(NUM_THREADS)
    _, model_name, mode = name.split(", ")
    model = Decoder(config.model) if model_name == "fused attention" else hugging_face_model(config)
    model.train()
    forward = torch.compile(model) if mode == "torch.compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(array).long() for array in random_batch(config).values())

    def step() -> None:
        if model_name == "fused attention":
            loss = forward(tokens, targets)
        else:
            loss = F.cross_entropy(forward(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def hugging_face_model(config: Config) -> Any:
    """Hugging Face's GPT-2 of the same shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = config.model
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.context_length,
            n_embd=model.embed_dim,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def take_turns(name: str, shape_name: str) -> None:
    """The process of a contestant: for each line of standard input, takes some steps and prints their seconds."""
    shape, num_steps = SHAPES[shape_name]
    config = config_of(shape)
    step = our_step(config) if name == OURS else their_step(name, config)
    for _ in range(WARM_UP_STEPS):  # compiles, and allocates memory
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
    """The peak memory of this process; None if unknown."""
    try:
        return mib_level("VmHWM")
    except OSError:
        return None


class Contestant:
    """The process of a contestant, which sleeps between its turns."""

    def __init__(self, *arguments: str):
        """Starts a Python script that answers each line of its standard input, as `take_turns` does."""
        command = [sys.executable, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        self.answer("ready")

    def answer(self, expected: str = "") -> str:
        """The next line of output that is an answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(expected or "{"):
                return line
        raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")

    def turn(self) -> dict[str, Any]:
        """The seconds of each step, and the peak memory so far."""
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
    start = [__file__, "--shape", shape_name, "--contestant"]
    contestants = {name: Contestant(*start, name) for name in (OURS, *THEIRS)}
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
    # Set before a library starts its threads.
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
