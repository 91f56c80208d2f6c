"""Loads, converts and compares models, given the path of a run folder or of a Hugging Face folder."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flax_decoder.config import Config, DataConfig
from flax_decoder.config_file import load_config, to_toml
from flax_decoder.data.tokenizer import Tokenizer, write_tokenizer
from flax_decoder.errors import FaultError, UserError, as_path, require_type
from flax_decoder.huggingface.choice import choose_family
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.folder import (
    is_model_folder,
    read_family,
    read_folder,
    read_tokenizer,
    write_folder,
    write_special_tokens,
)
from flax_decoder.io.files import new_folder, write_text
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import for_these_devices
from flax_decoder.nn.params import abstract_params
from flax_decoder.training.checkpoint import read_checkpoint, restore_params, save_params
from flax_decoder.training.run_folder import facts_of, require_same_inputs, require_same_model

if TYPE_CHECKING:
    from flax_decoder.comparison.ledger import Ledger


def load(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    shardings: Any = None,
    allow_nan: bool = False,
    strict: bool = False,
) -> tuple[Decoder, Any, Tokenizer | None]:
    """Loads a trained model.

    Args:
        path: a run folder, or a Hugging Face folder (config.json, model.safetensors, tokenizer.json).
        step: the checkpoint of a run: the newest, the one with the lowest validation loss, or that of a step.
        shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them like the parameters; each parameter
            is read straight onto its devices. None means the default device.
        allow_nan: accept a Hugging Face folder with NaN or infinite weights; runs have none.
        strict: refuse a Hugging Face folder with a setting that is not known, also where its name does not belong to
            the network; by default such a setting is passed over with a `FolderWarning`.

    Returns:
        The model, its parameters, and its tokenizer: None for a Hugging Face folder without tokenizer.json.

    Raises:
        UserError: there is no such folder, model or checkpoint, the Hugging Face folder is not supported, or a sharding
            does not fit its parameter, or `step` is none of these.
        FaultError: the checkpoint cannot be read.
    """
    folder = Path(as_path(path))
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run folder, such as runs/default")
    if _is_run_folder(folder):
        return _load_run(folder, step, shardings)
    if not is_model_folder(folder):
        raise UserError(
            f"{folder}: is not a run folder: it has no config.toml; nor a Hugging Face folder: it has no config.json"
        )
    if step != "latest":
        raise UserError(f"{folder}: is a Hugging Face folder and has no checkpoints to choose from; leave out --step")
    return read_folder(folder, shardings, allow_nan=allow_nan, strict=strict)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    allow_nan: bool = False,
    strict: bool = False,
) -> None:
    """Converts a run folder to a Hugging Face folder, or the reverse.

    Args:
        source: the folder to read; its kind decides the direction.
        destination: the new folder, which must not exist or be empty; it is written atomically.
        model_type: the Hugging Face model type to write; None means the one that fits the model best.
        allow_nan: see `load`.
        strict: see `load`.

    Raises:
        UserError: `source` cannot be read, `destination` is in use, or no model type can express the model.
        FaultError: `destination` cannot be written.
    """
    source, destination = Path(as_path(source)), Path(as_path(destination))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: exists and is not empty; give a new folder to convert into")
    to_run = source.is_dir() and not _is_run_folder(source)
    model, params, tokenizer = load(source, allow_nan=allow_nan, strict=strict)
    if to_run and model_type is not None:
        raise UserError(f"{source}: is converted to a run folder, which has no model type; leave out --model-type")
    try:
        with new_folder(destination) as unfinished:
            if to_run:
                _write_run(unfinished, model, params, _required(tokenizer, source))
            else:
                family = choose_family(model.config, str(source), model_type)
                write_folder(unfinished, model.config, params, tokenizer, family)
    except OSError as error:
        raise FaultError(f"{destination}: cannot be written: {error}") from error


def compare(
    path: str | os.PathLike[str] | None = None,
    *,
    steps: int = 0,
    model: Decoder | None = None,
    params: Any = None,
    torch_model: Any = None,
    allow_nan: bool = False,
    strict: bool = False,
    **settings: Any,
) -> "Ledger":
    """Compares a model with PyTorch, tensor by tensor: `assert fd.compare("my_model").holds`.

    PyTorch's side is the model of `transformers`. What no model type there can express is compared with its twin in
    `comparison/torch_decoder.py`; so is a model without a folder.

    Args:
        path: a Hugging Face folder, or a run folder, which is first written as one to a temporary folder. None compares
            `model` and `params`.
        steps: AdamW steps to compare, after the forward pass and the gradients.
        model: a model to compare in place of the one in `path`.
        params: parameters to compare in place of those in `path`.
        torch_model: a model of `transformers` in place of the one in `path`; it is not changed.
        allow_nan: see `load`.
        strict: see `load`.
        **settings: tx, optimizer, batch_size, length, accumulation_steps, seed; see `compare_models`.

    Returns:
        The rows, whether all hold, and the cause if one does not; `str` makes a table of it.

    Raises:
        UserError: `path` cannot be read, or is left out without a model and params; a setting cannot be compared;
            `torch_model` is of another architecture; or PyTorch is not installed.
    """
    folder = None if path is None else Path(as_path(path))
    if model is not None:
        require_type("model", model, Decoder)
    try:
        import torch

        from flax_decoder.comparison.compare import compare_models
        from flax_decoder.comparison.torch_decoder import TABLE, TorchDecoder, make_twin
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise UserError(
            f'comparing needs {error.name}, which is not installed: pip install "flax-decoder[torch]"'
        ) from None
    if torch_model is not None:
        require_type("torch_model", torch_model, torch.nn.Module)
    if path is not None:
        saved_model, saved_params, tokenizer = load(path, allow_nan=allow_nan, strict=strict)
    elif model is not None and params is not None:
        saved_model, saved_params, tokenizer = model, params, None
    else:
        raise UserError("compare needs a folder, or both model and params")
    config, notes = saved_model.config, tuple[str, ...]()
    model_folder = folder if folder is not None and not _is_run_folder(folder) else None
    if torch_model is None and folder is None:
        torch_model = make_twin(config, saved_params)
    if isinstance(torch_model, TorchDecoder):
        family = TABLE
    elif torch_model is not None:
        family = read_family(model_folder) if model_folder else choose_family(config, str(path or "model"))
    else:
        torch_model, family, notes = _pytorch_model(saved_model, saved_params, tokenizer, model_folder, str(path))
    model, params = model or saved_model, saved_params if params is None else params
    ledger = compare_models(model, params, torch_model, family, steps=steps, **settings)
    return dataclasses.replace(ledger, notes=(*notes, *ledger.notes))


def _pytorch_model(
    model: Decoder, params: Any, tokenizer: Tokenizer | None, model_folder: Path | None, source: str
) -> tuple[Any, Family, tuple[str, ...]]:
    """The model of transformers in a folder or, for a run, in which ours can be written; else the twin of ours.

    Returns:
        The model, the names of its tensors, and notes for the ledger.
    """
    from flax_decoder.comparison.torch_decoder import TABLE, make_twin
    from flax_decoder.comparison.torch_side import open_model

    if model_folder is not None:
        return open_model(model_folder), read_family(model_folder), ()
    try:
        family = choose_family(model.config, source)
    except UserError as error:
        note = f"{error}. PyTorch's side is the twin in flax_decoder/comparison/torch_decoder.py."
        return make_twin(model.config, params), TABLE, (note,)
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(temporary), model.config, params, tokenizer, family)
        return open_model(Path(temporary)), family, ()


def load_with_tokenizer(
    path: str | os.PathLike[str],
    step: int | Literal["latest", "best"],
    *,
    allow_nan: bool = False,
    strict: bool = False,
) -> tuple[Decoder, Any, Tokenizer]:
    """As `load`, but raises UserError if there is no tokenizer."""
    model, params, tokenizer = load(path, step=step, allow_nan=allow_nan, strict=strict)
    return model, params, _required(tokenizer, Path(path))


def _required(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"{folder}: has no tokenizer.json; make one from its other tokenizer files:\n"
            f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        )
    return tokenizer


def _is_run_folder(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def _load_run(folder: Path, step: int | Literal["latest", "best"], shardings: Any) -> tuple[Decoder, Any, Tokenizer]:
    return read_checkpoint(folder, step, lambda step: _read_run(folder, step, shardings))


def _read_run(folder: Path, step: int, shardings: Any) -> tuple[Decoder, Any, Tokenizer]:
    config = load_config(folder / "config.toml")
    require_same_model(folder, config)
    require_same_inputs(folder, ["tokenizer.json"])
    model = Decoder(for_these_devices(config.model))
    tokenizer = _required(read_tokenizer(folder), folder)
    return model, restore_params(folder, step, abstract_params(model, shardings)), tokenizer


def _write_run(folder: Path, model: Decoder, params: Any, tokenizer: Tokenizer) -> None:
    """Writes a run folder of a model that was trained elsewhere; its only checkpoint is that of step 0."""
    write_tokenizer(folder / "tokenizer.json", tokenizer)
    write_special_tokens(folder, tokenizer)
    config = Config(model=model.config, data=DataConfig(tokenizer="tokenizer.json"))
    write_text(folder / "config.toml", to_toml(config))
    save_params(folder, 0, params, facts_of(config, folder))
