"""Known mistakes of a forward pass, each tried on the tensors around the first one that differs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_decoder.interop.evidence import TOLERANCE, Array, Evidence, same
from flax_decoder.interop.rotation import Rotation, read_rotation
from flax_decoder.nn.feed_forward import ACTIVATIONS, GATED

# Scores under this are behind the mask.
MASKED = -1e30


@dataclass
class Step:
    """One tensor of the forward pass: what went into it, and what came out on both sides."""

    ours: Array
    theirs: Array
    layer: str
    evidence: Evidence

    def input(self, name: str) -> Array:
        """A tensor of the same layer, on which both sides agree."""
        return self.evidence.their_forward[f"{self.layer}{name}"]

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return f"{self.layer}{name}" in self.evidence.their_forward

    @property
    def residual(self) -> Array:
        """What the layer read."""
        number = int(self.layer.split(".")[1])
        name = f"layers.{number - 1}.residual" if number else "embeddings"
        return self.evidence.their_forward[name]

    @property
    def attended(self) -> Array:
        """The residual stream between attention and feed-forward."""
        written = "attention_output_norm" if self.has("attention_output_norm") else "attention.out"
        return self.residual + self.input(written)

    def params(self, path: str, side: str = "theirs") -> Array | None:
        """A parameter of this layer, or of the whole model, in float64; None where a side has none."""
        owner: Any = getattr(self.evidence, side)
        full = f"layers/{path}" if self.layer else path
        if full not in self.evidence.theirs.shapes:
            return None
        array: Array = owner.array("params", full)
        return array[int(self.layer.split(".")[1])] if self.layer else array


def of_forward(name: str, evidence: Evidence) -> Iterator[str]:
    """Causes for a tensor of the forward pass, likeliest first.

    Args:
        name: of its row, such as layers.0.attention.q.
        evidence: both sides.
    """
    layer = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else ""
    kind = name.removeprefix(layer)
    step = Step(evidence.our_forward[name], evidence.their_forward[name], layer, evidence)
    if step.ours.shape != step.theirs.shape:
        yield f"the shapes differ: ours {step.ours.shape}, PyTorch's {step.theirs.shape}"
        return
    if not np.isfinite(step.ours).all() and not kind.endswith("scores"):
        yield "ours has numbers that are not finite"
        return
    yield from FORWARD[kind](kind, step)
    if not kind.endswith("scores"):
        yield from _by_a_factor(step)
        yield from _by_a_vector(step)


def _of_embeddings(kind: str, step: Step) -> Iterator[str]:
    yield from _by_a_factor(step)
    tokens_BT = step.evidence.batch["inputs"]
    by_position = step.ours - step.theirs
    if same(by_position, np.broadcast_to(by_position[:1], by_position.shape)) and len(by_position) > 1:
        yield "the vectors of positions differ, or are counted from another number"
    first = step.theirs.reshape(-1, step.theirs.shape[-1])
    ours = step.ours.reshape(first.shape)
    different = np.abs(ours - first).max(-1) > TOLERANCE * np.abs(first).max()
    tokens = np.unique(tokens_BT.ravel()[different])
    if len(tokens) < len(np.unique(tokens_BT)):
        yield f"the embeddings of some tokens differ, such as that of token {tokens[0]}"


def _of_norm(kind: str, step: Step) -> Iterator[str]:
    config = step.evidence.ours.config
    if kind == "final_norm":
        x = step.evidence.their_forward[f"layers.{config.num_layers - 1}.residual"]
    elif kind == "feed_forward_norm":
        yield from _between_parallel_and_sequential(step)
        x = step.residual if config.parallel_residual else step.attended
    else:
        x = {
            "attention_norm": lambda: step.residual,
            "attention_output_norm": lambda: step.input("attention.out"),
            "feed_forward_output_norm": lambda: step.input("feed_forward.down"),
        }[kind]()
    yield from _by_normalising(kind, x, step)


def _between_parallel_and_sequential(step: Step) -> Iterator[str]:
    scale, bias = step.params("feed_forward_norm/scale"), step.params("feed_forward_norm/bias")
    if scale is None:
        return
    shift = 0.0 if bias is None else bias

    def is_normal_of(x: Array, y: Array) -> bool:
        centred = x - x.mean(-1, keepdims=True)
        return any(_epsilon(form, y - shift, scale) is not None for form in (x, centred))

    for side, own, other in (("ours", step.ours, step.theirs), ("PyTorch", step.theirs, step.ours)):
        if is_normal_of(step.residual, own) and is_normal_of(step.attended, other):
            yield f"parallel residual: the feed-forward of {side} reads what attention reads, not what it writes"


def _by_normalising(path: str, x: Array, step: Step) -> Iterator[str]:
    """Mistakes of a norm with the parameters at `path`, of an input on which both sides agree."""
    scale = step.params(f"{path}/scale")
    bias = step.params(f"{path}/bias")
    if scale is None:
        return
    shift = 0.0 if bias is None else bias
    kinds = {}
    for kind, centred in (("LayerNorm", x - x.mean(-1, keepdims=True)), ("RMSNorm", x)):
        for side, y in (("ours", step.ours), ("theirs", step.theirs)):
            epsilon = _epsilon(centred, y - shift, scale)
            if epsilon is not None:
                kinds[side] = kind, epsilon
    if len(kinds) == 2:
        (our_kind, our_epsilon), (their_kind, their_epsilon) = kinds["ours"], kinds["theirs"]
        if our_kind != their_kind:
            yield f"the norm: ours is {our_kind}, PyTorch's {their_kind}"
        elif not math.isclose(our_epsilon, their_epsilon, rel_tol=1e-3):
            yield f"epsilon of the norm: ours {our_epsilon:.2g}, PyTorch's {their_epsilon:.2g}"
    normal = np.divide(step.theirs - shift, scale, out=np.zeros_like(step.theirs), where=scale != 0)
    for offset in (1.0, -1.0):
        if same(step.ours, normal * (scale + offset) + shift):
            yield "the scale of the norm: it is 1 + weight on one side, and the weight itself on the other"


def _epsilon(centred: Array, y: Array, scale: Array) -> float | None:
    """The epsilon with which y = centred / sqrt(mean(centred^2) + epsilon) * scale; None where there is none."""
    direction = centred * scale
    factor = (y * direction).sum(-1, keepdims=True) / np.square(direction).sum(-1, keepdims=True)
    if not same(y, factor * direction):
        return None
    size = np.square(centred).mean(-1, keepdims=True)
    smallest = np.unravel_index(size.argmin(), size.shape)
    return float((factor**-2 - size)[smallest])


def _of_queries_or_keys(kind: str, step: Step) -> Iterator[str]:
    """Queries and keys as they go into the rotation: after their norm, where there is one."""
    name = {"attention.q": "query", "attention.k": "key"}[kind]
    if step.evidence.ours.config.qk_norm == "none":
        yield from _of_projection(f"attention.{name}", step)
        return
    x = step.input(f"attention.{name}")
    if step.evidence.ours.config.qk_norm == "all":
        flat = [array.reshape(*array.shape[:2], -1) for array in (x, step.ours, step.theirs)]
        x, step = flat[0], Step(flat[1], flat[2], step.layer, step.evidence)
    yield from _by_normalising(f"attention/{name}_norm", x, step)


def _of_values(kind: str, step: Step) -> Iterator[str]:
    yield from _of_projection("attention.value", step)


def _of_projection(kind: str, step: Step) -> Iterator[str]:
    config = step.evidence.ours.config
    if kind.startswith("attention.") and kind != "attention.out":
        x = step.input("attention_norm") if step.has("attention_norm") else step.residual
        others = {"queries": "attention.query", "keys": "attention.key", "values": "attention.value"}
    elif kind == "attention.out":
        x, others = step.input("attention.heads"), {}
    elif kind == "feed_forward.down":
        x, others = step.input("feed_forward.hidden"), {}
    else:
        before = step.residual if config.parallel_residual else step.attended
        x = step.input("feed_forward_norm") if step.has("feed_forward_norm") else before
        others = {"gate": "feed_forward.gate", "up": "feed_forward.up"}
    own = next((word for word, other in others.items() if other == kind), "")
    for word, other in others.items():
        if other != kind and step.has(other) and same(step.ours, step.input(other)):
            first, second = sorted([own, word])
            yield f"{first} and {second} are swapped"
    for layout, order in _rotary_orders(step.theirs.shape[-1]):
        if kind in ("attention.query", "attention.key") and same(step.ours, step.theirs[..., order]):
            yield f"rotary layout of the weights: the numbers of each head of ours are reordered, {layout}"
    yield from _by_the_matrix(kind.replace(".", "/"), x, step)


def _by_the_matrix(path: str, x: Array, step: Step) -> Iterator[str]:
    kernel, bias = step.params(f"{path}/kernel"), step.params(f"{path}/bias")
    if kernel is None:
        return
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    matrix = kernel.reshape(rows.shape[1], -1)
    y = step.ours.reshape(len(rows), -1)
    shift = 0.0 if bias is None else bias.reshape(1, -1)
    if matrix.shape[0] == matrix.shape[1] and same(y, rows @ matrix.T + shift):
        yield "the matrix is transposed: it is square, so its shape does not tell"
    difference = (step.ours - step.theirs).reshape(len(rows), -1)
    if same(difference, np.broadcast_to(difference[:1], difference.shape)):
        side = "ours" if same(step.ours.reshape(len(rows), -1), rows @ matrix) else "PyTorch"
        missing = same(step.ours.reshape(len(rows), -1), rows @ matrix) or same(
            step.theirs.reshape(len(rows), -1), rows @ matrix
        )
        yield f"a bias is missing in {side}" if missing else "the bias differs"
    if kernel.ndim == 3 and path != "attention/out":
        heads, width = kernel.shape[1:]
        mixed = step.theirs.reshape(len(rows), width, heads).swapaxes(1, 2)
        if same(y, mixed.reshape(y.shape)):
            yield "heads and head width are mixed up in a reshape"
    ours = step.params(f"{path}/kernel", "ours")
    if ours is not None and not same(ours, kernel):
        yield f"the weights differ: the largest difference in {path}/kernel is {np.abs(ours - kernel).max():.1e}"


def _rotary_orders(width: int) -> Iterator[tuple[str, Array]]:
    numbers = np.arange(width - width % 2)
    yield "from pairs half a head apart to pairs side by side", numbers.reshape(2, -1).T.ravel()
    yield "from pairs side by side to pairs half a head apart", numbers.reshape(-1, 2).T.ravel()


def _of_rotation(kind: str, step: Step) -> Iterator[str]:
    before = step.input(kind.removesuffix("_rotated"))
    ours, theirs = read_rotation(before, step.ours), read_rotation(before, step.theirs)
    if ours is None or theirs is None:
        side = "ours" if ours is None else "PyTorch"
        yield f"what {side} does to it is no rotation of pairs"
        return
    yield from _between_rotations(ours, theirs)


def _between_rotations(ours: Rotation, theirs: Rotation) -> Iterator[str]:
    if ours.layouts.isdisjoint(theirs.layouts):
        yield f"rotary layout: ours turns {ours.layout} pairs, PyTorch {theirs.layout} pairs"
        return
    if ours.width != theirs.width:
        yield f"rotary fraction: ours turns {ours.width} numbers of a head, PyTorch {theirs.width}"
        return
    if not math.isclose(ours.start, theirs.start, abs_tol=1e-6):
        yield f"rotary positions: ours start at {ours.start:.3g}, PyTorch's at {theirs.start:.3g}"
    if same(ours.angles, -theirs.angles):
        yield "rotary direction: the two turn opposite ways"
    if ours.base is not None and theirs.base is not None and not math.isclose(ours.base, theirs.base, rel_tol=1e-4):
        yield f"rotary base: ours {ours.base:,.6g}, PyTorch's {theirs.base:,.6g}"
    ratio = ours.angles / theirs.angles
    if same(ratio, np.full_like(ratio, ratio[0])) and not math.isclose(ratio[0], 1, rel_tol=TOLERANCE):
        yield f"rotary scaling: positions count {ratio[0]:.4g} times as much in ours"
    if not same(ours.angles, theirs.angles):
        yield "rotary scaling: some wavelengths are stretched on one side only, as llama3 does"


def _of_scores(kind: str, step: Step) -> Iterator[str]:
    ours, theirs = step.ours, step.theirs
    our_mask, their_mask = ours >= MASKED, theirs >= MASKED
    if (our_mask != their_mask).any():
        yield _between_masks(our_mask, their_mask)
        return
    ours, theirs = np.where(our_mask, ours, 0), np.where(their_mask, theirs, 0)
    H = step.evidence.ours.config.head_width
    factor = (ours * theirs).sum() / np.square(theirs).sum()
    if same(ours, factor * theirs):
        side = "ours" if factor > 1 else "PyTorch"
        if math.isclose(max(factor, 1 / factor), math.sqrt(H), rel_tol=TOLERANCE):
            yield f"the scores are not divided by the root of the head width, {math.sqrt(H):.4g}, in {side}"
        yield f"the scores are scaled differently: ours are {factor:.6g} times PyTorch's"
    q_BTNH, k_BSKH = step.input("attention.q_rotated"), step.input("attention.k_rotated")
    products = {how: np.einsum("BTNH,BSNH->BNTS", q_BTNH, k) for how, k in _groupings(k_BSKH, q_BTNH.shape[2])}
    products = {how: np.where(our_mask, product, 0) for how, product in products.items()}
    yield from _between_groupings(ours, theirs, products)
    capped = next((cap for cap in _caps(ours, theirs)), None)
    if capped is not None:
        side, cap = capped
        yield f"a soft cap of {cap:.4g} squashes the scores of {side} only"


def _groupings(array_BSKH: Array, num_heads: int) -> Iterator[tuple[str, Array]]:
    """Key or value heads as the query heads might find them."""
    count = num_heads // array_BSKH.shape[2]
    yield "head n reads key/value head n // G", array_BSKH.repeat(count, axis=2)
    yield "head n reads key/value head n mod K", np.tile(array_BSKH, (1, 1, count, 1))


def _between_groupings(ours: Array, theirs: Array, products: dict[str, Array]) -> Iterator[str]:
    """Which grouping each side has, up to a factor."""

    def found(array: Array) -> str | None:
        for how, product in products.items():
            factor = (array * product).sum() / max(np.square(product).sum(), 1e-300)
            if same(array, factor * product):
                return how
        return None

    our_way, their_way = found(ours), found(theirs)
    if our_way is not None and their_way is not None and our_way != their_way:
        yield f"query heads are grouped differently: in ours {our_way}, in PyTorch {their_way}"


def _between_masks(our_mask: Array, their_mask: Array) -> str:
    """What the masks say, by what the last query of the first head sees, and by what lies in the future."""
    if np.triu(our_mask[0, 0], 1).any() != np.triu(their_mask[0, 0], 1).any():
        side = "ours" if np.triu(our_mask[0, 0], 1).any() else "PyTorch"
        return f"the mask: {side} lets positions see later ones"
    ours, theirs = int(our_mask[0, 0, -1].sum()), int(their_mask[0, 0, -1].sum())
    T = our_mask.shape[-1]
    for side, own, other in (("ours", ours, theirs), ("PyTorch", theirs, ours)):
        if own == T and other < T:
            return f"the window: {side} has none, the other side sees {other} positions"
    off = ": off by one" if abs(ours - theirs) == 1 else ""
    return f"the window: a query of ours sees {ours} positions, one of PyTorch's {theirs}{off}"


def _caps(ours: Array, theirs: Array) -> Iterator[tuple[str, float]]:
    """The side that squashes the other's numbers by cap * tanh(x / cap), and the cap."""
    for side, small, large in (("ours", ours, theirs), ("PyTorch", theirs, ours)):
        place = np.unravel_index(np.abs(large).argmax(), large.shape)
        x, y = abs(float(large[place])), abs(float(small[place]))
        if not 0 < y < x:
            continue
        low, high = y, 1e6 * x
        for _ in range(200):  # cap * tanh(x / cap) grows with the cap
            middle = math.sqrt(low * high)
            low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
        if same(small, low * np.tanh(large / low)):
            yield side, low


