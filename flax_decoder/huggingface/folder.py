"""Hugging Face model folders: `config.json`, weights as safetensors, `tokenizer.json`, `generation_config.json`."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import Tokenizer, parse_tokenizer
from flax_decoder.errors import UserError
from flax_decoder.huggingface.config import family_of, read_settings, write_settings
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.tensor_file import Tensor, read_header, write_tensors
from flax_decoder.huggingface.weights import (
    Place,
    flatten,
    places,
    read_params,
    refuse_too_large,
    unflatten,
    write_arrays,
)
from flax_decoder.io.files import write_text
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import LISTING, SETTINGS, VOCABULARY, Limits, parse_object, shown
from flax_decoder.nn.decoder import Decoder, abstract_params

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz")
# Large enough for few files, small enough for file systems and downloads.
SHARD_BYTES = 5_000_000_000


def is_model_folder(folder: Path) -> bool:
    """Whether this is the kind of folder that the functions below read."""
    return os.path.lexists(folder / "config.json")


def read_family(folder: Path) -> Family:
    """The family of the model in a folder. Raises UserError where it is none of ours."""
    return family_of(_read_json(folder, "config.json", SETTINGS), str(folder / "config.json"))


def read_folder(
    folder: Path, shardings: Any = None, *, allow_nan: bool = False
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
    """Opens a model.

    Args:
        folder: has at least config.json and the weights.
        shardings: where its parameters go, as in `abstract_params`.
        allow_nan: reads weights that are NaN or infinite too.

    Returns:
        The model, its parameters in float32, and its tokenizer where it has a tokenizer.json.

    Raises:
        UserError: something in the folder cannot be used; the message names it.
    """
    document = _read_json(folder, "config.json", SETTINGS)
    source = str(folder / "config.json")
    family, model = family_of(document, source), Decoder(read_settings(document, source))
    with contextlib.ExitStack() as files:
        tensors = _find_tensors(folder, files)
        refuse_too_large(model.config, family, tensors, source)  # even shapes of absurd sizes cost time
        wanted = flatten(abstract_params(model, shardings))
        params = unflatten(read_params(tensors, family, wanted, folder, allow_nan=allow_nan))
    return model, params, read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder or run folder; None where it has no tokenizer.json. Raises UserError."""
    name = "tokenizer.json"
    if not os.path.lexists(folder / name):
        return None
    content = read_content(open_inside(folder, name), VOCABULARY.num_bytes, str(folder / name))
    tokenizer = parse_tokenizer(content, str(folder / name))
    _read_special_tokens(folder, tokenizer)
    return tokenizer


