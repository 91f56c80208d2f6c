"""Which family a model can be written as."""

import dataclasses
from typing import Any

from flax_decoder.config import ModelConfig, is_used
from flax_decoder.errors import UserError
from flax_decoder.huggingface.config import read_settings, write_settings
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.pieces import BIASES

# Fields of ModelConfig that do not affect the logits at inference.
_NOT_ARCHITECTURE = {"dropout", "init_stddev", "output_init", "attention", "dtype", "scan_layers", "remat"}


def choose_family(config: ModelConfig, source: str, model_type: str | None = None) -> Family:
    """The family that can express a model with the fewest additional biases, or the given one.

    Args:
        config: the model.
        source: how error messages begin.
        model_type: the only family to consider.

    Raises:
        UserError: none can; the message names the obstacles in the nearest.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(f"model type {model_type!r} cannot be written, only {', '.join(FAMILIES)}")
    candidates = FAMILIES if model_type is None else [model_type]
    distances = {name: _distance(config, FAMILIES[name]) for name in candidates}
    nearest = min(distances, key=lambda name: distances[name][0])
    _, obstacles = distances[nearest]
    if obstacles:
        what = "no Hugging Face model type can" if model_type is None else f"model type {model_type} cannot"
        raise UserError(f"{source}: {what} express this model; obstacles in {nearest}: {', '.join(obstacles)}")
    return FAMILIES[nearest]


def require_expressible(config: ModelConfig, family: Family, source: str) -> None:
    """Raises UserError, which names the obstacles, if a family cannot express a model; `source` begins the message."""
    _, obstacles = _distance(config, family)
    if obstacles:
        raise UserError(f"{source}: {family.model_type} cannot express this model; obstacles: {', '.join(obstacles)}")


def _distance(config: ModelConfig, family: Family) -> tuple[tuple[int, int, int], list[str]]:
    """A sort key, smaller for a nearer family, and the settings that it cannot express.

    Those are the settings that change if the model is written to the family's config.json and read again. Biases that
    only the family has are no obstacle: they are written as zeros.
    """
    try:
        restored = read_settings(write_settings(config, family), family.model_type, family)
    except UserError as error:
        return (1, 0, 0), [str(error)]
    wanted, expressed = _architecture(config), _architecture(restored)
    different = [name for name in wanted if wanted[name] != expressed[name]]
    added = [name for name in different if name in BIASES and expressed[name]]
    obstacles = [f"{name} = {getattr(config, name)!r}" for name in different if name not in added]
    if family.divides_width and config.embed_dim % config.num_heads != 0:
        obstacles.append(f"embed_dim = {config.embed_dim}, which is not a multiple of num_heads = {config.num_heads}")
    if family.fills_width and config.embed_dim != config.num_heads * config.head_width:
        obstacles.append(f"embed_dim = {config.embed_dim}, which is not num_heads times the width of a head")
    pads = any(rule.unused for rule in family.rules)  # rather biases of zeros than rows that nothing reads
    return (0, len(obstacles), 100 * pads + len(added)), obstacles


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The settings that affect the logits, with defaults filled in, and None for those without effect here."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_ARCHITECTURE}
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_width, "mlp_dim": config.mlp_width}
    values |= {"window": max(window or 0 for window in config.windows), "window_pattern": config.windows}
    values["rotary_pattern"] = tuple(kind.rotates for kind in config.layer_kinds)
    values["attention_scale"] = config.attention_scale or config.head_width**-0.5
    unused = {name for name in values if not is_used(config, name)}
    if config.positions != "rotary":
        unused |= {name for name in values if name.startswith("rotary_")}
    if config.rotary_scaling == "dynamic":
        unused |= {"context_length"}  # what is written is the original context
    if config.rotary_scaling == "none":
        values["rotary_window_base"] = config.rotary_window_base or config.rotary_base
    if values["window"] == 0:
        unused |= {"rotary_window_base"}
    if None not in config.windows and config.rotary_window_base is not None:
        unused |= {"rotary_base"}
    return values | dict.fromkeys(unused)
