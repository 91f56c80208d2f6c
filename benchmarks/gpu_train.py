"""Compares a training step on a GPU with PyTorch's: the same shapes, in turn, in bfloat16.

    pip install -e ".[cuda13]" torch && python benchmarks/gpu_train.py [--shape S] [--rounds N] [--json FILE]
        [--batch-size N] [--model.FIELD VALUE] [--training.FIELD VALUE]

Two shapes, both with a tied head and without dropout:

* 124M, configs/gpt2_124m.toml: 12 layers, 768 wide, 12 heads, vocabulary 50,304; LayerNorm, GELU (tanh), learned
  positions, biases; 32 sequences of 1,024 tokens, as many as that config computes at a time.
* 1B, as Llama 3.2 1B: 16 layers, 2,048 wide, 32 heads of 64 and 8 of keys and values, feed-forward 8,192, vocabulary
  128,256; RMSNorm, SwiGLU, rotary positions; 8 sequences of 2,048 tokens.

A step is forward, backward, clipping to norm 1 and AdamW. Params, gradients and both moments are float32; products are
bfloat16; norms, softmax and loss are float32. PyTorch's model, in torch_decoder.py, is written for speed: torch.compile
around model and loss, query, key and value in one product, gate and up in another, fused attention (two kinds) and
fused AdamW; its logits are rounded to bfloat16, ours are not. First both take a few steps on the CPU, in float32, at a
tiny size and from the same weights; if their losses differ, nothing is measured.

Each turn is a separate process, so that a contestant has all of the GPU's memory, and only its own libraries. It takes
many steps in a row, and copies their batches to the GPU, as train.py does. A round has a turn of each; the result is
the ratio of the medians over all rounds, the fastest PyTorch over ours. MFU is relative to the dense bfloat16 peak,
with attention counted in full and, in brackets, halved.

`--tiny` runs tiny shapes on the CPU, as a test; its times mean nothing. Any field of the model or the training can be
set: `--model.scan-layers true`, `--model.remat dots`, `--training.loss-chunk-tokens 8192`. Flags worth trying, one at a
time, in the environment variable XLA_FLAGS:

    --xla_gpu_enable_cudnn_layer_norm=true          124M: 2 ms per step less memory traffic, as compiled for an H100
    --xla_gpu_enable_triton_gemm=false              cuBLAS for all products
    --xla_gpu_exhaustive_tiling_search=true         tries more tile shapes; compiles for minutes
    --xla_gpu_cudnn_gemm_fusion_level=2             lets cuDNN compete for products with fusions
    --xla_gpu_enable_latency_hiding_scheduler=true  for more than one GPU
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import Config
from flax_decoder.config_file import load_config
from flax_decoder.errors import UserError

STEPS_PER_CALL, WARM_UP_CALLS, TIMED_CALLS = 10, 2, 5
TINY_STEPS_PER_CALL = 2
OURS = "flax_decoder"
# Contestants, and the backend of PyTorch's attention. On CPU only the first PyTorch runs: cuDNN needs a GPU.
CONTESTANTS = {
    OURS: "",
    "PyTorch, flash attention": "FLASH_ATTENTION",
    "PyTorch, cuDNN attention": "CUDNN_ATTENTION",
}
# The first is a config of its own, which the others change.
CONFIGS = {"124M": Path(__file__).parent.parent / "configs" / "gpt2_124m.toml", "1B": None}
SHAPES: dict[str, dict[str, Any]] = {
    # The rows that the config computes at a time.
    "124M": {"training.batch_size": 32, "training.rows_per_device": None},
    "1B": {
        "model.vocab_size": 128256,
        "model.context_length": 2048,
        "model.num_layers": 16,
        "model.embed_dim": 2048,
        "model.num_heads": 32,
        "model.num_kv_heads": 8,
        "model.mlp_dim": 8192,
        "model.positions": "rotary",
        "model.rotary_base": 500_000.0,
        "model.norm": "rmsnorm",
        "model.feed_forward": "swiglu",
        "training.batch_size": 8,
        "training.loss_chunk_tokens": 0,
    },
}
TINY_GPT2 = {
    "model.vocab_size": 131,
    "model.context_length": 32,
    "model.num_layers": 2,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "training.batch_size": 8,
}
TINY = {"124M": TINY_GPT2, "1B": TINY_GPT2 | {"model.num_kv_heads": 2, "model.mlp_dim": 96}}
# Of the check that both take the same steps from the same weights: losses differ only by float32 rounding.
CHECKED_STEPS, TOLERANCE = 3, 1e-5
Call = Callable[[], list[float]]


def config_of(shape: str, changes: dict[str, Any], tiny: bool = False) -> Config:
    """The config of a shape, or of a tiny one of the same kind, with changes by dotted name."""
    settings = {"model.dtype": "bfloat16", "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    settings |= SHAPES[shape] | changes | (TINY[shape] if tiny else {})
    return load_config(CONFIGS[shape], settings)


def our_call(config: Config, batches: np.ndarray) -> Call:
    """A function that takes our step on each batch, on one device, and returns the losses."""
    import jax

    from flax_decoder.nn.decoder import Decoder
    from flax_decoder.parallel.mesh import make_mesh, use_mesh
    from flax_decoder.training.step import init_state, jit_step

    mesh = make_mesh(config, jax.devices()[:1])
    state = init_state(Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)
    take_step = jit_step(state, mesh)

    def call() -> list[float]:
        nonlocal state
        losses = []
        with use_mesh(mesh):
            for tokens in batches:
                state, metrics = take_step(state, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
                losses.append(metrics["loss"])  # not waited for until the end, as on the other side
        return [float(loss) for loss in losses]

    return call


def random_batches(config: Config, num_steps: int) -> np.ndarray:
    """Tokens (steps, B, T + 1)."""
    shape = (num_steps, config.training.batch_size, config.model.context_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


def check_losses(shape: str, changes: dict[str, Any]) -> None:
    """Exits if the losses of both over the first steps differ, at a tiny size, in float32, from the same weights."""
    import jax
    import torch_decoder

    import flax_decoder as fd

    config = config_of(shape, changes | {"model.dtype": "float32", "model.attention": "auto"}, tiny=True)
    theirs = torch_decoder.Decoder(config.model)
    # The same random key as in `our_call`.
    torch_decoder.copy_params(fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0)).params, theirs)
    batches = random_batches(config, CHECKED_STEPS)
    their_losses = torch_decoder.steps_of(config, theirs, batches, "MATH", compiled=False)()
    our_losses = our_call(config, batches)()
    if not np.allclose(our_losses, their_losses, rtol=TOLERANCE, atol=0):
        sys.exit(f"{shape}: the losses of the same steps differ: {our_losses}, PyTorch {their_losses}")


def turn(name: str, config: Config, tiny: bool, compiled: bool) -> dict[str, Any]:
    """One contestant: seconds per step in each call, and the peak memory."""
    batches = random_batches(config, TINY_STEPS_PER_CALL if tiny else STEPS_PER_CALL)
    if name == OURS:
        import jax

        device = jax.devices()[0]
        if not tiny and device.platform != "gpu":
            sys.exit('JAX sees no GPU: pip install -e ".[cuda13]", or ".[cuda12]"')
        call, device_kind = our_call(config, batches), device.device_kind
    else:
        import torch
        import torch_decoder

        if tiny:
            torch.set_num_threads(1)  # more threads cost more than they compute
        model = torch_decoder.Decoder(config.model).to("cpu" if tiny else "cuda")
        call = torch_decoder.steps_of(config, model, batches, CONTESTANTS[name], compiled)
        device_kind = "cpu" if tiny else torch.cuda.get_device_name()
    seconds = []
    for _ in range(WARM_UP_CALLS + TIMED_CALLS):
        start = time.perf_counter()
        losses = call()
        seconds.append((time.perf_counter() - start) / len(batches))
    if not np.isfinite(losses).all():
        sys.exit(f"{name}: the loss is {losses[-1]}")
    if tiny:
        peak_bytes = None
    elif name == OURS:
        peak_bytes = device.memory_stats()["peak_bytes_in_use"]
    else:
        peak_bytes = torch.cuda.max_memory_allocated()
    return {"device": device_kind, "seconds": seconds[WARM_UP_CALLS:], "peak_bytes": peak_bytes}


def start(arguments: list[str], folder: str, *, platform: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a turn or the check in its own process; JAX uses one platform, or all if None."""
    environment = os.environ | {
        # All rounds share the programs compiled in the first.
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"),
    }
    if platform is not None:
        environment["JAX_PLATFORMS"] = platform
    return subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)


