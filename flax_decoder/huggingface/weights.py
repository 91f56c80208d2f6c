"""Tensors of a family <-> our parameters, by the rules of its table."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family, Rule
from flax_decoder.huggingface.tensor_file import Tensor
from flax_decoder.huggingface.torch_file import TorchTensor

_BLOCK_NUMBERS = 100_000  # checked at once: fits into the cache of a processor

Shape = tuple[int, ...]
# A tensor in a file: its numbers are read when they are needed.
StoredTensor = Tensor | TorchTensor


class TensorSpec(NamedTuple):
    """A tensor that a model has.

    Attributes:
        name: with its prefix.
        shape: in the file.
        rule: how parameters are stored in it.
        layer: None if it does not belong to one.
        param_shapes: shapes of the parameters in it, without the layer axis.
    """

    name: str
    shape: Shape
    rule: Rule
    layer: int | None
    param_shapes: list[Shape]

    @property
    def float32_bytes(self) -> int:
        """Its size as it is written."""
        return 4 * math.prod(self.shape)


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a params tree by path, such as layers/attention/query/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tensor_specs(family: Family, shapes: Mapping[str, Shape]) -> list[TensorSpec]:
    """All tensors of a model, whose parameters have these shapes; those of layers have a leading layer axis."""
    specs = []
    for rule in family.all_rules:
        if not all(path in shapes for path in rule.paths):
            continue  # a bias that this model does not have, or a head that is the embedding
        in_layer = "{}" in rule.tensor
        param_shapes = [shapes[path][1:] if in_layer else shapes[path] for path in rule.paths]
        matrices = [matrix_shape(path, shape) for path, shape in zip(rule.paths, param_shapes, strict=True)]
        shape = (*matrices[0][:-1], sum(matrix[-1] for matrix in matrices))
        shape = shape[::-1] if rule.transposed else shape
        shape = (shape[0] + rule.unused, *shape[1:])
        for layer in range(shapes[rule.paths[0]][0]) if in_layer else [None]:
            name = family.full_name(rule.tensor.format(layer))
            specs.append(TensorSpec(name, shape, rule, layer, param_shapes))
    return specs


def complete_specs(family: Family, shapes: Mapping[str, Shape]) -> list[TensorSpec]:
    """As `tensor_specs`; raises UserError if the table has no tensor for a parameter, which would be lost."""
    stored = {path for rule in family.all_rules for path in rule.paths}
    if lost := [path for path in shapes if path not in stored]:
        raise UserError(f"model type {family.model_type}: its table has no rule for {lost[0]}; add it to the rules")
    return tensor_specs(family, shapes)


class _HostBuffers:
    """A parameter that is being read: one buffer per distinct shard of it on the devices of this process."""

    def __init__(self, like: jax.ShapeDtypeStruct):
        self._like = like
        full = tuple(slice(size) for size in like.shape)
        sharding = like.sharding
        indices = [full] if sharding is None else sharding.addressable_devices_indices_map(like.shape).values()
        self._buffers = {bounds: self._aligned(bounds) for bounds in {self._bounds(index) for index in indices}}

    def write(self, layer: int | None, numbers: np.ndarray) -> None:
        """Writes the numbers of a layer, or of the whole parameter."""
        for bounds, buffer in self._buffers.items():
            if layer is None:
                buffer[...] = numbers[tuple(slice(*pair) for pair in bounds)]
            elif layer in range(*bounds[0]):
                buffer[layer - bounds[0][0]] = numbers[tuple(slice(*pair) for pair in bounds[1:])]

    def to_devices(self) -> jax.Array:
        """The parameter, on its devices."""
        like = self._like
        if like.sharding is None:
            (buffer,) = self._buffers.values()
            array = jax.device_put(buffer)
        else:
            array = jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: self._buffers[self._bounds(index)]
            )
        return jax.block_until_ready(array)  # until then the buffers take memory on the host as well

    def _bounds(self, index: Any) -> tuple[tuple[int, int], ...]:
        """Start and stop of a shard along each axis."""
        return tuple(axis.indices(size)[:2] for axis, size in zip(index, self._like.shape, strict=True))

    def _aligned(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """An array that begins at a multiple of 64 bytes, which JAX on CPU uses without a copy."""
        shape = [stop - start for start, stop in bounds]
        num_bytes = math.prod(shape) * self._like.dtype.itemsize
        buffer = np.empty(num_bytes + 64, np.uint8)
        start = -buffer.ctypes.data % 64
        return buffer[start : start + num_bytes].view(self._like.dtype).reshape(shape)


def check_sizes(config: ModelConfig, family: Family, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raises UserError if settings, at `source`, ask for more numbers than files hold, before any memory is taken."""
    num_numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    D, H, L = config.embed_dim, config.head_width, config.num_layers
    # A lower bound for every size: one matrix, or one per layer.
    needed = {
        ("num_layers",): L,
        ("vocab_size", "embed_dim"): D * (config.vocab_size or 1),
        ("num_layers", "embed_dim", "num_heads", "head_dim"): L * D * H * config.num_heads,
        ("num_layers", "embed_dim", "num_kv_heads", "head_dim"): L * D * H * config.kv_heads,
        ("num_layers", "embed_dim", "mlp_dim"): L * D * config.mlp_width,
        ("context_length", "embed_dim"): D * config.context_length if config.positions == "learned" else 0,
    }
    names = {field: setting.name for setting in family.all_settings for field in setting.fields}
    for fields, count in needed.items():
        available, what = (len(tensors), "tensors") if fields == ("num_layers",) else (num_numbers, "numbers")
        if count > available:
            wrong = ", ".join([names[field] for field in fields if field in names] or fields)
            raise UserError(
                f"{source}: {wrong} ask for at least {count:,} {what}, but the files hold {available:,}; get the whole "
                "model again"
            )


