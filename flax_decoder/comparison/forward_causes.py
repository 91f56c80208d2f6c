"""Known mistakes of a forward pass."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flax_decoder.comparison.mismatch import TOLERANCE, Array, Found, Mismatch, Test, factor_between, same

RTOL = 1e-4  # of what is read off a tensor, such as an epsilon: the last digits cancel


def unlike(read: Callable[[Mismatch, Array], Any], field: str = "") -> Test:
    """A test of what each side did, read off its tensor: whether both can be read and differ (in a field)."""

    def test(row: Mismatch) -> Found:
        ours, theirs = read(row, row.ours), read(row, row.theirs)
        one, other = (getattr(side, field, None) if field else side for side in (ours, theirs))
        if one is None or other is None:
            return False
        equal = one == other if isinstance(one, str) else np.allclose(one, other, rtol=RTOL, atol=0)
        return not equal and {"ours": ours, "theirs": theirs}

    return test


def one_side(is_wrong: Callable[[Mismatch, Array, Array], bool]) -> Test:
    """A test of the tensor of each side, beside the other's."""
    return lambda row: next(({"side": side} for side, own, other in row.sides if is_wrong(row, own, other)), False)


def _proportional(row: Mismatch) -> Found:
    width = row.evidence.ours.config.embed_dim
    is_root = row.is_factor(math.sqrt(width), 1 / math.sqrt(width))
    return row.factor is not None and {"root": f", the root of the width {width}" if is_root else ""}


def _constant(row: Mismatch) -> bool:
    """Whether the difference is the same at all positions."""
    return _repeats(_by_position(row.ours - row.theirs))


def _repeats(array: Array) -> bool:
    """Whether all along the first axis is the same."""
    return same(array, np.broadcast_to(array[:1], array.shape))


def _by_position(array: Array) -> Array:
    """(B, T, ...) as (B * T, width)."""
    return array.reshape(array.shape[0] * array.shape[1], -1)


def _cap(row: Mismatch) -> Found:
    """Whether one side is cap * tanh(x / cap) of the other side's x."""
    for side, small, large in row.sides:
        largest = np.unravel_index(np.abs(large).argmax(), large.shape)
        x, y = abs(float(large[largest])), abs(float(small[largest]))
        if not 0 < y < x:
            continue
        low, high = y, 1e6 * x
        for _ in range(200):  # bisection: cap * tanh(x / cap) grows with the cap
            middle = math.sqrt(low * high)
            low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
        if same(small, low * np.tanh(large / low)):
            return {"side": side, "cap": low}
    return False


# --- Embeddings, norms and projections ---


def _other_positions(row: Mismatch) -> bool:
    return len(row.ours) > 1 and _repeats(row.ours - row.theirs)


def _some_tokens(row: Mismatch) -> Found:
    tokens_BT = row.evidence.batch["inputs"]
    differs_BT = np.abs(row.ours - row.theirs).max(-1) > TOLERANCE * np.abs(row.theirs).max()
    tokens = np.unique(tokens_BT[differs_BT])
    return 0 < len(tokens) < len(np.unique(tokens_BT)) and {"token": tokens[0]}


def _other_scale(row: Mismatch) -> Found:
    """Whether the sides multiply the embeddings of tokens by different numbers, and agree in all else."""
    factor = factor_between(row.ours - row.theirs, _embedded(row))
    ours = row.evidence.ours.config.embed_scale
    return factor is not None and {"ours": ours, "theirs": ours - factor}


def _embedded(row: Mismatch) -> Array:
    """The embeddings of the tokens as they stand in the table."""
    return row.evidence.theirs.array("params", "embedding")[row.evidence.batch["inputs"]]


class _Norm(NamedTuple):
    kind: str
    epsilon: float


def _norm(row: Mismatch, y: Array, x: Array | None = None) -> _Norm | None:
    """The norm that makes y of x: y = centred / sqrt(mean(centred^2) + epsilon) * scale + bias."""
    scale = row.params("scale")
    x, y = (_last_axis(array, scale) for array in (row.x if x is None else x, y))
    for kind, centred in (("RMSNorm", x), ("LayerNorm", x - x.mean(-1, keepdims=True))):
        direction, shifted = centred * scale, y - row.params("bias")
        factor = (shifted * direction).sum(-1, keepdims=True) / np.square(direction).sum(-1, keepdims=True)
        if same(shifted, factor * direction):
            size = np.square(centred).mean(-1, keepdims=True)
            smallest = np.unravel_index(size.argmin(), size.shape)  # where epsilon counts most
            return _Norm(kind, float((factor**-2 - size)[smallest]))
    return None


