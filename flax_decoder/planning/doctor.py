"""Checks what a run needs, in some 30 seconds: installation, devices, disk, text, and the model itself."""

import dataclasses
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.allocator import describe_freed_memory
from flax_decoder.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from flax_decoder.data.corpus import prepare_corpus, require_fit
from flax_decoder.errors import FaultError
from flax_decoder.huggingface.folder import read_tokenizer
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import choose_kernel
from flax_decoder.parallel.mesh import make_mesh
from flax_decoder.training.checkpoint import Checkpoints, choose_step, restore_state
from flax_decoder.training.environment import versions
from flax_decoder.training.hardware import describe_cpu
from flax_decoder.training.placement import device_bytes
from flax_decoder.training.run_folder import model_folder
from flax_decoder.training.step import TrainState, eval_step, init_state, state_maker, train_step

NUM_SEQUENCES = 4  # to memorize
MAX_STEPS, MAX_SECONDS = 400, 20.0  # when memorizing ends: steps, and seconds since the start of the command
SKIP_SECONDS = 30.0  # on a machine that is slower still, the checks that would begin later are left out
MIN_STEPS = 20  # before them, the warm-up and chance decide more than the model
# Fractions of the first loss. Below the first one the sequences are known, and not just which tokens are frequent.
MEMORIZED, LEARNED = 0.1, 0.6
# Nats per token of the first loss below ln V, about ten times the difference between seeds, and above it: logits that
# vary by init_stddev add some, but a model that starts far above ln V first has to unlearn.
LOSS_TOLERANCE, MAX_EXCESS_LOSS = 0.25, 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check: what it found, and what to do about it unless it is "ok"."""

    name: str
    status: Literal["ok", "warning", "FAILED"]
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        """One line, and a second one with the advice."""
        advice = "" if self.status == "ok" else f"\n{'':21}-> {self.advice}"
        return f"{self.name:<12}  {self.status:<7}  {self.detail}{advice}"


def examine(config: Config) -> Iterator[Finding]:
    """Yields the finding of each check as soon as it is done, from the installation to the model.

    The model of the config is built in full size on one device, and memorizes a few sequences of the text with an
    optimizer that is quick at that. Nothing stays on the disk.

    Raises:
        UserError: the text or the model cannot be used on these devices.
    """
    start = time.perf_counter()
    yield check_versions(version("jaxlib"), jax.default_backend())
    yield Finding("processor", "ok", describe_cpu())
    yield Finding("memory", "ok", f"freed memory is {describe_freed_memory()}")
    yield check_devices(config)
    choose_kernel(config.model)
    source = model_folder(config)
    given = None if config.run.start_from is None or source is None else read_tokenizer(source)
    with tempfile.TemporaryDirectory() as temporary:
        # What is mapped outlives its file.
        tokenizer, corpus = prepare_corpus(
            config.data, Path(temporary), given, model_folder=source, context_length=config.model.context_length
        )
        require_fit(corpus, tokenizer, config.data, config.model.context_length, config.model.vocab_size)
        train = corpus.arranged(config.data).train
    yield Finding("text", "ok", f"{corpus.source}: {train.num_tokens:,} tokens, vocabulary {tokenizer.vocab_size:,}")

    config = memorizing(config, tokenizer.vocab_size)
    model, training, rng = Decoder(config.model), config.training, jax.random.key(config.training.seed)
    leaves = jax.tree.leaves(jax.eval_shape(state_maker(model, config), rng))
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    folder = Path(config.run.folder or ".")
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    disk = check_disk(folder, state_bytes, training.keep_newest)
    yield disk
    memory = check_memory(config.model, state_bytes)
    yield memory
    if memory.status != "ok":
        return
    state = init_state(model, config, rng=rng)
    yield check_first_loss(state, config.model)
    rows, T = training.batch_size, config.model.context_length
    batch = train.train_batch(seed=training.seed, step=0, batch_size=rows, context_length=T)
    state, finding = check_learning(state, batch, time.perf_counter() - start)
    yield finding
    # After training: the outputs of an untrained model may be zero, which would hide a leak.
    rest = {"no leak": lambda: check_no_leak(state, batch["inputs"][:1])}
    if disk.status != "FAILED":
        rest["checkpoint"] = lambda: check_checkpoint(state, folder)
    for name, check in rest.items():
        seconds = time.perf_counter() - start
        skipped = f"left out, as {seconds:.0f} s have passed: this machine is slow, or busy"
        advice = "run it again when it is idle, or with a smaller model: --model.num-layers 1"
        yield check() if seconds < SKIP_SECONDS else Finding(name, "warning", skipped, advice)


def check_versions(jaxlib: str, backend: str) -> Finding:
    """Lists the versions, and checks for a jaxlib that is slow on this kind of device."""
    found = {"python": platform.python_version(), **versions()}
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    numbers = tuple(int(number) for number in re.findall(r"\d+", jaxlib)[:3])
    # Its compiler adds to a row in memory by trying until no other thread has changed it (jax issue 38806).
    if backend == "gpu" and (0, 10, 2) <= numbers < (0, 11, 1):
        advice = 'gradients of embeddings may be very slow with it: pip install -U "jax[cuda13]>=0.11.1", '
        return Finding("versions", "warning", detail, advice + "which needs Python 3.12")
    return Finding("versions", "ok", detail)


def check_devices(config: Config) -> Finding:
    """Checks that a run uses all devices; UserError if they do not make its mesh."""
    devices = jax.devices()
    mesh = make_mesh(config, devices)
    memory = f"{device_bytes(1) / 1e9:.1f} GB of memory"
    detail = f"{len(devices)} x {devices[0].device_kind} ({memory}); a run uses {mesh.size}"
    advice = "the rest stays idle: make --training.batch-size a multiple of the devices, or set [mesh]"
    return Finding("devices", "ok" if mesh.size == len(devices) else "warning", detail, advice)


def check_disk(folder: Path, state_bytes: int, keep_newest: int) -> Finding:
    """Checks that the checkpoints of a run can be written to a folder."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", "FAILED", f"{folder}: is not writable", "set --run.folder to a folder that is")
    free = shutil.disk_usage(folder).free
    needed = (keep_newest + 2) * state_bytes  # beside the newest: the best one, and one that is being written
    detail = f"{folder}: {free / 1e9:,.1f} GB free; checkpoints of a run take {needed / 1e9:,.3f} GB"
    advice = "free some, keep fewer (--training.keep-newest), or set --run.folder"
    return Finding("disk", "ok" if free > needed else "FAILED", detail, advice)


