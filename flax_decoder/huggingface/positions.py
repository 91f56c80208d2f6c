"""What config.json says of positions: rotary settings, as transformers 4 and 5 name them, and windows."""

import math
from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Rotary, Windows
from flax_decoder.io.strict_json import shown

_LINEAR = {"factor": "rotary_scaling_factor"}
_BY_TURNS = _LINEAR | {"original_max_position_embeddings": "rotary_original_context"}
# rope_type -> the fields that it needs, and ours.
_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": _LINEAR,
    "llama3": {
        **_BY_TURNS,
        "low_freq_factor": "rotary_low_frequency_factor",
        "high_freq_factor": "rotary_high_frequency_factor",
    },
    "yarn": {
        **_BY_TURNS,
        "beta_slow": "rotary_low_frequency_factor",
        "beta_fast": "rotary_high_frequency_factor",
        "attention_factor": "rotary_magnitude",
        "truncate": "rotary_truncate",
    },
    "dynamic": _LINEAR,
    "longrope": {
        "original_max_position_embeddings": "rotary_original_context",
        "short_factor": "rotary_short_factors",
        "long_factor": "rotary_long_factors",
        "attention_factor": "rotary_magnitude",
    },
}
_FIRST_CONTEXT = "original_max_position_embeddings"
_QUERY_SCALING = "llama_4_scaling_beta"
# What stands beside a number alpha, and is not read.
_BESIDE_ALPHA = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_GPT_NEO_TYPES = ["global", "local"]  # without a window, with one
_LAYER_TYPES = ["full_attention", "sliding_attention"]  # without a window, with one


def read_rotary(
    rest: dict[str, Any], rotary: Rotary, context_length: int, head_width: int, source: str
) -> dict[str, Any]:
    """Reads the rotary settings, and removes them from `rest`.

    transformers 4 has rope_theta and rope_scaling; version 5 one table, rope_parameters, or one per type of layer.

    Args:
        rest: the fields of config.json that are not read yet.
        rotary: their names.
        context_length: the default of the original context.
        head_width: width of a head.
        source: how error messages begin.

    Returns:
        Settings of our model; with dynamic scaling among them the context length, which is longer by the factor.

    Raises:
        UserError: a setting is missing, unknown, or has two values.
    """
    if rotary.width is not None:
        return _read_width(rest, rotary.width, rotary.default_width, head_width, source)
    own = {"rope_theta": rotary.base, "partial_rotary_factor": rotary.fraction or "partial_rotary_factor"}
    given = [(ours, name, rest.pop(ours, None)) for name, ours in own.items()]
    in_window = [(rotary.window_base, rest.pop(rotary.window_base, None))] if rotary.window_base else []
    old = rest.get("rope_scaling")
    if rotary.by_kind and isinstance(old, dict) and "type" in old and "rope_type" not in old:
        # transformers passes over it.
        raise UserError(f"{source}: rope_scaling.type = {shown(old['type'])} must be called rope_type for this type")
    scaling, new = (_table(rest.pop(name, None), name, source) for name in ("rope_scaling", "rope_parameters"))
    if rotary.by_kind and new and "full_attention" not in new:
        raise UserError(f"{source}: rope_parameters must hold full_attention and sliding_attention")
    if (rotary.window_base or rotary.by_kind) and "full_attention" in new:
        local = _table(new.pop("sliding_attention", None), "sliding_attention", source)
        in_window.append(("rope_parameters.sliding_attention.rope_theta", local.pop("rope_theta", None)))
        new = _table(new.pop("full_attention"), "full_attention", source) | new
        if local and local != {"rope_type": "default"}:
            raise UserError(f"{source}: rope_parameters: layers with a window support rope_theta only")
    given += [(f"rope_scaling.{name}", name, value) for name, value in scaling.items()]
    given += [(f"rope_parameters.{name}", name, value) for name, value in new.items()]
    if rotary.original_context is not None:
        kind = new.get("rope_type") or scaling.get("rope_type") or "default"
        original = rest.pop(_FIRST_CONTEXT, rotary.original_context)
        given += [(_FIRST_CONTEXT, _FIRST_CONTEXT, original)] if kind != "default" else []  # else nothing reads it
    rope = _merged(given, source)
    # transformers 4.57 also writes the common names of what a family calls otherwise, but reads only the family's.
    for name, default in (("rope_theta", rotary.default_base), ("partial_rotary_factor", rotary.default_fraction)):
        value, copy = rope.get(name, default), rest.pop(name, None)
        _merged([(own[name], name, value), (name, name, copy)], source)
    fraction = rope.pop("partial_rotary_factor", rotary.default_fraction)
    if rotary.fraction is None and fraction != 1:
        raise UserError(f"{source}: partial_rotary_factor = {shown(fraction)} is not supported for this type")
    values = {"rotary_base": rope.pop("rope_theta", rotary.default_base), "rotary_fraction": fraction}
    if rotary.window_base or rotary.by_kind:
        bases = _merged([(place, "base", value) for place, value in in_window], source)
        values["rotary_window_base"] = bases.get("base", rotary.default_window_base)
    if rotary.has_alpha and rope.get("rope_type") == "dynamic" and rope.get("alpha"):
        alpha = rope.pop("alpha")
        if type(alpha) not in (int, float) or alpha < 1 or head_width <= 2:
            raise UserError(f"{source}: alpha = {shown(alpha)} must be a number from 1 on")
        values["rotary_base"] *= alpha ** (head_width / (head_width - 2))
        rope = {name: value for name, value in rope.items() if name not in (*_BESIDE_ALPHA, "rope_type")}
    rotated = int(head_width * fraction) if type(fraction) in (int, float) else 0
    return values | _read_scaling(rope, rotary, context_length, rotated, source)


