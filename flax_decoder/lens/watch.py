"""Records attention snapshots while a run trains; see `history` for the files."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_decoder.config import Config
from flax_decoder.data.long_array import Shards
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import make_folder, replacing
from flax_decoder.io.terminal import print_escaped
from flax_decoder.lens import history
from flax_decoder.lens.capture import capture
from flax_decoder.nn.decoder import Decoder
from flax_decoder.parallel.mesh import sharding_of

# How far into the validation split the watched text may begin, so that it begins with a word.
MAX_SKIPPED = 100


class Watch:
    """Records snapshots of a run.

    Attributes:
        folder: the run folder; set it where the folder has been renamed.
        every: steps between two snapshots: `lens.every`, or a multiple of it in a long run; 0 if none are recorded.
    """

    def __init__(
        self, config: Config, folder: Path, tokens_T: np.ndarray, step: int, mesh: Mesh, *, writes: bool = True
    ):
        """Continues the history of a run after `step` steps; snapshots of later steps are deleted.

        A damaged history, or one of another text, is renamed, and a new one begins. Only one of several processes
        writes, but all record: they share the parameters.

        Args:
            config: of the run.
            folder: the run folder.
            tokens_T: the text; see `watched_tokens`.
            step: steps completed.
            mesh: the devices that hold the parameters.
            writes: whether this process writes.

        Raises:
            FaultError: the history cannot be written.
        """
        self.every = config.lens.every
        self.folder = folder
        self._writes = writes
        self._tokens_T = tokens_T
        self._last_step = config.training.num_steps
        self._max = history.max_snapshots(config.model, len(tokens_T))
        self._snapshots: dict[int, str] = {}
        # Scanned layers compile in the same time however many there are. The parameters are the same.
        model = Decoder(dataclasses.replace(config.model, scan_layers=True, remat="none"), config.lora.adapter)
        self._attend = jax.jit(functools.partial(_attend, model), out_shardings=sharding_of(mesh))
        if self.every > 0:
            with as_fault_error(self._folder):
                self._resume(step)
        # A run without snapshots, such as one that began with lens.every = 0, gets its first one here.
        self._first_step = None if self._snapshots else step

    def record(self, step: int, params: Any) -> None:
        """Records a snapshot if one is due after so many steps: every `every` steps, and at the first and last step.

        Raises:
            FaultError: it cannot be written.
        """
        is_due = self.every > 0 and (step % self.every == 0 or step in (self._first_step, self._last_step))
        if not is_due or step in self._snapshots:
            return
        arrays = [np.asarray(array, np.float32) for array in jax.device_get(self._attend(params, self._tokens_T[None]))]
        if not all(np.isfinite(array).all() for array in arrays):
            told = f"lens: attention to the watched text is not finite after step {step}; this snapshot is left out"
            print_escaped(told)
            return
        with as_fault_error(self._folder):
            self._add(step, history.to_bytes(*arrays))

    @property
    def _folder(self) -> Path:
        return self.folder / history.FOLDER

    def _resume(self, step: int) -> None:
        """Reads the existing history, up to `step`."""
        try:
            index, _ = history.read_files(self._folder)
            if index is not None and index.tokens != self._tokens_T.tolist():
                raise BrokenError(f"{self._folder}: is of another text")
        except BrokenError as error:
            index = None
            if self._writes:
                names = (f"{self._folder}.{count}" for count in itertools.count(1))
                free_name = next(name for name in names if not os.path.lexists(name))
                os.rename(self._folder, free_name)
                print_escaped(
                    f"{error};\n{self._folder} is now {os.path.basename(free_name)}, and a new history begins"
                )
        if index is not None:
            self._snapshots = {earlier: digest for earlier, digest in index.snapshots.items() if earlier <= step}
            factor, rest = divmod(index.every, self.every)
            if rest == 0 and factor.bit_count() == 1:  # a power of two: thinned, as in `_add`
                self.every = index.every
        self._write_index()

    def _add(self, step: int, content: bytes) -> None:
        """Adds a snapshot. If there are too many, every other one is deleted."""
        snapshots = self._snapshots | {step: hashlib.sha256(content).hexdigest()}
        while len(snapshots) > self._max:
            self.every *= 2
            kept = [one for one in snapshots if one % self.every == 0 or one == self._last_step]
            snapshots = {one: snapshots[one] for one in kept}
        if self._writes and step in snapshots:
            make_folder(self._folder)
            with replacing(self._folder / f"{step}.npy") as file:
                file.write(content)
        self._snapshots = snapshots
        self._write_index()

    def _write_index(self) -> None:
        if self._writes:
            history.write_index(self._folder, history.Index(self.every, self._tokens_T.tolist(), self._snapshots))


def watched_tokens(config: Config, tokenizer: Tokenizer, validation_tokens: np.ndarray | Shards) -> np.ndarray:
    """tokens_T, the text whose attention is recorded: `lens.prompt`, else the first words of the validation split.

    Raises:
        UserError: the text has no tokens, the tokenizer cannot encode it, or a snapshot would be too large.
    """
    lens, model = config.lens, config.model
    beginning = validation_tokens[: MAX_SKIPPED + lens.prompt_tokens]
    tokens = beginning[_first_word(tokenizer, beginning) :]
    if lens.prompt is not None:
        try:
            tokens = np.array(tokenizer.encode_prompt(lens.prompt))
        except UserError as error:
            raise UserError(f"lens.prompt: {error}") from None
    tokens_T = tokens[: min(lens.prompt_tokens, model.context_length)].astype(np.int32)
    T = len(tokens_T)
    if T == 0:
        raise UserError('lens.prompt = "" has no token; give a text, or leave it out')
    if lens.every > 0 and history.max_snapshots(model, T) < 2:
        raise UserError(
            f"lens.prompt_tokens = {T}: a snapshot of this model takes {history.snapshot_bytes(model, T) / 1e9:,.2f} "
            f"GB of the {history.MAX_BYTES / 1e9:,.0f} GB for all; use fewer tokens, or set lens.every to 0"
        )
    return tokens_T


def _first_word(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """Where the first whole word begins: a split may cut one. 0 if none does soon."""
    pieces = [tokenizer.decode([token]) for token in tokens[:MAX_SKIPPED].tolist() if token < tokenizer.vocab_size]
    for place, (before, piece) in enumerate(itertools.pairwise(pieces), 1):
        is_cut = not (before[-1:].isspace() or piece[:1].isspace())
        if not is_cut and piece.strip()[:1].isalnum():
            return place
    return 0


def _attend(model: Decoder, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    """q_LTNH, k_LTKH and weights_LNTS of a text; under jit, nothing else is computed."""
    names = ("q_rotated", "k_rotated", "weights")
    activations = capture(model, params, tokens_BT, names=names)
    return tuple(activations[name][:, 0] for name in names)


@contextlib.contextmanager
def as_fault_error(folder: Path) -> Iterator[None]:
    """Turns an OSError into a one-line FaultError."""
    try:
        yield
    except OSError as error:
        raise FaultError(f"{error.filename or folder}: cannot write a snapshot: {error.strerror}") from error
