"""Known mistakes of a forward pass, each tried on the tensors around the first one that differs."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from flax_decoder.comparison.attention_causes import caps, of_heads, of_rotation, of_scores, of_weights
from flax_decoder.comparison.evidence import TOLERANCE, Array, Evidence, Step, same
from flax_decoder.nn.feed_forward import ACTIVATIONS, GATED


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
    for side, cap in caps(step.ours, step.theirs):
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
    **dict.fromkeys(("attention.q_rotated", "attention.k_rotated"), of_rotation),
    "attention.scores": of_scores,
    "attention.weights": of_weights,
    "attention.heads": of_heads,
    "feed_forward.hidden": _of_hidden,
    "residual": _of_residual,
    "logits": _of_logits,
}
