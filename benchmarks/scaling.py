"""How cost grows with size: training steps, compiling, preparing texts and generating.

    python benchmarks/scaling.py [--only NAME] [--quick] [--rounds N] [--json FILE] [--plot FILE]

Each point is measured in its own process. Seconds and processor seconds (of all cores, which depend less on other work
of the machine) are the minimum over the rounds. Memory (Linux only) is the peak of the process over its level before
the work: after the imports, and after compiling if a compiled program is measured.

Each cost is compared with its work: floating-point operations by `training/flops.py`, bytes by the table of
docs/memory.md, lines of the program to compile, bytes of a text. An exponent is the slope of log cost over log size, by
least squares over the larger half of the sizes. If that of a cost is larger than that of its work, the cost grows
faster than it must.
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
from measuring import mib_level, random_batch, random_model

import flax_decoder as fd
from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.generation.steps import cache_capacity
from flax_decoder.training.flops import flops_per_token, keys_per_query
from flax_decoder.training.hardware import describe_cpu
from flax_decoder.training.loss import LOGITS_BYTES
from flax_decoder.training.step import state_maker

MB, MIB = 10**6, 2**20
MAX_POINT_SECONDS = 20.0  # a point that has taken this long is not repeated
NEW_TOKENS = 64
LINE_WORDS = 12
TOKENIZER_TOKENS = 8192
COSTS = {"seconds": "seconds", "processor_seconds": "processor seconds", "mib": "MiB"}
Point = dict[str, Any]
"""`size`, the costs, and `work`, what each cost is compared with; or `size` and `failed`, why there are no costs."""

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
        axis: the meaning of the size.
        sizes: in increasing order; the largest needs less than 24 GiB.
        quick_sizes: those that take a few seconds each.
        measure: from a size, the maximum of rounds and the folder of texts to the costs and "work".
    """

    title: str
    axis: str
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    measure: Callable[[int, int, Path], Point]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table per series, then the exponents of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SERIES, action="append", help="only this series; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rounds", type=int, default=5, help="per point, fewer for those that take long")
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
    """Measures a point in its own process; a failure is recorded in the point and does not stop the others."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--point", name, str(size), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"size": size, "failed": f"exit code {done.returncode}: {reason}"}


def measure_point(name: str, size: int, rounds: int, folder: Path) -> Point:
    """Measures a point in this process."""
    # A cached program would cost nothing to compile.
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
    """A training step, `jax.jit(fd.train_step, donate_argnums=0)`."""
    config = fd.load_config(None, {**STEP, **changes, setting: size})
    batch = random_batch(config)
    make = state_maker(fd.Decoder(config.model), config)
    rng = jax.random.key(0)
    make_state = jax.jit(make).lower(rng).compile()
    step = jax.jit(fd.train_step, donate_argnums=0).lower(jax.eval_shape(make, rng), batch).compile()
    before = memory_before()
    state = make_state(rng)

    def take_step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    take_step()  # allocates memory
    costs = costs_of(take_step, rounds, before)
    num_tokens = batch["inputs"].size
    flops = num_tokens * flops_per_token(config.model, "causal")
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {**costs, "work": {**dict.fromkeys(costs, flops), "mib": step_bytes(config, num_params)}}


def step_bytes(config: fd.Config, num_params: int) -> float:
    """Memory of a training step by the table of docs/memory.md, with half of the scores, as attention is causal."""
    model, B = config.model, config.training.batch_size
    T, L, N, V = model.context_length, model.num_layers, model.num_heads, model.vocab_size or 0
    activations = L * B * T * (12 * model.embed_dim + 3 * model.mlp_width)
    scores = B * N * T * keys_per_query(model, "causal")
    return 16 * num_params + 4 * (activations + 3 * scores) + min(8 * B * T * V, 2 * LOGITS_BYTES)


def compile_point(setting: str, size: int, rounds: int, folder: Path, **changes: Any) -> Point:
    """Tracing and compiling a training step; the work is the number of lines of the program to compile."""
    config = fd.load_config(None, {**STEP, **changes, setting: size})
    batch = random_batch(config)
    state = jax.eval_shape(state_maker(fd.Decoder(config.model), config), jax.random.key(0))
    before = memory_before()

    def compile_step() -> Any:
        jax.clear_caches()
        lowered = jax.jit(fd.train_step, donate_argnums=0).lower(state, batch)
        lowered.compile()
        return lowered

    costs = costs_of(compile_step, rounds, before)
    lines = jax.jit(fd.train_step, donate_argnums=0).lower(state, batch).as_text().count("\n")
    return {**costs, "work": dict.fromkeys(costs, lines)}


def text_point(tokenizer: str, size: int, rounds: int, folder: Path) -> Point:
    """From a file to tokens, as in `train`."""
    kind = str(folder / "tokenizer.json") if tokenizer == "file" else tokenizer
    data = DataConfig(path=str(text_file(folder, size)), tokenizer=kind)
    if kind not in ("char", "byte"):
        import tokenizers  # noqa: F401  # an import is no cost of the text

    def prepare() -> None:
        with tempfile.TemporaryDirectory() as out:
            prepare_corpus(data, Path(out))

    costs = costs_of(prepare, rounds, memory_before())
    return {**costs, "work": dict.fromkeys(costs, size)}


def prompt_point(size: int, rounds: int, folder: Path) -> Point:
    """Processing a prompt and generating one token."""
    model, params, prompt_T = model_and_prompt(size)
    config = dataclasses.replace(model.config, context_length=size)

    def read() -> None:
        np.asarray(fd.generate(model, params, prompt_T[None], 1, temperature=0.0))

    read()  # compiles
    costs = costs_of(read, rounds, memory_before())
    flops = size * flops_per_token(config, "causal") / 3  # backward is twice as much as forward
    cache = cache_capacity(model.config, size + 1) * 8 * config.num_layers * config.kv_heads * config.head_width
    return {**costs, "work": {**dict.fromkeys(costs, flops), "mib": cache}}


def decode_point(size: int, rounds: int, folder: Path) -> Point:
    """Generating a token after `size` tokens: the cost of NEW_TOKENS more, over their number."""
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


def model_and_prompt(num_tokens: int) -> tuple[fd.Decoder, Any, np.ndarray]:
    """A model with random weights, unstacked as for serving, and a random prompt."""
    model, params = random_model(DECODE)
    prompt_T = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).astype(np.int32)
    return model, fd.unstack_layers(params), prompt_T


def text_file(folder: Path, size: int) -> Path:
    """The path of the text with this many bytes."""
    return folder / f"{size}.txt"


def write_texts(folder: Path, sizes: Sequence[int]) -> None:
    """Writes texts of random words from Python's help texts, and a tokenizer.json trained on the smallest.

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
    """Seconds and processor seconds of a call, each the minimum over the rounds."""
    seconds, processor_seconds = [], []
    while not seconds or (len(seconds) < rounds and sum(seconds) < MAX_POINT_SECONDS):
        start, processor_start = time.perf_counter(), time.process_time()
        act()
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    return min(seconds), min(processor_seconds)


