"""What to do next, said at the end of a run: as someone would who looks at its curves, its text and its rate."""

import collections
import math
import re
import shlex
from pathlib import Path

from flax_decoder.config import Config, OptimizerConfig
from flax_decoder.training.metrics import LogRow
from flax_decoder.training.optimizer import learning_rate_schedule

# Parts of the loss. What changes by less is flat: evaluations of one model on two halves of a text differ by as much.
FLAT = 0.005
# A run that gains less in its second half gains little in twice the steps.
GAIN = 0.02
# A training loss further below the validation loss shows a model that knows its text better than others.
GAP = 0.1
# Means of a few batches differ by less.
RISE = 0.05
# A loss above this part of ln V is that of frequent tokens at best.
GUESSING = 0.95


def advice(rows: list[LogRow], optimizer: OptimizerConfig, *, num_steps: int, epochs: float, vocab_size: int) -> str:
    """What to try next, in one line or two, after a run that has read its training text so many times."""
    points = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if len(points) < 2:
        count = "Only one evaluation" if points else "No evaluation"
        often = f"--training.eval-every {max(num_steps // 10, 1)}"
        return f"{count} so far, which shows no trend: train longer, or evaluate more often, as with {often}."
    best_step, best = min(points, key=lambda point: point[1])
    last_step, last = points[-1]
    if last > best * (1 + FLAT):
        if last < points[-2][1] * (1 - FLAT):
            return f"Validation loss falls again, after it rose from step {best_step} on: train longer."
        return _of_a_rise(rows, best_step, last_step, optimizer, epochs)
    guess, peak = math.log(vocab_size), optimizer.learning_rate
    if last > GUESSING * guess:
        return (
            f"The loss is still near ln V = {guess:.2f}, that of a guess: train longer; if it stays there, "
            f"try --optimizer.learning-rate {3 * peak:.1g} or {peak / 3:.1g}."
        )
    if _is_falling(points, optimizer, num_steps):
        return f"Still falling: train longer. {_how_to_go_on(optimizer, num_steps)}"
    rate = _rate(optimizer, num_steps, num_steps - 1)
    if rate > 0.5 * peak:
        return (
            "The loss is flat at the full learning rate: let the rate fall in the end, with --optimizer.schedule "
            "cosine or wsd\nin another --run.folder, before you try a larger model."
        )
    if epochs < 1:
        return (
            f"The loss is flat, but the learning rate has fallen to {rate:.2g}, and only {epochs:.0%} of the training "
            f"text was read: train longer. {_how_to_go_on(optimizer, num_steps)}"
        )
    train = _train_loss(rows, last_step)
    if train is not None and train < last * (1 - GAP):
        return (
            f"The loss has settled, that of training at {train:.2f}: more text or model.dropout would take it further, "
            "a larger model would not."
        )
    return "The loss has settled, with that of training near it: a larger model would take it further."


def _of_a_rise(rows: list[LogRow], best_step: int, last_step: int, optimizer: OptimizerConfig, epochs: float) -> str:
    """The advice where the validation loss has been lower, at `best_step`."""
    before, train = _train_loss(rows, best_step), _train_loss(rows, last_step)
    since = f"Validation loss has risen since step {best_step}"
    if before is not None and train is not None and train > before * (1 + RISE):
        return (
            f"{since}, and training loss too: the learning rate is too high. "
            f"Try --optimizer.learning-rate {optimizer.learning_rate / 3:.1g} in another --run.folder."
        )
    if epochs < 1:
        return (
            f"{since}, though no text was read twice: the end of the text, which is kept for validation,\n"
            "may be unlike the rest of it. Shuffle the documents."
        )
    return (
        f"{since}: overfitting, after the text was read {epochs:.1f} times. Try more text, model.dropout,\n"
        f"a smaller model, or {best_step} steps. The best model is kept: --step best."
    )


def how_to_prolong(optimizer: OptimizerConfig, num_steps: int) -> str:
    """The settings with which a finished run goes on for as many steps again; its rate does not jump."""
    longer = f"--training.num-steps {2 * num_steps}"
    return f"{longer} {_restart(optimizer, num_steps)}" if _jumps(optimizer, num_steps) else longer


