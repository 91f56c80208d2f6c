"""Is all in order for a run: what is installed, the devices, the disk, and the model itself, in under a minute."""

import dataclasses
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from flax_decoder.allocator import describe_freed_memory
from flax_decoder.config import Config, OptimizerConfig
from flax_decoder.data.batches import train_batch
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.errors import FaultError
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import choose_kernel
from flax_decoder.parallel.mesh import make_mesh
from flax_decoder.training.checkpoint import Checkpoints, choose_step, restore_state
from flax_decoder.training.hardware import describe_cpu
from flax_decoder.training.step import TrainState, eval_step, init_state, state_maker, train_step

PACKAGES = ("flax-decoder", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Sequences that are to be learned by heart: few, so that it is quick.
ROWS = 4
MAX_STEPS = 400
MAX_SECONDS = 20.0  # for those steps; with all else the whole stays under a minute
# A loss this much smaller than the first one: the sequences are known, not only which tokens are frequent.
LEARNED = 0.1
LEARNED_IN_PART = 0.6
# How far the first loss may be from what is expected: some ten times what it differs by from seed to seed.
TOLERANCE = 0.25
# A model that starts so much above ln V first has to unlearn; nats a token.
MUCH = 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: of the check.
        status: "ok"; "FAILED", something does not do what it must; "warning", the user may want to know.
        what: what was seen, with its numbers.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Literal["ok", "warning", "FAILED"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        """One line, and one more with the advice."""
        return f"{self.name:<12}  {self.status:<7}  {self.what}" + (f"\n{'':21}-> {self.advice}" if self.advice else "")


def examine(config: Config) -> Iterator[Finding]:
    """All checks, from the machine to the model, each when it is done.

    The model is the one of the config, in full, on one device; it learns a few sequences of the text, with an
    optimizer that is quick at that. Nothing is left on the disk.

    Raises:
        UserError: the text or the model cannot be used on these devices.
    """
    yield check_versions()
    yield Finding("processor", "ok", describe_cpu())
    yield Finding("memory", "ok", f"freed memory is {describe_freed_memory()}")
    yield check_devices(config)
    choose_kernel(config.model)
    tokenizer, corpus = prepare_corpus(config.data, config.model.context_length, config.model.vocab_size)
    yield Finding(
        "text", "ok", f"{corpus.source}: {len(corpus.train_tokens):,} tokens, vocabulary {tokenizer.vocab_size:,}"
    )
    config = for_learning_by_heart(config, tokenizer.vocab_size)
    model = Decoder(config.model)
    state_bytes = size_of_state(config)
    place = nearest_folder(Path(config.run.folder or "."))
    disk = check_disk(place, state_bytes, config.training.keep_newest)
    yield disk
    memory = check_memory(config, state_bytes)
    yield memory
    if memory.status != "ok":
        return

    state = init_state(model, config, rng=jax.random.key(config.training.seed))
    yield check_first_loss(state, config)
    batch = train_batch(
        corpus.train_tokens,
        seed=config.training.seed,
        step=0,
        batch_size=config.training.batch_size,
        context_length=config.model.context_length,
    )
    state, finding = check_learning(state, batch)
    yield finding
    # Only now: at the start a model whose outputs begin at zero would not show a leak.
    yield check_no_leak(state, batch["inputs"][:1])
    if disk.status != "FAILED":
        yield check_checkpoint(state, init_state(model, config, rng=jax.random.key(config.training.seed + 1)), place)


def check_versions() -> Finding:
    """What is installed; of use in every report of a fault."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return Finding("versions", "ok", f"python {platform.python_version()}, {versions}")


def check_devices(config: Config) -> Finding:
    """What there is to compute on, and that it makes the mesh; UserError where it does not."""
    devices = jax.devices()
    mesh = make_mesh(config, devices)
    size = memory_bytes()
    memory = "memory unknown" if size is None else f"{size / 1e9:.1f} GB of memory"
    what = f"{len(devices)} x {devices[0].device_kind} ({memory}); a run uses {mesh.size}"
    if mesh.size == len(devices):
        return Finding("devices", "ok", what)
    advice = "the rest stays idle: --training.batch-size must be a multiple of the devices, or set [mesh]"
    return Finding("devices", "warning", what, advice)


def check_disk(folder: Path, state_bytes: int, keep_newest: int) -> Finding:
    """Whether checkpoints can be written where the run is to live."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", "FAILED", f"{folder}: may not be written", "give --run.folder in a place of yours")
    free = shutil.disk_usage(folder).free
    need = (keep_newest + 2) * state_bytes  # the best one, and one that is being written, beside the newest
    what = f"{folder}: {free / 1e9:,.1f} GB free; checkpoints of a run take {need / 1e9:,.3f} GB"
    if free > need:
        return Finding("disk", "ok", what)
    return Finding("disk", "FAILED", what, "free some, keep fewer (--training.keep-newest), or give --run.folder")


def check_memory(config: Config, state_bytes: int) -> Finding:
    """Whether the model can be trained on one device, so that the checks after this one can be done."""
    size, gradients = memory_bytes(), state_bytes / 3
    count = f"{config.model.num_layers} layers, {config.model.embed_dim} wide"
    # Twice: what is restored is compared with what was saved.
    need = 2 * state_bytes + gradients
    what = f"{count}: parameters, optimizer and gradients take {(state_bytes + gradients) / 1e9:,.3f} GB"
    if size is None or need < 0.8 * size:
        return Finding("model", "ok", what)
    return Finding(
        "model",
        "warning",
        f"{what}, too much to check it on one device of {size / 1e9:.1f} GB; the rest is left out",
        "check a smaller one: --model.num-layers 2; whether the whole fits a mesh, flax-decoder plan says",
    )


def check_first_loss(state: TrainState, config: Config) -> Finding:
    """Whether a model that has seen nothing knows nothing: its loss on random tokens is ln V, or little more.

    More it is by the spread of the logits, whose variance is D s^2 (s is init_stddev): half of that; and, where the
    embedding is the head too, because each position rates its own token with about D s, of which learned positions
    take a part (1 / sqrt(2)).
    """
    V, T = config.model.vocab_size or 1, config.model.context_length
    generator = np.random.default_rng(0)
    num_rows = max(config.training.batch_size, math.ceil(1024 / T))
    batch = {name: generator.integers(0, V, (num_rows, T), np.int32) for name in ("inputs", "targets")}
    sums = jax.device_get(jax.jit(eval_step)(state, batch))
    loss = float(sums["loss"] / sums["num_tokens"])
    spread = config.model.embed_dim * config.model.init_stddev**2
    own = math.sqrt(config.model.embed_dim * spread) if config.model.tied_head else 0.0
    above = spread / 2 + (float(np.logaddexp(0.0, own - math.log(V))) if config.model.tied_head else 0.0)
    what = f"{loss:.3f} nats a token; ln V = {math.log(V):.3f} for {V:,} tokens, of which it knows none"
    if not -TOLERANCE <= loss - math.log(V) <= above + TOLERANCE:
        return Finding("first loss", "FAILED", what, "the initial weights or the loss are wrong; look at both")
    if loss - math.log(V) > MUCH:
        advice = "it starts far off: try a smaller --model.init-stddev, or --model.tied-head false"
        return Finding("first loss", "warning", what, advice)
    return Finding("first loss", "ok", what)


def check_learning(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Finding]:
    """Whether a model can learn a few sequences by heart; also gives the state that has."""
    take_step: Callable[..., Any] = jax.jit(train_step, donate_argnums=0)
    losses: list[float] = []
    start = time.perf_counter()
    while len(losses) < MAX_STEPS and (len(losses) < 2 or time.perf_counter() - start < MAX_SECONDS):
        state, metrics = take_step(state, batch)
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]) or losses[-1] < LEARNED * losses[0]:
            break
    rows, T = batch["inputs"].shape
    what = f"{rows} sequences of {T} tokens by heart: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"
    if losses[-1] <= LEARNED * losses[0]:  # also where there is one token only, and nothing to learn
        return state, Finding("learning", "ok", what)
    if len(losses) < MAX_STEPS and losses[-1] < losses[0]:
        what += f", and then {MAX_SECONDS:.0f} s were over"
        return state, Finding("learning", "warning", what, "check a smaller model: --model.num-layers 2")
    if losses[-1] < LEARNED_IN_PART * losses[0]:
        return state, Finding("learning", "warning", what, "it learns, but may be too small to know these by heart")
    return state, Finding("learning", "FAILED", what, "the gradient or the model is wrong: it must learn these")


