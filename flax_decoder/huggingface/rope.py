"""Rotary positions in config.json, as transformers 4 names them and as version 5 does."""

from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Rotary
from flax_decoder.io.strict_json import shown

_ROPE_FIELDS = {
    "factor": "rotary_scaling_factor",
    "low_freq_factor": "rotary_low_frequency_factor",
    "high_freq_factor": "rotary_high_frequency_factor",
    "original_max_position_embeddings": "rotary_original_context",
}
_ROPE_TYPES = {
    "default": ("none", ()),
    "linear": ("linear", ("factor",)),
    "llama3": ("llama3", tuple(_ROPE_FIELDS)),
}


def read_rotary(rest: dict[str, Any], rotary: Rotary, context_length: int, source: str) -> dict[str, Any]:
    """The rotary settings; takes what it reads out of `rest`.

    transformers 4 has rope_theta and rope_scaling, version 5 one table rope_parameters, or one for each kind of layer.

    Args:
        rest: fields of config.json that are not read yet.
        rotary: their names.
        context_length: what llama3's original context is where it is left out.
        source: what the message of an error begins with.

    Raises:
        UserError: a setting that is missing, not known, or said twice.
    """
    window_base = rest.pop(rotary.window_base, None) if rotary.window_base else None
    old = {"rope_theta": rest.pop(rotary.base, None)}
    if rotary.fraction is not None:
        old["partial_rotary_factor"] = rest.pop(rotary.fraction, None)
    scaling, new = (_rope_table(rest.pop(name, None), name, source) for name in ("rope_scaling", "rope_parameters"))
    if rotary.window_base and "full_attention" in new:
        in_window = _rope_table(new.pop("sliding_attention", None), "sliding_attention", source)
        window_base = in_window.pop("rope_theta", window_base)
        new = _rope_table(new.pop("full_attention"), "full_attention", source) | new
        if in_window and in_window != {"rope_type": "default"}:
            raise UserError(f"{source}: rope_parameters: layers with a window can have a rope_theta only")
    rope = _merged([old, scaling, new], source)
    values = {
        "rotary_base": _given(rope.pop("rope_theta", None), rotary.default_base),
        "rotary_fraction": _given(rope.pop("partial_rotary_factor", None), rotary.default_fraction),
        **_read_scaling(rope, rotary.types, context_length, source),
    }
    if rotary.fraction is None and values["rotary_fraction"] != 1:
        raise UserError(f"{source}: partial_rotary_factor = {values['rotary_fraction']} is not supported for this type")
    if rotary.window_base:
        values["rotary_window_base"] = _given(window_base, rotary.default_window_base)
    return values


def _merged(tables: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """All that the tables say, which must not contradict each other."""
    merged: dict[str, Any] = {}
    for name, value in (item for table in tables for item in table.items() if item[1] is not None):
        if merged.setdefault(name, value) != value:
            raise UserError(f"{source}: {name} is both {shown(merged[name])} and {shown(value)}; keep the right one")
    return merged


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rope_table(value: Any, name: str, source: str) -> dict[str, Any]:
    """A copy of a table of rope settings, under the newer of two names for its type."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} = {shown(value)} must be an object")
    table = dict(value)
    old_type = table.pop("type", None)
    return ({} if old_type is None else {"rope_type": old_type}) | table


def _read_scaling(rope: dict[str, Any], types: tuple[str, ...], context_length: int, source: str) -> dict[str, Any]:
    """How the waves are stretched; what is left in `rope` must be of the given type."""
    kind = _given(rope.pop("rope_type", None), "default")
    if kind not in types:
        raise UserError(
            f"{source}: rope_type = {shown(kind)} is not supported for this type; there are: {', '.join(types)}"
        )
    ours, names = _ROPE_TYPES[kind]
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", context_length)
    values: dict[str, Any] = {"rotary_scaling": ours}
    for name in names:
        if rope.get(name) is None:
            raise UserError(f"{source}: {name} is missing; rope_type = {shown(kind)} needs it")
        values[_ROPE_FIELDS[name]] = rope.pop(name)
    if rope:
        name, value = next(iter(rope.items()))
        raise UserError(f"{source}: {name} = {shown(value)} is not known for rope_type = {shown(kind)}")
    return values


def write_rotary(config: ModelConfig, rotary: Rotary) -> dict[str, Any]:
    """The fields that `read_rotary` reads back, in the names of transformers 4, which version 5 reads too."""
    document: dict[str, Any] = {rotary.base: config.rotary_base, "rope_scaling": None}
    if rotary.fraction is not None:
        document[rotary.fraction] = config.rotary_fraction
    if rotary.window_base is not None:
        document[rotary.window_base] = _given(config.rotary_window_base, config.rotary_base)
    theirs = next(theirs for theirs, (ours, _) in _ROPE_TYPES.items() if ours == config.rotary_scaling)
    if theirs != "default" and theirs in rotary.types:
        numbers = {name: getattr(config, _ROPE_FIELDS[name]) for name in _ROPE_TYPES[theirs][1]}
        document["rope_scaling"] = {"rope_type": theirs, **numbers}
    return document