def changes_of_schedule(saved: Config, config: Config, done: int) -> list[str]:
    """What a run that goes on with other settings than it had does differently from step `done` on, a line each."""
    lines = []
    known, asked = saved.optimizer.warmup_steps, config.optimizer.warmup_steps
    if known != asked:
        lines.append(
            f"the warm-up has {asked} steps instead of {known}, as the run now has {config.training.num_steps}"
        )
    last, rate = (_rate(one.optimizer, one.training.num_steps, done) for one in (saved, config))
    if f"{last:.2g}" != f"{rate:.2g}":
        line = f"the learning rate goes on at {rate:.2g} instead of {last:.2g}"
        if done in config.optimizer.restarts:
            line += ", where its schedule begins anew"
        elif rate > last:
            line += f"; {_restart(config.optimizer, done)} would let it rise with a warm-up and fall anew"
        lines.append(line)
    return lines


def _how_to_go_on(optimizer: OptimizerConfig, num_steps: int) -> str:
    longer = f"--training.num-steps {2 * num_steps}"
    if not _jumps(optimizer, num_steps):
        return f"{longer} goes on at the same learning rate."
    stable = f"before step {num_steps - round(optimizer.decay_fraction * num_steps)}, where the rate begins to fall"
    next_time = (
        f"prolong it {stable}"
        if optimizer.schedule == "wsd"
        else "with --optimizer.schedule wsd, prolong the run before its rate falls"
    )
    return (
        f"Best is a new run with {longer} and another --run.folder.\n"
        f"To continue this one, add {_restart(optimizer, num_steps)}: rate and loss rise again, then fall. "
        f"Next time, {next_time}."
    )


def _is_falling(points: list[tuple[int, float]], optimizer: OptimizerConfig, num_steps: int) -> bool:
    """Whether the validation loss has fallen in the second half of a run, or in its last fifth.

    The fall that comes with the end of a wsd schedule comes once, however long the run is: what is before it counts.
    """
    if optimizer.schedule == "wsd":
        stable = [point for point in points if point[0] <= (1 - optimizer.decay_fraction) * num_steps]
        points = stable if len(stable) > 1 else points
    last_step, last = points[-1]
    for part, fall in ((0.5, GAIN), (0.8, FLAT)):
        before = [loss for step, loss in points[:-1] if step <= part * last_step] or [points[0][1]]
        if last < min(before) * (1 - fall):
            return True
    return False


def _train_loss(rows: list[LogRow], step: int) -> float | None:
    """Mean training loss of the tenth of the steps up to a step, as single batches vary; None if none is known."""
    losses = [row.get("train_loss") for row in rows if 0.9 * step < row["step"] <= step]
    known = [loss for loss in losses if isinstance(loss, int | float)]
    return sum(known) / len(known) if known else None


def _rate(optimizer: OptimizerConfig, num_steps: int, step: int) -> float:
    return float(learning_rate_schedule(optimizer, num_steps)(step))


def _jumps(optimizer: OptimizerConfig, num_steps: int) -> bool:
    """Whether the learning rate is another one at once when a finished run gets twice the steps."""
    return _rate(optimizer, 2 * num_steps, num_steps) > 1.05 * _rate(optimizer, num_steps, num_steps - 1)


def _restart(optimizer: OptimizerConfig, step: int) -> str:
    steps = [*optimizer.restarts, step]
    return f"--optimizer.restarts {shlex.quote(str(steps)) if optimizer.restarts else step}"


def next_commands(folder: Path, sample: str) -> str:
    """Two lines with commands for a finished run; the most frequent word of its sample is a prompt that it knows."""
    words = collections.Counter(re.findall(r"[^\W\d_]{3,}", sample) or re.findall(r"[^\W\d_]+", sample)).most_common(1)
    arguments = f"{shlex.quote(str(folder))} --prompt {words[0][0][:20] if words else 'TEXT'}"
    return (
        f"more text: flax-decoder generate {arguments}\n"
        f"look inside (docs/tour.md explains it, number by number): flax-decoder lens {arguments}"
    )
