"""Shared by the benchmarks: timing, memory of the process, random models and batches."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import Config
from flax_decoder.config_file import load_config


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def mib_level(name: str) -> float:
    """Memory of this process in MiB: "VmRSS" now, or "VmHWM" at its peak; Linux only.

    Raises:
        OSError: on other systems.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of random tokens: inputs and targets, int32 (B, T)."""
    shape = (config.training.batch_size, config.model.context_length)
    tokens_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return {"inputs": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1)}


def random_model(settings: dict[str, Any]) -> tuple[Any, Any]:
    """A model with random weights, and its params."""
    import jax  # here, because some processes must not load it

    import flax_decoder as fd

    model = fd.Decoder(load_config(None, settings).model)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
