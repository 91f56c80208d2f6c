"""nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT): a file of torch.save with these entries.

model       the state dict            iter_num       steps so far
model_args  the settings              best_val_loss  the lowest validation loss so far
optimizer   of torch.optim.AdamW      config         all settings of the training script
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.config import read_settings, write_settings
from flax_decoder.huggingface.families import NANOGPT
from flax_decoder.huggingface.folder import with_all_biases
from flax_decoder.huggingface.torch_file import find_state_dict, stored_tensors, torch_module
from flax_decoder.huggingface.weights import check_sizes, complete_specs, export_tensors, flatten, read_params
from flax_decoder.io.strict_json import shown
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params


def read_model(
    document: dict[str, Any], path: Path, shardings: Any = None, *, allow_nan: bool = False
) -> tuple[Decoder, dict[str, Any]]:
    """Reads the model of a checkpoint, with its parameters in float32.

    Args:
        document: the content of the file, from `read_torch_file`.
        path: of the file, for messages.
        shardings: see `fd.load`, as for `allow_nan`.

    Raises:
        UserError: it is not a checkpoint of nanoGPT, or a setting or tensor of it cannot be used.
    """
    settings = document.get("model_args")
    if settings is None:
        raise UserError(
            f"{path}: has no model_args, as a ckpt.pt of nanoGPT has, so it does not say what its tensors are;\n"
            "say it in a file: flax-decoder convert CKPT.pt RUN --names FILE.toml"
        )
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{path}: model_args = {shown(settings)} must be a table of settings")
    source = f"{path}: model_args"
    model = Decoder(read_settings(settings, source, NANOGPT))
    tensors = stored_tensors(find_state_dict(document, path), path)
    check_sizes(model.config, NANOGPT, tensors, source)  # before abstract_params, which absurd sizes make slow
    wanted = flatten(abstract_params(model, shardings))
    return model, unflatten_dict(read_params(tensors, NANOGPT, wanted, path, allow_nan=allow_nan), sep="/")


def model_entries(config: ModelConfig, params: Any) -> dict[str, Any]:
    """The entries `model` and `model_args` of a model that nanoGPT can express; see `require_expressible`."""
    torch = torch_module("a checkpoint of nanoGPT")
    document = write_settings(config, NANOGPT)
    arrays = with_all_biases(document, params, NANOGPT)
    specs = complete_specs(NANOGPT, {path: array.shape for path, array in arrays.items()})
    exported = zip(specs, export_tensors(specs, arrays), strict=True)
    by_name = {spec.name: torch.from_numpy(np.array(tensor, np.float32, order="C")) for spec, tensor in exported}
    state_dict = {name: by_name[name] for name in in_module_order(list(by_name), config.num_layers)}
    state_dict[NANOGPT.head] = state_dict[f"{NANOGPT.prefix}wte.weight"]
    return {"model": state_dict, "model_args": {setting.name: document[setting.name] for setting in NANOGPT.settings}}


def in_module_order(names: list[str], num_layers: int) -> list[str]:
    """Tensor names in the order of nanoGPT's modules, which is that of `named_parameters`."""
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [f"h.{layer}.{part}" for layer in range(num_layers) for part in parts]
    modules = [f"{NANOGPT.prefix}{module}" for module in ("wte", "wpe", *layers, "ln_f")]
    every = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return [name for name in every if name in set(names)]


def write_checkpoint(file: BinaryIO, document: dict[str, Any]) -> None:
    """Writes the entries of a checkpoint to an open file."""
    torch_module("a checkpoint of nanoGPT").save(document, file)
