"""The learning rate of each step in plain Python, for PyTorch."""

import math

from flax_decoder.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int, step: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `num_steps`.

    Independent of `training.optimizer`, so that each can reveal a mistake in the other.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = num_steps // 20 if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    length = max(num_steps - warmup, 1)
    part = min((step - warmup) / length, 1.0)
    if config.schedule == "cosine":
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * part))
    if config.schedule == "linear":
        return peak + (end - peak) * part
    if config.schedule == "wsd":
        decay = min(round(config.decay_fraction * num_steps), length)
        return peak + (end - peak) * min(max(step - (num_steps - decay), 0) / max(decay, 1), 1.0)
    return peak
