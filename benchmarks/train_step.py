"""A training step beside PyTorch's: the same shapes, in turn, in one process.

    pip install -e ".[torch]" && python benchmarks/train_step.py [--rounds N] [--shape S] [--json FILE]

Four PyTorch models take part: Hugging Face's GPT2LMHeadModel and a plain one with fused attention, each eager and under
torch.compile. All have GELU (erf), LayerNorm, learned positions, a tied head, no dropout; a step is forward, backward,
clipping to norm 1 and AdamW, in float32 on two threads. Each round takes every contestant once, so that a machine that
slows down slows all of them; the result is the ratio of medians, the fastest PyTorch over ours.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

NUM_THREADS = 2
# Before JAX starts: its thread pool has a thread for each core it may use.
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import flax_decoder as fd  # noqa: E402
from flax_decoder.training.step import train_steps  # noqa: E402

VOCAB_SIZE = 65
# layers, width, heads, context, batch; and how many steps train.py takes in one call at that size
SHAPES = {"4/128/64/12": ((4, 128, 4, 64, 12), 10), "6/384/256/8": ((6, 384, 6, 256, 8), 4)}
Step = Callable[[], None]
OURS = "flax_decoder, as train.py steps"


class PlainBlock(torch.nn.Module):
    """A pre-norm block with PyTorch's fused attention, without biases."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = torch.nn.LayerNorm(width, bias=False)
        self.norm2 = torch.nn.LayerNorm(width, bias=False)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, 4 * width, bias=False)
        self.down = torch.nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        B, T, D = x.shape
        heads = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainModel(torch.nn.Module):
    """A decoder as small in code as PyTorch allows."""

    def __init__(self, num_layers: int, width: int, num_heads: int, context: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, width)
        self.positions = torch.nn.Embedding(context, width)
        self.blocks = torch.nn.ModuleList(PlainBlock(width, num_heads) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(width, bias=False)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens (B, T) to logits (B, T, V)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def torch_step(model: torch.nn.Module, inputs: np.ndarray, targets: np.ndarray, compiled: bool) -> Step:
    """A PyTorch training step, with its fused AdamW."""
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, wanted = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()

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


def our_step(shape: tuple[int, ...], inputs: np.ndarray, targets: np.ndarray, steps_a_call: int) -> Step:
    """This package's training step: compiled alone, or as train.py does it, several in one call."""
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
    if steps_a_call == 1:
        take_step = jax.jit(fd.train_step, donate_argnums=0)
        arguments: tuple[Any, ...] = ({"inputs": inputs, "targets": targets},)
    else:
        take_step = jax.jit(train_steps, donate_argnums=0)
        repeated = {"inputs": np.stack([inputs] * steps_a_call), "targets": np.stack([targets] * steps_a_call)}
        arguments = (repeated, steps_a_call)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(take_step(state, *arguments))

    return step


def contestants(shape: tuple[int, ...], steps_a_call: int) -> dict[str, Step]:
    """A step of each, on the same batch; the first takes several steps at once."""
    num_layers, width, num_heads, context, batch_size = shape
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (batch_size, context + 1), np.int32)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    gpt2 = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=context,
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    steps = {
        OURS: our_step(shape, inputs, targets, steps_a_call),
        "flax_decoder, a call a step": our_step(shape, inputs, targets, 1),
    }
    for compiled in (False, True):
        mode = "torch.compile" if compiled else "eager"
        plain = PlainModel(num_layers, width, num_heads, context)
        steps[f"PyTorch, fused attention, {mode}"] = torch_step(plain, inputs, targets, compiled)
        steps[f"PyTorch, GPT2LMHeadModel, {mode}"] = torch_step(GPT2LMHeadModel(gpt2), inputs, targets, compiled)
    return steps


def measure(steps: dict[str, Step], steps_a_call: int, num_rounds: int) -> dict[str, float]:
    """Median seconds a step of each, over rounds that take all of them in turn."""
    for step in steps.values():
        for _ in range(3):  # compiles, and settles the memory
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            # All take as many steps in a row, so that none profits from what the one before left in the caches.
            num_calls = 1 if name == OURS else steps_a_call
            start = time.perf_counter()
            for _ in range(num_calls):
                step()
            seconds[name].append((time.perf_counter() - start) / steps_a_call)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints a table for each shape, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    results = {}
    for name in options.shape or SHAPES:
        shape, steps_a_call = SHAPES[name]
        medians = measure(contestants(shape, steps_a_call), steps_a_call, options.rounds)
        fastest = min(value for contestant, value in medians.items() if contestant.startswith("PyTorch"))
        results[name] = {"seconds": medians, "ratio": fastest / medians[OURS]}
        print(f"layers/width/context/batch {name}, median of {options.rounds}")
        for contestant, value in medians.items():
            print(f"  {contestant:<42} {1000 * value:9.1f} ms")
        print(f"  fastest PyTorch over ours: {results[name]['ratio']:.3f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
