"""A trained model that a run starts from, in place of random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_decoder.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Start:
    """What a run takes from another model."""

    path: Path  # where it was read
    hashes: Mapping[str, str]  # SHA-256 of its weights, by file
    params: Any
    tokenizer: Tokenizer  # with start and end tokens
    kept: Mapping[str, bytes]  # the files that say how it chats and samples, such as its chat template, by name
    model_type: str | None = None  # that of its Hugging Face folder, if it is one: what others call its tensors

    def record(self) -> dict[str, Any]:
        """What the run folder keeps of where it began."""
        record = {"path": str(self.path.absolute()), "sha256": dict(self.hashes)}
        return record if self.model_type is None else record | {"model_type": self.model_type}
