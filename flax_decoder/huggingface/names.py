"""A map of names, theirs -> ours, for weights that no table of a family describes: somebody's own PyTorch module."""

import difflib
import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family, Rule
from flax_decoder.huggingface.weights import Shape, matrix_shape, tensor_specs
from flax_decoder.io.foreign_file import open_named, read_content

MAX_FILE_BYTES = 1_000_000
EXAMPLE = '"blocks.{}.qkv.weight" = ["layers/attention/query/kernel", …]'
_OPTIONS = {"paths", "transposed", "by_head"}
# How much of a tensor equals our parameters if it is stored as a rule says, from 0 to 1.
Agreement = Callable[[Rule], float]


@dataclass(frozen=True)
class LeftOver:
    """What a map leaves without a counterpart: names with {} for the layer, each with its shape.

    Attributes:
        ours: paths of our parameters.
        theirs: names of their tensors.
    """

    ours: dict[str, Shape]
    theirs: dict[str, Shape]

    def matrices(self) -> "LeftOver":
        """Those that are no bias and no scale, without which nothing can be computed."""
        kept = (
            {path: shape for path, shape in self.ours.items() if not path.endswith(("bias", "scale"))},
            {name: shape for name, shape in self.theirs.items() if len(_without_ones(shape)) > 1},
        )
        return LeftOver(*kept)

    def refuse(self, source: str) -> None:
        """Raises UserError if there is anything."""
        if self.ours or self.theirs:
            sides = f"of theirs {_listed(self.theirs)}; of ours {_listed(self.ours)}"
            raise UserError(
                f"{source}: has no counterpart for, {sides}\ngive a map of names, theirs = ours, such as {EXAMPLE}"
            )


