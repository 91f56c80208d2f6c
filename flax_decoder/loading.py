"""Loads, converts and compares models: run folders, Hugging Face folders, and files of PyTorch."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flax_decoder.config import Config, ModelConfig
from flax_decoder.config_file import load_config
from flax_decoder.data.corpus import read_text
from flax_decoder.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from flax_decoder.errors import UserError, as_path, require_type
from flax_decoder.huggingface.adapter import is_adapter_folder, read_adapter, write_adapter
from flax_decoder.huggingface.choice import choose_family, require_expressible
from flax_decoder.huggingface.families import FAMILIES, NANOGPT
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.folder import (
    is_model_folder,
    read_family,
    read_folder,
    read_kept_files,
    read_model_config,
    read_tokenizer,
    write_folder,
)
from flax_decoder.huggingface.nanogpt import model_entries, read_model, write_checkpoint
from flax_decoder.huggingface.own_layout import read_own_model
from flax_decoder.huggingface.torch_file import find_state_dict, read_torch_file
from flax_decoder.huggingface.weights import flatten
from flax_decoder.io.files import as_write_fault, expand_home, new_folder, replacing, sha256_of, write_text
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.choice import for_these_devices
from flax_decoder.nn.lora import merged
from flax_decoder.nn.params import abstract_params
from flax_decoder.training.checkpoint import choose_step, read_checkpoint, restore_params, steps_folder
from flax_decoder.training.manifest import MANIFEST
from flax_decoder.training.nanogpt_entries import training_entries
from flax_decoder.training.run_folder import (
    BASE_MANIFEST,
    START_FROM,
    read_adapters,
    read_base,
    require_same_inputs,
    require_same_model,
    start_record,
    write_run,
)
from flax_decoder.training.start import Start

if TYPE_CHECKING:
    from flax_decoder.comparison.ledger import Ledger


def load(
    path: str | os.PathLike[str],
    *,
    step: int | Literal["latest", "best"] = "latest",
    shardings: Any = None,
    allow_nan: bool = False,
    strict: bool = False,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    unstacked: bool = False,
) -> tuple[Decoder, Any, Tokenizer | None]:
    """Loads a trained model.

    Args:
        path: a run folder, a Hugging Face folder (config.json, model.safetensors, tokenizer.json), or a ckpt.pt of
            nanoGPT, which needs PyTorch.
        step: the checkpoint of a run: the newest, the one with the lowest validation loss, or that of a step.
        shardings: one `jax.sharding.Sharding` for all parameters, or a tree of them like the parameters; each parameter
            is read straight onto its devices. None means the default device.
        allow_nan: accept NaN or infinite weights of a Hugging Face folder or a file; runs have none.
        strict: refuse a Hugging Face folder with a setting that is not known, also where its name does not belong to
            the network; by default such a setting is passed over with a `FolderWarning`.
        tokenizer: that of a model that comes without one: "char:FILE", the characters of a text, sorted, as nanoGPT
            numbers them; or the path of a tokenizer.json, or of a folder with one.
        dtype: of a Hugging Face folder: that in which the model computes and its parameters are held. None means
            parameters in float32. A folder in bfloat16 then takes the memory of its file.
        unstacked: of a Hugging Face folder: parameters as `unstack_layers` makes them, for generation, without its
            second copy of the layers.

    Returns:
        The model, its parameters, and its tokenizer: None for a file, or a Hugging Face folder without tokenizer.json,
        unless `tokenizer` says which.

    Raises:
        UserError: there is no such folder, model or checkpoint, the Hugging Face folder or the file is not supported,
            or a sharding does not fit its parameter, or `step` is none of these, or the tokenizer does not fit.
        FaultError: the checkpoint cannot be read.
    """
    folder = Path(as_path(path))
    if not os.path.lexists(folder):
        raise UserError(f"{folder}: there is no such folder or file; give a run folder, such as runs/default")
    if (dtype is not None or unstacked) and not (folder.is_dir() and is_model_folder(folder)):
        raise UserError(f"{folder}: is no Hugging Face folder, of which alone dtype and unstacked can be chosen")
    if not folder.is_dir():
        if step != "latest":
            raise UserError(f"{folder}: is one checkpoint and has none to choose from; leave out --step")
        model, params = read_model(read_torch_file(folder), folder, shardings, allow_nan=allow_nan)
        return model, params, _named_tokenizer(tokenizer, model.config.vocab_size)
    if _is_run_folder(folder):
        _refuse_second_tokenizer(folder, tokenizer)
        return read_checkpoint(folder, step, lambda step: _read_run(folder, step, shardings))
    if is_adapter_folder(folder):
        raise UserError(f"{folder}: holds an adapter; give it its base: flax-decoder convert {folder} RUN --base BASE")
    if not is_model_folder(folder):
        raise UserError(
            f"{folder}: is not a run folder: it has no config.toml; nor a Hugging Face folder: it has no config.json"
        )
    if step != "latest":
        raise UserError(f"{folder}: is a Hugging Face folder and has no checkpoints to choose from; leave out --step")
    model, params, own_tokenizer = read_folder(
        folder, shardings, allow_nan=allow_nan, strict=strict, dtype=dtype, unstacked=unstacked
    )
    if own_tokenizer is not None:
        _refuse_second_tokenizer(folder, tokenizer)
        return model, params, own_tokenizer
    return model, params, _named_tokenizer(tokenizer, model.config.vocab_size)


def model_config_of(path: Path) -> ModelConfig:
    """The settings of a trained model; its weights are not read where there is another way. Raises as `load`."""
    if path.is_dir() and _is_run_folder(path):
        return load_config(path / "config.toml").model
    return read_model_config(path) if path.is_dir() and is_model_folder(path) else load(path)[0].config


def read_start(path: Path, tokenizer: str | None = None) -> Start:
    """A trained model for a run to start from; `tokenizer` as in `load`. Raises as `load`, also without a tokenizer."""
    step: int | Literal["latest"] = choose_step(path, "latest") if _is_run_folder(path) else "latest"
    _, params, found = load(path, step=step, tokenizer=tokenizer)
    if step != "latest":
        files = [steps_folder(path) / str(step) / MANIFEST]
    else:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    model_type = read_family(path).model_type if path.is_dir() and step == "latest" else None
    return Start(
        path,
        {file.name: sha256_of(file) for file in files},
        params,
        required_tokenizer(found, path),
        kept=read_kept_files(path) if path.is_dir() else {},
        model_type=model_type,
    )


def _refuse_second_tokenizer(folder: Path, tokenizer: str | None) -> None:
    if tokenizer is not None:
        raise UserError(f"{folder}: has its own tokenizer.json; leave out --tokenizer {tokenizer}")


def _named_tokenizer(name: str | None, vocab_size: int | None) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, if it does, for a model of `vocab_size` tokens.

    Raises:
        UserError: there is no such tokenizer, or it does not fit.
    """
    if name is None:
        return None
    kind, _, file = name.partition(":")
    tokenizer: Tokenizer
    if kind == "char" and file:
        # nanoGPT reads texts with Python's newlines, so that its vocabulary has no \r.
        text = read_text(expand_home(file)).replace("\r\n", "\n").replace("\r", "\n")
        tokenizer, num_padding = CharTokenizer(text), 0
    else:
        path = Path(expand_home(name))
        if not path.exists():
            raise UserError(
                f"--tokenizer {name}: there is no such file; give char:FILE, with the text the model was trained on, "
                "or the path of a tokenizer.json"
            )
        found = read_tokenizer(path) if path.is_dir() else load_tokenizer(path)
        # Models are padded to a multiple of 64 or 128: 50,257 tokens of GPT-2 to 50,304.
        tokenizer, num_padding = required_tokenizer(found, path), 127
    num_tokens = vocab_size or 0
    if not tokenizer.vocab_size <= num_tokens <= tokenizer.vocab_size + num_padding:
        raise UserError(
            f"--tokenizer {name}: has {tokenizer.vocab_size:,} tokens, but the model has {num_tokens:,}; give the one "
            "it was trained with"
        )
    return tokenizer


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    to: str | None = None,
    allow_nan: bool = False,
    strict: bool = False,
    tokenizer: str | None = None,
    names: str | os.PathLike[str] | None = None,
    merge: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> None:
    """Converts a Hugging Face folder or a checkpoint of PyTorch to a run folder, or a run folder to one of them.

    A run that has trained adapters becomes a folder of PEFT, and the other way round. The destination is written
    atomically.

    Args:
        source: the folder or file to read; its kind decides the direction.
        destination: a new folder, which must not exist or be empty, or a new file.
        model_type, to, allow_nan, strict, tokenizer, names, merge, base: the arguments of `flax-decoder convert`; for
            `allow_nan`, `strict` and `tokenizer` see `load`, for `names` `read_own_model`.

    Raises:
        UserError: `source` cannot be read, `destination` is in use, or no model type can express the model.
        FaultError: `destination` cannot be written.
    """
    source, destination = Path(as_path(source)), Path(as_path(destination))
    if to not in (None, "nanogpt"):
        raise UserError(f"--to {to} is not known; give --to nanogpt, or leave it out for a Hugging Face folder")
    if destination.exists() and (to or not destination.is_dir() or any(destination.iterdir())):
        kind = "file" if to else "folder"
        raise UserError(f"{destination}: exists{'' if to else ' and is not empty'}; give a new {kind} to convert into")
    if to and not destination.parent.is_dir():
        raise UserError(f"{destination}: must name a file in a folder that exists")
    to_run = not _is_run_folder(source)
    has_adapters = not to_run and load_config(source / "config.toml").lora.rank is not None
    if merge and not has_adapters:
        raise UserError(f"{source}: has no adapters to merge; leave out --merge")
    if has_adapters and to:
        raise UserError(f"{source}: has adapters, for which --to {to} has no place: first convert it with --merge")
    if is_adapter_folder(source) != (base is not None):
        what = "leave out --base" if base else "holds an adapter: give the model that it belongs to, --base PATH"
        raise UserError(f"{source}: {what}")
    if to_run and (model_type or to):
        what = "--model-type" if model_type else "--to"
        if os.path.lexists(source):
            raise UserError(f"{source}: is converted to a run folder, which has no model type; leave out {what}")
    if to and model_type:
        raise UserError("--to and --model-type are two formats; give one of them")
    if base is not None:
        _write_adapted_run(destination, source, Path(as_path(base)), tokenizer)
        return
    if has_adapters and not merge:
        _write_peft(destination, source, model_type)
        return
    # What else nanoGPT needs comes from the same checkpoint, also beside a training that saves another one.
    step: int | Literal["latest"] = choose_step(source, "latest") if to and not to_run else "latest"
    if names is not None:
        if source.is_dir():
            raise UserError(f"{source}: is a folder, which has its own names; leave out --names")
        model, params = read_own_model(read_torch_file(source), source, Path(as_path(names)), allow_nan=allow_nan)
        found = _named_tokenizer(tokenizer, model.config.vocab_size)
    else:
        model, params, found = load(source, step=step, allow_nan=allow_nan, strict=strict, tokenizer=tokenizer)
    if to:
        with as_write_fault(destination):
            _write_nanogpt(destination, source, int(step), model, params)
        return
    kept = read_kept_files(source) if source.is_dir() else {}
    with as_write_fault(destination), new_folder(destination) as unfinished:
        if to_run:
            write_run(unfinished, model.config, params, required_tokenizer(found, source), kept)
        else:
            family = choose_family(model.config, str(source), model_type)
            write_folder(unfinished, model.config, params, found, family, kept=kept)


