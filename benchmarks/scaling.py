"""How cost grows: training steps, compiling, preparing texts and generating, each over a range of sizes.

    python benchmarks/scaling.py [--only NAME] [--quick] [--rounds N] [--json FILE] [--plot FILE]

Each point is measured in a process of its own. Seconds are the fastest of the rounds, and so are processor seconds, of
all cores together, which hang less on what else the machine is doing. Memory (Linux only) is the highest level of the
process over the one before the work: after the imports, and where a compiled program is run, after compiling it.

Beside each cost stands its work: floating-point operations by `training/flops.py`, bytes by the table of
docs/memory.md, lines of the program that is compiled, bytes of a text. An exponent is the slope of log cost over log
size, by least squares over the larger half of the sizes. Where that of a cost is larger than that of its work, the
cost grows faster than it must.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
from process_memory import mib_level

import flax_decoder as fd
from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.generation.steps import cache_capacity
from flax_decoder.training.flops import flops_per_token, keys_per_query
from flax_decoder.training.hardware import describe_cpu
from flax_decoder.training.loss import LOGITS_BYTES
from flax_decoder.training.step import state_maker

MB, MIB = 10**6, 2**20
# A point that has taken so long is not repeated any more.
MAX_POINT_SECONDS = 20.0
NEW_TOKENS = 64
LINE_WORDS = 12
TOKENIZER_TOKENS = 8192
COSTS = {"seconds": "seconds", "processor_seconds": "processor seconds", "mib": "MiB"}
Point = dict[str, Any]
"""`size`, the costs, and in `work` what each cost is held against; `failed` alone says why there are none."""

STEP = {
    "model.vocab_size": 256,
    "model.num_layers": 4,
    "model.embed_dim": 128,
    "model.num_heads": 4,
    "model.context_length": 64,
    "training.batch_size": 8,
}
DECODE = {**STEP, "model.context_length": 16_384}


@dataclasses.dataclass(frozen=True)
class Series:
    """One cost over one size.

    Attributes:
        title: what is measured.
        axis: what the size counts.
        sizes: from small to large; the largest needs less than 24 GiB.
        quick_sizes: the same in a few seconds each.
        measure: takes a size, the most rounds and the folder of texts; gives costs and "work".
    """

    title: str
    axis: str
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    measure: Callable[[int, int, Path], Point]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each series, then the exponents of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SERIES, action="append", help="this series; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rounds", type=int, default=5, help="of each point, and fewer where one takes long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a picture of all series to this file")
    parser.add_argument("--point", nargs=3, metavar=("NAME", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point:
        name, size, folder = options.point
        print(json.dumps(measure_point(name, int(size), options.rounds, Path(folder))))
        return

    processor = describe_cpu()
    print(processor)
    results: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or SERIES:
            series = SERIES[name]
            sizes = series.quick_sizes if options.quick else series.sizes
            print(f"\n{name}: {series.title}\n{series.axis:>20}" + "".join(f"{cost:>20}" for cost in COSTS.values()))
            if name.startswith("text"):
                write_texts(Path(folder), sizes)
            results[name] = []
            for size in sizes:
                point = start_point(name, size, options.rounds, Path(folder))
                print(row_of(point), flush=True)
                results[name].append(point)
    exponents = {name: exponents_of(points) for name, points in results.items()}
    print("\n" + exponents_table(exponents))
    if options.json:
        document = {"processor": processor, "points": results, "exponents": exponents}
        options.json.write_text(json.dumps(document, indent=2), encoding="utf-8")
    if options.plot:
        plot(results, exponents, processor, options.plot)


def start_point(name: str, size: int, rounds: int, folder: Path) -> Point:
    """Measures a point in a process of its own; where that fails, the point says so and the others go on."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--point", name, str(size), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"size": size, "failed": f"exit code {done.returncode}: {reason}"}


def measure_point(name: str, size: int, rounds: int, folder: Path) -> Point:
    """Measures a point in this process."""
    # A program that lies ready in a cache would cost nothing to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.numpy.ones(3).block_until_ready()
    return {"size": size, **SERIES[name].measure(size, rounds, folder)}


def row_of(point: Point) -> str:
    """A line of the table of a series."""
    if "failed" in point:
        return f"{point['size']:>20,}  {point['failed']}"
    formats = {"seconds": "20.4f", "processor_seconds": "20.4f", "mib": "20,.1f"}
    cells = (format(point[cost], formats[cost]) if point.get(cost) is not None else " " * 20 for cost in COSTS)
    return f"{point['size']:>20,}" + "".join(cells)


