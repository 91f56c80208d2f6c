"""A training run from start to end."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flax_decoder.allocator import limit_kept_memory
from flax_decoder.config import Config, TrainingConfig
from flax_decoder.config_file import to_toml
from flax_decoder.data.listing import BUILT_IN
from flax_decoder.data.splits import Corpus, Mixture
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.generation.generate import generate
from flax_decoder.io.files import write_text
from flax_decoder.io.lock import FolderLock
from flax_decoder.io.place import Place
from flax_decoder.io.terminal import print_escaped
from flax_decoder.lens.watch import Watch, watched_tokens
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import choose_kernel, slower_attention
from flax_decoder.nn.params import abstract_params
from flax_decoder.nn.precision import rounding_of_products
from flax_decoder.parallel import processes
from flax_decoder.parallel.launchers import idle_part
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.advice import advice, changes_of_schedule, how_to_prolong, next_commands
from flax_decoder.training.average import swapped
from flax_decoder.training.batch import Batch
from flax_decoder.training.checkpoint import (
    Checkpoints,
    choose_step,
    remove_unfinished,
    require_space,
    restore_state,
    saved_steps,
    steps_folder,
)
from flax_decoder.training.environment import changes_since
from flax_decoder.training.evaluation import evaluate_batches
from flax_decoder.training.flops import UNKNOWN, utilization
from flax_decoder.training.interruption import Interruption
from flax_decoder.training.manifest import MANIFEST, read_manifest
from flax_decoder.training.metrics import (
    LOG,
    LogRow,
    MetricsLog,
    evaluations_since_best,
    log_row,
    losses_of_sources,
    plot_losses,
    read_metrics,
    require_reporters,
)
from flax_decoder.training.non_finite import CONTINUE_HINT, RESTART_HINT, check_finite, skip_batch
from flax_decoder.training.optimizer import learning_rate_schedule, num_updates
from flax_decoder.training.placement import place_batch, require_room
from flax_decoder.training.profile import Profile, profiling
from flax_decoder.training.progress import Progress
from flax_decoder.training.run_folder import facts_of, open_run, read_base, saved_config
from flax_decoder.training.run_id import RUN_ID, read_id
from flax_decoder.training.start import Start
from flax_decoder.training.step import Metrics, TrainState, init_state, jit_step, require_adapters, state_shardings

# Slightly under 1: fewer unlikely tokens than in the model's own distribution.
SAMPLE_TEMPERATURE = 0.8
# Files of a finished run, in the order in which they are written.
RESULTS = ("sample.txt", "loss.png")


def train(config: Config, folder: Path, start: Start | None = None) -> int:
    """Starts or resumes a run in a folder, trains it to its end, and writes a sample.

    Args:
        config: the run; its model is that of `start`, if there is one.
        folder: the run folder.
        start: the weights of a new run; None draws them.

    Returns:
        0, or 128 plus the number of the signal that stopped the run; all completed steps are saved.

    Raises:
        UserError: the text, the folder or the settings cannot be used; nothing is written.
        InUseError: another process has locked the folder.
        FaultError: the loss is not finite, or a file cannot be read or written.
        LostProcessError: another process of the job has ended, or no longer answers.
    """
    require_reporters(config.run)
    processes.join(config.distributed)
    # Which process this is belongs to this start, and not to the run.
    alike = dataclasses.replace(config.distributed, coordinator=None, num_processes=None, process_id=None)
    config = dataclasses.replace(config, distributed=alike)
    if not processes.is_first():  # the first process has created the folder by the time this one opens it
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="auto"))
    with processes.telling_of_lost(), processes.printing_once():
        return run(config, folder, start)


def run(config: Config, folder: Path, start: Start | None = None) -> int:
    """`train`, after all processes of the job have joined."""
    choose_kernel(config.model, has_documents=config.data.document_mask)  # raises if it does not run here

    def check(config: Config, tokenizer: Tokenizer, corpus: Corpus | Mixture) -> None:
        choose_kernel(config.model, has_documents=corpus.train.has_segments)
        require_room(config, jax.device_count())
        require_adapters(config)
        watched_tokens(config, tokenizer, corpus.validation.tokens)

    with FolderLock() as lock:
        owner = lock if processes.is_first() else None
        config, tokenizer, corpus = processes.first_alone(lambda: open_run(config, folder, check, owner, start))
        done = processes.first_alone(lambda: newest_step(folder) if processes.is_first() else 0)
        done = processes.broadcast(done)
        if owner is not None:
            remove_unfinished(folder, done)
        rows = read_metrics(folder / LOG) if config.training.patience > 0 else []
        is_settled = has_settled([row for row in rows if row["step"] <= done], config.training)
        is_over = done >= config.training.num_steps or is_settled
        if processes.broadcast(is_over and has_results(folder, done)):
            print_escaped(
                f"{folder} is finished after {done} steps. {how_to_go_on(config, done, is_settled=is_settled)}"
            )
            return 0
        with contextlib.ExitStack() as stack:
            place = None
            if owner is not None:
                place = stack.enter_context(Place(folder))
                owner.announce(read_id(folder / RUN_ID))
                # Of fewer steps; a clock that was set back would let it look like that of these.
                (folder / RESULTS[-1]).unlink(missing_ok=True)
                write_text(folder / "config.toml", to_toml(config))
            interruption = stack.enter_context(Interruption(place))
            return train_from(done, config, folder, tokenizer, corpus, interruption, start)


def train_from(
    done: int,
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    corpus: Corpus | Mixture,
    interruption: Interruption,
    start: Start | None = None,
) -> int:
    """Trains from step `done`, restoring its checkpoint unless it is 0, and writes the results."""
    training = config.training
    mesh = make_mesh(config, jax.devices())
    model = Decoder(config.model, config.lora.adapter)
    params = None if start is None else start.params
    if params is None and config.lora.rank is not None:  # the run has a copy of what stays as it is
        params = read_base(folder, abstract_params(model, state_shardings(mesh, abstract_params(model))))
    state = init_state(model, config, rng=jax.random.key(training.seed), mesh=mesh, params=params)
    if done > 0:
        state = restore_state(folder, done, state)
        print_escaped(f"continuing {folder} from the checkpoint of step {done}")
        if changes := changes_since(read_manifest(steps_folder(folder) / str(done))):
            print_escaped(f"the last digits may differ from those of an undisturbed run: {changes}")
        for change in changes_of_schedule(saved_config(folder), config, done):
            print_escaped(change)
    num_saves = math.ceil((training.num_steps - done) / training.save_every)
    processes.first_alone(lambda: require_space(folder, state, training.keep_newest, num_saves))
    log = MetricsLog(config.run, folder, done, read_id(folder / RUN_ID), writes=processes.is_first())
    watched = watched_tokens(config, tokenizer, corpus.validation.tokens)
    watch = processes.first_alone(lambda: Watch(config, folder, watched, done, mesh, writes=processes.is_first()))
    describe(model, state, tokenizer, corpus, training, mesh)
    facts = facts_of(config, folder)
    with use_mesh(mesh), Checkpoints(folder, training.keep_newest, facts, interruption.place) as checkpoints:
        interruption.writers = [log, watch, checkpoints]
        slower = slower_attention(config.model, has_documents=corpus.train.has_segments)
        if slower is not None and mesh.shape["context"] == 1:
            print_escaped(slower)
        schedule = learning_rate_schedule(config.optimizer, training.num_steps)
        if start is not None and not log.rows:  # what the steps will gain
            log.add(before := log_row(step=0, tokens=0, **validate(model, state, corpus, training)))
            print_escaped(f"started from {start.path}: validation {before['val_loss']:.4f} before the first step")
        with profiling(config.run, folder, writes=processes.is_first()) as profile:
            recorders = checkpoints, log, watch, profile
            state = run_steps(training, schedule, model, state, corpus, mesh, *recorders, interruption)
    if not interruption.requested():
        with use_mesh(mesh):
            params = swapped(state).all_params
            write_results(config, folder, interruption, model, params, tokenizer, corpus, log)
    if interruption.renamed is not None:
        raise FaultError(
            f"{folder}: was renamed to {interruption.renamed} while it trained; saved there at step {int(state.step)}: "
            "the same command with that --run.folder continues"
        )
    if interruption.signal is None:
        return 0
    saved = f"saved at step {int(state.step)}; the same command continues"
    if interruption.output_error is not None:
        raise FaultError(f"standard output: {interruption.output_error.strerror}; {saved}")
    print_escaped(f"stopped by {interruption.signal.name}: {saved}")
    return 128 + interruption.signal


def newest_step(folder: Path) -> int:
    """The step of the newest valid checkpoint; 0 if there are no checkpoints.

    Raises:
        BrokenError: all checkpoints are damaged; to start from step 0 would overwrite them.
    """
    if saved_steps(folder):
        return choose_step(folder, "latest")
    if (folder / LOG).exists():
        print_escaped(f"{folder} has no checkpoint yet: it starts from the beginning")
    return 0


def run_steps(
    training: TrainingConfig,
    schedule: optax.Schedule,
    model: Decoder,
    state: TrainState,
    corpus: Corpus | Mixture,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: MetricsLog,
    watch: Watch,
    profile: Profile,
    interruption: Interruption,
) -> TrainState:
    """Trains until all steps are done or a signal arrives; evaluates, records, saves and logs on the way."""
    T = model.config.context_length
    take_step = jit_step(state, mesh, deterministic=training.deterministic)
    tokens_per_step = training.batch_size * T
    step = int(state.step)
    skipped = step - num_updates(state.opt_state)
    # A run killed after its last step only lacks its results.
    stops = step >= training.num_steps or has_settled(log.rows, training)
    adapters = None if state.frozen is None else sum(leaf.size for leaf in jax.tree.leaves(state.params))
    step_seconds: list[float] = []  # since the last line of the log
    with Progress(training.num_steps, step, tokens_per_step, log.seconds()) as progress:
        watch.record(step, state.all_params)
        batch = place_batch(corpus.train, training, T, mesh, step)
        unread: list[tuple[int, Batch, Metrics]] = []  # of the last steps
        start = time.perf_counter()
        while not stops:
            profile.update(step, state)
            is_interrupted = interruption.ask()
            state, metrics = take_step(state, batch)
            step += 1
            unread.append((step, batch, metrics))
            batch = place_batch(corpus.train, training, T, mesh, step)  # while the devices compute
            jax.block_until_ready(unread[:-1])  # no more than one step ahead of the devices: a signal must not wait
            interrupted = is_interrupted()
            checkpoints.check()
            watch.record(step, state.all_params)

            stops = interrupted or step == training.num_steps
            saves = stops or step % training.save_every == 0
            # After a signal, time is short: the state is saved, but evaluated only if an evaluation is due.
            evaluates = step % training.eval_every == 0 or (saves and not interrupted)
            logs = saves or evaluates or step % training.log_every == 0
            # One step behind, so that the devices already have the next one; at once where a line or a save needs them.
            while len(unread) > (0 if logs else 1):
                done, its_batch, metrics = unread.pop(0)
                metrics = jax.device_get(metrics)  # waits for the devices
                if not metrics["applied"]:
                    skipped += 1
                    print_escaped(skip_batch(training, state, done, its_batch, metrics, skipped))
            limit_kept_memory()
            end = time.perf_counter()
            step_seconds.append(end - start)  # from one step to the next, with all that the loop does between them
            start = end
            if not logs:
                continue
            # The median ignores a step that compiled.
            tokens_per_second = tokens_per_step / statistics.median(step_seconds)
            step_seconds.clear()
            row = log_row(
                step=step,
                tokens=step * tokens_per_step,
                # JSON has no NaN, which the metrics of a step that was not applied may be.
                train_loss=metrics["loss"] if metrics["applied"] else UNKNOWN,
                gradient_norm=metrics["gradient_norm"] if metrics["applied"] else UNKNOWN,
                learning_rate=schedule(max(step - skipped - 1, 0)),
                skipped_steps=skipped,
                tokens_per_second=tokens_per_second,
                **utilization(model.config, tokens_per_second, mesh.devices.flat[0].device_kind, mesh.size, adapters),
                seconds=progress.seconds(),
            )
            if evaluates or saves:
                check_finite(state)
            if evaluates:
                row |= validate(model, state, corpus, training)
                stops = stops or interruption.requested()  # a signal may have arrived during the evaluation
                stops = stops or has_settled([*log.rows, row], training)
                saves = saves or stops
            log.add(row)
            progress.update(row)
            if saves:
                checkpoints.save(state, row.get("val_loss"))
            start = time.perf_counter()  # evaluations and checkpoints are no part of a step
    return state


def has_settled(rows: list[LogRow], training: TrainingConfig) -> bool:
    """Whether `training.patience` is over: the validation loss has not been lower for so many evaluations."""
    return 0 < training.patience <= evaluations_since_best(rows)


def how_to_go_on(config: Config, done: int, *, is_settled: bool) -> str:
    """What continues a finished run, which may have ended before its last step."""
    if is_settled and done < config.training.num_steps:
        return "Its validation loss no longer fell: --step best is its best model, and --training.patience 0 continues"
    return f"Continue with {how_to_prolong(config.optimizer, done)}, or start another run with --run.folder"


def validate(model: Decoder, state: TrainState, corpus: Corpus | Mixture, training: TrainingConfig) -> dict[str, float]:
    """Evaluates the validation split; returns its log entries. Of a mixture: those of each source, and their mean.

    Where the state keeps an average of the weights, that is evaluated, and the entries say so.
    """
    entries: dict[str, float] = {"val_loss": 0.0, "val_bits_per_byte": 0.0}
    averaged = swapped(state)
    if averaged is not state:
        entries["val_of_average"] = 1
    shape = {"batch_size": training.batch_size, "context_length": model.config.context_length}
    for source in corpus.sources:
        split = source.corpus.validation
        result = evaluate_batches(
            model,
            averaged.all_params,
            split.validation_batches(**shape, limit=training.eval_batches),
            num_learned=split.num_learned,
            num_bytes=split.num_bytes,
            loss_chunk_tokens=training.loss_chunk_tokens,
        )
        if not np.isfinite(result["loss"]):
            raise FaultError(
                f"the validation loss is {result['loss']} after step {int(state.step)}; {CONTINUE_HINT};\n"
                f"if it happens again, {RESTART_HINT}"
            )
        for name, value in (("val_loss", result["loss"]), ("val_bits_per_byte", result["bits_per_byte"])):
            entries[name] += source.weight * value
            if source.name:
                entries[f"{name}/{source.name}"] = value
    num_rows = int(state.step) * training.batch_size
    return entries | corpus.tokens_read(num_rows, model.config.context_length, training.seed)


def has_results(folder: Path, step: int) -> bool:
    """Whether the results in a run folder are newer than the checkpoint at `step`."""
    last_result = folder / RESULTS[-1]
    saved = (steps_folder(folder) / str(step) / MANIFEST).stat().st_mtime
    return last_result.exists() and last_result.stat().st_mtime >= saved


def describe(
    model: Decoder,
    state: TrainState,
    tokenizer: Tokenizer,
    corpus: Corpus | Mixture,
    training: TrainingConfig,
    mesh: Mesh,
) -> None:
    """Prints the text, the model and the devices."""
    built_in = "Python's own help texts; for your own, put an input.txt here or give --data.path FILE"
    config = model.config
    learning, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
    source = built_in if corpus.source == BUILT_IN else corpus.source
    what_was_read = corpus.describe(training.num_steps * training.batch_size, config.context_length)
    num_validation = sum(one.corpus.validation.num_tokens for one in corpus.sources)
    lines = "".join(f"{line}\n      " for line in what_was_read.splitlines())
    print_escaped(
        f"text: {source}\n      {lines}"
        f"{corpus.train.num_tokens:,} tokens to train on, {num_validation:,} to validate, "
        f"vocabulary {tokenizer.vocab_size:,}\n"
        f"model: {learning:,} parameters{f' beside {frozen:,} that stay' if frozen else ''}, "
        f"{config.num_layers} layers, {config.num_heads} heads, {config.embed_dim} wide, "
        f"context {config.context_length}; on {describe_mesh(mesh)}"
    )
    if swapped(state) is not state:
        print_escaped("evaluated, sampled and loaded is the average of the weights (optimizer.ema_decay)")
    if rounds := rounding_of_products(config, mesh.devices.flat[0].platform):
        print_escaped(rounds)
    if idle := idle_part(os.environ, jax.local_device_count()):
        print_escaped(idle)


def describe_mesh(mesh: Mesh) -> str:
    """The devices of a run and the axes of their mesh."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1 and jax.device_count() == 1:
        return kind
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    count = f"{mesh.size}" if mesh.size == jax.device_count() else f"{mesh.size} of the {jax.device_count()}"
    return f"{count} devices ({kind})" + (f": {axes}" if axes else "")


