"""Weights of somebody's own PyTorch model, by a TOML file: [model], our settings, and [names], theirs -> ours."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from flax_decoder.config_file import config_of
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.names import EXAMPLE, MAX_FILE_BYTES, family_of_names, left_over
from flax_decoder.huggingface.torch_file import find_state_dict, stored_tensors
from flax_decoder.huggingface.weights import check_sizes, flatten, read_params, tensor_specs
from flax_decoder.io.foreign_file import open_named, read_content
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params


def read_own_model(
    document: dict[str, Any], path: Path, layout: Path, *, allow_nan: bool = False
) -> tuple[Decoder, dict[str, Any]]:
    """Reads a model by a description of its settings and names.

    Args:
        document: the content of a file of PyTorch, from `read_torch_file`.
        path: of that file, for messages.
        layout: a TOML file with [model], settings of `ModelConfig`, and [names], a map for `family_of_names`.
        allow_nan: also reads weights that are NaN or infinite.

    Returns:
        The model, and its parameters in float32.

    Raises:
        UserError: a file cannot be used, or a tensor or a parameter has no counterpart.
    """
    try:
        tables = tomllib.loads(read_content(open_named(layout), MAX_FILE_BYTES, str(layout)).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{layout}: is not TOML: {error}") from None
    if tables.keys() != {"model", "names"} or not all(isinstance(table, dict) for table in tables.values()):
        raise UserError(f"{layout}: must hold two tables, [model] and [names], the latter of lines such as\n{EXAMPLE}")
    config = config_of({"model": tables["model"]}, str(layout)).model
    if config.vocab_size is None:
        raise UserError(f"{layout}: model.vocab_size is missing, but required")
    stored = stored_tensors(find_state_dict(document, path), path)
    # Before abstract_params, which absurd sizes make slow.
    check_sizes(config, Family("module", "Module", {}, (), (), rotary=None), stored, str(layout))
    wanted = flatten(abstract_params(Decoder(config)))
    shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
    theirs = {name: tensor.shape for name, tensor in stored.items()}
    family = replace(family_of_names(tables["names"], theirs, shapes, str(layout)), tied=None)
    left_over(family, theirs, shapes).refuse(str(layout))
    for spec in tensor_specs(family, shapes):
        tensor = stored[spec.name]
        # A table of positions may be (1, T, D), so that it adds to a batch.
        if tensor.shape != spec.shape and math.prod(tensor.shape) == math.prod(spec.shape):
            stored[spec.name] = replace(tensor, tensor=tensor.tensor.reshape(spec.shape))
    return Decoder(config), unflatten_dict(read_params(stored, family, wanted, path, allow_nan=allow_nan), sep="/")