def read_params(
    tensors: Mapping[str, StoredTensor],
    family: Family,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    folder: Path,
    *,
    allow_nan: bool = False,
    unstacked: bool = False,
) -> dict[str, jax.Array]:
    """Our parameters, by path, from the tensors of a folder, by name.

    One tensor at a time is in memory, besides the parameters.

    Args:
        wanted: shape, dtype and sharding of each parameter, by path; without a sharding it goes to the default device.
        folder: named in error messages.
        allow_nan: also reads tensors that hold NaN or infinities.
        unstacked: reads each layer into arrays of its own, with paths such as layers/0/attention/query/kernel.

    Raises:
        UserError: a tensor is missing, unknown, not finite, or of another shape or dtype.
    """
    specs = complete_specs(family, {path: like.shape for path, like in wanted.items()})
    found = _with_prefix(tensors, family, folder)
    _check_names(found, specs, family, folder, is_tied="head" not in wanted)
    params: dict[str, jax.Array] = {}
    # Tensors of one group share the arrays that they are read into.
    for (paths, layer), group in itertools.groupby(
        specs, lambda spec: (spec.rule.paths, spec.layer if unstacked else None)
    ):
        likes = [wanted[path] if layer is None else _of_one_layer(wanted[path]) for path in paths]
        buffers = [_HostBuffers(like) for like in likes]
        for spec in group:
            _read_tensor(spec if layer is None else spec._replace(layer=None), found[spec.name], buffers, allow_nan)
        names = paths if layer is None else [path.replace("layers/", f"layers/{layer}/", 1) for path in paths]
        params |= {name: buffer.to_devices() for name, buffer in zip(names, buffers, strict=True)}
    return params


def _of_one_layer(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter without its leading axis of layers, over which a single one is not split."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        sharding = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=sharding)


def _read_tensor(spec: TensorSpec, tensor: StoredTensor, buffers: Sequence[_HostBuffers], allow_nan: bool) -> None:
    """Reads a tensor into the parameters that are stored in it."""
    if tensor.shape != spec.shape:
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} has the shape {tensor.shape}, but its settings ask for {spec.shape}"
        )
    numbers = tensor.read()
    index = None if allow_nan else first_non_finite(numbers)
    if index is not None:
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} holds {numbers[index]} at {list(index)}; the model is broken: get it "
            "again, or read it\nanyway with --allow-nan, or allow_nan=True in Python"
        )
    for buffer, param in zip(buffers, split(spec.rule, numbers, spec.param_shapes), strict=True):
        buffer.write(spec.layer, param)