def memory_before() -> float | None:
    """The current memory in MiB, from which a peak is counted; resets the peak."""
    gc.collect()
    try:
        # Freed memory that the process keeps would hide what it allocates next.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return mib_level("VmRSS")


def costs_of(act: Callable[[], Any], rounds: int, before: float | None) -> Point:
    """Time of a call, see `fastest`, and the peak memory over `before` in MiB, None if unknown."""
    seconds, processor_seconds = fastest(act, rounds)
    mib = None if before is None else mib_level("VmHWM") - before
    return {"seconds": seconds, "processor_seconds": processor_seconds, "mib": mib}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size, by least squares over the larger half of the sizes, at least two.

    NaN if there are fewer, or a cost is not positive.
    """
    larger = sorted(zip(sizes, costs, strict=True))[min(len(sizes) // 2, max(len(sizes) - 2, 0)) :]
    if len(larger) < 2 or min(cost for _, cost in larger) <= 0:
        return math.nan
    log_sizes, log_costs = np.log(np.array(larger)).T
    return float(np.polyfit(log_sizes, log_costs, 1)[0])


def exponents_of(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """The exponent of each cost, "measured", and that of its work, "work"."""
    points = [point for point in points if "failed" not in point]
    result = {}
    for cost in COSTS:
        present = [point for point in points if point.get(cost) is not None]
        if present:
            sizes = [point["size"] for point in present]
            measured = exponent(sizes, [point[cost] for point in present])
            result[cost] = {"measured": measured, "work": exponent(sizes, [point["work"][cost] for point in present])}
    return result


def exponents_table(exponents: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table: the exponent of each cost, and in brackets that of its work."""
    rows = ["| | " + " | ".join(COSTS.values()) + " |", "|---" * (1 + len(COSTS)) + "|"]
    for name, own in exponents.items():
        cells = (f"{own[cost]['measured']:.2f} ({own[cost]['work']:.2f})" if cost in own else "" for cost in COSTS)
        rows.append(f"| {SERIES[name].title} over {SERIES[name].axis} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(
    results: dict[str, list[Point]], exponents: dict[str, dict[str, dict[str, float]]], processor: str, file: Path
) -> None:
    """A panel per series: processor seconds on the left axis, memory on the right one, their work as dashed lines."""
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
        titles = []
        for cost, color, axes in (("processor_seconds", "tab:blue", panel), ("mib", "tab:orange", None)):
            present = [point for point in points if point.get(cost)]
            if not present:
                continue
            axes = axes or panel.twinx()
            sizes = [point["size"] for point in present]
            scale = present[-1][cost] / present[-1]["work"][cost]
            axes.plot(sizes, [point[cost] for point in present], "o-", color=color, markersize=4)
            axes.plot(sizes, [scale * point["work"][cost] for point in present], "--", color=color, alpha=0.7)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.minorticks_off()
            some = sizes[:: max((len(sizes) - 1) // 2, 1)]  # all would overlap
            axes.set_xticks(some, [f"{size:,}" for size in some])
            if present[0][cost] * 10 > present[-1][cost]:  # too narrow for powers of ten
                axes.yaxis.set_major_locator(ticker.MaxNLocator(4, min_n_ticks=3))
                axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.4g}"))
            axes.set_ylabel(COSTS[cost], color=color)
            axes.tick_params(axis="y", labelcolor=color)
            titles.append(
                f"{COSTS[cost]} {exponents[name][cost]['measured']:.2f} ({exponents[name][cost]['work']:.2f})"
            )
        panel.set_xlabel(SERIES[name].axis)
        panel.set_title(f"{SERIES[name].title}\n{', '.join(titles)}", fontsize=9)
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"{processor}\nexponents over the larger half of the sizes; work in brackets and dashed", fontsize=10
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (2, 4, 8, 16, 32, 48)
BYTES = tuple(size * MB for size in (1, 2, 5, 10, 20, 50, 100, 200))
VOCABULARIES = (65, 256, 1024, 4096, 16_384, 32_768, 65_536, 131_072)
SETTING_OF = {
    "context length": "model.context_length",
    "layers": "model.num_layers",
    "vocabulary": "model.vocab_size",
    "batch size": "training.batch_size",
}


def over_setting(
    axis: str, title: str, sizes: tuple[int, ...], num_quick: int, point: Callable[..., Point], **changes: Any
) -> Series:
    """A series of `point` over one setting, with `changes` to STEP named section__field."""
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return Series(title, axis, sizes, sizes[:num_quick], functools.partial(point, SETTING_OF[axis], **settings))


over_context = functools.partial(over_setting, "context length")
over_layers = functools.partial(over_setting, "layers")
SERIES = {
    "step_context": over_context("training step", CONTEXTS, 3, step_point, training__batch_size=2),
    "step_window": over_context(
        "training step, window 128", CONTEXTS, 3, step_point, training__batch_size=2, model__window=128
    ),
    "step_depth": over_layers("training step", DEPTHS, 2, step_point, model__embed_dim=256, model__context_length=128),
    "step_vocabulary": over_setting(
        "vocabulary", "training step", VOCABULARIES, 2, step_point, model__num_layers=2, model__context_length=128
    ),
    "step_batch": over_setting("batch size", "training step", tuple(2**i for i in range(10)), 2, step_point),
    "compile_depth": over_layers("compiling, unrolled", DEPTHS, 2, compile_point),
    "compile_scanned": over_layers("compiling, scanned", DEPTHS, 2, compile_point, model__scan_layers=True),
    "compile_context": over_context("compiling, 2 layers", CONTEXTS, 2, compile_point, model__num_layers=2),
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
    "prompt": Series("processing a prompt", "tokens", (*CONTEXTS, 8192), CONTEXTS[:2], prompt_point),
    "decode": Series("generating a token", "tokens before it", (*CONTEXTS, 8192), CONTEXTS[:2], decode_point),
}

if __name__ == "__main__":
    main()