def read_layout(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file: [names], for `family_of_names`, and perhaps [model], settings of `ModelConfig`.

    Raises:
        UserError: the file cannot be read, is no TOML, or has no [names], or tables of other names.
    """
    content = read_content(open_named(path), MAX_FILE_BYTES, str(path))
    try:
        tables = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not TOML: {error}") from None
    are_tables = all(isinstance(table, dict) for table in tables.values())
    if not are_tables or not {"names"} <= tables.keys() <= {"model", "names"}:
        raise UserError(f"{path}: must hold a table [names] of lines such as\n{EXAMPLE}; and at most [model] beside it")
    return tables


def family_of_names(
    names: Mapping[str, Any],
    tensors: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    source: str = "names",
    *,
    layouts: Mapping[str, bool] | None = None,
    agreement: Agreement | None = None,
) -> Family:
    """The family whose tensors have the names of a map.

    A tensor is stored as its shape says: (out, in), as in nn.Linear, or (in, out). Where both fit, it is as `layouts`
    says, else as the numbers do, else as in nn.Linear. Several parameters in one tensor stand one after the other
    along its outputs; whether they are interleaved head by head, only numbers or the map can say.

    Args:
        names: name of a tensor, with {} for the number of the layer -> path of our parameter, or a list of paths if
            it holds several, or {"paths": ..., "transposed": True for (out, in), "by_head": ...}. An empty list is a
            tensor that is not learned, such as a mask.
        tensors: the shapes of all their tensors, by full name.
        shapes: the shapes of our parameters by path; those of layers have a leading layer axis.
        source: start of error messages.
        layouts: whether the tensor of a name in `names` is (out, in), where that is known.
        agreement: see `Agreement`; decides what shapes leave open.

    Raises:
        UserError: a name or a path that does not exist or is there twice, or a shape that does not fit.
    """
    rules, ignored, seen = [], [], dict[str, str]()
    for tensor, value in names.items():
        paths, options = _parse(tensor, value, source)
        found = _shape_of(tensor, tensors, shapes, source)
        if not paths:
            ignored.append(tensor)
            continue
        if paths == ("head",) and "head" not in shapes:
            continue  # ours is the embedding, and so must theirs be: see `head` below
        for path in paths:
            _check_path(tensor, path, shapes, source)
            if path in seen:
                raise UserError(f"{source}: {path} is given twice, to {seen[path]} and to {tensor}; remove one")
            seen[path] = tensor
        known = {"transposed": (layouts or {}).get(tensor)}
        fitting = ways_to_store(tensor, paths, shapes, found, **known | options)
        if not fitting:
            ours = " and ".join(f"{path} {_one_layer(path, shapes)}" for path in paths)
            raise UserError(f"{source}: {tensor} of shape {found} cannot hold {ours}; check the map and the model")
        rules.append(max(fitting, key=agreement) if agreement and len(fitting) > 1 else fitting[0])
    head = next((name for name, value in names.items() if _parse(name, value, source)[0] == ("head",)), "")
    return Family(
        model_type="module",
        architecture="Module",
        constants={},
        settings=(),
        rules=tuple(rules),
        prefix="",
        head=head,
        head_bias="",
        rotary=None,
        ignored_tensors="|".join(map(_pattern, ignored)) or "(?!)",
    )


def left_over(family: Family, tensors: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> LeftOver:
    """What a family has no rule for; see `family_of_names` for the arguments."""
    named = {spec.name for spec in tensor_specs(family, shapes)} | {family.head}
    is_ignored = re.compile(family.ignored_tensors).fullmatch
    covered = {path for rule in family.all_rules for path in rule.paths}
    theirs = {name: shape for name, shape in tensors.items() if name not in named and not is_ignored(name)}
    return LeftOver({path: shape for path, shape in shapes.items() if path not in covered}, theirs)


def ways_to_store(
    tensor: str,
    paths: tuple[str, ...],
    shapes: Mapping[str, Shape],
    found: Shape,
    transposed: bool | None = None,
    by_head: bool | None = None,
) -> list[Rule]:
    """All rules by which a tensor of a shape can hold parameters, the likeliest first."""
    # A table of embeddings has a row per token on both sides; a bias or scale has one axis.
    is_matrix = all(path == "head" or path.endswith("/kernel") for path in paths)
    heads = {_heads(path, shapes) for path in paths}
    can_interleave = len(paths) > 1 and len(heads) == 1 and heads != {()}
    rules = [
        Rule(tensor, paths, turned, headwise)
        for headwise in ((False, True) if can_interleave else (False,))
        for turned in ((True, False) if is_matrix else (False,))
        if (transposed in (None, turned) or not is_matrix) and by_head in (None, headwise)
    ]
    return [rule for rule in rules if _fits(rule, found, shapes)]


def _parse(tensor: str, value: Any, source: str) -> tuple[tuple[str, ...], dict[str, bool]]:
    """The paths of an entry of the map, and what it says about how they are stored."""
    table = value if isinstance(value, Mapping) else {"paths": value}
    given: Any = table.get("paths")
    paths = [given] if isinstance(given, str) else given
    options = {name: option for name, option in table.items() if name != "paths"}
    is_list = isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths)
    if not isinstance(tensor, str) or not is_list or not table.keys() <= _OPTIONS or tensor.count("{}") > 1:
        raise UserError(
            f"{source}: {tensor!r} = {value!r} must be a path of ours, or a list of them, such as {EXAMPLE}"
        )
    if not all(isinstance(option, bool) for option in options.values()):
        raise UserError(f"{source}: {tensor}: transposed and by_head must be true or false")
    return tuple(paths), options


def _shape_of(tensor: str, tensors: Mapping[str, Shape], shapes: Mapping[str, Shape], source: str) -> Shape:
    """The shape of a tensor, which all layers must share."""
    numbers = range(num_layers(shapes)) if "{}" in tensor else [0]
    found = {}
    for name in (tensor.replace("{}", str(number)) for number in numbers):
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, n=1, cutoff=0)
            raise UserError(f"{source}: there is no tensor {name}; the nearest is {near[0] if near else 'none'}")
        found[name] = _without_ones(tensors[name])
    if len(set(found.values())) > 1:
        raise UserError(f"{source}: the shapes of {tensor} differ between layers: {sorted(set(found.values()))}")
    return next(iter(found.values()))


def _check_path(tensor: str, path: str, shapes: Mapping[str, Shape], source: str) -> None:
    if path not in shapes:
        near = difflib.get_close_matches(path, shapes, n=1, cutoff=0)
        raise UserError(f"{source}: {tensor}: the model has no parameter {path}; the nearest is {near[0]}")
    if path.startswith("layers/") != ("{}" in tensor):
        raise UserError(f"{source}: {tensor} = {path}: write {{}} for the number of the layer, where there is one only")


def _heads(path: str, shapes: Mapping[str, Shape]) -> Shape:
    """Number of heads and their width, of what is projected into heads."""
    is_projection = path.startswith(("layers/attention/query/", "layers/attention/key/", "layers/attention/value/"))
    return shapes[path][-2:] if is_projection else ()


def _fits(rule: Rule, found: Shape, shapes: Mapping[str, Shape]) -> bool:
    matrices = [matrix_shape(path, _one_layer(path, shapes)) for path in rule.paths]
    if len({matrix[:-1] for matrix in matrices}) > 1:
        return False
    shape = (*matrices[0][:-1], sum(matrix[-1] for matrix in matrices))
    return _without_ones(shape[::-1] if rule.transposed else shape) == _without_ones(found)


def _one_layer(path: str, shapes: Mapping[str, Shape]) -> Shape:
    return tuple(shapes[path][1:] if path.startswith("layers/") else shapes[path])


def num_layers(shapes: Mapping[str, Shape]) -> int:
    """L, of the shapes of our parameters."""
    return next(shape[0] for path, shape in shapes.items() if path.startswith("layers/"))


def _without_ones(shape: Iterable[int]) -> Shape:
    """A table of positions may be (1, T, D), so that it adds to a batch."""
    return tuple(itertools.dropwhile(lambda size: size == 1, shape)) or (1,)


def _pattern(tensor: str) -> str:
    """A regular expression of the names that a name with {} stands for."""
    return r"\d+".join(map(re.escape, tensor.split("{}")))


def _listed(shapes: Mapping[str, Shape]) -> str:
    """Some names with their shapes."""
    shown = [f"{name} {tuple(shape)}" for name, shape in itertools.islice(shapes.items(), 3)]
    more = [f"{len(shapes) - 3} more"] if len(shapes) > 3 else []
    return ", ".join([*shown, *more]) or "nothing"
