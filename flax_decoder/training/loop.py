"""The story of a run, top to bottom."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.allocator import limit_kept_memory
from flax_decoder.config import Config, TrainingConfig
from flax_decoder.config_file import to_toml
from flax_decoder.data.corpus import BUILT_IN, Corpus
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.generation.generate import generate
from flax_decoder.io.files import write_text
from flax_decoder.io.lock import FolderLock
from flax_decoder.io.terminal import print_escaped
from flax_decoder.lens.watch import Watch, watched_tokens
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import choose_kernel
from flax_decoder.parallel import processes
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.checkpoint import (
    Checkpoints,
    choose_step,
    remove_unfinished,
    require_space,
    restore_state,
    saved_steps,
    steps_folder,
)
from flax_decoder.training.evaluation import evaluate
from flax_decoder.training.flops import UNKNOWN, utilization
from flax_decoder.training.interruption import Interruption
from flax_decoder.training.manifest import MANIFEST
from flax_decoder.training.metrics import MetricsLog, advice, as_row, plot_losses, require_reporters
from flax_decoder.training.non_finite import AGAIN, ANEW, check_finite, skip_batch
from flax_decoder.training.optimizer import learning_rate_schedule, num_updates
from flax_decoder.training.placement import place_batch, require_room
from flax_decoder.training.progress import Progress
from flax_decoder.training.run_folder import facts_of, open_run, saved_config
from flax_decoder.training.step import TrainState, init_state, jit_step

# A little under 1: fewer slips of the pen than the model's own distribution has.
SAMPLE_TEMPERATURE = 0.8
# What the log says of a step that was applied, and what the step calls it.
LOGGED_METRICS = {"train_loss": "loss", "gradient_norm": "gradient_norm"}
# What a finished run leaves, in the order in which it is written.
RESULTS = ("sample.txt", "loss.png")


def train(config: Config, folder: Path) -> int:
    """Trains a model as the config says, or continues to; then writes a sample.

    Args:
        config: the run.
        folder: where it lives.

    Returns:
        0, or where a signal stopped it 128 plus the signal's number; what was done until then is saved.

    Raises:
        UserError: the text, the folder or the settings cannot be used; nothing is written.
        InUseError: another process works in the folder.
        FaultError: the loss is not a number, or something cannot be read or written.
    """
    require_reporters(config.run)
    processes.join(config.distributed)
    # Which process this is belongs to this start, and not to the run.
    alike = dataclasses.replace(config.distributed, coordinator=None, num_processes=None, process_id=None)
    config = dataclasses.replace(config, distributed=alike)
    if not processes.is_first():  # it comes when the first one has made the folder
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="auto"))
    with processes.printing_once():
        return run(config, folder)


def run(config: Config, folder: Path) -> int:
    """The part of `train` that follows once all processes of the job are there."""
    num_devices = jax.device_count()
    choose_kernel(config.model)  # raises where the one asked for does not run here

    def check(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> None:
        require_room(config, num_devices)
        watched_tokens(config, tokenizer, corpus.validation_tokens)

    with FolderLock() as lock:
        owner = lock if processes.is_first() else None
        config, tokenizer, corpus = processes.first_alone(lambda: open_run(config, folder, check, owner))
        done = processes.first_alone(lambda: newest_step(folder) if processes.is_first() else 0)
        done = processes.broadcast(done)
        if processes.broadcast(done >= config.training.num_steps and has_results(folder, done)):
            print(
                f"{folder} is finished: {done} steps are done. Go on with --training.num-steps {2 * done}, "
                "or start another run with --run.folder"
            )
            return 0
        if owner is not None:
            owner.announce()
            remove_unfinished(folder, done)
            write_text(folder / "config.toml", to_toml(config))
        with Interruption() as interruption:
            return train_from(done, config, folder, tokenizer, corpus, interruption)


def train_from(
    done: int, config: Config, folder: Path, tokenizer: Tokenizer, corpus: Corpus, interruption: Interruption
) -> int:
    """Takes the steps after `done` ones, from the start or from their checkpoint, and writes the results."""
    training = config.training
    mesh = make_mesh(config, jax.devices())
    model = Decoder(config.model)
    state = init_state(model, config, rng=jax.random.key(training.seed), mesh=mesh)
    if done > 0:
        state = restore_state(folder, done, state)
        print(f"continuing {folder} from the checkpoint of step {done}")
        known, asked = saved_config(folder).optimizer.warmup_steps, config.optimizer.warmup_steps
        if known != asked:
            print(f"the warm-up has {asked} steps, as the run is now to have {training.num_steps}; it had {known}")
    num_saves = -(-(training.num_steps - done) // training.save_every)
    processes.first_alone(lambda: require_space(folder, state, training.keep_newest, num_saves))
    log = MetricsLog(config.run, folder, done, writes=processes.is_first())
    watched = watched_tokens(config, tokenizer, corpus.validation_tokens)
    watch = processes.first_alone(lambda: Watch(config, folder, watched, done, mesh, writes=processes.is_first()))
    describe(model, state.params, tokenizer, corpus, mesh)
    with use_mesh(mesh), Checkpoints(folder, training.keep_newest, facts_of(config, folder)) as checkpoints:
        state = run_steps(config, model, state, corpus, mesh, checkpoints, log, watch, interruption)
    if not interruption.has_come():
        write_results(config, folder, model, state.params, tokenizer, log)
    if interruption.signal is None:
        return 0
    print(f"stopped by {interruption.signal.name}: saved at step {int(state.step)}; the same command continues")
    return 128 + interruption.signal


def newest_step(folder: Path) -> int:
    """How many steps the newest checkpoint that holds has done; 0 where there is none.

    Raises:
        BrokenError: there are some, but none that holds: to start anew would leave them to be overwritten.
    """
    if saved_steps(folder):
        return choose_step(folder, "latest")
    if (folder / "metrics.jsonl").exists():
        print(f"{folder} has no checkpoint yet: it starts from the beginning")
    return 0


def run_steps(
    config: Config,
    model: Decoder,
    state: TrainState,
    corpus: Corpus,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: MetricsLog,
    watch: Watch,
    interruption: Interruption,
) -> TrainState:
    """Takes steps until all are done or a signal asks to stop; evaluates, looks, saves and reports on the way."""
    training = config.training
    take_step = jit_step(state, mesh)
    schedule = learning_rate_schedule(config.optimizer, training.num_steps)
    tokens_per_step = training.batch_size * config.model.context_length
    step = int(state.step)
    skipped = step - num_updates(state.opt_state)
    stops = step >= training.num_steps  # a run that was killed after its last step has only its results to write
    step_seconds: list[float] = []  # of the steps since the last line of the log
    with Progress(training.num_steps, step, tokens_per_step, log.seconds()) as progress:
        watch.record(step, state.params)
        batch = place_batch(corpus.train_tokens, config, mesh, step)
        while not stops:
            start = time.perf_counter()
            state, metrics = take_step(state, batch)
            step += 1
            next_batch = place_batch(corpus.train_tokens, config, mesh, step)  # read while the devices compute
            metrics = jax.device_get(metrics)  # waits for them
            step_seconds.append(time.perf_counter() - start)
            limit_kept_memory()
            checkpoints.check()
            watch.record(step, state.params)
            if not metrics["applied"]:
                skipped += 1
                print(skip_batch(training, state, batch, metrics, skipped))
            batch = next_batch

            interrupted = interruption.has_come()
            stops = interrupted or step == training.num_steps
            saves = stops or step % training.save_every == 0
            # A signal wants an end soon: it gets its checkpoint, but an evaluation only if it was due.
            evaluates = step % training.eval_every == 0 or (saves and not interrupted)
            if not (saves or evaluates or step % training.log_every == 0):
                continue
            # The median passes over a step that compiled.
            tokens_per_second = tokens_per_step / statistics.median(step_seconds)
            step_seconds.clear()
            row = as_row(
                step,
                tokens=step * tokens_per_step,
                # A step that was not applied may have none, and JSON has no NaN.
                **{name: metrics[key] if metrics["applied"] else UNKNOWN for name, key in LOGGED_METRICS.items()},
                learning_rate=schedule(max(step - skipped - 1, 0)),
                skipped_steps=skipped,
                tokens_per_second=tokens_per_second,
                **utilization(config.model, tokens_per_second, mesh.devices.flat[0].device_kind, mesh.size),
                seconds=progress.seconds(),
            )
            if evaluates or saves:
                check_finite(state)
            if evaluates:
                row |= validate(model, state, corpus, training)
                stops = stops or interruption.has_come()  # it takes long enough for a signal to come
                saves = saves or stops
            log.add(row)
            progress.show(row)
            if saves:
                checkpoints.save(state, row.get("val_loss"))
    return state


def validate(model: Decoder, state: TrainState, corpus: Corpus, training: TrainingConfig) -> dict[str, float]:
    """What the log says of the validation split."""
    result = evaluate(
        model,
        state.params,
        corpus.validation_tokens,
        corpus.validation_bytes,
        batch_size=training.batch_size,
        limit=training.eval_batches,
        loss_chunk_tokens=training.loss_chunk_tokens,
    )
    if not np.isfinite(result["loss"]):
        raise FaultError(
            f"the validation loss is {result['loss']} after step {int(state.step)}; {AGAIN};\nif it comes again, {ANEW}"
        )
    return {"val_loss": result["loss"], "val_bits_per_byte": result["bits_per_byte"]}


def has_results(folder: Path, step: int) -> bool:
    """Whether the results in a run folder are those of the checkpoint at `step`, not of one before."""
    last_result = folder / RESULTS[-1]
    saved = (steps_folder(folder) / str(step) / MANIFEST).stat().st_mtime
    return last_result.exists() and last_result.stat().st_mtime >= saved


def describe(model: Decoder, params: Any, tokenizer: Tokenizer, corpus: Corpus, mesh: Mesh) -> None:
    """Says what is about to be trained, on what, and where."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    if corpus.source == BUILT_IN:
        print("text: Python's own help texts; for your own, put an input.txt here or give --data.path FILE")
    else:
        print(f"text: {corpus.source}")
    print(
        f"      {len(corpus.train_tokens):,} tokens to train on, {len(corpus.validation_tokens):,} to validate, "
        f"vocabulary {tokenizer.vocab_size:,}"
    )
    config = model.config
    print(
        f"model: {num_params:,} parameters, {config.num_layers} layers, {config.num_heads} heads, "
        f"{config.embed_dim} wide, context {config.context_length}; on {describe_mesh(mesh)}"
    )


