"""Tensors of a family <-> our parameters, by the rules of its table."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family, Rule
from flax_decoder.huggingface.tensor_file import Tensor

_BLOCK_NUMBERS = 100_000  # looked through twice, so they should fit into a cache of the processor

Shape = tuple[int, ...]


class Place(NamedTuple):
    """One tensor of a model: its name, its shape, the rule for it, and its layer where it belongs to one."""

    name: str
    shape: Shape
    rule: Rule
    layer: int | None

    def parts(self, shapes: Mapping[str, Shape]) -> list[Shape]:
        """Shapes of our parameters in it, each without its layer axis, out of those of all parameters by path."""
        return [shapes[path] if self.layer is None else shapes[path][1:] for path in self.rule.ours]


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a params tree by path, such as layers/attention/query/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of which `flatten` gives these leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        here = tree
        for branch in branches:
            here = here.setdefault(branch, {})
        here[name] = leaf
    return tree


def places(family: Family, shapes: Mapping[str, Shape]) -> list[Place]:
    """Every tensor that a model of the family has.

    Args:
        family: its table.
        shapes: of our parameters, by path; those of layers have a leading layer axis.
    """
    result = []
    for rule in family.all_rules:
        if not all(path in shapes for path in rule.ours):
            continue  # a bias that this model does not have, or the head of one that shares it with the embedding
        prefix = "" if rule.theirs == family.head else family.prefix
        stacked = "{}" in rule.theirs
        own = [shapes[path][1:] if stacked else shapes[path] for path in rule.ours]
        shape = _their_shape(rule, own)
        for layer in range(shapes[rule.ours[0]][0]) if stacked else [None]:
            result.append(Place(prefix + rule.theirs.format(layer), shape, rule, layer))
    return result


class _Parameter:
    """A parameter whose tensors are being read: the parts of it that devices of this process will hold."""

    def __init__(self, like: jax.ShapeDtypeStruct):
        """Makes room for the parts; devices that hold the same one share it."""
        self._like = like
        whole = tuple(slice(size) for size in like.shape)
        sharding = like.sharding
        indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(like.shape).values()
        self._parts = {bounds: self._room(bounds) for bounds in {self._bounds(index) for index in indices}}

    def put(self, layer: int | None, numbers: np.ndarray) -> None:
        """Takes in the numbers of a layer, or all of them where it belongs to none."""
        for bounds, part in self._parts.items():
            if layer is None:
                part[...] = numbers[tuple(slice(*pair) for pair in bounds)]
            elif layer in range(*bounds[0]):
                part[layer - bounds[0][0]] = numbers[tuple(slice(*pair) for pair in bounds[1:])]

    def place(self) -> jax.Array:
        """The parameter, on its devices."""
        like = self._like
        if like.sharding is None:
            (part,) = self._parts.values()
            array = jax.device_put(part)
        else:
            array = jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: self._parts[self._bounds(index)]
            )
        return jax.block_until_ready(array)  # what is still on its way keeps its numbers on the host as well

    def _bounds(self, index: Any) -> tuple[tuple[int, int], ...]:
        """Where a part begins and ends along each axis."""
        return tuple(own.indices(size)[:2] for own, size in zip(index, self._like.shape, strict=True))

    def _room(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """An array that JAX on CPU takes as its own, without a copy: it begins at a multiple of 64 bytes."""
        shape = [stop - start for start, stop in bounds]
        num_bytes = math.prod(shape) * self._like.dtype.itemsize
        room = np.empty(num_bytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + num_bytes].view(self._like.dtype).reshape(shape)


def refuse_too_large(config: ModelConfig, family: Family, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError where the files cannot hold a model, however its matrices lie in them.

    Args:
        config: the model.
        family: how config.json names its settings.
        tensors: all that the files hold.
        source: the config.json.
    """
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    D, H, L = config.embed_dim, config.head_width, config.num_layers
    # One matrix, or one of each layer, for every size.
    needed = {
        ("num_layers",): L,
        ("vocab_size", "embed_dim"): D * (config.vocab_size or 1),
        ("num_layers", "embed_dim", "num_heads", "head_dim"): L * D * H * config.num_heads,
        ("num_layers", "embed_dim", "num_kv_heads", "head_dim"): L * D * H * config.kv_heads,
        ("num_layers", "embed_dim", "mlp_dim"): L * D * config.mlp_width,
        ("context_length", "embed_dim"): D * config.context_length if config.positions == "learned" else 0,
    }
    theirs = {ours: setting.theirs for setting in family.all_settings for ours in setting.ours}
    for sizes, count in needed.items():
        most, what = (len(tensors), "tensors") if sizes == ("num_layers",) else (held, "numbers")
        if count > most:
            fields = ", ".join(theirs[ours] for ours in sizes if ours in theirs)
            raise UserError(
                f"{source}: {fields} ask for at least {count:,} {what}, but the files hold {most:,}; get the whole "
                "model again"
            )