def _of_weights(kind: str, step: Step) -> Iterator[str]:
    for side, weights in (("ours", step.ours), ("PyTorch", step.theirs)):
        if not same(weights.sum(-1), np.ones(weights.shape[:-1])):
            yield f"the softmax: weights of {side} do not add up to 1 over the keys"


def _of_heads(kind: str, step: Step) -> Iterator[str]:
    v_BSKH, weights_BNTS = step.input("attention.v"), step.input("attention.weights")
    N = weights_BNTS.shape[1]
    averages = {how: np.einsum("BNTS,BSNH->BTNH", weights_BNTS, v) for how, v in _groupings(v_BSKH, N)}
    yield from _between_groupings(step.ours, step.theirs, averages)


def _of_hidden(kind: str, step: Step) -> Iterator[str]:
    up = step.input("feed_forward.up")
    gate = step.input("feed_forward.gate") if step.has("feed_forward.gate") else None
    found: dict[str, str] = {}
    for name in ACTIVATIONS:
        if (name in GATED) != (gate is not None):
            continue
        hidden = activate(name, up) if gate is None else activate(name, gate) * up
        for side, array in (("ours", step.ours), ("PyTorch", step.theirs)):
            if same(array, hidden):
                found.setdefault(side, _WORDS.get(name, name))
    if len(found) == 2 and found["ours"] != found["PyTorch"]:
        yield f"the activation: ours is {found['ours']}, PyTorch's {found['PyTorch']}"