def _last_axis(array: Array, scale: Array) -> Array:
    """(B, T, N, H) as (B, T, N * H) if one norm spans all heads."""
    return array if array.shape[-1] == scale.shape[-1] else array.reshape(*array.shape[:2], -1)


def _parallel(row: Mismatch, own: Array, other: Array) -> bool:
    return _norm(row, own, row.residual) is not None and _norm(row, other, row.attended) is not None


def _comes_after(row: Mismatch) -> bool:
    """Whether the first norm of a layer is one of what attention has written, too: on PyTorch's side only."""
    post = row.evidence.ours.config.norm_position == "post"
    return not post and _norm(row, row.theirs, row.residual + row.input("attention.out")) is not None


def _comes_before(row: Mismatch) -> bool:
    """Whether a projection reads what the first norm of a layer makes of its input: on PyTorch's side only."""
    config = row.evidence.ours.config
    if config.norm_position != "post":
        return False
    x = row.residual if config.norm == "rmsnorm" else row.residual - row.residual.mean(-1, keepdims=True)
    size = np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    normal = x / size * row.params("scale", module="attention_norm") + row.params("bias", module="attention_norm")
    product = _projected(row, x=normal)
    return product is not None and same(_by_position(row.theirs), product + row.params("bias").reshape(-1))


def _unscaled(row: Mismatch, array: Array) -> Array:
    """What a norm has multiplied by its scale; 0 where that is 0."""
    scale = row.params("scale")
    return np.divide(array - row.params("bias"), scale, out=np.zeros_like(array), where=scale != 0)


def _scale_offset(row: Mismatch) -> bool:
    scale, bias = row.params("scale"), row.params("bias")
    ours, theirs = (_last_axis(array, scale) for array in (row.ours, row.theirs))
    return any(same(ours, _unscaled(row, theirs) * (scale + offset) + bias) for offset in (1.0, -1.0))


def _swapped(row: Mismatch) -> Found:
    words = {"query": "queries", "key": "keys", "value": "values", "gate": "gate", "up": "up"}
    group, _, name = row.kind.rpartition(".")
    for other in words.keys() - {name} if name in words else ():
        if row.has(f"{group}.{other}") and same(row.ours, row.input(f"{group}.{other}")):
            return dict(zip(("first", "second"), sorted([words[name], words[other]]), strict=True))
    return False


def _reordered(row: Mismatch) -> Found:
    width = row.theirs.shape[-1]
    numbers = np.arange(width - width % 2)
    orders = {
        "from pairs half a head apart to adjacent pairs": numbers.reshape(2, -1).T.ravel(),
        "from adjacent pairs to pairs half a head apart": numbers.reshape(-1, 2).T.ravel(),
    }
    return next(({"how": how} for how, order in orders.items() if same(row.ours, row.theirs[..., order])), False)


def _projected(row: Mismatch, *, x: Array | None = None, transposed: bool = False) -> Array | None:
    """The product of a projection by position, without bias; None if a transposed matrix does not fit."""
    x = _by_position(row.x if x is None else x)
    matrix = row.params("kernel").reshape(x.shape[1], -1)
    if not transposed:
        return np.asarray(x @ matrix)
    return np.asarray(x @ matrix.T) if matrix.shape[0] == matrix.shape[1] else None


def _own_norm(row: Mismatch) -> bool:
    """Whether PyTorch's feed-forward reads through a norm of its own what ours reads through that of attention."""
    if not row.evidence.ours.config.shared_norm:
        return False
    given = _by_position(row.x)
    matrix = row.params("kernel").reshape(given.shape[1], -1)
    product = _by_position(row.theirs) - row.params("bias").reshape(-1)
    read = product @ np.linalg.pinv(matrix)
    if not same(read @ matrix, product):
        return False
    # Two norms of one stream differ in scale and bias only: number by number, one is a line in the other.
    ours, theirs = given - given.mean(0), read - read.mean(0)
    return same(theirs, ours * (ours * theirs).sum(0) / np.square(ours).sum(0))


