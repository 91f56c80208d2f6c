"""From a path to something that can be run."""

import os
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from flax_decoder.config import load_config
from flax_decoder.data.tokenizer import Tokenizer, load_tokenizer
from flax_decoder.errors import UserError
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.checkpoint import choose_step, restore_params


def load(
    path: str | os.PathLike[str], *, step: int | Literal["latest", "best"] = "latest"
) -> tuple[Decoder, Any, Tokenizer]:
    """Opens a trained model.

    Args:
        path: a run folder.
        step: which checkpoint: the newest, the one with the lowest validation loss, or the one after that many steps.

    Returns:
        The model, its parameters and its tokenizer.

    Raises:
        UserError: there is no such folder, it holds no run, or the run has no such checkpoint.
        FaultError: the checkpoint cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run folder, such as runs/default")
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: is not a run folder: it has no config.toml")
    step = choose_step(folder, step)
    config = load_config(folder / "config.toml")
    model = Decoder(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return model, restore_params(folder, step, shapes), load_tokenizer(folder / "tokenizer.json")
