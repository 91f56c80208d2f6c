"""A trace of a few training steps, which Perfetto and TensorBoard show."""

from pathlib import Path
from typing import Any, Self

import jax

from flax_decoder.config import RunConfig, profiled_steps
from flax_decoder.io.terminal import print_escaped

FOLDER = "profile"


class Profile:
    """Traces the steps of `run.profile`: a context with which a trace ends, whatever ends it."""

    def __init__(self, run: RunConfig, folder: Path, *, writes: bool = True):
        """Prepares a trace in `profile/` of the run folder; only one of several processes writes."""
        self._steps = profiled_steps(run) if writes else range(0)
        self._folder = folder / FOLDER
        self._is_on = False

    def update(self, step: int, results: Any) -> None:
        """Starts or ends the trace, if it is time; it has whole steps, so it waits for `results`, those so far."""
        if self._is_on == (step in self._steps):
            return
        jax.block_until_ready(results)
        if self._is_on:
            self._end()
        else:
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def _end(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()
        traces = sorted(self._folder.rglob("*.trace.json.gz"))
        print_escaped(f"profile: {traces[-1] if traces else self._folder}, for https://ui.perfetto.dev")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            self._end()