def _read_width(rest: dict[str, Any], name: str, default: int, head_width: int, source: str) -> dict[str, Any]:
    """Reads how many numbers of each head are rotated."""
    width = rest.pop(name, default)
    if type(width) is not int or not 0 < width <= head_width:
        raise UserError(f"{source}: {name} = {shown(width)} must be a whole number up to {head_width}, a head's width")
    fraction = width / head_width
    # The quotient may be rounded down, and then the product to the number below.
    return {"rotary_fraction": fraction if int(head_width * fraction) == width else math.nextafter(fraction, 1)}


def _table(value: Any, name: str, source: str) -> dict[str, Any]:
    """A copy of a table of rotary settings; its type may have an older name."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} = {shown(value)} must be an object")
    table = dict(value)
    old_type = table.pop("type", None)
    kind = table.get("rope_type")
    if None not in (old_type, kind) and old_type != kind:
        raise UserError(
            f"{source}: {name}.type = {shown(old_type)}, but {name}.rope_type = {shown(kind)}; keep the right one"
        )
    return table if old_type is None else table | {"rope_type": old_type}


def _merged(given: list[tuple[str, str, Any]], source: str) -> dict[str, Any]:
    """The value of each name, of all that are given as (place, name, value); those of one name must agree."""
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, name, value in given:
        if value is None:
            continue
        if merged.setdefault(name, value) != value:
            raise UserError(
                f"{source}: {places[name]} = {shown(merged[name])}, but {place} = {shown(value)}; keep the right one"
            )
        places.setdefault(name, place)
    return merged


def _read_scaling(
    rope: dict[str, Any], rotary: Rotary, context_length: int, rotated: int, source: str
) -> dict[str, Any]:
    """Reads how wavelengths are stretched from what is left of the rotary settings."""
    kind, types = rope.pop("rope_type", "default"), rotary.types
    kind = "longrope" if kind == "su" and "longrope" in types else kind  # its first name
    if kind not in types:
        raise UserError(f"{source}: rope_type = {shown(kind)} is not supported for this type, only {', '.join(types)}")
    values: dict[str, Any] = {"rotary_scaling": "none" if kind == "default" else kind}
    if rotary.scales_queries:
        rope.pop("max_position_embeddings", None)  # nothing reads it there
        growth = values["rotary_query_scaling"] = rope.pop(_QUERY_SCALING, None)
        if type(growth) not in (int, float) or growth < 0:
            raise UserError(f"{source}: {_QUERY_SCALING} = {shown(growth)} must be a number from 0 on")
    if kind in ("llama3", "yarn", "longrope") and rope.get(_FIRST_CONTEXT) is None:
        rope[_FIRST_CONTEXT] = context_length
    if kind == "yarn":
        # transformers looks for `truncate` in a table for all layers.
        rope = _whole_yarn(rope, context_length, source, must_truncate=rotary.by_kind or rotary.window_base is not None)
    elif kind == "longrope":
        rope = _whole_longrope(rope, context_length, rotated, source)
    for name in _TYPES[kind]:
        if name not in rope:
            raise UserError(f"{source}: {name} is missing; rope_type = {shown(kind)} needs it")
        values[_TYPES[kind][name]] = rope.pop(name)
    if kind == "dynamic":
        factor = values["rotary_scaling_factor"]
        if type(factor) not in (int, float) or not 1 <= factor <= 1e6:
            raise UserError(f"{source}: factor = {shown(factor)} must be a number from 1 to a million")
        # max_position_embeddings is the original context; texts may be longer by the factor.
        values |= {"rotary_original_context": context_length, "context_length": int(context_length * factor)}
    if rope:
        name, value = next(iter(rope.items()))
        raise UserError(f"{source}: {name} = {shown(value)} is not known for rope_type = {shown(kind)}")
    return values


def _whole_yarn(rope: dict[str, Any], context_length: int, source: str, *, must_truncate: bool) -> dict[str, Any]:
    """YaRN's settings with the defaults of transformers filled in."""
    rope = {name: value for name, value in rope.items() if value is not None}
    truncates = rope.pop("truncate", True)
    if type(truncates) is not bool or (must_truncate and not truncates):
        wanted = "true, the only way supported for this type" if must_truncate else "true or false"
        raise UserError(f"{source}: truncate = {shown(truncates)} must be {wanted}")
    for name, value in rope.items():
        if type(value) not in (int, float) or value <= 0:
            raise UserError(f"{source}: {name} = {shown(value)} must be a positive number")
    factor = rope.setdefault("factor", context_length / rope["original_max_position_embeddings"])
    rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": truncates} | rope

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    inferred = magnitude(1) if None in scales else magnitude(scales[0]) / magnitude(scales[1])
    return {"attention_factor": inferred} | rope


