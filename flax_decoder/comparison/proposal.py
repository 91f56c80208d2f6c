"""Proposes which tensor of a stranger's module is which of our parameters: by names, numbers and shapes."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Rule
from flax_decoder.huggingface.names import EXAMPLE, Agreement, num_layers, ways_to_store
from flax_decoder.huggingface.weights import Shape, split

QUERY, KEY, VALUE, OUT = (f"layers/attention/{name}" for name in ("query", "key", "value", "out"))
GATE, UP, DOWN = (f"layers/feed_forward/{name}" for name in ("gate", "up", "down"))
# What fills one tensor, in the usual order.
FUSED = ((QUERY, KEY, VALUE), (KEY, VALUE), (GATE, UP))
# Other orders of the same, which only numbers can show.
REORDERED = (
    *((QUERY, VALUE, KEY), (KEY, QUERY, VALUE), (KEY, VALUE, QUERY), (VALUE, KEY, QUERY), (VALUE, QUERY, KEY)),
    *((VALUE, KEY), (UP, GATE)),
)
# Words that mean one thing wherever they stand: they count more than numbers, or two tensors whose numbers were swapped
# would be taken for two that have each other's name, and hide the mistake.
CLEAR = {
    QUERY: r"(w|to|lin|linear|fc)?_?(q|query|queries)(_?(w|proj|projection|linear|lin|layer))?",
    KEY: r"(w|to|lin|linear|fc)?_?(k|key|keys)(_?(w|proj|projection|linear|lin|layer))?",
    VALUE: r"(w|to|lin|linear|fc)?_?(v|val|value|values)(_?(w|proj|projection|linear|lin|layer))?",
    GATE: r"(w_?)?gate(_?proj)?",
    "layers/attention/query_norm": r"(q|query)_?(norm|ln)|(norm|ln)_?q",
    "layers/attention/key_norm": r"(k|key)_?(norm|ln)|(norm|ln)_?k",
    "positions": r".*pos.*|wpe",
    "head": r".*head|unembed.*|generator",
}
# Words that most use so, and that numbers overrule.
USUAL = {
    OUT: r".*(out|output|proj|wo|o_proj|dense|projection|unify_?heads|o|fc_o|w_o)",
    GATE: r"w1",
    UP: r"(c_)?fc_?1?|up(_proj)?|w_?[13]|lin(ear)?_?1|dense_h_to_4h|expand|intermediate|.*in|0",
    DOWN: r"(c_)?proj|fc_?2|down(_proj)?|w_?2|lin(ear)?_?2|dense_4h_to_h|contract|.*out(put)?|[1-9]",
    "layers/attention_norm": r".+(1|_a|att|attn|attention|input|sa|mha)|(attn|attention|input|sa)_?.*",
    "layers/feed_forward_norm": r".+(2|_b|ff|ffn|ffwd|mlp|feed_forward)|(ff|ffn|mlp|post|feed)_?.*",
    "final_norm": r".*(norm|ln|layernorm).*",
    "embedding": r".*(emb|embed|embedding|embeddings|wte|tok|token|tokens|embed_tokens).*",
    "head": r".*(out|output|proj|projection|logits|decoder|vocab|final|classifier|fc|linear|lm).*",
}
_ATTENTION, _FEED_FORWARD = r"at+n|attention|mha|(^|[._])sa([._]|$)", r"mlp|ff|feed|ffn"


@dataclass(frozen=True)
class Pattern:
    """Tensors of a module that are alike in every layer.

    Attributes:
        name: with {} for the layer; without, it is one tensor.
        shape: of each.
        transposed: whether it is (out, in); None if its module does not tell.
    """

    name: str
    shape: Shape
    transposed: bool | None

    @property
    def in_layer(self) -> bool:
        """Whether there is one per layer."""
        return "{}" in self.name

    @property
    def is_bias(self) -> bool:
        """Whether its name says that it is a bias."""
        return re.search(r"(^|[._])(bias|beta|b)$", self.name) is not None

    @property
    def words(self) -> list[str]:
        """The parts of its name from the last, in snake case, without what says that it is a weight."""
        parts = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower() for part in self.name.split(".")]
        if len(parts) > 1 and parts[-1] in ("weight", "bias", "gamma", "beta", "scale", "g", "b", "kernel", "w"):
            parts.pop()
        stripped = [re.sub(r"_(weights?|bias|kernel)$", "", part) for part in reversed(parts)]
        return [part for part in stripped if part != "{}"]


def patterns_of(
    shapes: Mapping[str, Shape], layers: int, transposed: Callable[[str], bool | None] = lambda name: None
) -> dict[str, Pattern]:
    """The tensors of a module by pattern.

    The number of the layer is the first number in a name before which the same text stands with 0 to L - 1, and no
    others. `transposed` says whether a tensor is stored as (out, in); None if unknown.
    """
    numbers: dict[str, set[int]] = {}
    for name in shapes:
        for found in re.finditer(r"\d+", name):
            numbers.setdefault(name[: found.start()], set()).add(int(found[0]))
    result = {}
    for name, shape in shapes.items():
        pattern = name
        for found in re.finditer(r"\d+", name):
            before, after = name[: found.start()], name[found.end() :]
            others = {shapes.get(f"{before}{number}{after}") for number in range(layers)}
            if numbers[before] == set(range(layers)) and others == {shape}:
                pattern = f"{before}{{}}{after}"
                break
        result[pattern] = Pattern(pattern, tuple(shape), transposed(name))
    return result


class Proposal:
    """Finds the parameters of each pattern, the surest first; see `propose_names`."""

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        shapes: Mapping[str, Shape],
        agreement: Agreement,
        source: str,
    ) -> None:
        self.patterns, self.shapes, self.agreement, self.source = dict(patterns), shapes, agreement, source
        self.names: dict[str, list[str]] = {}

    @property
    def free(self) -> set[str]:
        """Our parameters that have no tensor yet."""
        return self.shapes.keys() - {path for paths in self.names.values() for path in paths}

    def candidates(self, pattern: Pattern, *, reordered: bool = False) -> list[tuple[str, ...]]:
        """What a tensor may hold, by its shape, of what is free."""
        free = self.free
        found: list[tuple[str, ...]] = [(path,) for path in self.shapes if path in free]
        groups = (*FUSED, *REORDERED) if reordered else FUSED
        found += [tuple(f"{module}/{leaf}" for module in group) for group in groups for leaf in ("kernel", "bias")]
        return [paths for paths in found if set(paths) <= free and self._may_hold(pattern, paths)]

    def take(self, pattern: Pattern, paths: tuple[str, ...]) -> None:
        """Settles a pattern."""
        self.names[pattern.name] = list(paths)

    def open(self) -> list[Pattern]:
        """The patterns that are not settled."""
        return [pattern for name, pattern in self.patterns.items() if name not in self.names]

    def by_words(self, table: Mapping[str, str]) -> None:
        """Settles patterns that alone have the words of what they may hold."""
        claims: dict[tuple[str, ...], list[Pattern]] = {}
        for pattern in self.open():
            named = [paths for paths in self.candidates(pattern) if _is_named(pattern, paths, table)]
            for paths in named if len(named) == 1 else []:
                claims.setdefault(paths, []).append(pattern)
        for paths, patterns in claims.items():
            if len(patterns) == 1 and set(paths) <= self.free:
                self.take(patterns[0], paths)

    def by_numbers(self) -> None:
        """Settles patterns most of whose numbers are those of one choice only."""
        claims: dict[str, list[tuple[Pattern, tuple[str, ...]]]] = {}
        for pattern in self.open():
            scores = {paths: self._score(pattern, paths) for paths in self.candidates(pattern, reordered=True)}
            best = [paths for paths, score in scores.items() if score == max(scores.values()) and score > 0.5]
            if len(best) == 1:
                claims.setdefault(best[0][0], []).append((pattern, best[0]))
        for claimants in claims.values():
            if len(claimants) == 1 and set(claimants[0][1]) <= self.free:
                self.take(*claimants[0])

    def by_elimination(self) -> None:
        """Settles patterns for which one choice is left, that no other pattern could take."""
        while True:
            choices = {pattern.name: self.candidates(pattern) for pattern in self.open()}
            sure = [
                (name, found[0])
                for name, found in choices.items()
                if len(found) == 1 and not any(set(found[0]) & set(p) for o in choices if o != name for p in choices[o])
            ]
            if not sure:
                return
            self.take(self.patterns[sure[0][0]], sure[0][1])

    def by_siblings(self) -> None:
        """Settles biases: each belongs to the weight beside it."""
        for pattern in self.open():
            weight = re.sub(r"(bias|beta|b)$", "", pattern.name)
            for name, paths in list(self.names.items()):
                if pattern.is_bias and re.sub(r"(weight|gamma|scale|w|g)$", "", name) == weight != name:
                    biases = tuple("head_bias" if p == "head" else f"{p.rpartition('/')[0]}/bias" for p in paths)
                    if set(biases) <= self.free and self._may_hold(pattern, biases):
                        self.take(pattern, biases)

    def refuse_ambiguous(self) -> None:
        """Raises UserError if a matrix fits several of ours, or the reverse."""
        for pattern in self.open():
            found = self.candidates(pattern)
            if len(pattern.shape) > 1 and found:
                others = [other.name for other in self.open() if set(self.candidates(other)) & set(found)]
                ours = " or ".join(" + ".join(paths) for paths in found[:4])
                raise UserError(
                    f"{self.source}: {' and '.join(others[:4])} could be {ours}: neither names nor numbers tell\n"
                    f"give a map of names, theirs = ours, such as {EXAMPLE}"
                )

    def _may_hold(self, pattern: Pattern, paths: tuple[str, ...]) -> bool:
        if pattern.in_layer != paths[0].startswith("layers/"):
            return False
        is_vector = len(pattern.shape) == 1
        if is_vector != paths[0].endswith(("bias", "scale")):
            return False
        if is_vector and pattern.is_bias != paths[0].endswith("bias"):
            return False
        return bool(self._ways(pattern, paths))

    def _ways(self, pattern: Pattern, paths: tuple[str, ...]) -> list[Rule]:
        return ways_to_store(pattern.name, paths, self.shapes, pattern.shape, pattern.transposed)

    def _score(self, pattern: Pattern, paths: tuple[str, ...]) -> float:
        return max(map(self.agreement, self._ways(pattern, paths)))


def propose_names(
    patterns: Mapping[str, Pattern],
    shapes: Mapping[str, Shape],
    agreement: Agreement,
    source: str,
) -> dict[str, list[str]]:
    """A map of names, as `family_of_names` takes it.

    Names that say query, key or value settle a tensor first; then numbers, where most of a tensor equals one parameter
    of ours and no other; then the usual words, and what is left over. The order of tensors decides nothing.

    Raises:
        UserError: a matrix could be several of ours.
    """
    proposal = Proposal(patterns, shapes, agreement, source)
    proposal.by_words(CLEAR)
    proposal.by_numbers()
    for _ in range(2):  # what is settled may leave one choice elsewhere
        proposal.by_words(USUAL)
        proposal.by_siblings()
        proposal.by_elimination()
    proposal.refuse_ambiguous()
    return proposal.names


def agreement_of(theirs: Callable[[str], np.ndarray], ours: Mapping[str, np.ndarray]) -> Agreement:
    """How much of the tensors of a rule, by name, equals our parameters, by path: see `Agreement`.

    In the first and the last layer.
    """

    def agreement(rule: Rule) -> float:
        in_layer = "{}" in rule.tensor
        last = num_layers({path: leaf.shape for path, leaf in ours.items()}) - 1
        parts = [_equal_parts(rule, theirs, ours, layer) for layer in ({0, last} if in_layer else [None])]
        return float(np.mean([part for layer in parts for part in layer]))

    return agreement


def _equal_parts(
    rule: Rule, theirs: Callable[[str], np.ndarray], ours: Mapping[str, np.ndarray], layer: int | None
) -> Iterator[float]:
    wanted = [ours[path] if layer is None else ours[path][layer] for path in rule.paths]
    tensor = theirs(rule.tensor.replace("{}", str(layer)))
    matrix = tensor.reshape(tensor.shape[-2:] if wanted[0].ndim > 1 or tensor.ndim > 1 else (-1,))
    for one, other in zip(split(rule, matrix, [leaf.shape for leaf in wanted]), wanted, strict=True):
        yield float(np.mean(np.abs(one - other) <= 1e-6 * np.abs(other)))


def _is_named(pattern: Pattern, paths: tuple[str, ...], table: Mapping[str, str]) -> bool:
    """Whether the name of a pattern has the words of what it may hold; those of a fused tensor are its shape."""
    if len(paths) > 1:
        return table is USUAL
    module = re.sub(r"/(kernel|scale|bias)$", "", paths[0]).replace("head_bias", "head")
    words = pattern.words or [""]
    if module not in table or re.fullmatch(table[module], words[0]) is None:
        return False
    # An attention and a feed-forward have a projection each, often by the same name.
    elsewhere = {"layers/attention/": _FEED_FORWARD, "layers/feed_forward/": _ATTENTION}
    other = next((regex for start, regex in elsewhere.items() if module.startswith(start)), "(?!)")
    return re.search(other, ".".join(reversed(words[1:]))) is None