def _transposed(row: Mismatch) -> bool:
    product = _projected(row, transposed=True)
    return product is not None and same(_by_position(row.ours), product + row.params("bias").reshape(-1))


def _no_bias(row: Mismatch, own: Array, other: Array) -> bool:
    return _constant(row) and same(_by_position(own), _projected(row))


def _mixed_heads(row: Mismatch) -> bool:
    if row.ours.ndim != 4:
        return False
    B, T, N, H = row.theirs.shape
    return same(row.ours, row.theirs.reshape(B, T, H, N).swapaxes(2, 3))


def _other_weights(row: Mismatch) -> Found:
    ours, theirs = row.params("kernel", "ours"), row.params("kernel")
    return not same(ours, theirs) and {
        "path": f"{row.kind.replace('.', '/')}/kernel",
        "largest": np.abs(ours - theirs).max(),
    }


def _other_table(*paths: str) -> Test:
    """A test of whether one of these parameters differs."""

    def test(row: Mismatch) -> Found:
        for path in (path for path in paths if path in row.evidence.theirs.shapes):
            ours, theirs = (side.array("params", path) for side in (row.evidence.ours, row.evidence.theirs))
            if not same(ours, theirs):
                return {"path": path, "largest": np.abs(ours - theirs).max()}
        return False

    return test


# --- Rotary positions ---


@dataclass(frozen=True)
class Rotation:
    """How the pairs of a head turn with the position.

    Attributes:
        layout: which numbers make a pair: "half-by-half" (i with i + R/2) or "interleaved" (2 i with 2 i + 1); None if
            a head is too narrow to tell.
        width: R, how many numbers of a head turn.
        angles: (R / 2,), radians per position.
        start: position of the first token.
    """

    layout: str | None
    width: int
    angles: Array
    start: float

    @property
    def base(self) -> float | None:
        """The base, if the angles are base^(-2 i / R); None if they are not, or too few to tell."""
        if len(self.angles) < 2 or self.angles[1] <= 0:
            return None
        base = float(self.angles[1] ** (-self.width / 2))
        expected = base ** (-np.arange(0, self.width, 2) / self.width)
        return base if np.allclose(self.angles, expected, rtol=1e-5, atol=0) else None