def _write_peft(destination: Path, source: Path, model_type: str | None) -> None:
    """Writes the adapters of a run as a folder of PEFT."""

    def read(step: int) -> tuple[Config, Any]:
        config = load_config(source / "config.toml")
        require_same_model(source, config)
        require_same_inputs(source, [BASE_MANIFEST])
        return config, read_adapters(source, step, config.lora, abstract_params(Decoder(config.model)))

    config, adapters = read_checkpoint(source, "latest", read)
    record = start_record(source)
    family = choose_family(config.model, str(source), model_type or record.get("model_type"))
    base = record["path"] if "model_type" in record else None  # transformers opens no run folder
    with as_write_fault(destination), new_folder(destination) as unfinished:
        write_adapter(unfinished, config.model, config.lora, adapters, family, base)


def _write_adapted_run(destination: Path, source: Path, base: Path, tokenizer: str | None) -> None:
    """Writes the run folder of a base and the adapters in a folder of PEFT; its only checkpoint is that of step 0."""
    start = read_start(base, tokenizer)
    config = model_config_of(base)
    family = FAMILIES[start.model_type] if start.model_type else choose_family(config, str(base))
    lora, adapters = read_adapter(source, config, family)
    with as_write_fault(destination), new_folder(destination) as unfinished:
        write_run(unfinished, config, start.params, start.tokenizer, start.kept, lora, adapters)
        write_text(unfinished / START_FROM, json.dumps(start.record(), indent=1))