def last_line(text: str) -> str:
    """The last line of the output of a process."""
    return (text.strip().splitlines() or ["no output"])[-1]


def measure(shape: str, arguments: list[str], num_rounds: int, tiny: bool) -> dict[str, list[dict[str, Any]]]:
    """The turns of each contestant; a PyTorch that does not run here is left out."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in list(CONTESTANTS)[: 2 if tiny else None]}
    with tempfile.TemporaryDirectory() as folder:
        checked = start([*arguments, "--turn", "check"], folder, platform="cpu")
        if checked.returncode != 0:
            sys.exit(last_line(checked.stderr))
        for _ in range(num_rounds):
            for name in list(turns):
                platform = None if name == OURS and not tiny else "cpu"
                done = start([*arguments, "--turn", name], folder, platform=platform)
                if done.returncode == 0:
                    turns[name].append(json.loads(last_line(done.stdout)))
                    continue
                reason = f"{shape}: {name}: {last_line(done.stderr)}"
                if name == OURS or len(turns) == 2:
                    sys.exit(reason)
                print(f"{reason}; left out", file=sys.stderr)
                del turns[name]
    return turns


def summary(config: Config, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, derived numbers, and the ratio."""
    import jax

    from flax_decoder.nn.decoder import Decoder
    from flax_decoder.nn.params import abstract_params
    from flax_decoder.training.flops import utilization

    jax.config.update("jax_platforms", "cpu")  # the GPU's memory is for the contestants
    tokens_per_step = config.training.batch_size * config.model.context_length
    device = turns[OURS][0]["device"]
    contestants = {}
    for name, results in turns.items():
        seconds = statistics.median(value for one in results for value in one["seconds"])
        tokens_per_second = tokens_per_step / seconds
        contestants[name] = {
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            **utilization(config.model, tokens_per_second, device, num_devices=1),
            "turns": results,
        }
    fastest = min(result["step_seconds"] for name, result in contestants.items() if name != OURS)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Decoder(config.model))))
    ratio = fastest / contestants[OURS]["step_seconds"]
    return {"device": device, "parameters": num_params, "contestants": contestants, "ratio": ratio}


