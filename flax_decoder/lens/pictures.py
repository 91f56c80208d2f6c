"""Pictures for papers: attention as PNG or SVG, by the ending of the file's name."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What each kind of picture is saved with. No date, version or random name is in it: the same numbers, the same file.
_PNG = {"dpi": 160, "metadata": {"Software": None}}
_SVG = {"dpi": 160, "metadata": {"Date": None, "Creator": None}}
FORMATS: dict[str, dict[str, Any]] = {".png": _PNG, ".svg": _SVG}
# Text stays text in an SVG, to be searched and edited.
_STYLE: Any = {"svg.hashsalt": "flax_decoder", "svg.fonttype": "none"}

# One hue from white to dark: it reads the same in grey and to colour-blind eyes.
COLOURS = "Blues"
MAX_PANELS = 400
MAX_SQUARES = 4_000_000
# Up to so many squares are drawn as shapes, which stay sharp in an SVG; more become an image in it, to keep it small.
MAX_SHAPES = 5_000
_BEHIND_THE_MASK = "0.92"
_LONGEST_LABEL = 16
# In inches, and in points of which an inch has 72.
_SQUARE, _SMALLEST_PANEL, _LARGEST_PANEL, _LARGEST_GRID = 0.2, 1.1, 8.0, 16.0
_SMALLEST_LETTERS, _LARGEST_LETTERS = 3.5, 9.0


def plot_attention(weights: ArrayLike, labels: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draws what each query position gave each key position, as a PNG or an SVG.

    All panels share one scale of colour, from 0 to 1. A label shows a space as ␣ and what cannot be printed as Python
    writes it, such as \\n; so it does with characters that Matplotlib's font lacks, which its `font.family` can change.

    Args:
        weights: of one head (T, S); of several (N, T, S), as a grid; or of several layers (L, N, T, S), a row each.
        labels: the S tokens as text. Where there are fewer queries than keys, these are the last T.
        path: of the picture, which ends in .png or .svg; what is there is replaced.

    Raises:
        UserError: another ending, a folder that is not there, or weights that are none or do not go with the labels.
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
    from matplotlib.figure import Figure

    num_rows = -(-L * N // num_columns)
    width = min(max(_SQUARE * S, _SMALLEST_PANEL), _LARGEST_PANEL, max(_LARGEST_GRID / num_columns, _SMALLEST_PANEL))
    height = max(width * T / S, 0.2)
    positions = _positions(labels, 72 * width / S)
    margin = max(map(len, positions.names)) * 0.65 * positions.letters / 72
    size = num_columns * (width + 0.1) + margin + 1.6, max(num_rows * (height + 0.25) + margin + 0.6, 2.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel, axes in enumerate(panels.reshape(-1)):
        if panel >= L * N:
            axes.set_axis_off()
            continue
        layer, head = divmod(panel, N)
        squares = _draw(axes, weights_LNTS[layer, head], as_shapes=weights_LNTS.size <= MAX_SHAPES)
        if L * N > 1:
            axes.set_title(f"layer {layer}, head {head}" if L > 1 else f"head {head}", fontsize=8)
        positions.mark(axes, T, keys=panel + num_columns >= L * N, queries=panel % num_columns == 0)
    figure.supxlabel("key position", fontsize=10)
    figure.supylabel("query position", fontsize=10)
    bar = figure.colorbar(squares, ax=panels, shrink=min(1.0, 3.5 / size[1]), aspect=18, pad=0.02)
    bar.set_label("attention weight (grey: 0)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    save_picture(figure, path)


def picture_path(path: str | os.PathLike[str]) -> Path:
    """The path of a picture to be; UserError where it ends in no kind of picture, or its folder is not there."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: the name of a picture must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or give another path")
    return path


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes a figure to a path from `picture_path`, whole or not at all; the same figure gives the same bytes."""
    import matplotlib

    kind = path.suffix.lower()
    with matplotlib.rc_context(_STYLE), replacing(path) as file:
        figure.savefig(file, format=kind.removeprefix("."), **FORMATS[kind])


def visible(text: str) -> str:
    """A token as a label: all of it can be seen, and it is not long."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in rcParams["font.family"]]

    def shown(character: str) -> str:
        drawn = character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)
        return character if drawn else character.encode("unicode_escape").decode()

    text = "".join(map(shown, text[: _LONGEST_LABEL + 1].replace(" ", "␣")))
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _as_panels(weights: ArrayLike) -> tuple[np.ndarray, int]:
    """Weights as (L, N, T, S), and how many of them stand side by side."""
    array = np.asarray(weights)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise UserError(f"weights: has the shape {array.shape}; give (T, S), (N, T, S) or (L, N, T, S), none of them 0")
    try:
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        raise UserError(f"weights: has the dtype {array.dtype}; give numbers") from None
    # A sum of rounded weights may be over 1 by a little, and so may one weight of a narrow dtype.
    outside = ~((array >= 0) & (array <= 1.01))
    if outside.any():
        raise UserError(f"weights: has {array[outside][0]}, but attention weights are from 0 to 1; are these scores?")
    if array.shape[-2] > array.shape[-1]:
        raise UserError(f"weights: has {array.shape[-2]} queries and {array.shape[-1]} keys, but each query has a key")
    num_heads = math.prod(array.shape[:-2])
    num_columns = array.shape[1] if array.ndim == 4 else math.ceil(math.sqrt(num_heads))
    return array.reshape((1,) * (4 - array.ndim) + array.shape), num_columns


