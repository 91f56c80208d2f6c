"""The types of the tables in `families`: how a model family names its settings and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""The default of a setting that config.json must give."""


@dataclass(frozen=True)
class Setting:
    """A field of config.json.

    Attributes:
        name: the field.
        fields: the fields of `ModelConfig` that it sets.
        default: its value if config.json does not give it.
        values: its value -> ours, if they differ; of several that mean the same, the first is written.
        read: its number -> ours; raises ValueError with the reason.
        write: our number -> its.
        also: other names of the field, which transformers reads too.
    """

    name: str
    fields: tuple[str, ...]
    default: Any = REQUIRED
    values: Mapping[str, str] | None = None
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rotary:
    """How config.json names rotary settings, before transformers 5 moved them into `rope_parameters`.

    Attributes:
        base: name of the base.
        default_base: its default.
        fraction: name of the rotated fraction of the head width; None if it is always 1.
        default_fraction: its default.
        width: the family gives how many numbers of a head are rotated, by this name, and nothing else.
        default_width: its default.
        types: values of `rope_type` that transformers supports for the family.
        original_context: original_max_position_embeddings stands beside the rotary settings, with this default.
        window_base: name of the base in layers with a window; None if all layers share one.
        default_window_base: its default.
        by_kind: instead, version 5 has a table for layers with a window and one for those without; in older files the
            base in layers with a window is the default.
        scales_queries: the table must also hold `llama_4_scaling_beta`, by which queries grow with their position.
        has_alpha: rope_type "dynamic" with a number `alpha` multiplies the base by alpha^(H / (H - 2)).
        layers: which layers rotate: "all"; those that are 1 in `no_rope_layers`, without it all but every
            `no_rope_layer_interval`-th ("listed"); or, if any has a window, those ("windowed").
    """

    base: str = "rope_theta"
    default_base: float = 10_000.0
    fraction: str | None = None
    default_fraction: float = 1.0
    width: str | None = None
    default_width: int = 64
    types: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic")
    original_context: int | None = None
    window_base: str | None = None
    default_window_base: float = 10_000.0
    by_kind: bool = False
    scales_queries: bool = False
    has_alpha: bool = False
    layers: Literal["all", "listed", "windowed"] = "all"


@dataclass(frozen=True)
class Windows:
    """How config.json says which layers have a window.

    Attributes:
        layers: "all"; or those that `layer_types` names. Without it: "typed" is all; the "late" ones, from
            max_window_layers on, and only if use_sliding_window is true; "periodic" is all but every `period`-th.
            "listed" are those that GPT-Neo's attention_types calls local, with a window of `window_size`.
        default: default of the window, in tokens.
        period: default of `sliding_window_pattern`.
        writes_null: transformers takes null for a window that no layer has.
    """

    layers: Literal["all", "typed", "late", "periodic", "listed"]
    default: int | None = None
    period: int = 0
    writes_null: bool = False


@dataclass(frozen=True)
class Rule:
    """How parameters are stored in a tensor.

    Attributes:
        tensor: its name without the prefix; {} is the layer.
        paths: paths of the parameters, which are concatenated along their outputs.
        transposed: the tensor is (out, in), as in a PyTorch Linear; ours are (in, out).
        by_head: the parameters are interleaved: the tensor holds, for each key/value head, the query heads that share
            it, the key and the value.
        parts: the parameters are interleaved in so many equal parts.
        offset: ours is the tensor plus this.
        unused: how many rows the tensor has before ours, which no text reads; they are written as zeros.
    """

    tensor: str
    paths: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    parts: int = 1
    offset: float = 0.0
    unused: int = 0


@dataclass(frozen=True)
class Family:
    """A model type of transformers, or another source of models with tables of the same kind.

    Attributes:
        model_type: its name in config.json.
        architecture: its class with a language-model head.
        constants: fields of `ModelConfig` that are the same in all models of the family.
        settings: fields of config.json, each read on its own.
        rules: the tensors, except the head.
        prefix: prefix of all tensor names except the head's.
        head: tensor name of the head.
        head_bias: that of its bias; "" if none has one, or a rule names it.
        tied: default of `tie_word_embeddings`; None if there is no such setting, and all heads are the embedding.
        rotary: names of the rotary settings; None if positions are learned.
        windows: which layers have a window; None if none has.
        supported: fields of config.json of which the network supports only these values; the first is the default.
        ignored: fields of config.json that change no logit, beyond `fields.NO_BEARING`.
        ignored_tensors: regular expression of tensors, such as masks, that are not learned.
        scales_embedding: token embeddings are multiplied by sqrt(embed_dim).
        divides_width: transformers requires embed_dim to be a multiple of num_heads.
        fills_width: transformers requires embed_dim to be num_heads times head_dim.
        tables: fields of config.json that are objects; the tables here name what is in them as `table.field`.
        modules: the model type whose modules its class in transformers has; None if they are named as the tensors are.
        has_own_attention: its class in transformers computes attention by itself, where the ledger cannot look.
    """

    model_type: str
    architecture: str
    constants: Mapping[str, Any]
    settings: tuple[Setting, ...]
    rules: tuple[Rule, ...]
    prefix: str = "model."
    head: str = "lm_head.weight"
    head_bias: str = "lm_head.bias"
    tied: bool | None = False
    rotary: Rotary | None = Rotary()
    windows: Windows | None = None
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_tensors: str = r".*\.rotary_emb\.inv_freq"
    scales_embedding: bool = False
    divides_width: bool = False
    fills_width: bool = False
    tables: tuple[str, ...] = ()
    modules: str | None = None
    has_own_attention: bool = False

    @property
    def all_settings(self) -> tuple[Setting, ...]:
        """The settings, and the one that every family of Hugging Face has."""
        tied = () if self.tied is None else (Setting("tie_word_embeddings", ("tied_head",), self.tied),)
        return *self.settings, *tied

    @property
    def names_read(self) -> frozenset[str]:
        """The fields of config.json that are settings, or supported with some values only."""
        settings = {name for setting in self.all_settings for name in (setting.name, *setting.also)}
        return frozenset(settings | self.supported.keys())

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules, and those of the head and its bias, unless they are among them or have no name."""
        rules = Rule(self.head, ("head",), transposed=True), Rule(self.head_bias, ("head_bias",))
        given = {path for rule in self.rules for path in rule.paths}
        return *self.rules, *(rule for rule in rules if rule.tensor and rule.paths[0] not in given)

    def full_name(self, tensor: str) -> str:
        """The name of a tensor with its prefix, which may be there already."""
        if tensor in (self.head, self.head_bias):
            return tensor
        return self.prefix + tensor.removeprefix(self.prefix)


def linear_rules(
    tensor: str, *modules: str, transposed: bool = True, by_head: bool = False, parts: int = 1
) -> tuple[Rule, ...]:
    """The rules of a Linear that holds some modules of a layer; it has a bias if they have."""
    kernels, biases = (tuple(f"layers/{module}/{leaf}" for module in modules) for leaf in ("kernel", "bias"))
    interleaved: dict[str, Any] = {"by_head": by_head, "parts": parts}
    return Rule(f"{tensor}.weight", kernels, transposed, **interleaved), Rule(f"{tensor}.bias", biases, **interleaved)


def norm_rules(tensor: str, path: str, offset: float = 0.0) -> tuple[Rule, ...]:
    """The rules of a norm, whose parameters are at a path; it has a bias if they have."""
    return Rule(f"{tensor}.weight", (f"{path}/scale",), offset=offset), Rule(f"{tensor}.bias", (f"{path}/bias",))
