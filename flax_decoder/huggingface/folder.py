"""Hugging Face model folders: `config.json`, weights as safetensors, `tokenizer.json`, `generation_config.json`."""

import contextlib
import dataclasses
import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_decoder.config import ModelConfig
from flax_decoder.data.chat_template import CHAT_TEMPLATE, MAX_TEMPLATE_BYTES
from flax_decoder.data.special_tokens import read_special_tokens, read_tokenizer_config
from flax_decoder.data.tokenizer import Tokenizer, parse_tokenizer, write_tokenizer
from flax_decoder.data.tokenizer_conversion import convert_tokenizer
from flax_decoder.errors import UserError
from flax_decoder.huggingface.config import family_of, read_settings, write_settings
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.tensor_file import Tensor, read_header, write_tensors
from flax_decoder.huggingface.weights import (
    TensorSpec,
    check_sizes,
    complete_specs,
    export_tensors,
    flatten,
    read_params,
)
from flax_decoder.io.files import replacing, write_text
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import LISTING, SETTINGS, VOCABULARY, Limits, parse_object, shown
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params, layers_of

_WEIGHTS = "model.safetensors"
_GENERATION = "generation_config.json"
# Files around a tokenizer.json that stay as they are when a model is converted or tuned, and how large they may be.
_KEPT = {
    CHAT_TEMPLATE: MAX_TEMPLATE_BYTES,
    "tokenizer_config.json": LISTING.num_bytes,
    "special_tokens_map.json": LISTING.num_bytes,
    _GENERATION: SETTINGS.num_bytes,
}
# Fields of generation_config.json that are arguments of `Sampling`.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz")
SHARD_BYTES = 5_000_000_000  # few files, but none too large for file systems and downloads


def is_model_folder(folder: Path) -> bool:
    """Whether this is a folder for `read_folder`."""
    return os.path.lexists(folder / "config.json")


def read_family(folder: Path) -> Family:
    """The family of the model in a folder. Raises UserError if it is not supported."""
    return family_of(_read_json(folder, "config.json", SETTINGS), str(folder / "config.json"))


def read_folder(
    folder: Path,
    shardings: Any = None,
    *,
    allow_nan: bool = False,
    strict: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    unstacked: bool = False,
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
    """Reads a model, its parameters and its tokenizer; None without one. See `fd.load` for the arguments.

    Raises:
        UserError: a file in the folder cannot be used; the message names it.
    """
    family, source = read_family(folder), str(folder / "config.json")
    config = read_model_config(folder, strict=strict)
    model = Decoder(config if dtype is None else dataclasses.replace(config, dtype=dtype))
    with contextlib.ExitStack() as files:
        tensors = _find_tensors(folder, files)
        check_sizes(model.config, family, tensors, source)  # before abstract_params, which absurd sizes make slow
        wanted = flatten(abstract_params(model, shardings))
        if dtype is not None:
            wanted = {path: like.update(dtype=jnp.dtype(dtype)) for path, like in wanted.items()}
        read = read_params(tensors, family, wanted, folder, allow_nan=allow_nan, unstacked=unstacked)
    params = unflatten_dict(read, sep="/")
    return model, {**params, "layers": layers_of(params)}, read_tokenizer(folder)


def read_model_config(folder: Path, *, strict: bool = False) -> ModelConfig:
    """The model that the config.json of a model folder describes. Raises UserError as `read_folder`."""
    return read_settings(_read_json(folder, "config.json", SETTINGS), str(folder / "config.json"), strict=strict)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder or run folder; None if it has no tokenizer.json, and none can be made exactly.

    Raises:
        UserError: a file of it cannot be used.
    """
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        content = read_content(open_inside(folder, path.name), VOCABULARY.num_bytes, str(path))
    else:
        has_config = os.path.lexists(folder / "config.json")
        model_type = _read_json(folder, "config.json", SETTINGS).get("model_type") if has_config else None
        converted = convert_tokenizer(folder, model_type if isinstance(model_type, str) else None)
        if converted is None:
            return None
        document, path = converted
        content = json.dumps(document, ensure_ascii=False).encode("utf-8")
    tokenizer = parse_tokenizer(content, str(path))
    _read_special_tokens(folder, tokenizer)
    return tokenizer


def read_kept_files(folder: Path) -> dict[str, bytes]:
    """The files of a model folder or run folder that say how it chats and samples: name -> content.

    Raises:
        UserError: one cannot be read, or is too large.
    """
    names = {name: max_bytes for name, max_bytes in _KEPT.items() if os.path.lexists(folder / name)}
    return {
        name: read_content(open_inside(folder, name), max_bytes, str(folder / name))
        for name, max_bytes in names.items()
    }


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, kept: Mapping[str, bytes]) -> None:
    """Writes the files from which `read_tokenizer` reads this tokenizer, with its start and end tokens.

    The files around it, `kept` from `read_kept_files`, stay as they are, but for a generation_config.json without
    tokens that only the config.json beside it has named.
    """
    write_tokenizer(folder / "tokenizer.json", tokenizer)
    _write_files(folder, kept)
    found = read_tokenizer(folder)
    if found is None or (found.start_id, found.end_ids) != (tokenizer.start_id, tokenizer.end_ids):
        document = parse_object(kept.get(_GENERATION, b"{}"), _GENERATION, SETTINGS)
        write_text(folder / _GENERATION, _to_json(document | _special_tokens(tokenizer)))


def write_folder(
    folder: Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer | None,
    family: Family,
    *,
    kept: Mapping[str, bytes] = types.MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model into an empty folder, for `transformers` to load.

    Args:
        family: what to write it as, from `choose_family`.
        kept: from `read_kept_files`: written as they are, in place of what is known of the tokenizer.
        shard_bytes: maximum size of a file of weights, unless a single tensor is larger.
    """
    document = write_settings(config, family)
    arrays = with_all_biases(document, params, family)
    shapes = {path: array.shape for path, array in arrays.items()}
    special = _special_tokens(tokenizer)
    # Written as null if unknown: transformers has other defaults, such as token 50256 for gpt2.
    document |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special, "dtype": "float32"}
    write_text(folder / "config.json", _to_json(document))
    write_text(folder / _GENERATION, _to_json(special))
    if tokenizer is not None:
        write_tokenizer(folder / "tokenizer.json", tokenizer)
        # tokenizer.json decodes exactly; transformers must not change spaces afterwards.
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_text(folder / "tokenizer_config.json", _to_json(tokenizer_config))
    _write_files(folder, kept)
    _write_weights(folder, complete_specs(family, shapes), arrays, shard_bytes)