def check_no_leak(state: TrainState, tokens_1T: np.ndarray) -> Finding:
    """Whether no position sees a later one: other tokens from t on leave all logits before t as they are."""
    V, T = state.params["embedding"].shape[0], tokens_1T.shape[1]
    compute = jax.jit(lambda params, tokens_1T: state.apply_fn({"params": params}, tokens_1T))
    logits_1TV = np.asarray(compute(state.params, tokens_1T))
    places = sorted({1, T // 2, T - 1} - {0, T})
    if V == 1 or not places:
        return Finding("no leak", "ok", "there is one token only, so nothing to see")
    for t in places:
        changed_1T = tokens_1T.copy()
        changed_1T[:, t:] = (changed_1T[:, t:] + 1) % V
        changed_1TV = np.asarray(compute(state.params, changed_1T))
        seen = np.abs(changed_1TV - logits_1TV)[0, :t].max()
        if seen != 0:  # NaN counts too
            what = f"a change from position {t} on moves logits before it by up to {seen:.2g}"
            return Finding(
                "no leak", "FAILED", what, "attention sees later tokens; losses mean nothing until it does not"
            )
        if np.array_equal(changed_1TV[:, t:], logits_1TV[:, t:]):
            what = f"a change from position {t} on changes nothing at all"
            return Finding("no leak", "FAILED", what, "the model does not read its tokens")
    what = f"changes from positions {', '.join(map(str, places))} on leave the logits before as they are, bit by bit"
    return Finding("no leak", "ok", what)


def check_checkpoint(state: TrainState, other: TrainState, place: Path) -> Finding:
    """Whether a saved state comes back into another one bit by bit, on the disk of the run."""
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor_", dir=place) as folder:
            with Checkpoints(Path(folder), keep_newest=1) as checkpoints:
                checkpoints.save(state, None)
            restored = restore_state(Path(folder), choose_step(Path(folder), "latest"), other)
    except (FaultError, OSError) as error:
        return Finding("checkpoint", "FAILED", str(error).splitlines()[0], "look at the disk, or give --run.folder")
    different = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, saved), back in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True)
        if np.asarray(saved).tobytes() != np.asarray(back).tobytes()
    ]
    if different:
        what = f"{different[0]} came back changed" + (f", and {len(different) - 1} more" if len(different) > 1 else "")
        return Finding("checkpoint", "FAILED", what, "trust no run here until the disk and the memory are tested")
    count = len(jax.tree.leaves(state))
    return Finding("checkpoint", "ok", f"{count} arrays came back bit by bit, {time.perf_counter() - start:.1f} s")


def for_learning_by_heart(config: Config, vocab_size: int) -> Config:
    """The same model, without dropout, and an optimizer of the same name that learns a few sequences quickly."""
    parts = config.training.accumulation_steps
    rows = min(config.training.batch_size, parts * max(1, ROWS // parts))
    # Wide models take smaller steps.
    rate = min(5e-3, 0.3 / config.model.embed_dim)
    optimizer = OptimizerConfig(
        name=config.optimizer.name, learning_rate=rate, schedule="constant", warmup_steps=10, weight_decay=0.0
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model.with_vocab_size(vocab_size), dropout=0.0),
        optimizer=optimizer,
        training=dataclasses.replace(config.training, batch_size=rows, num_steps=MAX_STEPS, z_loss=0.0),
    )


def size_of_state(config: Config) -> int:
    """Bytes of a run's parameters and optimizer state; computes nothing."""
    state = jax.eval_shape(state_maker(Decoder(config.model), config), jax.random.key(0))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))


def memory_bytes() -> int | None:
    """Memory of one device, the machine's for a CPU; None where neither says."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None or device.platform != "cpu":
        return limit
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
