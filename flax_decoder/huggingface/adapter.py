"""Low-rank adapters as a folder of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

There A is (rank, inputs) and B is (outputs, rank), for each Linear of the model in `transformers`. A Linear that holds
several of our matrices has one adapter: ours are blocks of it, beside each other in A, on the diagonal of B.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_decoder.config import LoraConfig, ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family, Rule
from flax_decoder.huggingface.tensor_file import Tensor, read_header, write_tensors
from flax_decoder.huggingface.weights import first_non_finite, flatten, join, split
from flax_decoder.io.files import write_text
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import SETTINGS, parse_object, shown
from flax_decoder.nn.axes import PROJECTIONS
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT wraps the model twice
# Fields that are read, and those that say nothing of the numbers. All others must be empty: they are other methods.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
_NO_BEARING = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "fan_in_fan_out", "megatron_core", "qalora_group_size", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern"),  # the tensors themselves say which
}
# Starts that change the base too: what is saved belongs to a base that is not saved with it.
_OTHER_BASES = re.compile("pissa|olora|corda|loftq|lora_ga")
_MAX_RANK = 2**16
Place = tuple[str, str]
"""Where a matrix is, such as ("attention", "query")."""


class _Module(NamedTuple):
    """A Linear of `transformers` that holds matrices of ours.

    Attributes:
        name: full name, with {} for the layer.
        rule: how it holds them.
        places: where its matrices are with us.
        kernels: shapes of their kernels, without the layer axis.
    """

    name: str
    rule: Rule
    places: list[Place]
    kernels: list[tuple[int, ...]]

    @property
    def target(self) -> str:
        """Its name within a layer, such as self_attn.q_proj."""
        return self.name.partition("{}.")[2]


def is_adapter_folder(folder: Path) -> bool:
    """Whether this is a folder for `read_adapter`, and holds no whole model."""
    return os.path.lexists(folder / CONFIG) and not os.path.lexists(folder / "config.json")


def write_adapter(
    folder: Path, config: ModelConfig, lora: LoraConfig, adapters: Any, family: Family, base: str | None
) -> None:
    """Writes adapters, a tree as of `init_adapters`, into an empty folder, for PEFT to load.

    Args:
        family: what the base is written as.
        base: what PEFT calls the base: a path, or None.
    """
    rank, own = lora.rank or 0, adapters["layers"]
    ranks, alphas, shapes, arrays = dict[str, int](), dict[str, float](), dict[str, tuple[int, ...]](), []
    has_adapter = {(part, name) for part in own for name in own[part]}
    modules = [module for module in _modules(config, family) if has_adapter & set(module.places)]
    for module, layer in itertools.product(modules, range(config.num_layers)):
        found = [own.get(part, {}).get(name) for part, name in module.places]
        count = sum(one is not None for one in found)
        a = [np.asarray(one["lora_a"][layer], np.float32).reshape(-1, rank).T for one in found if one is not None]
        blocks, number = [], itertools.count()
        for one, kernel, place in zip(found, module.kernels, module.places, strict=True):
            block = np.zeros((count * rank, *_outputs(place, kernel)), np.float32)
            if one is not None:
                start = next(number) * rank
                block[start : start + rank] = np.asarray(one["lora_b"][layer]).reshape(rank, *block.shape[1:])
            blocks.append(block)
        pair = {"A": np.concatenate(a), "B": join(_of_b(module.rule), blocks)}
        for half, array in pair.items():
            shapes[f"{_PREFIX}{module.name.format(layer)}.lora_{half}.weight"] = array.shape
            arrays.append(array)
        if count > 1:  # the same scale, at a higher rank
            ranks[module.target] = count * rank
            alphas[module.target] = lora.alpha * (math.sqrt(count) if lora.rank_stabilised else count)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _as_int(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": [module.target for module in modules],
        "rank_pattern": ranks,
        "alpha_pattern": {target: _as_int(alpha) for target, alpha in alphas.items()},
        "bias": "none",
        "fan_in_fan_out": not any(module.rule.transposed for module in modules),  # the Conv1D of GPT-2
    }
    write_text(folder / CONFIG, json.dumps(document, indent=2) + "\n")
    write_tensors(folder / WEIGHTS, shapes, arrays)


def read_adapter(folder: Path, config: ModelConfig, family: Family) -> tuple[LoraConfig, Any]:
    """Reads the adapters in a folder of PEFT, of which `config` and `family` are the base.

    Returns:
        How they count, and the adapters as NumPy arrays, a tree as of `init_adapters`. All have the rank of the widest:
        others are filled up with zeros.

    Raises:
        UserError: a file cannot be used, is of another method, or the adapters belong to another base.
    """
    source = folder / CONFIG
    content = read_content(open_inside(folder, CONFIG), SETTINGS.num_bytes, str(source))
    document = _checked(parse_object(content, str(source), SETTINGS), source)
    halves, scales = dict[Place, tuple[np.ndarray, np.ndarray]](), dict[Place, list[float]]()
    kernels = dict[Place, tuple[int, ...]]()
    with open_inside(folder, WEIGHTS) as file:
        tensors = read_header(file, folder / WEIGHTS)
        for module in _modules(config, family):
            names = [_PREFIX + module.name.format(layer) for layer in range(config.num_layers)]
            if not any(f"{name}.lora_A.weight" in tensors for name in names):
                continue
            a, b = zip(*(_read_pair(tensors, name, folder) for name in names), strict=True)
            own = [_scale(document, name.removeprefix(_PREFIX), len(one)) for name, one in zip(names, a, strict=True)]
            for place, pair in _split(module, a, b, folder, document["r"]):
                halves[place], scales[place] = pair, own
            kernels |= dict(zip(module.places, module.kernels, strict=True))
    if tensors:
        raise UserError(
            f"{folder / WEIGHTS}: tensor {next(iter(tensors))} ({len(tensors)} in all) has no matrix in the base, "
            f"which is of type {family.model_type}; give the base that it was trained on"
        )
    if not halves:
        raise UserError(f"{folder / WEIGHTS}: has no adapter; get it again")
    rank = max(a.shape[-1] for a, _ in halves.values())
    scale = next(iter(scales.values()))[0]
    alpha = document["lora_alpha"] if rank == document["r"] else scale * _divisor(document, rank)
    settings: dict[str, Any] = {"rank": rank, "alpha": float(alpha), "rank_stabilised": document["use_rslora"]}
    targets: Any = tuple(name for _, name in halves)
    lora = LoraConfig(**settings, dropout=float(document["lora_dropout"]), targets=targets)
    found = {}
    for place, (a, b) in halves.items():
        more, inputs = rank - a.shape[-1], len(PROJECTIONS[place[1]][0])
        factor_L = np.array([own / (alpha / _divisor(document, rank)) for own in scales[place]], np.float32)
        a = np.pad(a, ((0, 0), (0, 0), (0, more)))
        b = np.pad(b * factor_L[:, None, None], ((0, 0), (0, more), (0, 0)))
        found[*place, "lora_a"] = a.reshape(-1, *kernels[place][:inputs], rank)
        found[*place, "lora_b"] = b.reshape(-1, rank, *kernels[place][inputs:])
    return lora, {"layers": unflatten_dict(found)}


def _modules(config: ModelConfig, family: Family) -> Iterator[_Module]:
    """The modules of a family that hold matrices of layers."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(Decoder(config))).items()}
    for rule in family.all_rules:
        if all(path in shapes and path.startswith("layers/") and path.endswith("/kernel") for path in rule.paths):
            places = [(path.split("/")[1], path.split("/")[2]) for path in rule.paths]
            kernels = [shapes[path][1:] for path in rule.paths]
            yield _Module(family.prefix + rule.tensor.removesuffix(".weight"), rule, places, kernels)