def _draw(axes: "Axes", weights_TS: np.ndarray, *, as_shapes: bool) -> Any:
    """One head as a panel, of shapes or as an image; grey is what is behind the mask, as nothing else is quite 0."""
    import matplotlib

    T, S = weights_TS.shape
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad=_BEHIND_THE_MASK)
    shown = np.ma.masked_equal(weights_TS, 0.0)
    axes.set(aspect="equal", xlim=(0, S), ylim=(T, 0))
    # Edges of their own colour close the gaps that viewers of SVG leave between shapes.
    edges: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.4} if as_shapes else {}
    return axes.pcolormesh(shown, cmap=colours, vmin=0, vmax=1, rasterized=not as_shapes, **edges)


@dataclass(frozen=True)
class _Positions:
    """How the positions of all panels are named: each by its token, or where there is no room some by their number.

    Attributes:
        places: the key positions that have a name.
        names: these.
        letters: their size, in points.
        rotation: of the names of keys, in degrees.
    """

    places: np.ndarray
    names: list[str]
    letters: float
    rotation: int

    def mark(self, axes: "Axes", T: int, *, keys: bool, queries: bool) -> None:
        """Names the positions along the edges of a panel that no other panel is in the way of."""
        S = round(axes.get_xlim()[1])
        # A dollar sign is one, and no beginning of a formula.
        plain: dict[str, Any] = {"parse_math": False, "usetex": False, "fontsize": self.letters}
        axes.tick_params(length=1.5, width=0.5)
        names = [name if keys else "" for name in self.names]
        axes.set_xticks(self.places + 0.5, names, rotation=self.rotation, **plain)
        own = [i for i, place in enumerate(self.places) if place >= S - T]
        names = [self.names[i] if queries else "" for i in own]
        axes.set_yticks(self.places[own] - (S - T) + 0.5, names, **plain)


def _positions(labels: Sequence[str], square: float) -> _Positions:
    """How to name positions where a square is so many points wide."""
    S = len(labels)
    letters = min(0.75 * square, _LARGEST_LETTERS)
    if letters < _SMALLEST_LETTERS:
        places = np.arange(0, S, max(S // 4, 1))
        return _Positions(places, [str(place) for place in places], 6.0, rotation=0)
    return _Positions(np.arange(S), [visible(label) for label in labels], letters, rotation=90)
