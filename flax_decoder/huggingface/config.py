"""config.json <-> `ModelConfig`. Every field has a meaning here, is known to have none, or is refused by name."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import REQUIRED, Family, Setting
from flax_decoder.huggingface.rope import read_rotary, write_rotary
from flax_decoder.huggingface.windows import read_windows, write_windows
from flax_decoder.io.strict_json import shown

# What changes no logit: notes, training, and what `generate` of transformers does.
_NOTES = {"architectures", "model_type", "name_or_path", "_name_or_path", "transformers_version"}
_NOTES |= {"dtype", "torch_dtype", "transformers.js_config", "_attn_implementation_autoset", "task_specific_params"}
_OF_GENERATION = {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "use_cache"}
_OF_OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "is_decoder"}
_OF_OUTPUTS |= {"is_encoder_decoder", "chunk_size_feed_forward"} | {
    f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
}
_OF_TRAINING = {"initializer_range", "gradient_checkpointing", "attention_dropout", "attn_pdrop", "embd_pdrop"}
_OF_TRAINING |= {"resid_pdrop", "hidden_dropout", "classifier_dropout", "residual_dropout", "embedding_dropout"}
_WITHOUT_MEANING = _NOTES | _OF_GENERATION | _OF_OUTPUTS | _OF_TRAINING


def family_of(document: dict[str, Any], source: str) -> Family:
    """The family that a config.json belongs to. Raises UserError where it is none of ours."""
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{source}: model_type = {shown(model_type)} is not a family that can be read; there are: {known}"
        )
    if document.get("auto_map"):
        raise UserError(
            f"{source}: auto_map names Python code that comes with the model, and such code is never run here.\n"
            f"If the model is an ordinary {model_type} also without that code, remove auto_map from the file"
        )
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
    without_meaning = _WITHOUT_MEANING | family.without_meaning | {"auto_map"}  # which is empty where it is there
    rest = {name: value for name, value in document.items() if name not in without_meaning}
    values = dict(family.always)
    for setting in family.all_settings:
        value = _read_setting(setting, rest, source)
        values |= dict.fromkeys(setting.ours, value)
    for name, allowed in family.fixed.items():
        value = rest.pop(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{source}: {name} = {shown(value)} is not supported for {family.model_type}, only {allowed[0]}"
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
            f"{source}: {name} = {shown(value)} is a setting that is not known for {family.model_type}; what it would "
            "change cannot be told, so the model is not read"
        )
    return _checked(values, family, source)


def write_settings(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of a model that the family can express.

    Names are those of transformers 4, which version 5 reads too.
    """
    document: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    scale = config.attention_scale or config.head_width**-0.5
    explicit = dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        mlp_dim=config.mlp_width,
        attention_scale=scale,
    )
    for setting in family.all_settings:
        document[setting.theirs] = _write_setting(setting, explicit)
    document |= {name: allowed[0] for name, allowed in family.fixed.items() if allowed[0] is not None}
    if family.rotary is not None:
        document |= write_rotary(config, family.rotary)
    if family.windows is not None:
        document |= write_windows(config, family.windows)
    return document


def _read_setting(setting: Setting, rest: dict[str, Any], source: str) -> Any:
    value = rest.pop(setting.theirs, setting.default)
    if value is REQUIRED or (value is None and setting.default is REQUIRED):
        raise UserError(f"{source}: {setting.theirs} is missing; a model cannot be built without it")
    if value is None:
        return None
    if setting.words is not None:
        if not isinstance(value, str) or value not in setting.words:
            known = ", ".join(setting.words)
            raise UserError(f"{source}: {setting.theirs} = {shown(value)} is not supported; there are: {known}")
        return setting.words[value]
    try:
        return setting.read(value)
    except ValueError as error:
        raise UserError(f"{source}: {setting.theirs} = {shown(value)} {error}") from None


def _write_setting(setting: Setting, config: ModelConfig) -> Any:
    # One field of theirs for several biases of ours: it is set where any is, and the others are written as zeros.
    value = max(getattr(config, name) for name in setting.ours)
    if setting.words is not None:
        # Where they have no word for it, the first one will do: read back, it shows as a difference.
        return next((theirs for theirs, ours in setting.words.items() if ours == value), next(iter(setting.words)))
    return None if value is None else setting.write(value)


def _checked(values: dict[str, Any], family: Family, source: str) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        complaint = error.errors(include_url=False)[0]
        if complaint["type"] == "value_error":
            raise UserError(f"{source}: {complaint['msg'].removeprefix('Value error, ')}") from None
        ours = str(complaint["loc"][0])
        theirs = next((setting.theirs for setting in family.all_settings if ours in setting.ours), ours)
        raise UserError(f"{source}: {theirs} = {shown(complaint['input'])}: {complaint['msg'].lower()}") from None