def check_memory(model: ModelConfig, state_bytes: int) -> Finding:
    """Checks that one device has room for the checks that follow."""
    available, gradients = device_bytes(1), state_bytes / 3
    # Two states: the restored one is compared with the saved one.
    fits = 2 * state_bytes + gradients < 0.8 * available
    size = f"{model.num_layers} layers, {model.embed_dim} wide"
    detail = f"{size}: parameters, optimizer and gradients take {(state_bytes + gradients) / 1e9:,.3f} GB"
    if not fits:
        detail += f", too much to check it on one device of {available / 1e9:.1f} GB; the rest is left out"
    advice = "check a smaller one: --model.num-layers 2; flax-decoder plan says whether the full one fits a mesh"
    return Finding("model", "ok" if fits else "warning", detail, advice)


def check_first_loss(state: TrainState, model: ModelConfig) -> Finding:
    """Checks that the loss of an untrained model on random tokens is about ln V: it knows nothing."""
    V, T = model.vocab_size or 1, model.context_length
    generator = np.random.default_rng(0)
    shape = max(NUM_SEQUENCES, math.ceil(1024 / T)), T
    batch = {name: generator.integers(0, V, shape, np.int32) for name in ("inputs", "targets")}
    sums = jax.device_get(jax.jit(eval_step)(state, batch))
    loss, expected = float(sums["loss"] / sums["num_tokens"]), math.log(V)
    detail = f"{loss:.3f} nats per token; ln V = {expected:.3f} for {V:,} tokens, of which it knows none"
    if not expected - LOSS_TOLERANCE <= loss < math.inf:  # also NaN
        return Finding("first loss", "FAILED", detail, "the initial weights or the loss are wrong")
    if loss > expected + MAX_EXCESS_LOSS:
        advice = "it starts far off: try a smaller --model.init-stddev, or --model.tied-head false"
        return Finding("first loss", "warning", detail, advice)
    return Finding("first loss", "ok", detail)