def _whole_longrope(rope: dict[str, Any], context_length: int, rotated: int, source: str) -> dict[str, Any]:
    """LongRoPE's settings with the defaults of transformers filled in."""
    rope = {name: value for name, value in rope.items() if value is not None}
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name, [])
        is_list = isinstance(factors, list) and all(type(factor) in (int, float) and factor > 0 for factor in factors)
        if not is_list or len(factors) != rotated // 2:
            raise UserError(f"{source}: {name} = {shown(factors)} must be a list of {rotated // 2} positive numbers")
    original = rope[_FIRST_CONTEXT]
    if type(original) is not int or original < 2:
        raise UserError(f"{source}: {_FIRST_CONTEXT} = {shown(original)} must be a whole number from 2 on")
    factor = rope.pop("factor", context_length / original)
    if type(factor) not in (int, float) or factor <= 0:
        raise UserError(f"{source}: factor = {shown(factor)} must be a positive number")
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"attention_factor": magnitude} | rope


def read_rotary_layers(
    rest: dict[str, Any],
    rotary: Rotary,
    window: int | None,
    window_pattern: tuple[bool, ...],
    num_layers: int,
    source: str,
) -> dict[str, Any]:
    """Reads which layers rotate, and removes it from `rest`. Raises UserError if it is invalid."""
    if rotary.layers == "windowed":
        return {"rotary_pattern": window_pattern} if window is not None else {}
    if rotary.layers == "all":
        return {}
    layers, period = rest.pop("no_rope_layers", None), rest.pop("no_rope_layer_interval", None)
    period = 4 if period is None else period
    if type(period) is not int or period < 1:
        raise UserError(f"{source}: no_rope_layer_interval = {shown(period)} must be a positive whole number")
    layers = [int((layer + 1) % period != 0) for layer in range(num_layers)] if layers is None else layers
    is_list = isinstance(layers, list) and all(type(rotates) is int and rotates in (0, 1) for rotates in layers)
    if not is_list or len(layers) != num_layers:
        raise UserError(
            f"{source}: no_rope_layers = {shown(layers)} must be a list of 0 and 1, one for each of the "
            f"{num_layers} layers"
        )
    return {"rotary_pattern": _shortest([bool(rotates) for rotates in layers])}


def _shortest(pattern: list[bool]) -> tuple[bool, ...]:
    """The shortest pattern that repeats into this one: the most readable."""
    count = len(pattern)
    length = next(n for n in range(1, count + 1) if pattern == [pattern[i % n] for i in range(count)])
    return tuple(pattern[:length])


def write_rotary(config: ModelConfig, rotary: Rotary) -> dict[str, Any]:
    """The fields that `read_rotary` reads, with the names of transformers 4, which version 5 reads too."""
    if rotary.width is not None:
        return {rotary.width: int(config.head_width * config.rotary_fraction)}
    document: dict[str, Any] = {rotary.base: config.rotary_base, "rope_scaling": None}
    if rotary.fraction is not None:
        document[rotary.fraction] = config.rotary_fraction
    if rotary.window_base is not None:
        document[rotary.window_base] = config.rotary_window_base or config.rotary_base
    if rotary.layers == "listed":
        document["no_rope_layers"] = [int(kind.rotates) for kind in config.layer_kinds]
    kind = config.rotary_scaling
    if kind in rotary.types:  # "none" is not
        fields = _TYPES[kind].items()
        scaling = {name: getattr(config, ours) for name, ours in fields}
        if rotary.original_context is not None:
            document[_FIRST_CONTEXT] = scaling[_FIRST_CONTEXT]
        if rotary.scales_queries:
            scaling[_QUERY_SCALING] = config.rotary_query_scaling
        document["rope_scaling"] = {"rope_type": kind} | {
            name: [*value] if isinstance(value, tuple) else value for name, value in scaling.items()
        }
    if rotary.by_kind:
        full = (
            {"rope_type": "default"} | (document.pop("rope_scaling") or {}) | {"rope_theta": document.pop(rotary.base)}
        )
        in_window = {"rope_type": "default", "rope_theta": config.rotary_window_base or config.rotary_base}
        document["rope_parameters"] = {"full_attention": full, "sliding_attention": in_window}
    return document