_WORDS = {
    "gelu": "GELU by erf",
    "gelu_tanh": "GELU by tanh",
    "geglu": "GELU by erf",
    "geglu_tanh": "GELU by tanh",
    "swiglu": "SiLU",
    "relu": "ReLU",
    "relu_squared": "ReLU squared",
}


def activate(name: str, x: Array) -> Array:
    """An activation of `nn.feed_forward`, in float64 NumPy."""
    if name in ("gelu", "geglu"):
        return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))
    if name in ("gelu_tanh", "geglu_tanh"):
        return np.asarray(x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    if name == "swiglu":
        return np.asarray(x / (1 + np.exp(-x)))
    return np.maximum(x, 0) ** (2 if name == "relu_squared" else 1)


def _of_residual(kind: str, step: Step) -> Iterator[str]:
    attention = step.attended - step.residual
    written = "feed_forward_output_norm" if step.has("feed_forward_output_norm") else "feed_forward.down"
    parts = {"the residual": step.residual, "attention": attention, "feed-forward": step.input(written)}
    for side, array in (("ours", step.ours), ("PyTorch", step.theirs)):
        for left_out, part in parts.items():
            if same(array, sum(parts.values()) - part):
                yield f"{left_out} is not added in {side}"


def _of_logits(kind: str, step: Step) -> Iterator[str]:
    final = step.evidence.their_forward["final_norm"]
    embedding = step.evidence.theirs.array("params", "embedding")
    tied = final @ embedding.T
    for side, cap in _caps(step.ours, step.theirs):
        yield f"a soft cap of {cap:.4g} squashes the logits of {side} only"
    for side, own, other in (("ours", step.ours, step.theirs), ("PyTorch", step.theirs, step.ours)):
        if same(own, tied) and not same(other, tied):
            yield f"tied head: {side} takes the embedding for its head, the other side has one of its own"


def _by_a_factor(step: Step) -> Iterator[str]:
    factor = (step.ours * step.theirs).sum() / max(np.square(step.theirs).sum(), 1e-300)
    if same(step.ours, factor * step.theirs):
        D = step.evidence.ours.config.embed_dim
        root = f", the root of the width {D}" if math.isclose(max(factor, 1 / factor), math.sqrt(D)) else ""
        yield f"ours is {factor:.6g} times PyTorch's everywhere{root}"


def _by_a_vector(step: Step) -> Iterator[str]:
    difference = (step.ours - step.theirs).reshape(-1, *step.ours.shape[2:])
    if same(difference, np.broadcast_to(difference[:1], difference.shape)):
        yield "the two differ by the same vector at all positions: a bias is missing on one side, or differs"


FORWARD: dict[str, Callable[[str, Step], Iterator[str]]] = {
    "embeddings": _of_embeddings,
    **dict.fromkeys(("attention_norm", "attention_output_norm"), _of_norm),
    **dict.fromkeys(("feed_forward_norm", "feed_forward_output_norm", "final_norm"), _of_norm),
    **dict.fromkeys(("attention.query", "attention.key", "attention.out"), _of_projection),
    **dict.fromkeys(("feed_forward.gate", "feed_forward.up", "feed_forward.down"), _of_projection),
    **dict.fromkeys(("attention.q", "attention.k"), _of_queries_or_keys),
    "attention.v": _of_values,
    **dict.fromkeys(("attention.q_rotated", "attention.k_rotated"), _of_rotation),
    "attention.scores": _of_scores,
    "attention.weights": _of_weights,
    "attention.heads": _of_heads,
    "feed_forward.hidden": _of_hidden,
    "residual": _of_residual,
    "logits": _of_logits,
}
