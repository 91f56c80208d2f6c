"""Rotary settings in config.json, as transformers 4 and 5 name them."""

from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Rotary
from flax_decoder.io.strict_json import shown

_FIELDS = {
    "factor": "rotary_scaling_factor",
    "low_freq_factor": "rotary_low_frequency_factor",
    "high_freq_factor": "rotary_high_frequency_factor",
    "original_max_position_embeddings": "rotary_original_context",
}
# rope_type -> the fields that it needs.
_TYPES = {"default": [], "linear": ["factor"], "llama3": list(_FIELDS)}


def read_rotary(rest: dict[str, Any], rotary: Rotary, context_length: int, source: str) -> dict[str, Any]:
    """Reads the rotary settings, and removes them from `rest`.

    transformers 4 has rope_theta and rope_scaling; version 5 one table, rope_parameters, or one per type of layer.

    Args:
        rest: the fields of config.json that are not read yet.
        rotary: their names.
        context_length: the default of llama3's original context.
        source: how error messages begin.

    Raises:
        UserError: a setting is missing, unknown, or has two values.
    """
    window_base = rest.pop(rotary.window_base, None) if rotary.window_base else None
    old = {"rope_theta": rest.pop(rotary.base, None)}
    if rotary.fraction is not None:
        old["partial_rotary_factor"] = rest.pop(rotary.fraction, None)
    scaling, new = (_table(rest.pop(name, None), name, source) for name in ("rope_scaling", "rope_parameters"))
    if rotary.window_base and "full_attention" in new:
        in_window = _table(new.pop("sliding_attention", None), "sliding_attention", source)
        window_base = in_window.pop("rope_theta", window_base)
        new = _table(new.pop("full_attention"), "full_attention", source) | new
        if in_window and in_window != {"rope_type": "default"}:
            raise UserError(f"{source}: rope_parameters: layers with a window support rope_theta only")
    rope = _merged([old, scaling, new], source)
    fraction = rope.pop("partial_rotary_factor", rotary.default_fraction)
    if rotary.fraction is None and fraction != 1:
        raise UserError(f"{source}: partial_rotary_factor = {fraction} is not supported for this type")
    values = {"rotary_base": rope.pop("rope_theta", rotary.default_base), "rotary_fraction": fraction}
    if rotary.window_base:
        values["rotary_window_base"] = 10_000.0 if window_base is None else window_base
    return values | _read_scaling(rope, rotary.types, context_length, source)


def _table(value: Any, name: str, source: str) -> dict[str, Any]:
    """A copy of a table of rotary settings; its type may have an older name."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} = {shown(value)} must be an object")
    table = dict(value)
    old_type = table.pop("type", None)
    return ({} if old_type is None else {"rope_type": old_type}) | table


def _merged(tables: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """All values that are given; tables that give the same name must agree."""
    merged: dict[str, Any] = {}
    for name, value in (item for table in tables for item in table.items() if item[1] is not None):
        if merged.setdefault(name, value) != value:
            raise UserError(f"{source}: {name} is both {shown(merged[name])} and {shown(value)}; keep the right one")
    return merged


def _read_scaling(rope: dict[str, Any], types: tuple[str, ...], context_length: int, source: str) -> dict[str, Any]:
    """Reads how wavelengths are stretched from what is left of the rotary settings."""
    kind = rope.pop("rope_type", "default")
    if kind not in types:
        raise UserError(f"{source}: rope_type = {shown(kind)} is not supported for this type, only {', '.join(types)}")
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", context_length)
    values: dict[str, Any] = {"rotary_scaling": "none" if kind == "default" else kind}
    for name in _TYPES[kind]:
        if name not in rope:
            raise UserError(f"{source}: {name} is missing; rope_type = {shown(kind)} needs it")
        values[_FIELDS[name]] = rope.pop(name)
    if rope:
        name, value = next(iter(rope.items()))
        raise UserError(f"{source}: {name} = {shown(value)} is not known for rope_type = {shown(kind)}")
    return values


def write_rotary(config: ModelConfig, rotary: Rotary) -> dict[str, Any]:
    """The fields that `read_rotary` reads, with the names of transformers 4, which version 5 reads too."""
    document: dict[str, Any] = {rotary.base: config.rotary_base, "rope_scaling": None}
    if rotary.fraction is not None:
        document[rotary.fraction] = config.rotary_fraction
    if rotary.window_base is not None:
        document[rotary.window_base] = config.rotary_window_base or config.rotary_base
    kind = config.rotary_scaling
    if kind in rotary.types:  # "none" is not
        document["rope_scaling"] = {"rope_type": kind} | {name: getattr(config, _FIELDS[name]) for name in _TYPES[kind]}
    return document