def _outputs(place: Place, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of B behind its rank, as `join` and `split` take those of a kernel behind its inputs."""
    inputs = len(PROJECTIONS[place[1]][0])
    return (*(1,) * (inputs - 1), *kernel[inputs:])


def _of_b(rule: Rule) -> Rule:
    """How B is stored where a matrix is stored by a rule: PEFT's are those of a Linear, (out, in), always."""
    return replace(rule, transposed=True, offset=0.0)


def _checked(document: dict[str, Any], source: Path) -> dict[str, Any]:
    """The fields of adapter_config.json that count. Raises UserError for another method than LoRA."""
    start = document.get("init_lora_weights", True)
    if isinstance(start, str) and _OTHER_BASES.search(start.lower()):
        raise UserError(
            f"{source}: init_lora_weights = {shown(start)} has changed the base, which is not saved with it"
        )
    for name, value in document.items():
        if name not in _READ | _NO_BEARING and value not in (None, False, "", [], {}):
            raise UserError(f"{source}: {name} = {shown(value)} is more than a LoRA adapter, which alone can be read")
    found = {"lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"} | {
        name: value for name, value in document.items() if name in _READ
    }
    rules = {
        "peft_type": ('"LORA"', lambda value: value == "LORA"),
        "r": ("a whole number from 1", lambda value: type(value) is int and 0 < value <= _MAX_RANK),
        "lora_alpha": ("a number above 0", _is_positive),
        "lora_dropout": ("a number from 0 to under 1", lambda value: type(value) in (int, float) and 0 <= value < 0.99),
        "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
        "rank_pattern": ("names of modules with numbers", _is_pattern),
        "alpha_pattern": ("names of modules with numbers", _is_pattern),
        "bias": ('"none"', lambda value: value == "none"),
    }
    for name, (what, is_valid) in rules.items():
        if not is_valid(found.get(name)):
            raise UserError(f"{source}: {name} = {shown(found.get(name))} must be {what}")
    return found


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 1e-15 <= value <= 1e15


def _is_pattern(value: Any) -> bool:
    """Whether it gives numbers to names; PEFT also takes regular expressions, which a file of others may not run."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"[\w.]+", name) and _is_positive(number) for name, number in value.items()
    )


def _scale(document: Mapping[str, Any], name: str, rank: int) -> float:
    """What the adapter of a module is multiplied by."""
    patterns = document["alpha_pattern"].items()
    own = (alpha for target, alpha in patterns if name == target or name.endswith(f".{target}"))
    return next(own, document["lora_alpha"]) / _divisor(document, rank)


def _divisor(document: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if document["use_rslora"] else rank


def _read_pair(tensors: dict[str, Tensor], name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module in float32; they are taken out of `tensors`."""
    pair = []
    for half in ("A", "B"):
        tensor = tensors.pop(f"{name}.lora_{half}.weight", None)
        if tensor is None:
            raise UserError(f"{folder / WEIGHTS}: tensor {name}.lora_{half}.weight is missing; get it again")
        numbers = tensor.read()
        if first_non_finite(numbers) is not None:
            raise UserError(f"{folder / WEIGHTS}: tensor {tensor.name} holds NaN or an infinity; get it again")
        pair.append(np.asarray(numbers, np.float32))
    a, b = pair
    return a, b


def _split(
    module: _Module, a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...], folder: Path, rank: int
) -> Iterator[tuple[Place, tuple[np.ndarray, np.ndarray]]]:
    """A, (L, inputs, rank), and B, (L, rank, outputs), of each matrix in a module, without what adds nothing to it."""
    width = max(map(len, a))
    both = list(zip(module.places, module.kernels, strict=True))
    num_inputs = {math.prod(kernel[: len(PROJECTIONS[place[1]][0])]) for place, kernel in both}
    num_outputs = sum(math.prod(_outputs(place, kernel)) for place, kernel in both)
    for layer, (one_a, one_b) in enumerate(zip(a, b, strict=True)):
        if one_a.shape != (len(one_a), *num_inputs) or one_b.shape != (num_outputs, len(one_a)):
            raise UserError(
                f"{folder / WEIGHTS}: the adapter of {module.name.format(layer)} has shapes {one_a.shape} and "
                f"{one_b.shape}, but the base has {(num_outputs, *num_inputs)} there; give its own base"
            )
    padded_a = np.stack([np.pad(one, ((0, width - len(one)), (0, 0))) for one in a])
    padded_b = [np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in b]
    shapes = [(width, *_outputs(place, kernel)) for place, kernel in both]
    by_layer = [split(_of_b(module.rule), one, shapes) for one in padded_b]
    halves = [np.stack(parts).reshape(len(parts), width, -1) for parts in zip(*by_layer, strict=True)]
    is_new = not any(half.any() for half in halves)
    for place, half in zip(module.places, halves, strict=True):
        used = np.arange(min(rank, width)) if is_new else np.flatnonzero(half.any((0, 2)))
        if used.size:
            yield place, (padded_a[:, used].swapaxes(1, 2), half[:, used])


def _as_int(number: float) -> float:
    return int(number) if float(number).is_integer() else number
