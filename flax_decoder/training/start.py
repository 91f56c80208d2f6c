"""A trained model that a run starts from, in place of random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.training.step import TrainState


@dataclass(frozen=True)
class Start:
    """What a run takes from another model.

    Attributes:
        path: where it was read.
        hashes: SHA-256 of its weights, by file.
        params: its parameters.
        tokenizer: its tokenizer, with start and end tokens.
        kept: the files that say how it chats and samples, such as its chat template, by name.
    """

    path: Path
    hashes: Mapping[str, str]
    params: Any
    tokenizer: Tokenizer
    kept: Mapping[str, bytes]

    def give(self, state: TrainState) -> TrainState:
        """The state with these parameters, laid out over devices as its own are; the optimizer is as new."""
        placed = jax.tree.map(
            lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), self.params, state.params
        )
        return state.replace(params=placed)

    def record(self) -> dict[str, Any]:
        """What the run folder keeps of where it began."""
        return {"path": str(self.path.absolute()), "sha256": dict(self.hashes)}