def write_results(
    config: Config,
    folder: Path,
    interruption: Interruption,
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    corpus: Corpus | Mixture,
    log: MetricsLog,
) -> None:
    """Writes a sample and the loss curve, then prints the best loss, advice and the sample."""
    training = config.training
    if training.sample_tokens > 0:  # by all processes: the parameters stay where they are
        text = generate_sample(training, model, params, tokenizer)
    if not processes.is_first():
        return
    folder = interruption.folder(folder)  # it may have been renamed meanwhile
    sample, curve = (folder / name for name in RESULTS)
    if training.sample_tokens > 0:
        write_text(sample, text)
    plot_losses(log.rows, curve)
    evaluated = [row for row in log.rows if "val_loss" in row]
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_loss"])
        print_escaped(
            f"best validation loss {best['val_loss']:.4f} ({best['val_bits_per_byte']:.3f} bits per byte) "
            f"at step {best['step']}{losses_of_sources(best)}; curve in {curve}"
        )
        epochs = corpus.train.epochs(log.rows[-1]["step"] * training.batch_size, model.config.context_length)
        num_steps, V = training.num_steps, tokenizer.vocab_size
        print_escaped(advice(log.rows, config.optimizer, num_steps=num_steps, epochs=epochs, vocab_size=V))
    if training.sample_tokens > 0:
        print_escaped(f"a sample, also in {sample}:\n\n{text}\n")
        print_escaped(next_commands(folder, text))


def generate_sample(training: TrainingConfig, model: Decoder, params: Any, tokenizer: Tokenizer) -> str:
    """A text by the model, without a prompt."""
    prompt, rng = np.array([opening(tokenizer)]), jax.random.key(training.seed)
    options: dict[str, Any] = {"temperature": SAMPLE_TEMPERATURE, "vocab_size": tokenizer.vocab_size}
    tokens_1T = generate(model, params, prompt, training.sample_tokens, rng, **options)
    return tokenizer.decode(tokens_1T[0]).removeprefix("\n")


def opening(tokenizer: Tokenizer) -> list[int]:
    """Tokens to start a text with: the start token, a newline, or else the first token of the vocabulary."""
    if tokenizer.start_id is not None:
        return [tokenizer.start_id]
    try:
        return tokenizer.encode("\n")
    except UserError:  # a char vocabulary without a newline
        return [0]
