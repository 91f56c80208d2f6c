"""A training step of adapters (LoRA) beside 135 million parameters: its memory, and its time beside PEFT's.

    pip install -e ".[torch]" peft && python benchmarks/lora.py [--rounds N] [--context T] [--json FILE]

The model has the shape of SmolLM2-135M (llama: 30 layers, width 576, 9 heads, 3 key/value heads, 49,152 tokens), random
weights, and adapters of rank 16 on all seven matrices of a layer. A step is forward, backward, clipping to norm 1 and
AdamW, in float32. PEFT's attention is PyTorch's fused one.

Time: each library has its own process, and they take steps in turn, on two threads: by the clock, and of the
processor. Run it on a machine that does nothing else: PyTorch's threads take time of the processor while they wait for
each other.

Memory: that of the compiled step, which is not run: its arguments (weights, adapters, moments, batch), and what it
needs beside them at its peak. "Kept" is what the forward pass keeps for the backward pass, weights not counted: the
least that can be needed beside the arguments without computing it twice.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

from measuring import random_batch
from train_step import NUM_THREADS, Contestant, Step, our_step

from flax_decoder.config import Config
from flax_decoder.config_file import load_config
from flax_decoder.training.hardware import describe_cpu

MIB = 2**20
RANK, ALPHA = 16, 32.0
SHAPE = {"vocab_size": 49_152, "num_layers": 30, "embed_dim": 576, "num_heads": 9, "num_kv_heads": 3, "mlp_dim": 1536}
KIND = {"feed_forward": "swiglu", "positions": "rotary", "rotary_base": 1e5, "norm": "rmsnorm"}
NAMES = ("ours", "PEFT")


def config_of(context_length: int) -> Config:
    """The run that is measured."""
    settings = {f"model.{name}": value for name, value in (SHAPE | KIND | {"context_length": context_length}).items()}
    run = {"lora.rank": RANK, "lora.alpha": ALPHA, "training.batch_size": 4}
    return load_config(None, settings | run)


def their_step(config: Config) -> Step:
    """A step of PEFT with a model of transformers."""
    import peft
    import torch
    from torch.nn import functional as F  # noqa: N812
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(NUM_THREADS)
    model = config.model
    shape = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.context_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    settings = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(LlamaForCausalLM(shape), settings).train()
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(array).long() for array in random_batch(config).values())

    def step() -> None:
        loss = F.cross_entropy(adapted(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        loss.item()

    return step


def take_turns(name: str, config: Config) -> None:
    """Runs one library: for each line of standard input, takes a step and prints its seconds."""
    step = our_step(config) if name == "ours" else their_step(config)
    for _ in range(2):  # compiles, and allocates memory
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        step()
        seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
        print(json.dumps(seconds), flush=True)


def times(context_length: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds per step of each library, by the clock and of the processor."""
    start = [__file__, "--context", str(context_length), "--contestant"]
    contestants = {name: Contestant(*start, name) for name in NAMES}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for _ in range(num_rounds):
        for name, contestant in contestants.items():
            turns[name].append(contestant.turn())
    for contestant in contestants.values():
        contestant.end()
    return {
        name: {kind: statistics.median(turn[kind] for turn in of_one) for kind in ("clock", "processor")}
        for name, of_one in turns.items()
    }


def memory(config: Config) -> dict[str, float]:
    """MiB of the compiled step."""
    import jax
    import numpy as np

    import flax_decoder as fd
    from flax_decoder.nn.lora import with_adapters
    from flax_decoder.training.step import loss_sum, state_maker

    def size_of(tree: Any) -> float:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / MIB

    state = jax.eval_shape(state_maker(fd.Decoder(config.model), config), jax.random.key(0))
    batch = random_batch(config)
    jitted: Any = jax.jit(fd.train_step, donate_argnums=0)
    needed = jitted.lower(state, batch).compile().memory_analysis()

    def backward(adapters: Any, frozen: Any) -> Any:
        batch_arrays = {name: jax.numpy.asarray(array) for name, array in batch.items()}

        def loss(adapters: Any) -> Any:
            return loss_sum(with_adapters(frozen, adapters), state.apply_fn, batch_arrays)[0]

        return jax.vjp(loss, adapters)[1]

    shapes = {leaf.shape for leaf in jax.tree.leaves((state.frozen, state.params))}
    kept = jax.tree.leaves(jax.eval_shape(backward, state.params, state.frozen))
    kept = [leaf for leaf in kept if leaf.shape not in shapes and np.prod(leaf.shape) > 0]
    return {
        "weights": size_of(state.frozen),
        "adapters": size_of(state.params),
        "moments": size_of(state.opt_state),
        "arguments": needed.argument_size_in_bytes / MIB,
        "beside them": needed.temp_size_in_bytes / MIB,
        "kept": size_of(kept),
    }


def main() -> None:
    """Prints both tables, and writes them to a file with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each library; 0 measures memory only")
    parser.add_argument("--context", type=int, default=128, help="tokens of a row, of which a batch has four")
    parser.add_argument("--memory-context", type=int, default=512, help="the same, for memory; 0 measures time only")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--contestant", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Set before a library starts its threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    if options.contestant:
        take_turns(options.contestant, config_of(options.context))
        return
    results: dict[str, Any] = {"processor": describe_cpu()}
    print(results["processor"])
    if options.memory_context:
        results["memory, MiB"] = memory(config_of(options.memory_context))
        for name, mib in results["memory, MiB"].items():
            print(f"  {name:<12} {mib:9,.1f} MiB")
    if options.rounds:
        results["seconds"] = times(options.context, options.rounds)
        for name, seconds in results["seconds"].items():
            print(f"  {name:<12} {seconds['clock']:7.2f} s, {seconds['processor']:7.2f} s of the processor")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