def describe_mesh(mesh: Mesh) -> str:
    """The devices of a run and how they share the work, in a few words."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1 and jax.device_count() == 1:
        return kind
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    count = f"{mesh.size}" if mesh.size == jax.device_count() else f"{mesh.size} of the {jax.device_count()}"
    return f"{count} devices ({kind})" + (f": {axes}" if axes else "")


def write_results(
    config: Config, folder: Path, model: Decoder, params: Any, tokenizer: Tokenizer, log: MetricsLog
) -> None:
    """What a user looks at afterwards: the curve, the best loss, advice, and a text."""
    sample, curve = (folder / name for name in RESULTS)
    evaluated = [row for row in log.rows if "val_loss" in row]
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_loss"])
        print(
            f"best validation loss {best['val_loss']:.4f} ({best['val_bits_per_byte']:.3f} bits per byte) "
            f"at step {best['step']}; curve in {curve}"
        )
        print(advice(log.rows))
    if config.training.sample_tokens > 0:
        params = processes.all_gather(params)
    if not processes.is_first():
        return
    if config.training.sample_tokens > 0:
        text = write_sample(config, model, params, tokenizer)
        write_text(sample, text)
        print_escaped(f"a sample, also in {sample}:\n\n{text}")
    plot_losses(log.rows, curve)


def write_sample(config: Config, model: Decoder, params: Any, tokenizer: Tokenizer) -> str:
    """A text by the model, out of nothing: it starts from a start token, a newline, or the first token there is."""
    tokens_1T = generate(
        model,
        params,
        np.array([opening(tokenizer)]),
        config.training.sample_tokens,
        jax.random.key(config.training.seed),
        temperature=SAMPLE_TEMPERATURE,
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode(tokens_1T[0]).removeprefix("\n")


def opening(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a text can begin with."""
    if tokenizer.start_id is not None:
        return [tokenizer.start_id]
    try:
        return tokenizer.encode("\n")
    except UserError:  # a char vocabulary without a newline
        return [0]