def first_non_finite(numbers: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity; None if there is none.

    Args:
        numbers: floats of 2 or 4 bytes, contiguous.
    """
    # A float is not finite if all its exponent bits are set; in infinity no others are. For float16 and bfloat16 this
    # is several times faster than np.isfinite.
    bits = np.dtype(f"u{numbers.itemsize}")
    exponent = np.array(np.inf, numbers.dtype).view(bits)
    flat = numbers.reshape(-1).view(bits)
    for start in range(0, flat.size, _BLOCK_NUMBERS):
        is_wrong = flat[start : start + _BLOCK_NUMBERS] & exponent == exponent
        if is_wrong.any():
            return tuple(map(int, np.unravel_index(start + is_wrong.argmax(), numbers.shape)))
    return None


def export_tensors(specs: Sequence[TensorSpec], params: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields the tensors made of our parameters."""
    for spec in specs:
        leaves = [params[path] if spec.layer is None else params[path][spec.layer] for path in spec.rule.paths]
        yield join(spec.rule, [np.asarray(leaf, np.float32) for leaf in leaves])


def split(rule: Rule, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The parameters, of the given shapes, that are stored in a tensor."""
    tensor = tensor[rule.unused :]
    matrix = tensor.T if rule.transposed else tensor
    if rule.offset != 0:
        matrix = matrix + np.float32(rule.offset)
    count = _num_parts(rule, shapes)
    widths = [matrix_shape(path, shape)[-1] // count for path, shape in zip(rule.paths, shapes, strict=True)]
    parts = np.split(matrix.reshape(*matrix.shape[:-1], count, sum(widths)), np.cumsum(widths)[:-1], axis=-1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def join(rule: Rule, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor in which parameters are stored; inverse of `split`."""
    matrices = [array.reshape(matrix_shape(path, array.shape)) for path, array in zip(rule.paths, arrays, strict=True)]
    count = _num_parts(rule, [array.shape for array in arrays])
    parts = [matrix.reshape(*matrix.shape[:-1], count, -1) for matrix in matrices]
    matrix = np.concatenate(parts, axis=-1).reshape(*matrices[0].shape[:-1], -1)
    if rule.offset != 0:
        matrix = matrix - np.float32(rule.offset)
    tensor = matrix.T if rule.transposed else matrix
    return np.concatenate([np.zeros((rule.unused, *tensor.shape[1:]), tensor.dtype), tensor]) if rule.unused else tensor


def _num_parts(rule: Rule, shapes: Sequence[Shape]) -> int:
    """Into how many parts the parameters of a tensor are cut."""
    return min(shape[-2] for shape in shapes) if rule.by_head else rule.parts


def matrix_shape(path: str, shape: Shape) -> Shape:
    """The shape with heads and their width merged: (in, out) of a matrix or table, (out,) of a bias; norms keep it."""
    if "norm/" in path:
        return tuple(shape)
    if path.endswith(("bias", "scale")):
        return (math.prod(shape),)
    num_inputs = 2 if path.endswith("/out/kernel") else 1
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


def _with_prefix(tensors: Mapping[str, StoredTensor], family: Family, folder: Path) -> dict[str, StoredTensor]:
    """Adds the prefix to names without it: files of a model without a head leave it out."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        full = family.full_name(name)
        if full in found:
            raise UserError(f"{folder}: tensor {full} is there twice, with and without {family.prefix}; remove one")
        found[full] = tensor
    return found


def _check_names(
    found: Mapping[str, StoredTensor], specs: Sequence[TensorSpec], family: Family, folder: Path, *, is_tied: bool
) -> None:
    names = {spec.name for spec in specs}
    missing = [spec.name for spec in specs if spec.name not in found]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); get the whole model again")
    if is_tied and family.head in found:
        embedding = next(spec.name for spec in specs if spec.rule.paths == ("embedding",))
        if not np.array_equal(found[family.head].read(), found[embedding].read(), equal_nan=True):
            advice = "get it again" if family.tied is None else "set tie_word_embeddings to false to use both"
            raise UserError(
                f"{folder}: tensor {family.head} differs from {embedding}, but its settings say that they are the "
                f"same; {advice}"
            )
        names.add(family.head)
    is_ignored = re.compile(family.ignored_tensors).fullmatch
    extra = [name for name in found if name not in names and not is_ignored(name.removeprefix(family.prefix))]
    if extra:
        raise UserError(
            f"{folder}: tensor {extra[0]} ({len(extra)} in all) is not part of {family.model_type} with these "
            "settings, and may change the numbers; check the settings"
        )