def read_params(
    tensors: Mapping[str, Tensor],
    family: Family,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    folder: Path,
    *,
    allow_nan: bool = False,
) -> dict[str, jax.Array]:
    """Our parameters from the tensors of a folder, one tensor after the other, each straight to its devices.

    Args:
        tensors: by name.
        family: what the names mean.
        wanted: shape, dtype and sharding of each parameter, by path; without a sharding it goes to the default device.
        folder: what the message of an error names.
        allow_nan: reads tensors that hold NaN or infinities too.

    Returns:
        The parameters by path.

    Raises:
        UserError: a tensor is missing, not known, not finite, or of another shape or dtype.
    """
    shapes = {path: like.shape for path, like in wanted.items()}
    all_places = places(family, shapes)
    found = _named_with_prefix(tensors, family, folder)
    _check_names(found, all_places, family, folder, is_tied="head" not in shapes)
    params: dict[str, jax.Array] = {}
    for paths, group in itertools.groupby(all_places, key=lambda place: place.rule.ours):
        together = [_Parameter(wanted[path]) for path in paths]
        for place in group:
            _read_place(place, found[place.name], place.parts(shapes), together, allow_nan)
        params |= {path: parameter.place() for path, parameter in zip(paths, together, strict=True)}
    return params


def _read_place(
    place: Place, tensor: Tensor, shapes: Sequence[Shape], together: Sequence[_Parameter], allow_nan: bool
) -> None:
    """Reads a tensor into the parameters that lie in it; it is let go before the next one is read."""
    if tensor.shape != place.shape:
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} has the shape {tensor.shape}, but config.json asks for {place.shape}"
        )
    numbers = tensor.read()
    where = None if allow_nan else first_not_finite(numbers)
    if where is not None:
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} holds {numbers[where]} at {list(map(int, where))}, so the model is "
            "broken; get it again, or read it\nall the same: --allow-nan, or allow_nan=True in Python"
        )
    for parameter, part in zip(together, split(place.rule, numbers, shapes), strict=True):
        parameter.put(place.layer, part)


def first_not_finite(numbers: np.ndarray) -> tuple[int, ...] | None:
    """Where the first NaN or infinity is; None where all numbers are finite. Takes no memory to speak of.

    Args:
        numbers: floats of 2 or 4 bytes, contiguous.
    """
    # Bits of a float, taken for an integer, grow with its size, and from infinity on it is no number. So the largest
    # of them as signed integers tells of positive ones, and as unsigned integers of negative ones.
    signed, unsigned = (np.dtype(f"{kind}{numbers.itemsize}") for kind in "iu")
    infinity = np.array(np.inf, numbers.dtype).view(unsigned)
    negative_infinity = np.array(-np.inf, numbers.dtype).view(unsigned)
    flat = numbers.reshape(-1)
    for start in range(0, flat.size, _BLOCK_NUMBERS):
        bits = flat[start : start + _BLOCK_NUMBERS].view(unsigned)
        if bits.view(signed).max() >= infinity.view(signed) or bits.max() >= negative_infinity:
            place = start + int(np.isfinite(flat[start : start + _BLOCK_NUMBERS]).argmin())
            return tuple(int(index) for index in np.unravel_index(place, numbers.shape))
    return None


