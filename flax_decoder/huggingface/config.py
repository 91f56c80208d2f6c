"""config.json <-> `ModelConfig`. Every field of config.json is read, known not to matter, or refused by name."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import REQUIRED, Family, Setting
from flax_decoder.huggingface.positions import read_rotary, read_windows, write_rotary, write_windows
from flax_decoder.io.strict_json import shown

# Fields that do not affect the logits.
_NOTES = {"architectures", "model_type", "name_or_path", "_name_or_path", "transformers_version"}
_NOTES |= {"dtype", "torch_dtype", "transformers.js_config", "_attn_implementation_autoset", "task_specific_params"}
_GENERATION = {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "use_cache"}
_OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "is_decoder"}
_OUTPUTS |= {"is_encoder_decoder", "chunk_size_feed_forward", "summary_activation", "summary_first_dropout"}
_OUTPUTS |= {"summary_proj_to_labels", "summary_type", "summary_use_proj"}
_TRAINING = {"initializer_range", "gradient_checkpointing", "attention_dropout", "attn_pdrop", "embd_pdrop"}
_TRAINING |= {"resid_pdrop", "hidden_dropout", "classifier_dropout", "residual_dropout", "embedding_dropout"}
_IGNORED = _NOTES | _GENERATION | _OUTPUTS | _TRAINING


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


def read_settings(document: dict[str, Any], source: str, family: Family | None = None) -> ModelConfig:
    """The model that a config.json, or another table of settings, describes.

    Args:
        document: the content of config.json.
        source: how error messages begin.
        family: its table; None means the one that config.json names.

    Raises:
        UserError: the family or a setting is unknown or not supported.
    """
    family = family_of(document, source) if family is None else family
    ignored = _IGNORED | family.ignored | {"auto_map"}  # `family_of` refuses an auto_map that is not empty
    rest = {name: value for name, value in document.items() if name not in ignored}
    values = dict(family.constants)
    for setting in family.all_settings:
        values |= dict.fromkeys(setting.fields, _read_setting(setting, rest, source))
    for name, supported in family.supported.items():
        value = rest.pop(name, supported[0])
        if value not in supported:
            raise UserError(
                f"{source}: {name} = {shown(value)} is not supported for {family.model_type}, only {supported[0]}"
            )
    if family.rotary is not None:
        values |= read_rotary(rest, family.rotary, values["context_length"], source)
    if family.windows is not None:
        values |= read_windows(rest, family.windows, values["num_layers"], source)
    if values.get("window") is None:
        values.pop("rotary_window_base", None)
    if family.scales_embedding:
        values["embed_scale"] = values["embed_dim"] ** 0.5
    if rest:
        name, value = next(iter(rest.items()))
        raise UserError(
            f"{source}: {name} = {shown(value)} is not known for {family.model_type}; it may change the numbers, so "
            "the model is not read"
        )
    return _validated(values, family, source)


def write_settings(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of a model that the family can express.

    Names are those of transformers 4, which version 5 reads too.
    """
    explicit = dataclasses.replace(
        config,
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
    return document


def _read_setting(setting: Setting, rest: dict[str, Any], source: str) -> Any:
    value = rest.pop(setting.name, setting.default)
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
        raise UserError(f"{source}: {setting.name} = {shown(value)} {error}") from None


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