def step_point(setting: str, size: int, rounds: int, folder: Path, **changes: Any) -> Point:
    """A training step as `jax.jit(fd.train_step, donate_argnums=0)` takes it."""
    config, batch = settings_and_batch({**STEP, **changes, setting: size})
    make = state_maker(fd.Decoder(config.model), config)
    rng = jax.random.key(0)
    make_state = jax.jit(make).lower(rng).compile()
    step = jax.jit(fd.train_step, donate_argnums=0).lower(jax.eval_shape(make, rng), batch).compile()
    before = memory_before()
    state = make_state(rng)

    def take_step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    take_step()  # settles the memory
    seconds, processor_seconds = fastest(take_step, rounds)
    num_tokens = batch["inputs"].size
    flops = num_tokens * flops_per_token(config.model, "causal")
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "mib": mib_over(before),
        "work": {"seconds": flops, "processor_seconds": flops, "mib": step_bytes(config, num_params)},
    }


def step_bytes(config: fd.Config, num_params: int) -> float:
    """What a training step holds by the table of docs/memory.md, of scores half: those in the past of their query."""
    model, B = config.model, config.training.batch_size
    T, L, N, V = model.context_length, model.num_layers, model.num_heads, model.vocab_size or 0
    activations = L * B * T * (12 * model.embed_dim + 3 * model.mlp_width)
    scores = B * N * T * keys_per_query(model, "causal")
    return 16 * num_params + 4 * (activations + 3 * scores) + min(8 * B * T * V, 2 * LOGITS_BYTES)


def compile_point(setting: str, size: int, rounds: int, folder: Path, **changes: Any) -> Point:
    """Tracing and compiling a training step. Its work is the program that is given to the compiler, in lines."""
    config, batch = settings_and_batch({**STEP, **changes, setting: size})
    state = jax.eval_shape(state_maker(fd.Decoder(config.model), config), jax.random.key(0))
    before = memory_before()

    def compile_step() -> Any:
        jax.clear_caches()
        lowered = jax.jit(fd.train_step, donate_argnums=0).lower(state, batch)
        lowered.compile()
        return lowered

    seconds, processor_seconds = fastest(compile_step, rounds)
    mib = mib_over(before)
    lines = jax.jit(fd.train_step, donate_argnums=0).lower(state, batch).as_text().count("\n")
    costs = {"seconds": seconds, "processor_seconds": processor_seconds, "mib": mib}
    return {**costs, "work": dict.fromkeys(costs, lines)}


def text_point(tokenizer: str, size: int, rounds: int, folder: Path) -> Point:
    """From a file to tokens, as `train` does it."""
    kind = str(folder / "tokenizer.json") if tokenizer == "file" else tokenizer
    data = DataConfig(path=str(text_file(folder, size)), tokenizer=kind)
    if kind not in ("char", "byte"):
        import tokenizers  # noqa: F401  # what an import takes is none of the text's
    before = memory_before()
    seconds, processor_seconds = fastest(lambda: prepare_corpus(data, 64, None), rounds)
    costs = {"seconds": seconds, "processor_seconds": processor_seconds, "mib": mib_over(before)}
    return {**costs, "work": dict.fromkeys(costs, size)}


def prompt_point(size: int, rounds: int, folder: Path) -> Point:
    """Reading a prompt of that many tokens and writing one."""
    model, params, prompt_T = model_and_prompt(size)
    config = dataclasses.replace(model.config, context_length=size)

    def read() -> None:
        np.asarray(fd.generate(model, params, prompt_T[None], 1, temperature=0.0))

    read()  # compiles
    before = memory_before()
    seconds, processor_seconds = fastest(read, rounds)
    flops = size * flops_per_token(config, "causal") / 3  # backward is twice as much as forward
    cache = cache_capacity(model.config, size + 1) * 8 * config.num_layers * config.kv_heads * config.head_width
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "mib": mib_over(before),
        "work": {"seconds": flops, "processor_seconds": flops, "mib": cache},
    }


