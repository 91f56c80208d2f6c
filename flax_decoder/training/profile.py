"""A trace of a few training steps, which Perfetto and TensorBoard show."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from flax_decoder.config import RunConfig, profiled_steps
from flax_decoder.io.terminal import print_escaped

FOLDER = "profile"


class Profile:
    """Traces the steps of `run.profile`."""

    def __init__(self, run: RunConfig, folder: Path, *, writes: bool = True):
        """Prepares a trace in `profile/` of the run folder; only one of several processes writes."""
        self._steps = profiled_steps(run) if writes else range(0)
        self._folder = folder / FOLDER
        self._is_on = False

    def update(self, step: int, results: Any) -> None:
        """Starts or ends the trace, if it is time.

        Args:
            step: steps that the devices have been given.
            results: their results, arrays, which a trace waits for: it has whole steps.
        """
        if self._is_on == (step in self._steps):
            return
        jax.block_until_ready(results)
        if self._is_on:
            self.end()
        else:
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def end(self) -> None:
        """Ends the trace, if it has begun, and says where it is."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            traces = sorted(self._folder.rglob("*.trace.json.gz"))
            print_escaped(f"profile: {traces[-1] if traces else self._folder}, for https://ui.perfetto.dev")


@contextlib.contextmanager
def profiling(run: RunConfig, folder: Path, *, writes: bool = True) -> Iterator[Profile]:
    """A `Profile` that ends with the block, whatever ends it."""
    profile = Profile(run, folder, writes=writes)
    try:
        yield profile
    finally:
        profile.end()