def write_folder(
    folder: Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer | None,
    family: Family,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills an empty folder with a model that `transformers` loads.

    Args:
        folder: exists and is empty.
        config: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        family: what to write it as, from `choose_family`.
        shard_bytes: weights are split into files of at most this size, where a tensor is not larger.
    """
    document = write_settings(config, family)
    full_shapes = _shapes(Decoder(read_settings(document, family.model_type)))
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    # Biases that the family has and the model has not are zeros.
    arrays = {path: arrays.get(path, np.broadcast_to(np.float32(0), shape)) for path, shape in full_shapes.items()}
    special = _special_tokens(tokenizer)
    # transformers has defaults of its own for these, such as token 50256 for gpt2: absent must be said.
    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    write_text(folder / "config.json", _to_json({**document, **nothing, **special, "dtype": "float32"}))
    write_text(folder / "generation_config.json", _to_json(special))
    if tokenizer is not None:
        write_text(folder / "tokenizer.json", tokenizer.to_json())
        # A tokenizer.json decodes exactly; transformers must not tidy the text up afterwards.
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_text(folder / "tokenizer_config.json", _to_json(tokenizer_config))
    _write_weights(folder, places(family, full_shapes), arrays, shard_bytes)


def _read_special_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Lets a tokenizer know which tokens open and close a text, from generation_config.json or config.json.

    What neither says stays as the tokenizer has it.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        document = _read_json(folder, name, SETTINGS) if os.path.lexists(path) else {}
        ids = {field: document.get(field) for field in ("bos_token_id", "eos_token_id")}
        if ids["eos_token_id"] is None and ids["bos_token_id"] is None:
            continue
        for field, value in ids.items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(id) is int for id in values):
                raise UserError(f"{path}: {field} = {shown(value)} must be a token id, or a list of them")
            # Some files name ids that their own vocabulary does not have.
            known = tuple(id for id in values if 0 <= id < tokenizer.vocab_size)
            if known and field == "bos_token_id":
                tokenizer.start_id = known[0]
            elif known:
                tokenizer.end_ids = known
        return


def write_special_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes generation_config.json, with which `read_tokenizer` gives an equal tokenizer the same tokens."""
    write_text(folder / "generation_config.json", _to_json(_special_tokens(tokenizer)))


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is known, in the names of transformers."""
    ids: dict[str, Any] = {}
    if tokenizer is not None and tokenizer.start_id is not None:
        ids["bos_token_id"] = tokenizer.start_id
    if tokenizer is not None and tokenizer.end_ids:
        ids["eos_token_id"] = tokenizer.end_ids[0] if len(tokenizer.end_ids) == 1 else list(tokenizer.end_ids)
    return ids


def _shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}


def _read_json(folder: Path, name: str, limits: Limits) -> dict[str, Any]:
    """The JSON object in a file of a folder."""
    source = str(folder / name)
    return parse_object(read_content(open_inside(folder, name), limits.num_bytes, source), source, limits)


def _find_tensors(folder: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """Where every tensor of a folder lies, over all its files, which are open until `files` is closed."""

    def opened(name: str, source: Path | None = None) -> BinaryIO:
        return files.enter_context(open_inside(folder, name, source))

    if os.path.lexists(folder / _WEIGHTS):
        return read_header(opened(_WEIGHTS), folder / _WEIGHTS)
    index = folder / _INDEX
    if not os.path.lexists(index):
        pickle = next((path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
        if pickle is None:
            raise UserError(f"{folder}: has no {_WEIGHTS} and no {_INDEX}; get the whole model again")
        raise UserError(
            f"{folder}: has its weights as a pickle ({pickle}), which can run any code when it is read.\n"
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    weight_map = _read_json(folder, _INDEX, LISTING).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map must say the file of each tensor")
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise UserError(f"{index}: {shown(shard)} is not the plain name of a safetensors file in the same folder")
    for shard, file in [(shard, opened(shard, index)) for shard in shards]:
        for name, tensor in read_header(file, folder / shard).items():
            if weight_map.get(name) != shard:
                said = shown(weight_map.get(name))
                raise UserError(f"{index}: tensor {name} is in {shard}, but weight_map says {said}")
            tensors[name] = tensor
    absent = weight_map.keys() - tensors.keys()
    if absent:
        name = min(absent)
        raise UserError(f"{index}: tensor {name} should be in {weight_map[name]}, but is not")
    return tensors


def _write_weights(folder: Path, wanted: list[Place], params: Mapping[str, Any], shard_bytes: int) -> None:
    shards: list[list[Place]] = [[]]
    room = shard_bytes
    for place in wanted:
        size = 4 * int(np.prod(place.shape))
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(place)
        room -= size
    names = [_WEIGHTS] if len(shards) == 1 else [_shard_name(i + 1, len(shards)) for i in range(len(shards))]
    for name, own in zip(names, shards, strict=True):
        write_tensors(folder / name, {place.name: place.shape for place in own}, write_arrays(own, params))
    if len(shards) > 1:
        weight_map = {place.name: name for name, own in zip(names, shards, strict=True) for place in own}
        total = sum(4 * int(np.prod(place.shape)) for place in wanted)
        write_text(folder / _INDEX, _to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