def print_table(shape: str, config: Config, result: dict[str, Any], num_rounds: int) -> None:
    """Prints a table."""
    batch_size, context_length = config.training.batch_size, config.model.context_length
    print(
        f"{shape}: {result['parameters']:,} parameters, {batch_size} x {context_length:,} tokens per step, on one "
        f"{result['device']}; medians of {num_rounds * TIMED_CALLS} calls of several steps"
    )
    for name, measured in result["contestants"].items():
        mfu = "unknown" if measured["mfu"] == "unknown" else f"{measured['mfu']:.1%} ({measured['mfu_causal']:.1%})"
        held = measured["turns"][0]["peak_bytes"]
        memory = "" if held is None else f"  {held / 2**30:5.1f} GiB"
        speed = f"{1000 * measured['step_seconds']:8.1f} ms  {measured['tokens_per_second']:11,.0f} tokens/s"
        print(f"  {name:<26}{speed}  MFU {mfu}{memory}")
    print(f"  fastest PyTorch over ours: {result['ratio']:.3f}")


def changes_of(arguments: list[str]) -> dict[str, str]:
    """The values of --section.field VALUE and --section.field=VALUE, by dotted name."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or any(not name.startswith("--") or "." not in name for name in names):
        raise UserError(f"cannot read {' '.join(arguments)}: fields are given as --model.scan-layers true")
    names = [name.removeprefix("--").replace("-", "_") for name in names]
    return dict(zip(names, values, strict=True))


def main(arguments: list[str]) -> int:
    """Measures each shape and prints a table; returns 2 if there is no GPU or an argument is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", metavar="N", help="sequences per step")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--turn", metavar="NAME", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if not options.tiny and options.turn is None:
        import torch  # here, so that our turn does not load it

        if not torch.cuda.is_available():
            print("there is no GPU that PyTorch can use; --tiny runs tiny shapes on the CPU", file=sys.stderr)
            return 2
    shapes = options.shape or list(SHAPES)
    try:
        changes = changes_of(rest) | ({"training.batch_size": options.batch_size} if options.batch_size else {})
        configs = {shape: config_of(shape, changes, options.tiny) for shape in shapes}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.turn == "check":
        check_losses(shapes[0], changes)
        return 0
    if options.turn is not None:
        print(json.dumps(turn(options.turn, configs[shapes[0]], options.tiny, not options.eager)))
        return 0
    results = {}
    for shape, config in configs.items():
        passed_on = [f"--{name}={value}" for name, value in changes.items()]
        passed_on += [f"--{flag}" for flag in ("tiny", "eager") if vars(options)[flag]]
        turns = measure(shape, ["--shape", shape, *passed_on], options.rounds, options.tiny)
        results[shape] = summary(config, turns)
        print_table(shape, config, results[shape], options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