def decode_point(size: int, rounds: int, folder: Path) -> Point:
    """Writing a token behind that many: what NEW_TOKENS more take, over their number."""
    model, params, prompt_T = model_and_prompt(size)
    prefix = fd.prefill(model, params, prompt_T)

    def write(num_tokens: int) -> None:
        np.asarray(fd.generate(model, params, prompt_T[None], num_tokens, temperature=0.0, prefix=prefix))

    write(1 + NEW_TOKENS)  # compiles
    write(1)
    many, one = (fastest(functools.partial(write, count), rounds) for count in (1 + NEW_TOKENS, 1))
    seconds, processor_seconds = (max(a - b, 0.0) / NEW_TOKENS for a, b in zip(many, one, strict=True))
    flops = flops_per_token(dataclasses.replace(model.config, context_length=size), "full") / 3
    costs = {"seconds": seconds, "processor_seconds": processor_seconds}
    slots = cache_capacity(model.config, size + 1 + NEW_TOKENS)
    return {**costs, "slots": slots, "work": dict.fromkeys(costs, flops)}


def settings_and_batch(settings: dict[str, Any]) -> tuple[fd.Config, dict[str, np.ndarray]]:
    """A config, and a batch of random tokens for it."""
    config = fd.load_config(None, settings)
    shape = (config.training.batch_size, config.model.context_length)
    tokens_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return config, {"inputs": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1)}


def model_and_prompt(num_tokens: int) -> tuple[fd.Decoder, Any, np.ndarray]:
    """A model with random weights, unstacked as for serving, and a random prompt."""
    model = fd.Decoder(fd.load_config(None, DECODE).model)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    prompt_T = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).astype(np.int32)
    return model, fd.unstack_layers(params), prompt_T


def text_file(folder: Path, size: int) -> Path:
    """Where the text of that many bytes is."""
    return folder / f"{size}.txt"


