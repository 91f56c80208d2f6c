"""Which layers have a window, in config.json."""

from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Windows
from flax_decoder.io.strict_json import shown

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def read_windows(rest: dict[str, Any], windows: Windows, num_layers: int, source: str) -> dict[str, Any]:
    """The window settings; takes what it reads out of `rest`. Raises UserError where they make no sense."""
    size = rest.pop("sliding_window", windows.default)
    if windows.layers == "late":
        # transformers has these two, and ignores the window unless it is told to use it.
        switched_on = rest.pop("use_sliding_window", False)
        first = rest.pop("max_window_layers", 28)
        if type(switched_on) is not bool or type(first) is not int:
            raise UserError(
                f"{source}: use_sliding_window = {shown(switched_on)} must be true or false, and max_window_layers = "
                f"{shown(first)} a whole number"
            )
        size = size if switched_on else None
        has_window = [layer >= first for layer in range(num_layers)]
    elif windows.layers == "periodic":
        # Version 5 of transformers writes the first name with an underscore.
        periods = [rest.pop(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
        period = next((period for period in periods if period is not None), windows.period)
        if type(period) is not int or period < 1:
            raise UserError(f"{source}: sliding_window_pattern = {shown(period)} must be a positive whole number")
        has_window = [(layer + 1) % period != 0 for layer in range(num_layers)]
    else:
        has_window = [True] * num_layers
    layer_types = None if windows.layers == "all" else rest.pop("layer_types", None)
    if layer_types is not None:
        has_window = _read_layer_types(layer_types, num_layers, source)
    if size is None or True not in has_window:
        return {"window": None}
    # The shortest pattern that repeats into this one reads best.
    length = next(n for n in range(1, num_layers + 1) if has_window == [has_window[i % n] for i in range(num_layers)])
    return {"window": size, "window_pattern": tuple(has_window[:length])}


def _read_layer_types(layer_types: Any, num_layers: int, source: str) -> list[bool]:
    known = isinstance(layer_types, list) and all(
        isinstance(kind, str) and kind in _LAYER_TYPES for kind in layer_types
    )
    if not known or len(layer_types) != num_layers:
        raise UserError(
            f"{source}: layer_types = {shown(layer_types)} must be a list of {' and '.join(_LAYER_TYPES)}, one for "
            f"each of {num_layers} layers"
        )
    return [_LAYER_TYPES[kind] for kind in layer_types]


def write_windows(config: ModelConfig, windows: Windows) -> dict[str, Any]:
    """The fields that `read_windows` reads back."""
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