def check_learning(state: TrainState, batch: Mapping[str, Any], seconds: float = 0.0) -> tuple[TrainState, Finding]:
    """Checks that a model can memorize a batch, `seconds` after the start; also returns the trained state."""
    take_step: Callable[..., Any] = jax.jit(train_step, donate_argnums=0)
    losses: list[float] = []
    start = time.perf_counter() - seconds
    while len(losses) < MAX_STEPS and (len(losses) < 2 or time.perf_counter() - start < MAX_SECONDS):
        state, metrics = take_step(state, batch)
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]) or losses[-1] < MEMORIZED * losses[0]:
            break
    rows, T = batch["inputs"].shape
    first, last, steps = losses[0], losses[-1], len(losses)
    detail = f"{rows} sequences of {T} tokens by heart: loss {first:.3f} -> {last:.3f} in {steps} steps"
    if last <= MEMORIZED * first:  # equal if both are 0: a vocabulary of one token
        return state, Finding("learning", "ok", detail)
    advice = ""
    if steps < min(MIN_STEPS, MAX_STEPS):
        advice = f"too few steps to tell: this machine made no more in {MAX_SECONDS:.0f} s; run it when it is idle"
    elif steps < MAX_STEPS and last < first:
        advice = f"it learns; for all of it this machine would need more than {MAX_SECONDS:.0f} s, which is no fault"
    elif last < LEARNED * first:
        advice = f"it learns, but not all in {MAX_STEPS} steps: it may be too small for these sequences"
    if advice and math.isfinite(last):
        return state, Finding("learning", "warning", detail, advice)
    return state, Finding("learning", "FAILED", detail, "the gradient or the model is wrong: it must learn these")


def check_no_leak(state: TrainState, tokens_1T: np.ndarray) -> Finding:
    """Checks causality: other tokens from position t on leave all logits before t bitwise the same."""
    V, T = state.params["embedding"].shape[0], tokens_1T.shape[1]
    if V == 1 or T == 1:
        return Finding("no leak", "ok", "there is one token only, so nothing can leak")
    compute = jax.jit(lambda params, tokens_1T: state.apply_fn({"params": params}, tokens_1T))
    logits_1TV = np.asarray(compute(state.params, tokens_1T))
    positions = sorted({1, T // 2, T - 1})
    for t in positions:
        other_1T = np.where(np.arange(T)[None] < t, tokens_1T, (tokens_1T + 1) % V)
        other_1TV = np.asarray(compute(state.params, other_1T))
        change = np.abs(other_1TV - logits_1TV)[:, :t].max()
        if change != 0:  # also NaN
            detail = f"a change from position {t} on moves logits before it by up to {change:.2g}"
            return Finding("no leak", "FAILED", detail, "attention sees later tokens, so losses mean nothing")
        if np.array_equal(other_1TV[:, t:], logits_1TV[:, t:]):
            detail = f"a change from position {t} on changes no logits at all"
            return Finding("no leak", "FAILED", detail, "the model does not read its tokens")
    starts = ", ".join(map(str, positions))
    detail = f"changes from positions {starts} on leave the logits before as they are, bit by bit"
    return Finding("no leak", "ok", detail)


def check_checkpoint(state: TrainState, folder: Path) -> Finding:
    """Checks that a state saved in a folder is restored bit by bit."""
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder) as run:
            with Checkpoints(Path(run), keep_newest=1) as checkpoints:
                checkpoints.save(state, None)
            zeros = jax.tree.map(jnp.zeros_like, state)
            restored = restore_state(Path(run), choose_step(Path(run), "latest"), zeros)
    except (FaultError, OSError) as error:
        return Finding("checkpoint", "FAILED", str(error).splitlines()[0], "check the disk, or set --run.folder")
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True))
    num_changed = sum(np.asarray(saved).tobytes() != np.asarray(back).tobytes() for saved, back in pairs)
    if num_changed:
        detail, advice = f"{num_changed} of {len(pairs)} arrays came back changed", "test the disk and the memory"
        return Finding("checkpoint", "FAILED", detail, advice)
    seconds = time.perf_counter() - start
    return Finding("checkpoint", "ok", f"{len(pairs)} arrays came back bit by bit, {seconds:.1f} s")


def memorizing(config: Config, vocab_size: int) -> Config:
    """The same model without dropout, with exact products, and the same kind of optimizer, set to memorize a little."""
    model = dataclasses.replace(config.model.with_vocab_size(vocab_size), dropout=0.0, matmul_precision="highest")
    rate = min(5e-3, 0.3 / model.embed_dim)  # wide models take smaller steps
    optimizer = OptimizerConfig(
        name=config.optimizer.name, learning_rate=rate, schedule="constant", warmup_steps=10, weight_decay=0.0
    )
    parts = config.training.accumulation_steps
    rows = min(config.training.batch_size, parts * max(1, NUM_SEQUENCES // parts))
    training = dataclasses.replace(config.training, batch_size=rows, num_steps=MAX_STEPS, z_loss=0.0)
    return dataclasses.replace(config, model=model, optimizer=optimizer, lora=LoraConfig(), training=training)
