"""Weights of somebody's own PyTorch model, by a TOML file: [model], our settings, and [names], theirs -> ours."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from flax_decoder.config_file import config_of
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.names import family_of_names, left_over, read_layout
from flax_decoder.huggingface.torch_file import find_state_dict, stored_tensors
from flax_decoder.huggingface.weights import check_sizes, flatten, read_params, tensor_specs
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
        allow_nan: see `fd.load`.

    Raises:
        UserError: a file cannot be used, or a tensor or a parameter has no counterpart.
    """
    tables = read_layout(layout)
    if "model" not in tables:
        raise UserError(f"{layout}: has no table [model], of our settings, such as num_layers = 6")
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