def with_all_biases(document: dict[str, Any], params: Any, family: Family) -> dict[str, np.ndarray]:
    """Parameters by path, or what is in a tree like them, and zeros for the biases that only the family has.

    `document` has the settings that are written.
    """
    full = flatten(abstract_params(Decoder(read_settings(document, family.model_type, family))))
    arrays = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in full.items()}
    return arrays | {path: np.asarray(leaf) for path, leaf in flatten(params).items()}


def _read_special_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Sets a tokenizer's start token and end tokens, if the files around it name any.

    A text ends at each end token that generation_config.json, config.json or the tokenizer's files name: the first may
    name those of conversations, the others that of documents. The start token is the first that is named.
    """
    starts, ends = list[int](), list[int]()
    for name in (_GENERATION, "config.json"):
        path = folder / name
        document = _read_json(folder, name, SETTINGS) if os.path.lexists(path) else {}
        for field, found in (("bos_token_id", starts), ("eos_token_id", ends)):
            value = document.get(field)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(id) is int for id in values):
                raise UserError(f"{path}: {field} = {shown(value)} must be a token id, or a list of them")
            found += values
    texts = read_special_tokens(folder, read_tokenizer_config(folder))
    for field, found in (("bos_token", starts), ("eos_token", ends)):
        id = tokenizer.token_id(texts[field]) if field in texts else None
        found += [] if id is None else [id]
    # Some files name ids outside of the vocabulary.
    starts, ends = ([id for id in dict.fromkeys(ids) if 0 <= id < tokenizer.vocab_size] for ids in (starts, ends))
    tokenizer.start_id = starts[0] if starts else tokenizer.start_id
    tokenizer.end_ids = tuple(ends) or tokenizer.end_ids


def read_sampling(folder: Path) -> dict[str, float]:
    """What the generation_config.json of a model folder says of sampling, with the names of `Sampling`.

    Raises:
        UserError: it cannot be used, or a value is no number.
    """
    path = folder / _GENERATION
    document = _read_json(folder, path.name, SETTINGS) if os.path.lexists(path) else {}
    values = {name: document[name] for name in _SAMPLING if document.get(name) is not None}
    for name, value in values.items():
        if type(value) not in (int, float):
            raise UserError(f"{path}: {name} = {shown(value)} must be a number")
    # As in transformers, which then passes over the temperature.
    return values | ({"temperature": 0.0} if document.get("do_sample") is False else {})


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The start and end tokens that are known, with the names of transformers."""
    ids: dict[str, Any] = {}
    if tokenizer is not None and tokenizer.start_id is not None:
        ids["bos_token_id"] = tokenizer.start_id
    if tokenizer is not None and tokenizer.end_ids:
        ids["eos_token_id"] = tokenizer.end_ids[0] if len(tokenizer.end_ids) == 1 else list(tokenizer.end_ids)
    return ids


def _read_json(folder: Path, name: str, limits: Limits) -> dict[str, Any]:
    """The JSON object in a file of a folder."""
    source = str(folder / name)
    return parse_object(read_content(open_inside(folder, name), limits.num_bytes, source), source, limits)


def _find_tensors(folder: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """All tensors of a folder; their files stay open until `files` is closed."""
    if os.path.lexists(folder / _WEIGHTS):
        return read_header(files.enter_context(open_inside(folder, _WEIGHTS)), folder / _WEIGHTS)
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
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise UserError(f"{index}: {shown(shard)} is not the plain name of a safetensors file in the same folder")
    tensors: dict[str, Tensor] = {}
    opened = {shard: files.enter_context(open_inside(folder, shard, index)) for shard in shards}
    for shard, file in opened.items():
        for name, tensor in read_header(file, folder / shard).items():
            expected = weight_map.get(name)
            if expected != shard:
                raise UserError(f"{index}: tensor {name} is in {shard}, but weight_map says {shown(expected)}")
            tensors[name] = tensor
    if absent := weight_map.keys() - tensors.keys():
        name = min(absent)
        raise UserError(f"{index}: tensor {name} should be in {weight_map[name]}, but is not")
    return tensors


def _write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content)


def _write_weights(folder: Path, specs: list[TensorSpec], arrays: Mapping[str, Any], shard_bytes: int) -> None:
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if spec.float32_bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.float32_bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [_WEIGHTS]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, {spec.name: spec.shape for spec in shard}, export_tensors(shard, arrays))
        weight_map |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        total = sum(spec.float32_bytes for spec in specs)
        write_text(folder / _INDEX, _to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