def compare(
    path: str | os.PathLike[str] | None = None,
    *,
    steps: int = 0,
    model: Decoder | None = None,
    params: Any = None,
    torch_model: Any = None,
    names: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    allow_nan: bool = False,
    strict: bool = False,
    **settings: Any,
) -> "Ledger":
    """Compares a model with PyTorch, tensor by tensor: `assert fd.compare("my_model").holds`.

    PyTorch's side is the model of `transformers`. What no model type there can express is compared with its twin in
    `comparison/torch_decoder.py`; so is a model without a folder. With `torch_model` it is that: your own module, say.

    Args:
        path: a Hugging Face folder, or a run folder, which is first written as one to a temporary folder. None compares
            `model` and `params`.
        steps: AdamW steps to compare, after the forward pass and the gradients.
        model: a model to compare in place of the one in `path`.
        params: parameters to compare in place of those in `path`.
        torch_model: a model of `transformers` in place of the one in `path`; or any `torch.nn.Module` that takes ids
            (B, T) and gives logits (B, T, V), alone, first in a tuple, or as `.logits`; or a function that makes it,
            with which float64 is exact in what a module computes when it is made. It is not changed.
        names: what belongs to what in a module of your own: the name of its tensor, with {} for the number of the
            layer -> the path of our parameter, or several where a tensor holds them one after the other:
            `{"blocks.{}.qkv.weight": ["layers/attention/query/kernel", ...]}`. None proposes it.
        checkpoint: a file of `torch.save` with the state dict that your module loads first; nothing in it is run.
        allow_nan: see `load`.
        strict: see `load`.
        **settings: tx, optimizer, batch_size, length, accumulation_steps, seed; see `compare_models`.

    Returns:
        The rows, whether all hold, and the cause if one does not; `str` makes a table of it.

    Raises:
        UserError: `path` cannot be read, or is left out without a model and params; a setting cannot be compared;
            `torch_model` is of another architecture, or has a matrix without a counterpart, or the reverse; or PyTorch
            is not installed.
    """
    folder = None if path is None else Path(as_path(path))
    if model is not None:
        require_type("model", model, Decoder)
    try:
        import torch
        import transformers

        from flax_decoder.comparison.compare import compare_models
        from flax_decoder.comparison.module_side import open_module
        from flax_decoder.comparison.torch_decoder import TABLE, TorchDecoder, make_twin
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise UserError(
            f'comparing needs {error.name}, which is not installed: pip install "flax-decoder[torch]"'
        ) from None
    if torch_model is not None and not callable(torch_model):  # modules can be called, too
        require_type("torch_model", torch_model, torch.nn.Module)
    if path is not None:
        saved_model, saved_params, tokenizer = load(path, allow_nan=allow_nan, strict=strict)
    elif model is not None and params is not None:
        saved_model, saved_params, tokenizer = model, params, None
    else:
        raise UserError("compare needs a folder, or both model and params")
    config, notes = saved_model.config, tuple[str, ...]()
    if torch_model is None and not (names is None and checkpoint is None):
        raise UserError("names and checkpoint are those of a module of your own: give it as torch_model")
    model_folder = folder if folder is not None and folder.is_dir() and not _is_run_folder(folder) else None
    if torch_model is None and folder is None:
        torch_model = make_twin(config, saved_params)
    model, params = model or saved_model, saved_params if params is None else params
    is_known = torch_model is None or isinstance(torch_model, TorchDecoder | transformers.PreTrainedModel)
    if not is_known or names is not None or checkpoint is not None:
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
        state = None
        if checkpoint is not None:
            file = Path(as_path(checkpoint))
            state = find_state_dict(read_torch_file(file), file)
        torch_model = open_module(torch_model, model.config, leaves, names, state)
        family, notes = torch_model.family, torch_model.notes
    elif isinstance(torch_model, TorchDecoder):
        family = TABLE
    elif torch_model is not None:
        family = read_family(model_folder) if model_folder else choose_family(config, str(path or "model"))
    else:
        torch_model, family, notes = _pytorch_model(saved_model, saved_params, tokenizer, model_folder, str(path))
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