def read_windows(rest: dict[str, Any], windows: Windows, num_layers: int, source: str) -> dict[str, Any]:
    """Reads the window settings, and removes them from `rest`. Raises UserError if one is invalid."""
    if windows.layers == "listed":
        size = rest.pop("window_size", windows.default)
        return _windows(size, _listed_windows(rest, num_layers, source))
    size = rest.pop("sliding_window", windows.default) or None  # 0 is none, too
    has_window = [True] * num_layers
    if windows.layers == "late":
        # The defaults of transformers: the window is off, and would begin at layer 28.
        is_on, first = rest.pop("use_sliding_window", False), rest.pop("max_window_layers", 28)
        if type(is_on) is not bool:
            raise UserError(f"{source}: use_sliding_window = {shown(is_on)} must be true or false")
        if type(first) is not int:
            raise UserError(f"{source}: max_window_layers = {shown(first)} must be a whole number")
        size = size if is_on else None
        has_window = [layer >= first for layer in range(num_layers)]
    elif windows.layers == "periodic":
        # transformers 5 writes the second name.
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        period = _merged([(name, "", rest.pop(name, None)) for name in names], source).get("", windows.period)
        if size is None or rest.get("layer_types") is not None:
            period = windows.period  # nothing depends on what is given, such as 0 or "LLLG" in EXAONE 4
        if type(period) is not int or period < 1:
            raise UserError(f"{source}: sliding_window_pattern = {shown(period)} must be a positive whole number")
        has_window = [(layer + 1) % period != 0 for layer in range(num_layers)]
    layer_types = None if windows.layers == "all" else rest.pop("layer_types", None)
    if layer_types is not None:
        is_list = isinstance(layer_types, list) and all(kind in _LAYER_TYPES for kind in layer_types)
        if not is_list or len(layer_types) != num_layers:
            raise UserError(
                f"{source}: layer_types = {shown(layer_types)} must be a list of {' and '.join(_LAYER_TYPES)}, one "
                f"for each of the {num_layers} layers"
            )
        has_window = [kind == "sliding_attention" for kind in layer_types]
    return _windows(size, has_window)


def _listed_windows(rest: dict[str, Any], num_layers: int, source: str) -> list[bool]:
    """Reads which layers have a window: attention_types says it in parts, attention_layers for each layer."""
    types = rest.pop("attention_types", None) or [[["global", "local"], 12]]
    has_window: list[bool] = []
    for part in types if isinstance(types, list) else [None]:
        match part:
            case [list(kinds), int(count)] if all(kind in _GPT_NEO_TYPES for kind in kinds) and 0 < count <= num_layers:
                has_window += [kind == "local" for kind in kinds] * count
            case _:
                raise UserError(f'{source}: attention_types = {shown(types)} must be as in [[["global", "local"], 6]]')
    if len(has_window) != num_layers:
        raise UserError(f"{source}: attention_types = {shown(types)} must give a type to each of {num_layers} layers")
    layers = rest.pop("attention_layers", None)
    if layers is not None and layers != [_GPT_NEO_TYPES[windowed] for windowed in has_window]:
        raise UserError(f"{source}: attention_layers = {shown(layers)}, but attention_types says otherwise")
    return has_window


def _windows(size: int | None, has_window: list[bool]) -> dict[str, Any]:
    """The settings of our model: the window, and the layers that have it."""
    if size is None or True not in has_window:
        return {"window": None}
    return {"window": size, "window_pattern": _shortest(has_window)}


def write_windows(config: ModelConfig, windows: Windows) -> dict[str, Any]:
    """The fields that `read_windows` reads."""
    if windows.layers == "all":
        return {"sliding_window": config.window}
    has_window = [window is not None for window in config.windows]
    layer_types = [_LAYER_TYPES[windowed] for windowed in has_window]
    if windows.layers == "listed":
        types = [[[_GPT_NEO_TYPES[windowed] for windowed in has_window], 1]]
        return {"window_size": config.window or windows.default, "attention_types": types}
    if windows.layers in ("typed", "periodic"):
        absent = None if windows.writes_null else config.context_length
        return {"sliding_window": config.window or absent, "layer_types": layer_types}
    return {
        "use_sliding_window": True in has_window,
        "sliding_window": config.window,
        "max_window_layers": (*has_window, True).index(True),
        "layer_types": layer_types,
    }
