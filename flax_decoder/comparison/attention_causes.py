"""Known mistakes between queries, keys and values and the heads' outputs."""

import math
from collections.abc import Iterator

import numpy as np

from flax_decoder.comparison.evidence import MASKED, TOLERANCE, Array, Step, same
from flax_decoder.comparison.rotation import Rotation, read_rotation


def of_rotation(kind: str, step: Step) -> Iterator[str]:
    """Mistakes of rotary positions."""
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
        starts = (round(side.start, 6) + 0 for side in (ours, theirs))
        yield "rotary positions: ours start at {:.4g}, PyTorch's at {:.4g}".format(*starts)
    if same(ours.angles, -theirs.angles):
        yield "rotary direction: the two turn opposite ways"
    if ours.base is not None and theirs.base is not None and not math.isclose(ours.base, theirs.base, rel_tol=1e-4):
        yield f"rotary base: ours {ours.base:,.6g}, PyTorch's {theirs.base:,.6g}"
    ratio = ours.angles / theirs.angles
    if same(ratio, np.full_like(ratio, ratio[0])) and not math.isclose(ratio[0], 1, rel_tol=TOLERANCE):
        yield f"rotary scaling: positions count {ratio[0]:.4g} times as much in ours"
    if not same(ours.angles, theirs.angles):
        yield "rotary scaling: some wavelengths are stretched on one side only, as llama3 does"


def of_scores(kind: str, step: Step) -> Iterator[str]:
    """Mistakes of masks, of scaling and of which key head a query head reads."""
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
    capped = next((cap for cap in caps(ours, theirs)), None)
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


def caps(ours: Array, theirs: Array) -> Iterator[tuple[str, float]]:
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


def of_weights(kind: str, step: Step) -> Iterator[str]:
    """Mistakes of the softmax."""
    for side, weights in (("ours", step.ours), ("PyTorch", step.theirs)):
        if not same(weights.sum(-1), np.ones(weights.shape[:-1])):
            yield f"the softmax: weights of {side} do not add up to 1 over the keys"


def of_heads(kind: str, step: Step) -> Iterator[str]:
    """Mistakes of which value head a query head reads."""
    v_BSKH, weights_BNTS = step.input("attention.v"), step.input("attention.weights")
    N = weights_BNTS.shape[1]
    averages = {how: np.einsum("BNTS,BSNH->BTNH", weights_BNTS, v) for how, v in _groupings(v_BSKH, N)}
    yield from _between_groupings(step.ours, step.theirs, averages)
