"""What is said of a model family: how it names its settings and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""Stands in place of a default: the config.json must say it."""


@dataclass(frozen=True)
class Setting:
    """A field of config.json that says one thing, or the same of several.

    Attributes:
        theirs: its name in config.json.
        ours: the fields of `ModelConfig` that it sets.
        default: what it is where config.json is silent.
        words: their word -> ours, where the two differ; the first of several is the one written.
        read: their number -> ours; raises ValueError with what is wrong.
        write: our number -> theirs.
    """

    theirs: str
    ours: tuple[str, ...]
    default: Any = REQUIRED
    words: Mapping[str, str] | None = None
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Rotary:
    """How config.json names rotary positions, before transformers 5 moved all of them into `rope_parameters`.

    Attributes:
        base: name of the base.
        default_base: the base where config.json is silent.
        fraction: name of the rotated part of the head width, where it can be other than 1.
        default_fraction: the part where config.json is silent.
        types: the kinds of stretching that transformers allows.
        window_base: name of the base in layers that have a window, where they have their own.
        default_window_base: that base where config.json is silent.
    """

    base: str = "rope_theta"
    default_base: float = 10_000.0
    fraction: str | None = None
    default_fraction: float = 1.0
    types: tuple[str, ...] = ("default", "linear", "llama3")
    window_base: str | None = None
    default_window_base: float = 10_000.0


@dataclass(frozen=True)
class Windows:
    """How config.json says which layers have a window.

    Attributes:
        layers: where there is no list `layer_types`: "all" layers have it, the "late" ones from max_window_layers on
            and only where use_sliding_window is set, or all but each `period`-th.
        default: the window in tokens where config.json is silent.
        period: see `layers`.
    """

    layers: Literal["all", "late", "periodic"]
    default: int | None = None
    period: int = 0


@dataclass(frozen=True)
class Rule:
    """One of their tensors, and which of our parameters are in it.

    Attributes:
        theirs: its name; {} is the number of the layer.
        ours: paths of our parameters, which lie side by side in the tensor.
        transposed: it is a PyTorch Linear's (out, in), where ours is (in, out).
        by_head: the parts take turns, one head of each after the other.
        offset: ours is theirs plus this.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
        model_type: its name in config.json.
        architecture: the class with a language model's head.
        always: fields of `ModelConfig` that no config.json of the family can change.
        settings: fields of config.json with a meaning of their own.
        rules: the tensors, without the prefix.
        prefix: what names begin with, except the head's.
        head: name of the head's tensor.
        tied: `tie_word_embeddings` where config.json is silent.
        rotary: names of rotary settings; None where positions are learned.
        windows: how layers get a window; None where they have none.
        fixed: fields of config.json for which the network can do nothing else than these values.
        without_meaning: fields of config.json that change no logit, beyond those of all families.
        extra_tensors: a regular expression of tensors, such as masks, that hold nothing learned.
        scales_embedding: token embeddings are multiplied by the root of the width.
        whole_heads: transformers refuses a width that is no multiple of the number of heads.
    """

    model_type: str
    architecture: str
    always: Mapping[str, Any]
    settings: tuple[Setting, ...]
    rules: tuple[Rule, ...]
    prefix: str = "model."
    head: str = "lm_head.weight"
    tied: bool = False
    rotary: Rotary | None = Rotary()
    windows: Windows | None = None
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without_meaning: frozenset[str] = frozenset()
    extra_tensors: str = r".*\.rotary_emb\.inv_freq"
    scales_embedding: bool = False
    whole_heads: bool = False

    @property
    def all_settings(self) -> tuple[Setting, ...]:
        """The settings, and the one that every family has."""
        return *self.settings, Setting("tie_word_embeddings", ("tied_head",), self.tied)

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules, and that of the head."""
        return *self.rules, Rule(self.head, ("head",), transposed=True)
