"""The first ten minutes on a GPU: is it right, how fast is it, and where does the time go?

    python benchmarks/first_gpu.py --out FOLDER [--seconds 600] [--only PART ...] [--cpu]

Needs no network. Each result is a file of its own in the folder, written as soon as it is known. Each part runs in a
process of its own: one that fails or hangs ends alone, and one for which no time is left is left out. A line says so.
The parts, in the order in which they run:

1. machine: versions, the rate of an 8,192 x 8,192 product, the bandwidth of a copy.
2. correctness: cuDNN's attention beside the formula; sums of gradients of embeddings, positions and biases in
   bfloat16; loss and gradients on the GPU beside the CPU, in float32; `flax-decoder doctor`.
3. step: GPT-2 124M with 32 x 1,024 tokens (`gpu_train.py`): seconds, tokens per second, MFU, memory. Then profiled:
   the 30 kernels that take most time, and the gaps in which none runs.
4. scatter: the gradient of an embedding, by each way of `nn/embedding.py`.
5. torch: PyTorch's step of the same shape (`torch_decoder.py`), with flash and with cuDNN's attention.
6. train: `train.py configs/gpt2_124m.toml`, 20 steps, by the wall clock.
7. variants of step, with the time that is left: 64 rows, deterministic, the loss in chunks, scanned layers, remat, and
   options of XLA.

It takes Python 3.11 or later, jax with its plugin for CUDA, torch, and what pyproject.toml lists. For a machine without
a network, on one of its kind that has one:

    pip download -d wheels ".[cuda13]" torch==2.13.0 setuptools && pip wheel --no-deps -w wheels .

and there `pip install --no-index --find-links wheels "flax-decoder[cuda13]" torch`.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

# The most that a part may take, as a multiple of what it is expected to take.
PATIENCE = 2.5
VARIANTS: dict[str, list[str]] = {
    "rows_64": ["--training.batch-size", "64"],
    "deterministic": ["--training.deterministic", "true"],
    "chunks": ["--training.loss-chunk-tokens", "8192"],
    "scan": ["--model.scan-layers", "true"],
    "remat_dots": ["--model.remat", "dots"],
}
# What XLA may be told, and why it could help.
FLAGS = {
    "cublas_only": "--xla_gpu_enable_triton_gemm=false",  # products by the library alone
    "cudnn_gemm_fusion": "--xla_gpu_cudnn_gemm_fusion_level=2",  # cuDNN competes for products with what surrounds them
    "cudnn_layer_norm": "--xla_gpu_enable_cudnn_layer_norm=true",  # norms by the library
    "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",  # for several GPUs; should cost nothing on one
    "no_command_buffers": "--xla_gpu_enable_command_buffer=",  # kernels launched one by one, not as CUDA graphs
}


class Part(NamedTuple):
    """A part: what it does, and about how many seconds it takes on a GPU, compilation included."""

    measure: Callable[["Reporter"], None]
    seconds: float
    flags: str = ""  # of XLA, beside those that are given


class Reporter:
    """Writes results, and knows the size of things.

    Attributes:
        out: the folder.
        part: the part that measures.
        tiny: on a CPU, at tiny sizes, as a test.
    """

    def __init__(self, out: Path, part: str, *, tiny: bool):
        self.out, self.part, self.tiny = out, part, tiny

    def write(self, name: str, result: Result) -> None:
        """Writes a result to its own file, and prints it."""
        file = self.out / f"{self.part}{'_' if name else ''}{name}.json"
        file.with_suffix(".part").write_text(json.dumps(result, indent=1), encoding="utf-8")
        file.with_suffix(".part").replace(file)
        short = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
        print(f"{file.stem}: " + ", ".join(f"{key} {_short(value)}" for key, value in short.items()), flush=True)

    def attempt(self, name: str, measure: Callable[[], Result]) -> None:
        """Writes what a measurement gives, or why it failed; another one can follow."""
        try:
            self.write(name, measure())
        except Exception as error:
            self.write(name, {"failed": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns 0 if all that ran succeeded, 1 if one failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cpu", action="store_true", help="all of it on the CPU, at tiny sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        PARTS[options.part].measure(Reporter(options.out, options.part, tiny=options.cpu))
        return 0
    end, failed = time.monotonic() + options.seconds, False
    with tempfile.TemporaryDirectory() as cache:
        for name in options.only or PARTS:
            code = run_part(name, options.out, end - time.monotonic(), cache, tiny=options.cpu)
            if code == 2:
                return 2
            failed |= code != 0
    print(f"{options.seconds - (end - time.monotonic()):.0f} s; results in {options.out}")
    return int(failed)


def run_part(name: str, out: Path, seconds_left: float, cache: str, *, tiny: bool) -> int:
    """Runs a part in a process of its own, within the seconds that are left; its exit code, 0 if it is left out."""
    part, reporter = PARTS[name], Reporter(out, name, tiny=tiny)
    if seconds_left < (5 if tiny else part.seconds):
        reporter.write("", {"left out": f"takes about {part.seconds:.0f} s, and {max(seconds_left, 0):.0f} s are left"})
        return 0
    environment = os.environ | {
        # Empty at the start: what a program costs to compile is a result, too.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {part.flags}".strip(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--out", str(out), "--part", name, *(["--cpu"] if tiny else [])]
    start, limit = time.monotonic(), seconds_left if tiny else min(seconds_left, PATIENCE * part.seconds)
    code, reason = run_command(command, environment, limit)
    if code not in (0, 2):
        reporter.write("", {"failed": reason})
    print(f"{name}: {time.monotonic() - start:.0f} s{f', {reason}' if code else ''}", flush=True)
    return code


def run_command(command: list[str], environment: dict[str, str], limit: float) -> tuple[int, str]:
    """Runs a command for at most so many seconds: its exit code, and the last line of its errors."""
    # A session of its own, so that what it has started ends with it.
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 1, f"still ran after {limit:.0f} s"
    return process.returncode, (errors.strip().splitlines() or ["no message"])[-1]


def seconds_per_call(compute: Callable[..., Any], *arguments: Any, calls: int = 10) -> float:
    """The least mean over three rounds of calls that are not waited for one by one; the first call compiles."""
    import jax

    jax.block_until_ready(compute(*arguments))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([compute(*arguments) for _ in range(calls)][-1])
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def machine(reporter: Reporter) -> None:
    """Part 1."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    if device.platform != "gpu" and not reporter.tiny:
        print("JAX sees no GPU; --cpu tries all of this on the CPU", file=sys.stderr)
        sys.exit(2)
    driver = "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"
    packages = "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "torch"
    installed = {name: _version(name) for name in packages}

    def versions() -> Result:
        return {
            "device": device.device_kind,
            "capability": getattr(device, "compute_capability", ""),
            "memory": (device.memory_stats() or {}).get("bytes_limit"),
            **{name: version for name, version in installed.items() if version},
            "python": sys.version.split()[0],
            "driver": "" if reporter.tiny else subprocess.run(driver, capture_output=True, text=True).stdout,
        }

    size, num_numbers = (64, 2**10) if reporter.tiny else (8192, 2**28)

    def product(dtype: str, precision: str) -> Result:
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
        seconds = seconds_per_call(multiply, a, a)
        return {"size": size, "dtype": dtype, "precision": precision, "TFLOP/s": 2 * size**3 / seconds / 1e12}

    def copy() -> Result:
        x = jnp.ones(num_numbers)
        seconds = seconds_per_call(jax.jit(lambda x: x + 1), x)
        return {"bytes": 8 * num_numbers, "GB/s": 8 * num_numbers / seconds / 1e9}

    reporter.attempt("versions", versions)
    for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
        reporter.attempt(f"product_{dtype}_{precision}", lambda d=dtype, p=precision: product(d, p))
    reporter.attempt("copy", copy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def correctness(reporter: Reporter) -> None:
    """Part 2; "right" in a result is its verdict."""
    settings = [("heads", 12, 12, 64, 1024, None), ("grouped", 8, 2, 128, 1023, None), ("window", 4, 4, 64, 1024, 100)]
    for name, *sizes in settings:
        reporter.attempt(f"attention_{name}", lambda sizes=sizes: attention(*sizes, tiny=reporter.tiny))
    for vocab_size in (65, 523 if reporter.tiny else 50304):
        reporter.attempt(f"embedding_{vocab_size}", lambda V=vocab_size: embedding_sums(V, tiny=reporter.tiny))
    reporter.attempt("biases", lambda: bias_sums(tiny=reporter.tiny))
    for shape in ("124M", "1B"):
        reporter.attempt(f"devices_{shape}", lambda shape=shape: beside_cpu(shape))
    reporter.attempt("doctor", lambda: doctor(tiny=reporter.tiny))


def attention(N: int, K: int, H: int, T: int, window: int | None, *, tiny: bool) -> Result:
    """The fused kernel and the formula in bfloat16, each beside the formula with all digits: outputs and gradients."""
    import jax
    import jax.numpy as jnp

    from flax_decoder.nn.attention import dot_product_attention
    from flax_decoder.nn.kernels.blockwise import blockwise
    from flax_decoder.nn.kernels.cudnn import cudnn
    from flax_decoder.nn.mask import MaskSpec

    if tiny:
        N, K, H, T = N // K, 1, 8, 65
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
    mask = MaskSpec(positions_BT, positions_BT, None, window, None, None)
    rngs = jax.random.split(jax.random.key(0), 4)
    shapes = (2, T, N, H), (2, T, K, H), (2, T, K, H), (2, T, N, H)
    *qkv, change = (jax.random.normal(rng, shape, "bfloat16") for rng, shape in zip(rngs, shapes, strict=True))

    def outputs(attend: Callable[..., Any], dtype: str) -> list[Any]:
        heads, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), *(x.astype(dtype) for x in qkv))
        return [heads, *pull(change.astype(dtype))]

    def run(attend: Callable[..., Any], dtype: str) -> list[Any]:
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda: outputs(attend, dtype))()

    def error(found: list[Any]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(float(jnp.abs(x.astype("float32") - y).max() / jnp.abs(y).max()) for x, y in pairs)

    exact = run(dot_product_attention, "float32")
    fused = (lambda *args: blockwise(dot_product_attention, *args)) if tiny else cudnn
    errors = {"fused": error(run(fused, "bfloat16")), "formula": error(run(dot_product_attention, "bfloat16"))}
    # Both round weights and heads to bfloat16, 2^-9, in another order.
    return {**errors, "right": errors["fused"] <= 4 * max(errors["formula"], 2**-9)}


def embedding_sums(vocab_size: int, *, tiny: bool) -> Result:
    """Sums of the gradients of an embedding in a bfloat16 model: equal ones of one row, and Zipf's law."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flax_decoder.nn.embedding import look_up

    num_tokens, width = 4096, 8 if tiny else 768
    change_BTD = np.random.default_rng(0).standard_normal((1, num_tokens, width)).astype(jnp.bfloat16)

    def gradient(ids_BT: np.ndarray, change_BTD: np.ndarray) -> np.ndarray:
        table_VD = jnp.zeros((vocab_size, width))
        pull = jax.jit(
            lambda ids, change: jax.vjp(lambda table: look_up(table, ids).astype("bfloat16"), table_VD)[1](change)
        )
        return np.asarray(pull(ids_BT, change_BTD)[0])

    equal = gradient(np.full((1, num_tokens), 3, np.int32), np.ones_like(change_BTD))[3]
    ids_BT = zipf_tokens((1, num_tokens), vocab_size)
    expected_VD = np.zeros((vocab_size, width))
    np.add.at(expected_VD, ids_BT[0], change_BTD[0].astype(np.float64))
    difference = np.abs(gradient(ids_BT, change_BTD) - expected_VD).max() / np.abs(expected_VD).max()
    right = bool((equal == num_tokens).all() and difference < 1e-5)
    return {"4096 equal ones": float(equal[0]), "difference": float(difference), "right": right}


def zipf_tokens(shape: tuple[int, ...], vocab_size: int) -> Any:
    """Token ids of which the n-th is 1 / n as frequent as the first, as words are."""
    import numpy as np

    weights = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(0).choice(vocab_size, shape, p=weights / weights.sum()).astype(np.int32)


def bias_sums(*, tiny: bool) -> Result:
    """The gradients of a bias and of positions in a bfloat16 model, of equal contributions."""
    import jax
    import jax.numpy as jnp

    from flax_decoder.nn.precision import add_parameter

    B, T, D = (32, 64, 8) if tiny else (512, 1024, 64)
    x_BTD = jnp.zeros((B, T, D), "bfloat16")
    found = {}
    for name, shape, expected in (("bias", (1, 1, D), B * T), ("positions", (1, T, D), B)):
        total = jax.jit(jax.grad(lambda p: add_parameter(x_BTD, p).astype("float32").sum()))(jnp.zeros(shape))
        found[name] = float(jnp.abs(total / expected - 1).max())
    return {**found, "right": max(found.values()) == 0}


def beside_cpu(shape: str) -> Result:
    """Loss and gradients of a tiny model of a shape, on the GPU beside the CPU, in float32 with all digits."""
    import jax
    import numpy as np
    from gpu_train import config_of, random_batches

    from flax_decoder.nn.decoder import Decoder
    from flax_decoder.parallel.mesh import make_mesh, sharding_of, use_mesh
    from flax_decoder.training.step import init_state, mean_gradients

    exact = {"model.dtype": "float32", "model.matmul_precision": "highest"}
    config = config_of(shape, exact, tiny=True)
    batch = random_batches(config, 1)[0]
    batch = {"inputs": batch[:, :-1], "targets": batch[:, 1:]}
    results = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        mesh = make_mesh(config, [device])
        state = init_state(Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)
        with use_mesh(mesh):
            placed = jax.device_put(batch, sharding_of(mesh))
            gradients, metrics = jax.jit(lambda *args: mean_gradients(*args))(state, placed)
        results.append((float(metrics["loss"]), jax.tree.leaves(jax.device_get(gradients))))
    (cpu_loss, cpu), (loss, found) = results
    largest = max(np.abs(leaf).max() for leaf in cpu)
    difference = max(float(np.abs(one - other).max() / largest) for one, other in zip(found, cpu, strict=True))
    right = abs(loss / cpu_loss - 1) < 1e-5 and difference < 1e-5
    return {"loss": loss, "loss on the CPU": cpu_loss, "difference of gradients": difference, "right": right}


def doctor(*, tiny: bool) -> Result:
    """`flax-decoder doctor`."""
    small = ["configs/tiny.toml", "--model.num-layers", "1"] if tiny else ["configs/default.toml"]
    command = [sys.executable, "-m", "flax_decoder", "doctor", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"exit code": done.returncode, "right": done.returncode == 0, "lines": lines}


def step(reporter: Reporter, changes: Iterable[str] = (), *, profiled: bool = True) -> None:
    """Parts 3 and 7: the step with changes to its config, given as on the command line."""
    import jax
    from gpu_train import STEPS_PER_CALL, changes_of, config_of, our_call, random_batches

    from flax_decoder.training.flops import utilization

    config = config_of("124M", changes_of(list(changes)), reporter.tiny)
    batches = random_batches(config, 2 if reporter.tiny else STEPS_PER_CALL)
    start = time.perf_counter()
    call = our_call(config, batches)
    call()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(2 if reporter.tiny else 4):
        start = time.perf_counter()
        losses = call()
        seconds.append((time.perf_counter() - start) / len(batches))
    tokens_per_second = config.training.batch_size * config.model.context_length / statistics.median(seconds)
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "step_seconds": statistics.median(seconds),
        "tokens_per_second": tokens_per_second,
        **utilization(config.model, tokens_per_second, device.device_kind, num_devices=1),
        "start_seconds": first,  # of the state, compiling and one call
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "loss": losses[-1],
        "changes": list(changes),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "rounds": seconds,
    }
    reporter.write("", result)
    if profiled:
        reporter.attempt("profile", lambda: profile(call, len(batches)))


def profile(call: Callable[[], Any], num_steps: int) -> Result:
    """The kernels of some steps that take most time, and the gaps in which none runs."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        data = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
        lines = [(plane.name, line.name, line.events) for plane in data.planes for line in plane.lines]
        events = [
            event
            for plane, line, of_line in lines
            if (plane.startswith("/device:GPU") and line.startswith("Stream"))
            or (jax.default_backend() == "cpu" and plane == "/host:CPU" and "XLA" in line)
            for event in of_line
        ]
        kernels = sorted((event.start_ns, event.end_ns, event.name) for event in events)
    return summary_of(kernels, num_steps)


def summary_of(kernels: list[tuple[float, float, str]], num_steps: int) -> Result:
    """Sums over (start, end, name) of kernels in nanoseconds, in the order of their starts; times are ms per step."""
    by_name: dict[str, list[float]] = {}
    gaps: list[tuple[float, str, str]] = []
    end, before, idle = kernels[0][0], "", 0.0
    for started, ended, name in kernels:
        by_name.setdefault(re.sub(r"[._]?\d+$", "", name), []).append(ended - started)
        if started > end:
            idle += started - end
            gaps.append(((started - end) / 1e6, before, name))
        if ended > end:
            end, before = ended, name
    scale = 1e6 * num_steps
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:30]
    total = end - kernels[0][0]
    return {
        "ms per step": total / scale,
        "idle ms per step": idle / scale,
        "idle": idle / total,
        "kernels per step": len(kernels) / num_steps,
        "top": [{"name": n, "ms": sum(t) / scale, "count": len(t) / num_steps, "part": sum(t) / total} for n, t in top],
        "longest gaps (ms, after, before)": sorted(gaps, reverse=True)[:10],
    }


