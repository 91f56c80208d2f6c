"""Which family a model of ours can be written as."""

import dataclasses
from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.config import read_settings, write_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import Family

# Fields of ModelConfig that say how a model is trained or computed, not what it is.
_NOT_ARCHITECTURE = frozenset({"dropout", "init_stddev", "output_init", "attention", "dtype", "scan_layers", "remat"})
_BIASES = frozenset({"norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias"})


def choose_family(config: ModelConfig, source: str, model_type: str | None = None) -> Family:
    """The family that can express a model with the fewest additions, or the given one.

    Args:
        config: the model.
        source: what the message of an error begins with.
        model_type: the only family to consider.

    Raises:
        UserError: none can; it names what is in the way of the nearest.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not a family that can be written; there are: {', '.join(FAMILIES)}"
        )
    candidates = FAMILIES if model_type is None else [model_type]
    distances = {name: _distance(config, FAMILIES[name]) for name in candidates}
    nearest = min(distances, key=lambda name: distances[name][0])
    _, obstacles = distances[nearest]
    if obstacles:
        what = "no Hugging Face model type can" if model_type is None else f"model type {model_type} cannot"
        raise UserError(f"{source}: {what} express this model; in the way of {nearest}: {', '.join(obstacles)}")
    return FAMILIES[nearest]


def _distance(config: ModelConfig, family: Family) -> tuple[tuple[int, int, int], list[str]]:
    """How far a family is from a model, smallest first, and the settings that are in the way.

    Those are the settings that become others on the way through the family's config.json and back. Biases that the
    family has and the model has not are no obstacle: as zeros they change nothing.
    """
    try:
        back = read_settings(write_settings(config, family), family.model_type)
    except UserError as error:
        return (1, 0, 0), [str(error)]
    wanted, expressed = _architecture(config), _architecture(back)
    different = [name for name in wanted if wanted[name] != expressed[name]]
    added = [name for name in different if name in _BIASES and expressed[name]]
    obstacles = [f"{name} = {getattr(config, name)!r}" for name in different if name not in added]
    if family.whole_heads and config.embed_dim % config.num_heads != 0:
        obstacles.append(f"embed_dim = {config.embed_dim}, which is no multiple of num_heads = {config.num_heads}")
    return (0, len(obstacles), len(added)), obstacles


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, in one form only: nothing left out, and no setting that has no effect."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_ARCHITECTURE}
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_width, "mlp_dim": config.mlp_width}
    values |= {"window": max(window or 0 for window in config.windows), "window_pattern": config.windows}
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