def read_rotation(row: Mismatch, after_BTNH: Array) -> Rotation | None:
    """The rotation of queries or keys; None if it is none."""
    before_BTNH = row.input(row.kind.removesuffix("_rotated"))
    changed_H = np.abs(after_BTNH - before_BTNH).max((0, 1, 2)) > 1e-9 * np.abs(before_BTNH).max()
    # The slowest pair may hardly turn: the width is the smallest that spans all that changes.
    for width in range(2 * ((int(np.flatnonzero(changed_H).max(initial=0)) + 2) // 2), len(changed_H) + 1, 2):
        found: dict[str, tuple[Array, float]] = {}
        for layout in ("half-by-half", "interleaved"):
            turned = _angles(*(_pairs(x_BTNH[..., :width], layout) for x_BTNH in (before_BTNH, after_BTNH)))
            found |= {} if turned is None else {layout: turned}
        if found:
            layout, turned = next(iter(found.items()))
            return Rotation(layout if len(found) == 1 else None, width, *turned)
    return None


def _pairs(x_BTNR: Array, layout: str) -> Array:
    """The pairs as complex numbers, (B, T, N, R / 2)."""
    half = x_BTNR.shape[-1] // 2
    if layout == "interleaved":
        return np.asarray(x_BTNR[..., 0::2] + 1j * x_BTNR[..., 1::2])
    return np.asarray(x_BTNR[..., :half] + 1j * x_BTNR[..., half:])


def _angles(before: Array, after: Array) -> tuple[Array, float] | None:
    """Angle per position, and the position of the first token, if all tokens turn by such angles."""
    after = after * (np.linalg.norm(before) / max(float(np.linalg.norm(after)), 1e-300))  # YaRN's magnitude is no angle
    turns_TR = (after * before.conj()).sum((0, 2))
    per_step_R = np.angle(turns_TR[1:] * turns_TR[:-1].conj()).mean(0)
    first_R = np.angle(turns_TR[0])
    start = float(first_R[0] / per_step_R[0]) if per_step_R[0] != 0 else 0.0
    positions_T = np.arange(len(turns_TR))
    turned = before * np.exp(1j * (first_R + positions_T[:, None] * per_step_R))[None, :, None, :]
    if not np.allclose(turned, after, atol=1e-5 * np.abs(after).max()):
        return None
    return per_step_R, round(start, 6) + 0  # + 0 turns -0.0 into 0.0


def _clipped(row: Mismatch) -> Found:
    for side, own, other in row.sides:
        own, other = own[:, 0], other[:, 0]  # what stands at position 0 is not turned
        limit = np.abs(own).max()
        if same(own, other.clip(-limit, limit)) and not same(own, other):
            return {"side": side, "limit": limit}
    return False


def _unturned(row: Mismatch, own: Array, other: Array) -> bool:
    return same(own, row.input(row.kind.removesuffix("_rotated")))


def _no_rotation(row: Mismatch, own: Array, other: Array) -> bool:
    return read_rotation(row, own) is None


def _angle_ratio(row: Mismatch) -> Found:
    """The ratio of our angles and PyTorch's, if it is the same for all pairs."""
    ours, theirs = read_rotation(row, row.ours), read_rotation(row, row.theirs)
    if ours is None or theirs is None:
        return False
    ratio = ours.angles / theirs.angles
    constant = same(ratio, np.full_like(ratio, ratio[0])) and not math.isclose(ratio[0], 1, rel_tol=TOLERANCE)
    return constant and {"ratio": ratio[0]}


def _magnitude(row: Mismatch) -> Found:
    """Whether what turns is multiplied by different numbers on the two sides."""
    turned_H = np.abs(row.theirs - row.input(row.kind.removesuffix("_rotated"))).max((0, 1, 2)) > 0
    factor = factor_between(row.ours[..., turned_H], row.theirs[..., turned_H])
    return factor is not None and not math.isclose(abs(factor), 1, rel_tol=TOLERANCE) and {"ratio": factor}


def _growth(row: Mismatch) -> Found:
    """Whether all that stands at a position is so many times PyTorch's, and at the first one equal."""
    ratios = [factor_between(row.ours[:, t], row.theirs[:, t]) for t in range(row.ours.shape[1])]
    if row.kind != "attention.q_rotated" or None in ratios or not math.isclose(ratios[0] or 0, 1, rel_tol=TOLERANCE):
        return False
    t = next((t for t, ratio in enumerate(ratios) if not math.isclose(ratio or 0, 1, rel_tol=TOLERANCE)), None)
    return t is not None and {"position": t, "ratio": ratios[t]}


def _opposite(row: Mismatch) -> bool:
    found = _angle_ratio(row)
    return isinstance(found, dict) and math.isclose(found["ratio"], -1, rel_tol=TOLERANCE)


# --- Attention ---


def _future(row: Mismatch) -> Found:
    ours, theirs = (bool(np.triu(mask[0, 0], 1).any()) for mask in row.masks)
    return ours != theirs and {"side": "ours" if ours else "PyTorch"}


def _window(row: Mismatch) -> Found:
    """Compares how many keys the last query sees."""
    our_mask, their_mask = row.masks
    ours, theirs = (int(mask[0, 0, -1].sum()) for mask in row.masks)
    T = our_mask.shape[-1]
    off = ": off by one" if abs(ours - theirs) == 1 and T not in (ours, theirs) else ""
    words = {"ours": f"all {T}" if ours == T else ours, "theirs": f"all {T}" if theirs == T else theirs, "off": off}
    return bool((our_mask != their_mask).any()) and words


def _no_root(row: Mismatch) -> Found:
    root = math.sqrt(row.evidence.ours.config.head_width)
    side = "ours" if row.is_factor(root) else "PyTorch"
    return row.is_factor(root, 1 / root) and {"root": root, "side": side}


def _reads_values(row: Mismatch, own: Array, other: Array) -> bool:
    """Whether the scores are of queries and values, or the heads means of keys: behind their projections."""
    of_scores = row.kind == "attention.scores"
    heads_BSKH = row.input("attention.v" if of_scores else "attention.k")
    heads_BSNH = heads_BSKH.repeat(row.evidence.ours.config.num_heads // heads_BSKH.shape[2], axis=2)
    product = _product(row, row.input("attention.q" if of_scores else "attention.weights"), heads_BSNH)
    return factor_between(own, product) is not None if of_scores else same(own, product)


def _product(row: Mismatch, x: Array, heads_BSNH: Array) -> Array:
    """The scores of queries x with these heads, or the means of these heads by weights x."""
    if row.kind == "attention.scores":
        return np.where(row.masks[0], np.einsum("BTNH,BSNH->BNTS", x, heads_BSNH), 0)
    return np.asarray(np.einsum("BNTS,BSNH->BTNH", x, heads_BSNH))


def _heads_mixed(row: Mismatch, own: Array, other: Array) -> bool:
    """Whether (B, N, T, H) was reshaped without a transposition before."""
    return same(own, np.ascontiguousarray(other.swapaxes(1, 2)).reshape(other.shape))


def _grouping(row: Mismatch, own: Array) -> str | None:
    """Which key or value head each query head reads."""
    of_scores = row.kind == "attention.scores"
    rotated = "_rotated" if row.has("attention.q_rotated") else ""
    x = row.input(f"attention.q{rotated}" if of_scores else "attention.weights")
    heads_BSKH = row.input(f"attention.k{rotated}" if of_scores else "attention.v")
    G = row.evidence.ours.config.num_heads // heads_BSKH.shape[2]
    ways = {"n // G": heads_BSKH.repeat(G, axis=2), "n mod K": np.tile(heads_BSKH, (1, 1, G, 1))}
    for way, heads_BSNH in ways.items():
        if factor_between(own, _product(row, x, heads_BSNH)) is not None:
            return f"head n reads key/value head {way}"
    return None


def _not_normalised(row: Mismatch, own: Array, other: Array) -> bool:
    return not same(own.sum(-1), np.ones(own.shape[:-1]))


def _slopes(row: Mismatch) -> Found:
    """Whether the weights of one side fall faster with distance, by the same factor per position for a whole head."""
    if min(row.ours[:, :, -1].min(), row.theirs[:, :, -1].min()) <= 0:
        return False
    steps_BNS = np.diff(np.log(row.ours[:, :, -1]) - np.log(row.theirs[:, :, -1]))
    equal = np.allclose(steps_BNS, steps_BNS[:1, :, :1], rtol=0, atol=1e-3 * np.abs(steps_BNS).max())
    return equal and {"side": "ours" if steps_BNS[0, 0, 0] > 0 else "PyTorch"}


# --- Feed-forward, residual and head ---

# Those of `nn.feed_forward`, in float64 NumPy.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "GELU by erf": lambda x: np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
    "GELU by tanh": lambda x: np.asarray(x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "SiLU": lambda x: np.asarray(x / (1 + np.exp(-x))),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU squared": lambda x: np.square(np.maximum(x, 0)),
}


def _activation(row: Mismatch, hidden: Array) -> str | None:
    up = row.input("feed_forward.up")
    gate, factor = (row.input("feed_forward.gate"), up) if row.has("feed_forward.gate") else (up, 1.0)
    return next((name for name, activate in ACTIVATIONS.items() if same(hidden, activate(gate) * factor)), None)


def _not_added(row: Mismatch) -> Found:
    feed_forward = row.scaled_write("feed_forward.down")
    parts = {"the residual": row.residual, "attention": row.attended - row.residual, "feed-forward": feed_forward}
    for side, own, _ in row.sides:
        for part, array in (parts | {"what goes into feed-forward": row.attended}).items():
            if same(own, row.attended + feed_forward - array):
                return {"part": part, "side": side}
    return False


def _residual_scale(row: Mismatch, own: Array) -> float | None:
    """How many times a side adds what attention writes to the residual stream, read off the norm behind the sum."""
    config = row.evidence.ours.config
    if row.kind == "residual":
        return factor_between(own - row.residual, row.attended - row.residual + row.write("feed_forward.down"))
    scale, normal = row.params("scale"), _unscaled(row, own)
    x, write = row.residual, row.write("attention.out")
    if config.norm == "layernorm":
        x, write = (array - array.mean(-1, keepdims=True) for array in (x, write))
    used = scale != 0
    # At one position, x + factor * write = size * normal has two unknowns.
    factors = [
        np.linalg.lstsq(np.stack([-write_D, normal_D], -1)[used], x_D[used])[0][0]
        for x_D, write_D, normal_D in zip(*map(_by_position, (x, write, normal)), strict=True)
    ]
    return float(np.mean(factors)) if np.allclose(factors, factors[0], rtol=RTOL, atol=0) else None


def _plain_embeddings(row: Mismatch, own: Array, other: Array) -> bool:
    """Whether the embeddings of a side are as they stand in the table, and the other's are not."""
    return row.evidence.ours.config.positions != "learned" and factor_between(own, _embedded(row)) is not None


def _tied(row: Mismatch, own: Array, other: Array) -> bool:
    embedding_VD = row.evidence.theirs.array("params", "embedding")
    has_bias = "head_bias" in row.evidence.theirs.shapes
    bias_V = row.evidence.theirs.array("params", "head_bias") if has_bias else 0.0
    tied = row.evidence.their_forward.get("final_norm", row.residual) @ embedding_VD.T + bias_V
    return same(own, tied) and not same(other, tied)


NORM, ROTATED, SCORES, NOT_SCORES = r".*_norm", r"attention\.[qk]_rotated", r"attention\.scores", r"(?!.*scores).*"
PROJECTION = r"attention\.(query|key|value|out)|feed_forward\.(gate|up|down)"
PROPORTIONAL = _proportional, "ours is {row.factor:.6g} times PyTorch's everywhere{root}"
SHAPES = "the shapes differ: ours {row.ours.shape}, PyTorch's {row.theirs.shape}"
OTHER = "the weights differ: the largest difference in {path} is {largest:.1e}"
GROUPED = "query heads are grouped differently: in ours {ours}, in PyTorch {theirs}"
rotation = functools.partial(unlike, read_rotation)
# Which kinds of rows (a regular expression), the test, and the sentence; the first test that is true names the cause.
FORWARD: tuple[tuple[str, Test, str], ...] = (
    (".*", lambda row: row.ours.shape != row.theirs.shape, SHAPES),
    (NOT_SCORES, lambda row: not np.isfinite(row.ours).all(), "ours has numbers that are not finite"),
    ("embeddings", *PROPORTIONAL),
    ("embeddings", _other_scale, "token embeddings are multiplied by {ours:.6g} in ours, by {theirs:.6g} in PyTorch"),
    ("embeddings", _other_positions, "the vectors of positions differ, or are counted from another number"),
    ("embeddings", _some_tokens, "the embeddings of some tokens differ, such as that of token {token}"),
    ("embeddings", _other_table("embedding", "positions"), OTHER),
    ("embeddings", one_side(_plain_embeddings), "the norm of embeddings: {side} has none"),
    (
        "feed_forward_norm",
        one_side(_parallel),
        "parallel residual: the feed-forward of {side} reads what attention reads, not what it writes",
    ),
    (
        "feed_forward_norm",
        unlike(_residual_scale),
        "residual scale: ours adds {ours:.6g} times what attention writes, PyTorch {theirs:.6g} times",
    ),
    (
        "attention_norm",
        _comes_after,
        "the place of the norm: in PyTorch it comes after the sum (post-norm), in ours not",
    ),
    (
        r"attention\.(query|key)_norm",
        lambda row: same(row.theirs[:, 0], row.ours[:, 0]),  # what stands at position 0 is not turned
        "the place of the norm of queries and keys: in ours before the rotation, in PyTorch after it",
    ),
    (NORM, unlike(_norm, "kind"), "the norm: ours is {ours.kind}, PyTorch's {theirs.kind}"),
    (NORM, unlike(_norm, "epsilon"), "epsilon of the norm: ours {ours.epsilon:.2g}, PyTorch's {theirs.epsilon:.2g}"),
    (NORM, _scale_offset, "the scale of the norm: it is 1 + weight on one side, and the weight itself on the other"),
    (
        r"attention\.(query|key|value)",
        _comes_before,
        "the place of the norm: in PyTorch it comes before attention (pre-norm), in ours after the sum",
    ),
    (PROJECTION, _swapped, "{first} and {second} are swapped"),
    (r"attention\.(query|key)", _reordered, "rotary layout of the weights: numbers of our heads are reordered, {how}"),
    (
        r"feed_forward\.(gate|up)",
        _own_norm,
        "shared norm: the feed-forward of ours reads the norm of attention, that of PyTorch has one of its own",
    ),
    (PROJECTION, _transposed, "the matrix is transposed: it is square, so its shape does not tell"),
    (PROJECTION, one_side(_no_bias), "a bias is missing in {side}"),
    (PROJECTION, _constant, "the bias differs"),
    (PROJECTION, _mixed_heads, "heads and head width are mixed up in a reshape"),
    (PROJECTION, _other_weights, OTHER),
    (ROTATED, _clipped, "{side} clips queries and keys to ± {limit:.4g}, the other side does not"),
    (ROTATED, one_side(_unturned), "rotary positions: {side} does not turn it, in this layer or in all"),
    (ROTATED, _growth, "scaling of queries by position: those at {position} are {ratio:.6g} times PyTorch's"),
    (ROTATED, _magnitude, "rotary magnitude: what ours turns is {ratio:.6g} times PyTorch's"),
    (ROTATED, one_side(_no_rotation), "what {side} does to it is no rotation of pairs"),
    (ROTATED, rotation("layout"), "rotary layout: ours turns {ours.layout} pairs, PyTorch {theirs.layout} pairs"),
    (ROTATED, rotation("width"), "rotary fraction: ours turns {ours.width} numbers of a head, PyTorch {theirs.width}"),
    (ROTATED, rotation("start"), "rotary positions: ours start at {ours.start:.4g}, PyTorch's at {theirs.start:.4g}"),
    (ROTATED, _opposite, "rotary direction: the two turn opposite ways"),
    (ROTATED, rotation("base"), "rotary base: ours {ours.base:,.6g}, PyTorch's {theirs.base:,.6g}"),
    (ROTATED, _angle_ratio, "rotary scaling: positions count {ratio:.4g} times as much in ours"),
    (ROTATED, rotation("angles"), "rotary scaling: some wavelengths are stretched on one side only, as llama3 does"),
    (SCORES, _future, "the mask: {side} lets positions see later ones"),
    (SCORES, _window, "the window: a query of ours sees {ours} positions, one of PyTorch's {theirs}{off}"),
    (SCORES, one_side(_reads_values), "keys and values are swapped behind their projections in {side}"),
    (SCORES, _no_root, "the scores are not divided by the root of the head width, {root:.4g}, in {side}"),
    (SCORES, _proportional, "the scores are scaled differently: ours are {row.factor:.6g} times PyTorch's"),
    (SCORES, unlike(_grouping), GROUPED),
    (SCORES, _cap, "a soft cap of {cap:.4g} squashes the scores of {side} only"),
    (r"attention\.weights", one_side(_not_normalised), "the softmax: weights of {side} do not add up to 1 over keys"),
    (r"attention\.weights", _slopes, "ALiBi: the weights of {side} fall faster with distance, or only these do"),
    (r"attention\.heads", unlike(_grouping), GROUPED),
    (r"attention\.heads", one_side(_reads_values), "keys and values are swapped behind their projections in {side}"),
    (r"attention\.heads", one_side(_heads_mixed), "{side} reshapes the heads without transposing them before"),
    (r"feed_forward\.hidden", unlike(_activation), "the activation: ours is {ours}, PyTorch's {theirs}"),
    (
        "residual",
        unlike(_residual_scale),
        "residual scale: ours adds {ours:.6g} times the writes, PyTorch {theirs:.6g}",
    ),
    ("residual", _not_added, "{part} is not added in {side}"),
    ("logits", _cap, "a soft cap of {cap:.4g} squashes the logits of {side} only"),
    ("logits", *PROPORTIONAL),
    ("logits", one_side(_tied), "tied head: {side} takes the embedding for its head, the other side does not"),
    (NOT_SCORES, *PROPORTIONAL),
    ("logits", _other_table("head"), OTHER),
    (NOT_SCORES, _constant, "the difference is the same at all positions: a bias differs, or is missing on one side"),
)