def scatter(reporter: Reporter) -> None:
    """Part 4."""
    import jax
    import jax.numpy as jnp

    from flax_decoder.nn import embedding

    B, T, D = (2, 16, 8) if reporter.tiny else (32, 1024, 768)
    ways = {"added": "look_up_plain", "product": "look_up_by_product", "sorted": "look_up_sorted"}

    def milliseconds(look_up: Callable[..., Any], V: int, dtype: str) -> float:
        table_VD, ids_BT = jnp.zeros((V, D)), zipf_tokens((B, T), V)
        change_BTD = jnp.ones((B, T, D), dtype)
        gradient = jax.jit(
            lambda ids, change: jax.vjp(lambda table: look_up(table, ids).astype(dtype), table_VD)[1](change)
        )
        return 1e3 * seconds_per_call(gradient, ids_BT, change_BTD, calls=3)

    for V in (65, 103, 523 if reporter.tiny else 50304):
        for dtype in ("float32", "bfloat16"):
            for name, function in ways.items():
                if name == "product" and V > embedding.SMALL_TABLE:
                    continue
                look_up = getattr(embedding, function)
                measured = f"{V}_{dtype}_{name}"
                reporter.attempt(measured, lambda f=look_up, V=V, d=dtype: {"ms": milliseconds(f, V, d)})


