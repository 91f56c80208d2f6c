"""config.json <-> `ModelConfig`. Every field of config.json is read, known not to matter, or told of by name."""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flax_decoder.config import ModelConfig
from flax_decoder.errors import FolderWarning, UserError
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import REQUIRED, Family, Setting
from flax_decoder.huggingface.fields import NO_BEARING, ONLY, QUANTIZED, is_of_network
from flax_decoder.huggingface.positions import (
    read_rotary,
    read_rotary_layers,
    read_windows,
    write_rotary,
    write_windows,
)
from flax_decoder.io.strict_json import shown


def family_of(document: dict[str, Any], source: str) -> Family:
    """The family of a config.json. Raises UserError if it is unknown, or needs code of its own."""
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{source}: model_type = {shown(model_type)} is not supported, only {', '.join(FAMILIES)}")
    if document.get("auto_map"):
        raise UserError(
            f"{source}: auto_map names Python code that comes with the model; such code is never run.\n"
            f"If the model is an ordinary {model_type} also without that code, remove auto_map from the file"
        )
    return FAMILIES[model_type]


def read_settings(
    document: dict[str, Any], source: str, family: Family | None = None, *, strict: bool = False
) -> ModelConfig:
    """The model that a config.json, or another table of settings, describes.

    Args:
        document: the content of config.json.
        source: how error messages begin.
        family: its table; None means the one that config.json names.
        strict: refuse every field that is not known, instead of warning of those that hardly matter.

    Raises:
        UserError: the family or a setting is unknown or not supported.
    """
    family = family_of(document, source) if family is None else family
    if name := next((name for name in QUANTIZED if document.get(name)), None):
        raise UserError(
            f"{source}: {name} = {shown(document[name])}: quantised weights are not read;\n"
            "get the model in float32, bfloat16 or float16"
        )
    ignored = (NO_BEARING | family.ignored | {*QUANTIZED}) - family.names_read
    fields = document | _fields_of_tables(document, family, ignored, source)
    rest = {name: value for name, value in fields.items() if name not in {*ignored, *family.tables}}
    values = dict(family.constants)
    for setting in family.all_settings:
        values |= dict.fromkeys(setting.fields, _read_setting(setting, rest, source))
    _read_supported(rest, family, family.supported, source)
    if family.rotary is not None:
        head_width = values.get("head_dim") or max(1, values["embed_dim"] // values["num_heads"])
        values |= read_rotary(rest, family.rotary, values["context_length"], head_width, source)
    if family.windows is not None:
        values |= read_windows(rest, family.windows, values["num_layers"], source)
    if family.rotary is not None:
        windows = values.get("window"), values.get("window_pattern", (True,))
        values |= read_rotary_layers(rest, family.rotary, *windows, values["num_layers"], source)
    if values.get("window") is None:
        values.pop("rotary_window_base", None)
    if family.scales_embedding:
        values["embed_scale"] = values["embed_dim"] ** 0.5
    _read_supported(rest, family, ONLY, source)
    _check_unknown(rest, family, source, strict)
    return _validated(values, family, source)


def write_settings(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of a model that the family can express.

    Names are those of transformers 4, which version 5 reads too.
    """
    explicit = dataclasses.replace(
        config,
        # Which dynamic scaling counts from.
        context_length=config.rotary_original_context if config.rotary_scaling == "dynamic" else config.context_length,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        mlp_dim=config.mlp_width,
        attention_scale=config.attention_scale or config.head_width**-0.5,
    )
    document: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    document |= {setting.name: _write_setting(setting, explicit) for setting in family.all_settings}
    document |= {name: supported[0] for name, supported in family.supported.items() if supported[0] is not None}
    if family.rotary is not None:
        document |= write_rotary(config, family.rotary)
    if family.windows is not None:
        document |= write_windows(config, family.windows)
    for name in [name for name in document if "." in name]:
        table, _, field = name.partition(".")
        document.setdefault(table, {})[field] = document.pop(name)
    return document


def _fields_of_tables(document: dict[str, Any], family: Family, ignored: frozenset[str], source: str) -> dict[str, Any]:
    """The fields of the objects that the family has, as `table.field`. Raises UserError for what is no object."""
    fields: dict[str, Any] = {}
    for table in family.tables:
        content = document.get(table) or {}
        if not isinstance(content, dict):
            raise UserError(f"{source}: {table} = {shown(content)} must be an object")
        fields |= {f"{table}.{name}": value for name, value in content.items() if name not in ignored}
    return fields


def _read_supported(
    rest: dict[str, Any], family: Family, supported: Mapping[str, tuple[Any, ...]], source: str
) -> None:
    """Removes from `rest` the fields that are supported with some values only. Raises UserError for another value."""
    for name, values in supported.items():
        value = rest.pop(name, values[0])
        if value not in values:
            raise UserError(
                f"{source}: {name} = {shown(value)} is not supported for {family.model_type}, only {values[0]}"
            )


def _check_unknown(rest: dict[str, Any], family: Family, source: str, strict: bool) -> None:
    """Warns of fields that nobody knows. Raises UserError if one belongs to the network, or, if strict, for any."""
    unknown = {name: value for name, value in rest.items() if value is not None or strict}
    for name, value in unknown.items():
        told = f"{source}: {name} = {shown(value)} is not known for {family.model_type}"
        if strict or is_of_network(name):
            raise UserError(f"{told}; it may change the numbers, so the model is not read")
    if unknown:
        told = ", ".join(f"{name} = {shown(value)}" for name, value in itertools.islice(unknown.items(), 5))
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        verb = "is" if len(unknown) == 1 else "are"
        warnings.warn(
            f"{source}: {told}{more} {verb} not known for {family.model_type}, and passed over; --strict refuses",
            FolderWarning,
            stacklevel=2,
        )


def _read_setting(setting: Setting, rest: dict[str, Any], source: str) -> Any:
    given = {name: rest.pop(name) for name in (setting.name, *setting.also) if name in rest}
    name, value = next(iter(given.items()), (setting.name, setting.default))
    for other, second in given.items():
        if second != value:
            raise UserError(
                f"{source}: {name} = {shown(value)}, but {other} = {shown(second)}, another name of it; keep the right "
                "one"
            )
    if value is REQUIRED or (value is None and setting.default is REQUIRED):
        raise UserError(f"{source}: {setting.name} is missing, but required")
    if value is None:
        return None
    try:
        if setting.values is None:
            return setting.read(value)
        if not isinstance(value, str) or value not in setting.values:
            raise ValueError(f"is not supported, only {', '.join(setting.values)}")
        return setting.values[value]
    except ValueError as error:
        raise UserError(f"{source}: {name} = {shown(value)} {error}") from None


def _write_setting(setting: Setting, config: ModelConfig) -> Any:
    # If one field stands for several biases, it is set if any is; the others are written as zeros.
    value = max(getattr(config, name) for name in setting.fields)
    if setting.values is not None:
        # If none means the value, `choose_family` sees that the first one reads back as another value.
        return next((name for name, ours in setting.values.items() if ours == value), next(iter(setting.values)))
    return None if value is None else setting.write(value)


def _validated(values: dict[str, Any], family: Family, source: str) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        if details["type"] == "value_error":
            raise UserError(f"{source}: {details['msg'].removeprefix('Value error, ')}") from None
        field = str(details["loc"][0])
        name = next((setting.name for setting in family.all_settings if field in setting.fields), field)
        raise UserError(f"{source}: {name} = {shown(details['input'])}: {details['msg'].lower()}") from None