def required_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer:
    """The tokenizer of a model; raises UserError, which says where to get one, if it has none."""
    if tokenizer is None and not folder.is_dir():
        raise UserError(
            f"{folder}: has no tokenizer; say which: --tokenizer char:FILE, with the text whose characters are its "
            "tokens,\nor --tokenizer PATH, of a tokenizer.json"
        )
    if tokenizer is None:
        raise UserError(
            f"{folder}: has no tokenizer.json; make one from its other tokenizer files:\n"
            f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        )
    return tokenizer


def _is_run_folder(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def _read_run(folder: Path, step: int, shardings: Any) -> tuple[Decoder, Any, Tokenizer]:
    config = load_config(folder / "config.toml")
    require_same_model(folder, config)
    require_same_inputs(folder, ["tokenizer.json", BASE_MANIFEST])
    model = Decoder(for_these_devices(config.model))
    tokenizer = required_tokenizer(read_tokenizer(folder), folder)
    like = abstract_params(model, shardings)
    if config.lora.adapter is None:
        return model, restore_params(folder, step, like), tokenizer
    base, adapters = read_base(folder, like), read_adapters(folder, step, config.lora, like)
    return model, merged(base, adapters, config.lora.adapter.scale), tokenizer


def _write_nanogpt(path: Path, source: Path, step: int, model: Decoder, params: Any) -> None:
    """Writes the model of a run at a step as a new checkpoint of nanoGPT, from which its `train.py` goes on."""
    require_expressible(model.config, NANOGPT, str(source))
    document = model_entries(model.config, params)
    config = load_config(source / "config.toml")
    document |= training_entries(source, step, config, document["model"])
    with replacing(path) as file:
        write_checkpoint(file, document)