def torch(reporter: Reporter) -> None:
    """Part 5."""
    from gpu_train import CONTESTANTS, OURS, last_line, start

    def turn(name: str) -> Result:
        flags = ["--tiny", "--eager"] if reporter.tiny else []
        with tempfile.TemporaryDirectory() as folder:
            done = start(["--shape", "124M", *flags, "--turn", name], folder, platform="cpu")
        if done.returncode != 0:
            raise RuntimeError(last_line(done.stderr))
        result = json.loads(last_line(done.stdout))
        seconds = statistics.median(result["seconds"])
        ours = reporter.out / "step.json"
        ratio = seconds / json.loads(ours.read_text())["step_seconds"] if ours.exists() else None
        return {"step_seconds": seconds, "over ours": ratio, **result}

    for name in [name for name in CONTESTANTS if name != OURS][: 1 if reporter.tiny else None]:
        reporter.attempt(name.split(", ")[1].split()[0], lambda name=name: turn(name))


def train(reporter: Reporter) -> None:
    """Part 6."""
    sizes = {"vocab-size": 256, "context-length": 16, "num-layers": 1, "num-heads": 2, "embed-dim": 16}
    fewer = [word for name, size in sizes.items() for word in (f"--model.{name}", str(size))]
    fewer += ["--model.dtype", "float32", "--training.batch-size", "4", "--training.rows-per-device", "2"]

    def run() -> Result:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, "text.txt")
            text.write_text("\n".join(topics.values()) * (1 if reporter.tiny else 10), encoding="utf-8")
            started = time.perf_counter()
            done = subprocess.run(
                [
                    *(sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "gpt2_124m.toml")),
                    *("--data.path", str(text), "--data.tokenizer", "byte", "--run.folder", f"{folder}/run"),
                    *("--training.num-steps", "20", "--training.log-every", "1", "--training.sample-tokens", "0"),
                    *(fewer if reporter.tiny else []),
                ],
                capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - started
            if done.returncode != 0:
                raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
            rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        later = rows[len(rows) // 2 :]
        return {
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in later),
            "mfu": later[-1]["mfu"],
            "seconds to the first step": rows[0]["seconds"],
            "seconds in all": seconds,
            "last loss": rows[-1]["train_loss"],
            "rows": rows,
        }

    reporter.attempt("", run)


PARTS = {
    "machine": Part(machine, 40),
    "correctness": Part(correctness, 100),
    "step": Part(step, 90),
    "scatter": Part(scatter, 50),
    "torch": Part(torch, 100),
    "train": Part(train, 80),
    **{
        f"variant_{name}": Part(lambda reporter, changes=changes: step(reporter, changes, profiled=False), 45)
        for name, changes in VARIANTS.items()
    },
    **{
        f"variant_{name}": Part(lambda reporter: step(reporter, profiled=False), 45, flags)
        for name, flags in FLAGS.items()
    },
}

if __name__ == "__main__":
    sys.exit(main())