def write_texts(folder: Path, sizes: Sequence[int]) -> None:
    """Texts of so many bytes, drawn from the words of Python's help texts, and a tokenizer.json trained on the first.

    Each text begins with the smaller ones.
    """
    words = np.array([word for topic in sorted(topics) for word in topics[topic].split() if word.isascii()], object)
    for size in sizes:
        if text_file(folder, size).exists():
            continue
        num_left, rng = size, np.random.default_rng(0)
        with open(text_file(folder, size), "w", encoding="ascii") as file:
            while num_left > 0:
                lines = rng.choice(words, (10_000, LINE_WORDS))
                piece = "".join(" ".join(line) + "\n" for line in lines)[:num_left]
                num_left -= file.write(piece)
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENIZER_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text_file(folder, min(sizes)))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def fastest(act: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Seconds and processor seconds of a call, of each the least of all rounds."""
    seconds, processor_seconds = [], []
    while not seconds or (len(seconds) < rounds and sum(seconds) < MAX_POINT_SECONDS):
        start, processor_start = time.perf_counter(), time.process_time()
        act()
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    return min(seconds), min(processor_seconds)


def memory_before() -> float | None:
    """The level that a peak is counted from, in MiB; forgets the peaks so far, such as that of compiling."""
    gc.collect()
    try:
        # Memory that was freed and not given back would hide what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return mib_level("VmRSS")


def mib_over(before: float | None) -> float | None:
    """The highest level since, in MiB over the one before; None where the system does not say it."""
    return None if before is None else mib_level("VmHWM") - before


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size, by least squares over the larger half of the sizes, at least two.

    NaN where there are fewer, or a cost is not over 0, which has no logarithm.
    """
    larger = sorted(zip(sizes, costs, strict=True))[min(len(sizes) // 2, max(len(sizes) - 2, 0)) :]
    if len(larger) < 2 or min(cost for _, cost in larger) <= 0:
        return math.nan
    log_sizes, log_costs = np.log(np.array(larger)).T
    return float(np.polyfit(log_sizes, log_costs, 1)[0])


def exponents_of(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """For each cost its exponent, "measured", and that of its work, "work"."""
    points = [point for point in points if "failed" not in point]
    result = {}
    for cost in COSTS:
        own = [point for point in points if point.get(cost) is not None]
        if own:
            sizes = [point["size"] for point in own]
            measured = exponent(sizes, [point[cost] for point in own])
            result[cost] = {"measured": measured, "work": exponent(sizes, [point["work"][cost] for point in own])}
    return result


def exponents_table(exponents: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table of Markdown: the measured exponent of each cost, and in brackets that of its work."""
    rows = ["| | " + " | ".join(COSTS.values()) + " |", "|---" * (1 + len(COSTS)) + "|"]
    for name, own in exponents.items():
        cells = (f"{own[cost]['measured']:.2f} ({own[cost]['work']:.2f})" if cost in own else "" for cost in COSTS)
        rows.append(f"| {SERIES[name].title} over {SERIES[name].axis} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(
    results: dict[str, list[Point]], exponents: dict[str, dict[str, dict[str, float]]], processor: str, file: Path
) -> None:
    """A panel a series: processor seconds on the left axis, memory on the right one, their work as dashed lines."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    num_columns = min(3, len(results))
    num_rows = -(-len(results) // num_columns)
    figure, panels = plt.subplots(
        num_rows, num_columns, figsize=(4.6 * num_columns, 3.2 * num_rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(results) :]:
        panel.set_visible(False)
    for panel, (name, points) in zip(panels.flat, results.items(), strict=False):
        told = []
        for cost, color, axes in (("processor_seconds", "tab:blue", panel), ("mib", "tab:orange", None)):
            own = [point for point in points if point.get(cost)]
            if not own:
                continue
            axes = axes or panel.twinx()
            sizes = [point["size"] for point in own]
            scale = own[-1][cost] / own[-1]["work"][cost]
            axes.plot(sizes, [point[cost] for point in own], "o-", color=color, markersize=4)
            axes.plot(sizes, [scale * point["work"][cost] for point in own], "--", color=color, alpha=0.7)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.minorticks_off()
            some = sizes[:: max((len(sizes) - 1) // 2, 1)]  # all would run into each other
            axes.set_xticks(some, [f"{size:,}" for size in some])
            if own[0][cost] * 10 > own[-1][cost]:  # too narrow for powers of ten
                axes.yaxis.set_major_locator(ticker.MaxNLocator(4, min_n_ticks=3))
                axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.4g}"))
            axes.set_ylabel(COSTS[cost], color=color)
            axes.tick_params(axis="y", labelcolor=color)
            told.append(f"{COSTS[cost]} {exponents[name][cost]['measured']:.2f} ({exponents[name][cost]['work']:.2f})")
        panel.set_xlabel(SERIES[name].axis)
        panel.set_title(f"{SERIES[name].title}\n{', '.join(told)}", fontsize=9)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{processor}\nexponents of the larger half, in brackets and dashed those of the work", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (2, 4, 8, 16, 32, 48)
BYTES = tuple(size * MB for size in (1, 2, 5, 10, 20, 50, 100, 200))
WIDER = {"model.embed_dim": 256, "model.context_length": 128}
SERIES = {
    "step_context": Series(
        "training step",
        "context length",
        CONTEXTS,
        CONTEXTS[:3],
        functools.partial(step_point, "model.context_length", **{"training.batch_size": 2}),
    ),
    "step_window": Series(
        "training step, window 128",
        "context length",
        CONTEXTS,
        CONTEXTS[:3],
        functools.partial(step_point, "model.context_length", **{"training.batch_size": 2, "model.window": 128}),
    ),
    "step_depth": Series(
        "training step", "layers", DEPTHS, DEPTHS[:2], functools.partial(step_point, "model.num_layers", **WIDER)
    ),
    "step_vocabulary": Series(
        "training step",
        "vocabulary",
        (65, 256, 1024, 4096, 16_384, 32_768, 65_536, 131_072),
        (65, 256),
        functools.partial(step_point, "model.vocab_size", **{"model.num_layers": 2, "model.context_length": 128}),
    ),
    "step_batch": Series(
        "training step",
        "batch size",
        tuple(2**i for i in range(10)),
        (1, 2),
        functools.partial(step_point, "training.batch_size"),
    ),
    "compile_depth": Series(
        "compiling, unrolled", "layers", DEPTHS, DEPTHS[:2], functools.partial(compile_point, "model.num_layers")
    ),
    "compile_scanned": Series(
        "compiling, scanned",
        "layers",
        DEPTHS,
        DEPTHS[:2],
        functools.partial(compile_point, "model.num_layers", **{"model.scan_layers": True}),
    ),
    "compile_context": Series(
        "compiling, 2 layers",
        "context length",
        CONTEXTS,
        CONTEXTS[:2],
        functools.partial(compile_point, "model.context_length", **{"model.num_layers": 2}),
    ),
    **{
        f"text_{kind}": Series(
            f"preparing a text, {'a tokenizer.json' if kind == 'file' else kind}",
            "bytes",
            BYTES,
            (20_000, 40_000),
            functools.partial(text_point, kind),
        )
        for kind in ("char", "byte", "bpe", "file")
    },
    "prompt": Series("reading a prompt", "tokens", (*CONTEXTS, 8192), CONTEXTS[:2], prompt_point),
    "decode": Series("writing a token", "tokens before it", (*CONTEXTS, 8192), CONTEXTS[:2], decode_point),
}

if __name__ == "__main__":
    main()
