"""What to do next, said at the end of a run."""

import re
import shlex
from pathlib import Path

from flax_decoder.training.metrics import LogRow


def advice(rows: list[LogRow]) -> str:
    """One line on what to try next, given the course of the validation loss."""
    losses = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if len(losses) < 2:
        return "Only one evaluation so far: train longer to see a trend."
    (best_step, best), (last_step, last) = min(losses, key=lambda point: point[1]), losses[-1]
    if last > best * 1.005:
        return (
            f"Validation loss has risen since step {best_step}: overfitting. Try more text, model.dropout, "
            f"a smaller model, or {best_step} steps."
        )
    # Settled: less than half a percent below the loss a fifth of the run ago.
    before = [loss for step, loss in losses if step <= 0.8 * last_step] or [losses[0][1]]
    if last < before[-1] * 0.995:
        return f"Still falling: train longer, for example --training.num-steps {2 * last_step}."
    return "The loss has settled: a larger model or more text would take it further."


def next_commands(folder: Path, sample: str) -> str:
    """Two lines with commands for a finished run; its own sample gives them a prompt that its tokenizer knows."""
    word = re.search(r"[^\W\d_]+", sample)
    arguments = f"{shlex.quote(str(folder))} --prompt {word[0][:20] if word else 'TEXT'}"
    return (
        f"more text:   flax-decoder generate {arguments}\n"
        f"look inside: flax-decoder lens {arguments}; how it works, number by number: docs/tour.md"
    )
