"""Compares tokens per second with PyTorch's: the same weights, prompts and tokens, in turn, in one process.

    pip install -e ".[torch]" && python benchmarks/generate.py [--rounds N] [--shape S] [--table] [--json FILE]
        [--plot FILE]

Greedy, in float32 on two threads, a prompt of 32 tokens and 128 new ones, against `transformers`' generate with its
cache. Each round runs every contestant once, so that a machine that slows down slows all of them; results are medians
and their ratios. Also the bytes of weights that batch 1 reads per second, and those of a matrix-vector product; the
time to the first token of a prompt of 512; the cost of streaming. `--table` measures our tokens per second at batch 1,
8 and 32 with a cache of 256 to 4,096 tokens; `--plot` draws them.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_THREADS = 2
# Set before JAX starts: its thread pool has a thread per available core.
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from measuring import random_model, timed  # noqa: E402

import flax_decoder as fd  # noqa: E402
from flax_decoder.generation.generate import as_prompts  # noqa: E402
from flax_decoder.generation.sampling import Sampling  # noqa: E402
from flax_decoder.generation.steps import DecodeState, decode_chunk, empty_prefill  # noqa: E402
from flax_decoder.generation.stream import stream  # noqa: E402
from flax_decoder.huggingface.families import FAMILIES  # noqa: E402
from flax_decoder.huggingface.folder import write_folder  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT_TOKENS = 32, 128, 512
GPT2 = {
    "model.positions": "learned",
    "model.norm_bias": True,
    "model.attention_in_bias": True,
    "model.attention_out_bias": True,
    "model.mlp_bias": True,
    "model.feed_forward": "gelu_tanh",
}
# vocabulary, layers, width, heads, context
SIZES = {"124M": (50257, 12, 768, 12, 1024), "char": (65, 4, 128, 4, 256)}
BATCHES = {"124M": (1, 8), "char": (1,)}
# PyTorch's threads keep spinning for a while, which must not slow the next contestant.
REST_SECONDS = 0.3
TABLE_BATCHES, TABLE_CONTEXTS, TABLE_TOKENS = (1, 8, 32), (256, 512, 1024, 2048, 4096), 16
Run = Callable[[], Any]


def make_model(shape: str, **changes: Any) -> tuple[fd.Decoder, Any]:
    """A model with random weights, and its params."""
    vocab_size, num_layers, embed_dim, num_heads, context_length = SIZES[shape]
    sizes = {
        "model.vocab_size": vocab_size,
        "model.num_layers": num_layers,
        "model.embed_dim": embed_dim,
        "model.num_heads": num_heads,
        "model.context_length": context_length,
    }
    return random_model(sizes | GPT2 | changes)


def torch_model(model: fd.Decoder, params: Any) -> Any:
    """The same weights in PyTorch, through an exported folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), model.config, params, None, FAMILIES["gpt2"])
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def interleaved(contestants: dict[str, Run], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round to compile and warm up."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, run in contestants.items():
            time.sleep(REST_SECONDS)
            seconds[name].append(timed(run)[0])
    return seconds


def bandwidth_run(params: Any) -> tuple[Run, int]:
    """Matrix-vector products over as many bytes as the weights, in matrices as large as the largest weight."""
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = 3072
    matrices = [jnp.ones((rows, 768)) for _ in range(max(num_bytes // (rows * 768 * 4), 1))]
    product = jax.jit(lambda matrices, x_D: [matrix @ x_D for matrix in matrices])
    x_D = jnp.ones(768)
    return lambda: jax.block_until_ready(product(matrices, x_D)), sum(matrix.nbytes for matrix in matrices)


def compare(shape: str, num_rounds: int) -> dict[str, float]:
    """All measurements of one shape."""
    model, params = make_model(shape)
    theirs, unstacked = torch_model(model, params), fd.unstack_layers(params)
    rng, contestants = np.random.default_rng(0), {}
    for B in BATCHES[shape]:
        prompt_BT = rng.integers(0, model.config.vocab_size, (B, PROMPT_TOKENS)).astype(np.int32)
        contestants |= continuing(model, unstacked, theirs, prompt_BT, NEW_TOKENS, f"batch {B}")
    if model.config.context_length > LONG_PROMPT_TOKENS:
        prompt_BT = rng.integers(0, model.config.vocab_size, (1, LONG_PROMPT_TOKENS)).astype(np.int32)
        contestants |= continuing(model, unstacked, theirs, prompt_BT, 1, "first token")
    contestants["bandwidth"], product_bytes = bandwidth_run(params)
    medians = {name: statistics.median(times) for name, times in interleaved(contestants, num_rounds).items()}

    # Position vectors are looked up, not read in full; the embedding is also the head.
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["positions"].nbytes
    result: dict[str, float] = {}
    for B in BATCHES[shape]:
        ours, other = (medians[f"batch {B}, {name}"] for name in ("flax_decoder", "transformers"))
        result[f"batch {B}: tokens/s"] = B * NEW_TOKENS / ours
        result[f"batch {B}: transformers, tokens/s"] = B * NEW_TOKENS / other
        result[f"batch {B}: ratio"] = other / ours
        result[f"batch {B}: streamed over not streamed"] = medians[f"batch {B}, streamed"] / ours
    result["weights read, GB/s"] = weight_bytes * result["batch 1: tokens/s"] / 1e9
    result["matrix-vector products, GB/s"] = product_bytes / medians["bandwidth"] / 1e9
    result["part of the bandwidth"] = result["weights read, GB/s"] / result["matrix-vector products, GB/s"]
    if "first token, flax_decoder" in medians:
        result["first token of 512, seconds"] = medians["first token, flax_decoder"]
        result["first token of 512, transformers, seconds"] = medians["first token, transformers"]
    return result


def continuing(
    model: fd.Decoder, params: Any, theirs: Any, prompt_BT: np.ndarray, num_tokens: int, name: str
) -> dict[str, Run]:
    """Both libraries, and ours piece by piece, on one prompt. Checks that they write the same text."""
    tokens = torch.tensor(prompt_BT, dtype=torch.int64)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": num_tokens, "do_sample": False}

    def ours() -> np.ndarray:
        return np.asarray(fd.generate(model, params, prompt_BT, num_tokens, temperature=0.0))

    def streamed() -> None:
        prompts = as_prompts(prompt_BT, model.config)
        for written in stream(model, params, prompts, num_tokens, None, Sampling(temperature=0)):
            written.tokens_BC.tolist()

    def other() -> np.ndarray:
        with torch.no_grad():
            return theirs.generate(tokens, pad_token_id=0, use_cache=True, **options).numpy()

    if not np.array_equal(ours(), other()):
        print(f"{name}: the texts differ: with random weights, logits can be equal up to rounding")
    return {f"{name}, flax_decoder": ours, f"{name}, transformers": other, f"{name}, streamed": streamed}


def table(shape: str, num_rounds: int) -> dict[str, float]:
    """Tokens per second of the compiled decoding loop, by length of the cache."""
    result = {}
    for S in TABLE_CONTEXTS:
        model, params = make_model(shape, **{"model.context_length": S})
        params = fd.unstack_layers(params)
        for B in TABLE_BATCHES:
            state = DecodeState(*empty_prefill(model, B, S), np.zeros(B, np.int32), np.zeros(B, bool), None)
            filters = Sampling(temperature=0).filters(model.config.vocab_size or 0)
            seconds = []
            for _ in range(1 + num_rounds):
                start = time.perf_counter()
                # Each round starts from a half-filled cache: all rounds together would not fit.
                state = state.replace(cache=state.cache.replace(length_B=np.full(B, S // 2, np.int32)))
                seeds_B2 = np.zeros((B, 2), np.uint32)
                state, _ = jax.block_until_ready(
                    decode_chunk(
                        model, params, state, filters, None, seeds_B2, None, np.int32(0), np.int32(TABLE_TOKENS)
                    )
                )
                seconds.append(time.perf_counter() - start)
            result[f"batch {B}, context {S}: tokens/s"] = B * TABLE_TOKENS / statistics.median(seconds[1:])
            print(
                f"batch {B:>2}, context {S:>4}: {result[f'batch {B}, context {S}: tokens/s']:10.1f} tokens/s",
                flush=True,
            )
    return result


def plot(result: dict[str, float], shape: str, file: Path) -> None:
    """Draws a table: tokens per second over the context, one line per batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for B, marker in zip(TABLE_BATCHES, "os^", strict=True):
        rates = [result[f"batch {B}, context {S}: tokens/s"] for S in TABLE_CONTEXTS]
        axes.plot(TABLE_CONTEXTS, rates, marker=marker, label=f"batch {B}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(TABLE_CONTEXTS, [f"{S:,}" for S in TABLE_CONTEXTS])
    axes.set_xlabel("slots of the cache")
    axes.set_ylabel("tokens per second, all rows together")
    axes.set_title(f"{shape}: {SIZES[shape][1]} layers, {SIZES[shape][2]} wide, two threads, float32")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--table", action="store_true", help="the throughput table instead of the comparison")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw it; needs --table and one --shape")
    options = parser.parse_args()
    if options.plot and not (options.table and len(options.shape or ()) == 1):
        parser.error("--plot needs --table and one --shape")
    torch.set_num_threads(NUM_THREADS)
    transformers.logging.set_verbosity_error()
    measure = table if options.table else compare
    results = {shape: measure(shape, options.rounds) for shape in options.shape or SIZES}
    for shape, result in results.items():
        print(shape)
        for name, value in result.items():
            print(f"  {name:<44} {value:10.3f}")
    if options.plot:
        plot(results[options.shape[0]], options.shape[0], options.plot)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
