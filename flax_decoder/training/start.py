"""A trained model that a run starts from, in place of random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_decoder.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Start:
    """What a run takes from another model.

    Attributes:
        path: where it was read.
        hashes: SHA-256 of its weights, by file.
        params: its parameters.
        tokenizer: its tokenizer, with start and end tokens.
        kept: the files that say how it chats and samples, such as its chat template, by name.
        model_type: that of its Hugging Face folder, if it is one: what others call its tensors.
    """

    path: Path
    hashes: Mapping[str, str]
    params: Any
    tokenizer: Tokenizer
    kept: Mapping[str, bytes]
    model_type: str | None = None

    def record(self) -> dict[str, Any]:
        """What the run folder keeps of where it began."""
        record = {"path": str(self.path.absolute()), "sha256": dict(self.hashes)}
        return record if self.model_type is None else record | {"model_type": self.model_type}
