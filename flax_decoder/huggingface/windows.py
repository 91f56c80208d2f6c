"""Which layers have a window, in config.json."""

from typing import Any

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Windows
from flax_decoder.io.strict_json import shown

_LAYER_TYPES = ["full_attention", "sliding_attention"]  # without a window, with one


def read_windows(rest: dict[str, Any], windows: Windows, num_layers: int, source: str) -> dict[str, Any]:
    """Reads the window settings, and removes them from `rest`. Raises UserError if one is invalid."""
    size = rest.pop("sliding_window", windows.default)
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
        periods = [rest.pop(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
        period = next((period for period in periods if period is not None), windows.period)
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
    if size is None or True not in has_window:
        return {"window": None}
    # The shortest pattern that repeats into this one is the most readable.
    length = next(n for n in range(1, num_layers + 1) if has_window == [has_window[i % n] for i in range(num_layers)])
    return {"window": size, "window_pattern": tuple(has_window[:length])}


def write_windows(config: ModelConfig, windows: Windows) -> dict[str, Any]:
    """The fields that `read_windows` reads."""
    if windows.layers == "all":
        return {"sliding_window": config.window}
    has_window = [window is not None for window in config.windows]
    layer_types = [_LAYER_TYPES[windowed] for windowed in has_window]
    if windows.layers == "periodic":
        return {"sliding_window": config.window or config.context_length, "layer_types": layer_types}
    return {
        "use_sliding_window": True in has_window,
        "sliding_window": config.window,
        "max_window_layers": (*has_window, True).index(True),
        "layer_types": layer_types,
    }
