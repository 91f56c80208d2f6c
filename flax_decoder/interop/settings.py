"""config.json <-> `ModelConfig`. Every field has a meaning here, is known to have none, or is refused by name."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.interop.families import FAMILIES
from flax_decoder.interop.family import REQUIRED, Family, Rotary, Setting, Windows

# What changes no logit: notes, training, and what `generate` of transformers does.
_WITHOUT_MEANING = frozenset(
    """
    architectures auto_map dtype model_type name_or_path _name_or_path torch_dtype transformers_version
    transformers.js_config _attn_implementation_autoset is_decoder is_encoder_decoder return_dict use_cache
    output_attentions output_hidden_states gradient_checkpointing id2label label2id task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    initializer_range attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout classifier_dropout
    residual_dropout embedding_dropout chunk_size_feed_forward
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    """.split()
)
# Fields of ModelConfig that say how a model is trained or computed, not what it is.
_NOT_ARCHITECTURE = frozenset({"dropout", "init_stddev", "output_init", "attention", "dtype", "scan_layers", "remat"})
_BIASES = frozenset({"norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias"})

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


def family_of(document: dict[str, Any], source: str) -> Family:
    """The family that a config.json belongs to. Raises UserError where it is none of ours."""
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{source}: model_type = {model_type!r} is not a family that can be read; there are: {known}")
    return FAMILIES[model_type]


def read_settings(document: dict[str, Any], source: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        document: the content of config.json.
        source: what the message of an error begins with.

    Raises:
        UserError: the family, or a setting, is not one that the network can do, or is not known.
    """
    family = family_of(document, source)
    rest = {name: value for name, value in document.items() if name not in _WITHOUT_MEANING | family.without_meaning}
    values = dict(family.always)
    for setting in (*family.settings, Setting("tie_word_embeddings", ("tied_head",), family.tied)):
        value = _read_setting(setting, rest, source)
        values |= dict.fromkeys(setting.ours, value)
    for name, allowed in family.fixed.items():
        value = rest.pop(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{source}: {name} = {value!r} is not supported for {family.model_type}, only {allowed[0]}")
    if family.rotary is not None:
        values |= _read_rotary(rest, family.rotary, values["context_length"], source)
    if family.windows is not None:
        values |= _read_windows(rest, family.windows, values["num_layers"], source)
    if values.get("window") is None:
        values.pop("rotary_window_base", None)
    if family.scales_embedding:
        values["embed_scale"] = values["embed_dim"] ** 0.5
    if rest:
        name, value = next(iter(rest.items()))
        raise UserError(
            f"{source}: {name} = {value!r} is a setting that is not known for {family.model_type}; what it would "
            "change cannot be told, so the model is not read"
        )
    return _checked(values, family, source)


def write_settings(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of a model that the family can express.

    Names are those of transformers 4, which version 5 reads too.
    """
    document: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    explicit = dataclasses.replace(
        config, num_kv_heads=config.kv_heads, head_dim=config.head_width, mlp_dim=config.mlp_width
    )
    for setting in (*family.settings, Setting("tie_word_embeddings", ("tied_head",), family.tied)):
        document[setting.theirs] = _write_setting(setting, explicit)
    document |= {name: allowed[0] for name, allowed in family.fixed.items() if allowed[0] is not None}
    if family.rotary is not None:
        document |= _write_rotary(config, family.rotary)
    if family.windows is not None:
        document |= _write_windows(config, family.windows)
    return document


def choose_family(config: ModelConfig, source: str, model_type: str | None = None) -> Family:
    """The family that can express a model with the fewest additions, or the given one.

    Raises:
        UserError: none can, or not the given one; it names what is in the way of the nearest.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(f"model type {model_type!r} is not a family that can be written; there are: {', '.join(FAMILIES)}")
    candidates = FAMILIES.values() if model_type is None else [FAMILIES[model_type]]
    distances = {family.model_type: _distance(config, family) for family in candidates}
    nearest = min(distances, key=lambda name: tuple(map(len, distances[name])))
    obstacles, _ = distances[nearest]
    if obstacles:
        what = "no Hugging Face model type" if model_type is None else f"model type {model_type}"
        where = f" of the nearest, {nearest}" if model_type is None else ""
        raise UserError(f"{source}: {what} can express this model; in the way{where}: {', '.join(obstacles)}")
    return FAMILIES[nearest]


def _distance(config: ModelConfig, family: Family) -> tuple[list[str], list[str]]:
    """The settings that become others on the way through the family's config.json and back, and the biases added.

    A family may have biases where the model has none: as zeros they change nothing.
    """
    try:
        back = read_settings(write_settings(config, family), family.model_type)
    except UserError as error:
        return [str(error)], []
    wanted, expressed = _architecture(config), _architecture(back)
    different = [name for name in wanted if wanted[name] != expressed[name]]
    added = [name for name in different if name in _BIASES and expressed[name]]
    return [f"{name} = {getattr(config, name)!r}" for name in different if name not in added], added


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, in one form only: nothing left out, and no setting that has no effect."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_ARCHITECTURE}
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_width, "mlp_dim": config.mlp_width}
    values |= {"window": max((w or 0 for w in config.windows)), "window_pattern": config.windows}
    values["attention_scale"] = config.attention_scale or config.head_width**-0.5
    idle = set()
    if config.positions != "rotary":
        idle |= {name for name in values if name.startswith("rotary_")}
    if config.rotary_scaling == "none":
        idle |= {"rotary_scaling_factor"}
        values["rotary_window_base"] = config.rotary_window_base or config.rotary_base
    if config.rotary_scaling != "llama3":
        idle |= {"rotary_low_frequency_factor", "rotary_high_frequency_factor", "rotary_original_context"}
    if values["window"] == 0:
        idle |= {"rotary_window_base"}
    if None not in config.windows and config.rotary_window_base is not None:
        idle |= {"rotary_base"}
    return values | dict.fromkeys(idle)


def _read_setting(setting: Setting, rest: dict[str, Any], source: str) -> Any:
    value = rest.pop(setting.theirs, setting.default)
    if value is REQUIRED or (value is None and setting.default is REQUIRED):
        raise UserError(f"{source}: {setting.theirs} is missing; a model cannot be built without it")
    if value is None:
        return None
    if setting.words is not None:
        if not isinstance(value, str) or value not in setting.words:
            known = ", ".join(setting.words)
            raise UserError(f"{source}: {setting.theirs} = {value!r} is not supported; there are: {known}")
        return setting.words[value]
    try:
        return setting.read(value)
    except (TypeError, ZeroDivisionError):
        raise UserError(f"{source}: {setting.theirs} = {value!r} must be a positive number") from None


def _write_setting(setting: Setting, config: ModelConfig) -> Any:
    # One field of theirs for several biases of ours: it is set where any is, and the others are written as zeros.
    value = max(getattr(config, name) for name in setting.ours)
    if setting.words is not None:
        return next((theirs for theirs, ours in setting.words.items() if ours == value), value)
    if value is None:
        value = config.head_width**-0.5 if "attention_scale" in setting.ours else None
    return None if value is None else setting.write(value)


def _read_rotary(rest: dict[str, Any], rotary: Rotary, context_length: int, source: str) -> dict[str, Any]:
    """The rotary settings, from the names of transformers 4 or 5."""
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
    for table in (scaling, new):
        for name, value in table.items():
            if old.get(name) not in (None, value):
                raise UserError(f"{source}: {name} is both {old[name]!r} and {value!r}; keep the right one")
            old[name] = value
    values = {
        "rotary_base": _given(old.pop("rope_theta"), rotary.default_base),
        "rotary_fraction": _given(old.pop("partial_rotary_factor", None), rotary.default_fraction),
        **_read_scaling(old, context_length, source),
    }
    if rotary.fraction is None and values["rotary_fraction"] != 1:
        raise UserError(f"{source}: partial_rotary_factor = {values['rotary_fraction']} is not supported for this type")
    if rotary.window_base:
        values["rotary_window_base"] = _given(window_base, rotary.default_window_base)
    return values


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rope_table(value: Any, name: str, source: str) -> dict[str, Any]:
    """A copy of a table of rope settings, under the newer of two names for its type."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} = {value!r} must be an object")
    table = dict(value)
    old_type = table.pop("type", None)
    return ({} if old_type is None else {"rope_type": old_type}) | table


def _read_scaling(rope: dict[str, Any], context_length: int, source: str) -> dict[str, Any]:
    kind = _given(rope.pop("rope_type", None), "default")
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise UserError(f"{source}: rope_type = {kind!r} is not supported; there are: {', '.join(_ROPE_TYPES)}")
    ours, names = _ROPE_TYPES[kind]
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", context_length)
    values: dict[str, Any] = {"rotary_scaling": ours}
    for name in names:
        if rope.get(name) is None:
            raise UserError(f"{source}: {name} is missing; rope_type = {kind!r} needs it")
        values[_ROPE_FIELDS[name]] = rope.pop(name)
    if rope:
        name, value = next(iter(rope.items()))
        raise UserError(f"{source}: {name} = {value!r} is not known for rope_type = {kind!r}")
    return values


def _write_rotary(config: ModelConfig, rotary: Rotary) -> dict[str, Any]:
    document: dict[str, Any] = {rotary.base: config.rotary_base, "rope_scaling": None}
    if rotary.fraction is not None:
        document[rotary.fraction] = config.rotary_fraction
    if rotary.window_base is not None:
        document[rotary.window_base] = _given(config.rotary_window_base, config.rotary_base)
    theirs = next(theirs for theirs, (ours, _) in _ROPE_TYPES.items() if ours == config.rotary_scaling)
    if theirs != "default":
        numbers = {name: getattr(config, _ROPE_FIELDS[name]) for name in _ROPE_TYPES[theirs][1]}
        document["rope_scaling"] = {"rope_type": theirs, **numbers}
    return document


def _read_windows(rest: dict[str, Any], windows: Windows, num_layers: int, source: str) -> dict[str, Any]:
    size = rest.pop("sliding_window", windows.default)
    switched_on, first = True, 0
    if windows.layers == "late":
        switched_on, first = rest.pop("use_sliding_window", False), rest.pop("max_window_layers", 28)
    periods = [rest.pop(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
    period = next((period for period in periods if period is not None), windows.period)
    if windows.layers == "periodic" and (type(period) is not int or period < 1):
        raise UserError(f"{source}: sliding_window_pattern = {period!r} must be a positive whole number")
    layer_types = None if windows.layers == "all" else rest.pop("layer_types", None)
    if layer_types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(layer_types, list) or not all(isinstance(t, str) and t in known for t in layer_types):
            raise UserError(f"{source}: layer_types = {layer_types!r} must be a list of {' and '.join(known)}")
        if len(layer_types) != num_layers:
            raise UserError(f"{source}: layer_types has {len(layer_types)} entries for {num_layers} layers")
        has_window = [known[layer_type] for layer_type in layer_types]
    elif windows.layers == "periodic":
        has_window = [(layer + 1) % period != 0 for layer in range(num_layers)]
    else:
        has_window = [layer >= first for layer in range(num_layers)]
    if size is None or not switched_on or True not in has_window:
        return {"window": None}
    # The shortest pattern that repeats into this one reads best.
    length = next(n for n in range(1, num_layers + 1) if has_window == [has_window[i % n] for i in range(num_layers)])
    return {"window": size, "window_pattern": tuple(has_window[:length])}


def _write_windows(config: ModelConfig, windows: Windows) -> dict[str, Any]:
    if windows.layers == "all":
        return {"sliding_window": config.window}
    has_window = [window is not None for window in config.windows]
    layer_types = ["sliding_attention" if windowed else "full_attention" for windowed in has_window]
    if windows.layers == "periodic":
        return {"sliding_window": config.window or config.context_length, "layer_types": layer_types}
    return {
        "use_sliding_window": True in has_window,
        "sliding_window": config.window,
        "max_window_layers": (*has_window, True).index(True),
        "layer_types": layer_types,
    }


def _checked(values: dict[str, Any], family: Family, source: str) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        complaint = error.errors(include_url=False)[0]
        if complaint["type"] == "value_error":
            raise UserError(f"{source}: {complaint['msg'].removeprefix('Value error, ')}") from None
        ours = str(complaint["loc"][0])
        theirs = next((setting.theirs for setting in family.settings if ours in setting.ours), ours)
        raise UserError(f"{source}: {theirs} = {complaint['input']!r}: {complaint['msg'].lower()}") from None
