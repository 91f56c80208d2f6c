"""Attention weights as PNG or SVG pictures."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metadata by format: without dates and versions, the same numbers give the same file.
FORMATS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
# Ids in an SVG are hashes, not random; its text stays text, which can be searched and edited.
_STYLE: Any = {"svg.hashsalt": "flax_decoder", "svg.fonttype": "none"}

# One hue from white to dark reads the same in grey and to colour-blind eyes.
COLOURS = "Blues"
MASKED_COLOUR = "0.92"
MAX_PANELS = 400
MAX_SQUARES = 4_000_000
# Shapes stay sharp in an SVG; more squares than this become an image, to keep the file small.
MAX_SHAPES = 5_000
_MAX_LABEL_CHARACTERS = 16
# In inches.
_SQUARE, _MIN_PANEL, _MAX_PANEL, _MAX_GRID = 0.2, 1.1, 8.0, 16.0
# In points, 72 per inch.
_MIN_FONT, _MAX_FONT = 3.5, 9.0


def plot_attention(weights: ArrayLike, labels: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draws attention weights, one panel per head, as a PNG or an SVG.

    All panels share one colour scale from 0 to 1. In a label a space shows as ␣; characters that are not printable, or
    not in Matplotlib's `font.family`, show as Python escapes them, such as \\n.

    Args:
        weights: of one head (T, S); of several (N, T, S), as a grid; or of several layers (L, N, T, S), a row each.
        labels: the S tokens as text. If there are fewer queries than keys, the queries are the last T.
        path: the picture, ending in .png or .svg; an existing file is replaced.

    Raises:
        UserError: another file ending, a missing folder, or invalid weights or labels.
    """
    weights_LNTS, num_columns = _as_panels(weights)
    L, N, T, S = weights_LNTS.shape
    if len(labels) != S:
        raise UserError(f"labels: there are {len(labels)}, but weights are of {S} key positions; give one for each")
    if L * N > MAX_PANELS:
        raise UserError(f"weights: {L} x {N} heads are more than {MAX_PANELS} in one picture; give some of the layers")
    if weights_LNTS.size > MAX_SQUARES:
        raise UserError(f"weights: {weights_LNTS.size:,} are more than {MAX_SQUARES:,} in one picture; give a part")
    path = picture_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    num_rows = -(-L * N // num_columns)
    width = min(max(_SQUARE * S, _MIN_PANEL), _MAX_PANEL, max(_MAX_GRID / num_columns, _MIN_PANEL))
    height = max(width * T / S, 0.2)
    ticks, names, text = _ticks(labels, 72 * width / S)
    margin = max(map(len, names)) * 0.65 * text["fontsize"] / 72
    size = num_columns * (width + 0.1) + margin + 1.6, max(num_rows * (height + 0.25) + margin + 0.6, 2.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    # Only masked weights are exactly 0.
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad=MASKED_COLOUR)
    style: dict[str, Any] = {"rasterized": True}
    if weights_LNTS.size <= MAX_SHAPES:
        style = {"edgecolors": "face", "linewidth": 0.4}  # closes the gaps that SVG viewers leave between shapes
    for panel, axes in enumerate(panels.reshape(-1)):
        if panel >= L * N:
            axes.set_axis_off()
            continue
        layer, head = divmod(panel, N)
        axes.set(aspect="equal", xlim=(0, S), ylim=(T, 0))
        shown = np.ma.masked_equal(weights_LNTS[layer, head], 0.0)
        squares = axes.pcolormesh(shown, cmap=colours, vmin=0, vmax=1, **style)
        if L * N > 1:
            axes.set_title(f"layer {layer}, head {head}" if L > 1 else f"head {head}", fontsize=8)
        # Names at the outer edges of the grid only.
        is_lowest, is_leftmost = panel + num_columns >= L * N, panel % num_columns == 0
        axes.tick_params(length=1.5, width=0.5)
        axes.set_xticks(ticks + 0.5, names if is_lowest else [], rotation=0 if ticks.size < S else 90, **text)
        of_query = ticks >= S - T
        query_names = [name for name, is_query in zip(names, of_query, strict=True) if is_query]
        axes.set_yticks(ticks[of_query] - (S - T) + 0.5, query_names if is_leftmost else [], **text)
    figure.supxlabel("key position", fontsize=10)
    figure.supylabel("query position", fontsize=10)
    bar = figure.colorbar(squares, ax=panels, shrink=min(1.0, 3.5 / size[1]), aspect=18, pad=0.02)
    bar.set_label("attention weight (grey: 0)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    save_picture(figure, path)


def picture_path(path: str | os.PathLike[str]) -> Path:
    """The path of a new picture; UserError if its ending is no picture format, or its folder does not exist."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: the name of a picture must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or give another path")
    return path


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes a figure to a path from `picture_path`, atomically; the same figure gives the same bytes."""
    import matplotlib

    kind = path.suffix.lower()
    with matplotlib.rc_context(_STYLE), replacing(path) as file:
        figure.savefig(file, format=kind.removeprefix("."), dpi=160, metadata=FORMATS[kind])


def visible(text: str) -> str:
    """A token as a label: no invisible characters, and shortened if it is long."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in rcParams["font.family"]]

    def drawn(character: str) -> str:
        has_glyph = character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)
        return character if has_glyph else character.encode("unicode_escape").decode()

    text = "".join(map(drawn, text[: _MAX_LABEL_CHARACTERS + 1].replace(" ", "␣")))
    return text if len(text) <= _MAX_LABEL_CHARACTERS else text[: _MAX_LABEL_CHARACTERS - 1] + "…"


def _as_panels(weights: ArrayLike) -> tuple[np.ndarray, int]:
    """Weights as (L, N, T, S), and the number of columns of panels."""
    array = np.asarray(weights)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise UserError(f"weights: has the shape {array.shape}; give (T, S), (N, T, S) or (L, N, T, S), none of them 0")
    try:
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        raise UserError(f"weights: has the dtype {array.dtype}; give numbers") from None
    # A weight, or the sum of several, may be rounded to slightly more than 1.
    outside = ~((array >= 0) & (array <= 1.01))
    if outside.any():
        raise UserError(f"weights: has {array[outside][0]}, but attention weights are from 0 to 1; are these scores?")
    if array.shape[-2] > array.shape[-1]:
        raise UserError(f"weights: has {array.shape[-2]} queries and {array.shape[-1]} keys, but each query has a key")
    num_heads = math.prod(array.shape[:-2])
    num_columns = array.shape[1] if array.ndim == 4 else math.ceil(math.sqrt(num_heads))
    return array.reshape((1,) * (4 - array.ndim) + array.shape), num_columns


def _ticks(labels: Sequence[str], square: float) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """The key positions that are named, their names, and how to write them, for squares of this width in points.

    Every position is named by its token; if there is no room for that, about four are named by their number.
    """
    S = len(labels)
    # A dollar sign begins no formula.
    text: dict[str, Any] = {"parse_math": False, "usetex": False, "fontsize": min(0.75 * square, _MAX_FONT)}
    if text["fontsize"] >= _MIN_FONT:
        return np.arange(S), [visible(label) for label in labels], text
    ticks = np.arange(0, S, max(S // 4, 1))
    return ticks, [str(tick) for tick in ticks], text | {"fontsize": 6.0}
