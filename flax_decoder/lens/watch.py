"""Watching a run while it learns: every so many steps, a look at what its attention does with one text."""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import replacing
from flax_decoder.lens.capture import capture
from flax_decoder.lens.history import (
    FOLDER,
    MAX_BYTES,
    Index,
    moment_bytes,
    most_moments,
    read_index,
    read_moments,
    to_bytes,
    write_index,
)
from flax_decoder.nn.decoder import Decoder
from flax_decoder.parallel.mesh import sharding_of


class Watch:
    """Keeps moments of a run as it goes on.

    Attributes:
        every: steps between two moments, as many as `lens.every` or, in a long run, more; 0 where none are kept.
    """

    def __init__(
        self, config: Config, folder: Path, tokens_T: np.ndarray, step: int, mesh: Mesh, *, writes: bool = True
    ):
        """Opens the history of a run that stands at `step`; moments after it, which will come again, are dropped.

        A history of another text, or one that is damaged, is set aside under another name, and a new one begins. Of
        several processes only one writes; the others look too, as all must that share an array.

        Args:
            config: the run.
            folder: of the run.
            tokens_T: the text; see `watched_tokens`.
            step: how many steps were done.
            mesh: the devices that hold the parameters.
            writes: whether this is the process that writes.

        Raises:
            FaultError: the history cannot be written.
        """
        self.every = config.lens.every
        self._folder = folder / FOLDER
        self._writes = writes
        self._tokens_T = tokens_T
        self._last_step = config.training.num_steps
        self._most = most_moments(config.model, len(tokens_T))
        self._moments: dict[int, str] = {}
        # A loop over the layers compiles in the same time however many there are. The parameters are the same.
        model = Decoder(dataclasses.replace(config.model, scan_layers=True, remat="none"))
        self._attend = jax.jit(functools.partial(_attend, model), out_shardings=sharding_of(mesh))
        if self.every > 0:
            with as_fault_error(self._folder):
                self._take_up(step)
        # A run that has no moment yet, such as one from before there was a lens, gets one where it stands.
        self._first_step = None if self._moments else step

    def look(self, step: int, params: Any) -> None:
        """Keeps a moment, if one is due: every so many steps, at the first and at the last.

        Args:
            step: how many steps were done.
            params: the parameters after them; under the mesh of the run.

        Raises:
            FaultError: it cannot be written.
        """
        is_due = self.every > 0 and (step % self.every == 0 or step in (self._first_step, self._last_step))
        if not is_due or step in self._moments:
            return
        arrays = [np.asarray(array, np.float32) for array in jax.device_get(self._attend(params, self._tokens_T[None]))]
        if not all(np.isfinite(array).all() for array in arrays):
            print(f"lens: attention to the watched text is not finite after step {step}; this moment is left out")
            return
        content = to_bytes(*arrays)
        with as_fault_error(self._folder):
            self._keep(step, content)

    def _take_up(self, step: int) -> None:
        """Goes on with the history that is there, as far as it is of this text and not of a later step."""
        try:
            index = read_index(self._folder)
            if index is not None:
                if index.tokens != self._tokens_T.tolist():
                    raise BrokenError(f"{self._folder}: is of another text")
                read_moments(self._folder, index)
        except BrokenError as error:
            index = None
            self._set_aside(error)
        if index is not None:
            self._moments = {kept: digest for kept, digest in index.moments.items() if kept <= step}
            times, rest = divmod(index.every, self.every)
            if rest == 0 and times.bit_count() == 1:  # it was doubled when there were too many moments
                self.every = index.every
        self._write_index()

    def _set_aside(self, error: BrokenError) -> None:
        """Renames what cannot be gone on with: it may still be worth something to its owner."""
        if self._writes:
            names = (f"{FOLDER}.{count}" for count in range(1, 1_000_000))
            aside = next(path for path in map(self._folder.with_name, names) if not os.path.lexists(path))
            os.rename(self._folder, aside)
            print(f"{error};\n{self._folder} is now {aside.name}, and a new history begins")

    def _keep(self, step: int, content: bytes) -> None:
        """Adds a moment; where there are then too many, every other one goes."""
        moments = self._moments | {step: hashlib.sha256(content).hexdigest()}
        while len(moments) > self._most:
            self.every *= 2
            kept = [one for one in moments if one % self.every == 0 or one == self._last_step]
            moments = {one: moments[one] for one in kept}
        if self._writes and step in moments:
            with replacing(self._folder / f"{step}.npy") as file:
                file.write(content)
        self._moments = moments
        self._write_index()

    def _write_index(self) -> None:
        if self._writes:
            write_index(self._folder, Index(self.every, self._tokens_T.tolist(), self._moments))


def watched_tokens(config: Config, tokenizer: Tokenizer, validation_tokens: np.ndarray) -> np.ndarray:
    """tokens_T, the text on which a run is watched.

    Args:
        config: the run; its `lens`.
        tokenizer: of the run.
        validation_tokens: whose beginning it is where the config gives no text.

    Raises:
        UserError: the text has no tokens or cannot be expressed in them, or its moments would take too much room.
    """
    lens, model = config.lens, config.model
    tokens = validation_tokens
    if lens.prompt is not None:
        try:
            tokens = np.array(tokenizer.encode_prompt(lens.prompt))
        except UserError as error:
            raise UserError(f"lens.prompt: {error}") from None
    tokens_T = tokens[: min(lens.prompt_tokens, model.context_length)].astype(np.int32)
    T = len(tokens_T)
    if T == 0:
        raise UserError('lens.prompt = "" has no token; give a text, or leave it out')
    if lens.every > 0 and most_moments(model, T) < 2:
        raise UserError(
            f"lens.prompt_tokens = {T}: a moment of this model takes {moment_bytes(model, T) / 1e9:,.2f} GB, and a "
            f"whole history at most {MAX_BYTES / 1e9:,.0f}; give fewer, or set lens.every to 0"
        )
    return tokens_T


def _attend(model: Decoder, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    """q_LTNH, k_LTKH and weights_LNTS of a text; what else the model would compute, the compiler leaves out."""
    names = ("q_rotated", "k_rotated", "weights")
    seen = capture(model, params, tokens_BT, names=names)
    return tuple(seen[name][:, 0] for name in names)


@contextlib.contextmanager
def as_fault_error(folder: Path) -> Iterator[None]:
    """Turns what goes wrong with files into a fault with one line."""
    try:
        yield
    except OSError as error:
        raise FaultError(f"{error.filename or folder}: cannot keep a moment: {error.strerror}") from error