def write_arrays(wanted: Sequence[Place], params: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Their tensors from our parameters, in the order of the places, each made when it is asked for."""
    for place in wanted:
        leaves = [params[path] if place.layer is None else params[path][place.layer] for path in place.rule.ours]
        yield join(place.rule, [np.asarray(leaf, np.float32) for leaf in leaves])


def split(rule: Rule, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Our parameters, of the given shapes, out of one of their tensors."""
    matrix = tensor.T if rule.transposed else tensor
    if rule.offset != 0:
        matrix = matrix + np.float32(rule.offset)
    if rule.by_head:
        heads, width = shapes[0][-2:]
        apart = matrix.reshape(*matrix.shape[:-1], heads, len(shapes), width)
        parts = [apart[..., part, :] for part in range(len(shapes))]
    else:
        widths = [_matrix_shape(path, shape)[-1] for path, shape in zip(rule.ours, shapes, strict=True)]
        parts = np.split(matrix, np.cumsum(widths)[:-1], axis=-1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def join(rule: Rule, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One of their tensors out of our parameters; undoes `split`."""
    matrices = [array.reshape(_matrix_shape(path, array.shape)) for path, array in zip(rule.ours, arrays, strict=True)]
    if rule.by_head:
        apart = [m.reshape(*m.shape[:-1], *array.shape[-2:]) for m, array in zip(matrices, arrays, strict=True)]
        matrix = np.stack(apart, axis=-2).reshape(*matrices[0].shape[:-1], -1)
    else:
        matrix = np.concatenate(matrices, axis=-1)
    if rule.offset != 0:
        matrix = matrix - np.float32(rule.offset)
    return matrix.T if rule.transposed else matrix


def _matrix_shape(path: str, shape: Shape) -> Shape:
    """The shape with heads and their width merged: (in, out) of a matrix or table, (out,) of a bias or scale."""
    if path.endswith(("/bias", "/scale")):
        return (math.prod(shape),)
    num_inputs = 2 if path.endswith("/out/kernel") else 1
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


def _their_shape(rule: Rule, shapes: Sequence[Shape]) -> Shape:
    matrices = [_matrix_shape(path, shape) for path, shape in zip(rule.ours, shapes, strict=True)]
    shape = (*matrices[0][:-1], sum(matrix[-1] for matrix in matrices))
    return shape[::-1] if rule.transposed else shape


def _named_with_prefix(tensors: Mapping[str, Tensor], family: Family, folder: Path) -> dict[str, Tensor]:
    """Puts the prefix before names that lack it: files of a model without its head leave it out."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = name if name == family.head else family.prefix + name.removeprefix(family.prefix)
        if full in found:
            raise UserError(f"{folder}: tensor {full} is there twice, with and without {family.prefix}; remove one")
        found[full] = tensor
    return found


def _check_names(
    found: dict[str, Tensor], wanted: Sequence[Place], family: Family, folder: Path, *, is_tied: bool
) -> None:
    names = {place.name for place in wanted}
    missing = [place.name for place in wanted if place.name not in found]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]}{_more(missing)} is missing; get the whole model again")
    if is_tied and family.head in found:
        embedding = next(place.name for place in wanted if place.rule.ours == ("embedding",))
        if not np.array_equal(found[family.head].read(), found[embedding].read(), equal_nan=True):
            raise UserError(
                f"{folder}: tensor {family.head} differs from {embedding}, but config.json says that they are one; "
                "set tie_word_embeddings to false to use both"
            )
        names.add(family.head)
    extra = [
        name
        for name in found
        if name not in names and not re.fullmatch(family.extra_tensors, name.removeprefix(family.prefix))
    ]
    if extra:
        raise UserError(
            f"{folder}: tensor {extra[0]}{_more(extra)} is no part of {family.model_type} with these settings, so "
            "what it would change cannot be told; check config.json"
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
