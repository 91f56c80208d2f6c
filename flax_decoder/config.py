"""What a run is: every setting, frozen, typed, and checked against the others before anything is computed."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_RULES = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

# Marks a field, or a whole section, that may change when a run is resumed: the losses of its steps do not depend on it.
MAY_CHANGE = "may change on resume"
# Marks a field that is a path, or several: in a file and on the command line, `~` at its start is the home folder. A
# shell leaves that of --run.folder=~/texts to the program.
IS_PATH = "is a path"
# Marks a field of the model that weights do not depend on: a run that starts from others' may set it anew.
NOT_IN_WEIGHTS = "weights do not depend on it"


@dataclasses.dataclass(frozen=True)
class UsedWhere:
    """Marks a field that nothing depends on, and that may change on resume, unless its section passes the test."""

    test: Callable[[Any], bool]


_WITH_ROTARY = UsedWhere(lambda model: model.positions == "rotary")
_WITH_ROTARY_SCALING = UsedWhere(lambda model: model.rotary_scaling not in ("none", "longrope"))
_WITH_LONGROPE = UsedWhere(lambda model: model.rotary_scaling == "longrope")
_WITH_MAGNITUDE = UsedWhere(lambda model: model.rotary_scaling in ("yarn", "longrope"))
_WITH_ORIGINAL_CONTEXT = UsedWhere(
    lambda model: model.rotary_scaling not in ("none", "linear") or model.rotary_query_scaling > 0
)
_WITH_QK_NORM = UsedWhere(lambda model: model.qk_norm != "none")
_WITH_YARN = UsedWhere(lambda model: model.rotary_scaling == "yarn")
_WITH_SCALING_BY_TURNS = UsedWhere(lambda model: model.rotary_scaling in ("llama3", "yarn"))
_WITH_BPE = UsedWhere(lambda data: data.tokenizer == "bpe")
_WITHOUT_VALIDATION_PATH = UsedWhere(lambda data: data.validation_path is None)
_WITH_MUON = UsedWhere(lambda optimizer: optimizer.name == "muon")
_WITH_WSD = UsedWhere(lambda optimizer: optimizer.schedule == "wsd")
_WITH_WEIGHT_DECAY = UsedWhere(lambda optimizer: optimizer.weight_decay > 0)
_WITH_LORA = UsedWhere(lambda lora: lora.rank is not None)
_WITH_A_FALL = UsedWhere(lambda optimizer: optimizer.schedule != "constant")

# A log line has numbers of each source; each block of 1,000 rows has at least one of each.
MAX_SOURCES, MIN_WEIGHT = 64, 0.001

# Bounds far beyond sensible values, for what a device cannot compute: float32 rounds 1 - 1e-8 to 1 and 1e-50 to 0, the
# square of 1e30 is infinite, and counts are int32.
Fraction = Annotated[float, Field(ge=0, le=0.999999)]
Positive = Annotated[float, Field(ge=1e-15, le=1e15)]
NonNegative = Annotated[float, Field(ge=0, le=1e15)]
Epsilon = Annotated[float, Field(ge=1e-15, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Width = Annotated[int, Field(gt=0, le=2**24)]


def _is_not_zero(count: int) -> int:
    if count == 0:
        raise ValueError("0 is no number of devices; leave it out, or give -1 for all that are left")
    return count


def _is_off_or_over_one(factor: float) -> float:
    if 0 < factor <= 1:
        raise ValueError(f"{factor} would take every second loss for a spike; give 0 (off) or more than 1")
    return factor


def _is_start_and_count(text: str) -> str:
    start, _, count = text.partition(":")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (start, count)) or int(count) == 0:
        raise ValueError(f"{text!r} is not START:STEPS, such as 100:5 for 5 steps after step 100")
    return text


def _as_tuple(value: Any) -> Any:
    """TOML knows lists only; a frozen, hashable config wants tuples."""
    return tuple(value) if isinstance(value, list) else value


def _as_steps(value: Any) -> Any:
    """One step needs no brackets, which a shell takes for a pattern."""
    return (value,) if type(value) is int else _as_tuple(value)


# The matrices of a layer, by the names of `nn/attention.py` and `nn/feed_forward.py`.
Targets = Annotated[tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...], Field(min_length=1)]
# By what each rotated pair is stretched.
Factors = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]
# A number of devices, or -1 for all that the other mesh axes leave.
NumDevices = Annotated[int, Field(ge=-1), AfterValidator(_is_not_zero)]


class LayerKind(NamedTuple):
    """What may differ from layer to layer."""

    window: int | None = None  # how many positions a query sees, its own included; None is all up to its own
    rotates: bool = True  # queries and keys turn with their positions, where these are rotary


PLAIN_LAYER = LayerKind()


class Adapter(NamedTuple):
    """How the low-rank adapters of a call count; see `nn/lora.py`."""

    scale: float  # factor of what an adapter adds
    dropout: float = 0.0  # probability of zeroing a number of its input


class _Shown:
    """Shows as the call that makes it, with what differs from the defaults."""

    def __repr__(self) -> str:
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]
        values = ((field, getattr(self, field.name)) for field in fields)
        defaults = _fields(type(self))
        changed = [f"{field.name}={value!r}" for field, value in values if value != defaults[field.name].default]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True, config=_RULES, repr=False)
class ModelConfig(_Shown):
    """The network. The letters are those of the array names: `q_BTNH` is [batch, position, head, head width]."""

    vocab_size: Width | None = None
    """V, number of tokens; left out, that of the tokenizer"""
    context_length: Annotated[Count, NOT_IN_WEIGHTS] = 64
    """T, the longest sequence the model is trained on, in tokens"""
    num_layers: Annotated[int, Field(gt=0, le=10_000)] = 4
    """L, number of blocks"""
    embed_dim: Width = 128
    """D, width of the residual stream"""
    num_heads: Width = 4
    """N, number of query heads"""
    num_kv_heads: Width | None = None
    """K, number of key/value heads: N (left out) is multi-head, 1 multi-query, between them grouped-query attention"""
    head_dim: Width | None = None
    """H, width of one head; left out, D / N"""
    mlp_dim: Width | None = None
    """F, width of the feed-forward layer; left out, 4 D"""
    feed_forward: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu", "geglu", "geglu_tanh"] = "gelu"
    """between the two feed-forward matrices; `gelu` is the exact one (erf); the GLUs have a third matrix, the gate"""
    dropout: Annotated[Fraction, NOT_IN_WEIGHTS] = 0.0
    """probability of zeroing, in training: embeddings, attention weights, outputs of a block's two parts"""

    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"
    """how the model knows the order of its tokens"""
    rotary_base: Annotated[float, Field(gt=1, le=1e15), _WITH_ROTARY] = 10_000.0
    """base of the rotary wavelengths (theta)"""
    rotary_window_base: Annotated[float, Field(gt=1, le=1e15)] | None = None
    """the base in layers that have a window, whose waves are then not stretched; left out, all layers are alike"""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """part of each head's width that is rotated"""
    rotary_layout: Annotated[Literal["half", "interleaved"], _WITH_ROTARY] = "half"
    """which numbers of the rotated part R turn as a pair: half: i and i + R/2; interleaved: 2 i and 2 i + 1"""
    rotary_pattern: Annotated[tuple[bool, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (True,)
    """which layers rotate, repeated over the stack: [true, true, true, false] leaves every fourth without positions"""
    rotary_scaling: Literal["none", "linear", "llama3", "yarn", "dynamic", "longrope"] = "none"
    """how rotary wavelengths are stretched to reach beyond the length of the first training; `dynamic` and `longrope`
    depend on how long a text is"""
    rotary_scaling_factor: Annotated[float, Field(ge=1, le=1e15), _WITH_ROTARY_SCALING] = 8.0
    """by how much they are stretched"""
    rotary_low_frequency_factor: Annotated[Positive, _WITH_SCALING_BY_TURNS] = 1.0
    """llama3, yarn: wavelengths over original context / this are stretched in full"""
    rotary_high_frequency_factor: Annotated[Positive, _WITH_SCALING_BY_TURNS] = 4.0
    """llama3, yarn: wavelengths under original context / this stay as they are; yarn's own value is 32"""
    rotary_original_context: Annotated[Count, _WITH_ORIGINAL_CONTEXT] = 8192
    """all but linear, and query scaling: the context length of the first training, in tokens"""
    rotary_short_factors: Annotated[Factors, _WITH_LONGROPE] = ()
    """longrope: by what each rotated pair is stretched in texts of up to the original context"""
    rotary_long_factors: Annotated[Factors, _WITH_LONGROPE] = ()
    """longrope: by what each is stretched in longer texts"""
    rotary_magnitude: Annotated[Positive, _WITH_MAGNITUDE] = 1.0
    """yarn, longrope: what is rotated is also multiplied by this, in queries and in keys; yarn's own value is
    0.1 ln(factor) + 1"""
    rotary_truncate: Annotated[bool, _WITH_YARN] = True
    """yarn: the pairs between which it blends are whole ones, rounded outwards; false: fractions of pairs count"""
    rotary_query_scaling: NonNegative = 0.0
    """queries are multiplied by 1 + this ln(1 + floor(position / original context)): scores of long texts stay sharp"""
    embed_scale: Positive = 1.0
    """token embeddings are multiplied by this"""
    embedding_norm: bool = False
    """token embeddings go through a norm, before positions are added"""

    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """how activations are normalised"""
    norm_epsilon: Epsilon = 1e-5
    """added to the variance before the square root"""
    norm_position: Literal["pre", "post", "both", "output"] = "pre"
    """pre: x + f(norm(x)); post: norm(x + f(x)); both: x + norm(f(norm(x))); output: x + norm(f(x))"""
    parallel_residual: bool = False
    """attention and feed-forward read the same input: x + attention(norm(x)) + feed_forward(norm(x))"""
    shared_norm: bool = False
    """with parallel_residual: they read the output of one norm; without, each has its own"""
    residual_scale: Positive = 1.0
    """what attention and feed-forward add to the residual stream is multiplied by this"""
    qk_norm: Literal["none", "head", "each_head", "all"] = "none"
    """normalises queries and keys: over the width of each head, with one scale for all or for each head one of its own,
    or over all heads at once"""
    qk_norm_kind: Annotated[Literal["rmsnorm", "layernorm"], _WITH_QK_NORM] = "rmsnorm"
    """how queries and keys are normalised"""
    qk_norm_bias: Annotated[bool, _WITH_QK_NORM] = False
    """LayerNorm of queries and keys also learns a shift"""
    qk_norm_position: Annotated[Literal["before", "after"], _WITH_QK_NORM] = "before"
    """queries and keys are normalised before they are rotated, or after"""

    qkv_clip: Positive | None = None
    """queries, keys and values are clipped to ± this, before they are normalised or rotated"""

    final_norm: bool = True
    """a norm between the last block and the head; post-norm models often have none"""

    norm_scale: bool = True
    """norms learn a factor for each number; false: they normalise, and learn nothing"""
    norm_bias: bool = False
    """LayerNorm also learns a shift"""
    attention_in_bias: bool = False
    """query, key and value projections have a bias"""
    attention_out_bias: bool = False
    """the attention output projection has a bias"""
    mlp_bias: bool = False
    """the feed-forward matrices have biases"""
    tied_head: bool = True
    """the head that makes logits is the embedding, transposed"""
    head_bias: bool = False
    """the head has a bias: one number for each token of the vocabulary"""

    window: Count | None = None
    """a position sees itself and the window - 1 positions before it; left out, all before it"""
    window_pattern: Annotated[tuple[bool, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (True,)
    """which layers have the window, repeated over the stack: [true, false] is every other layer"""
    attention_scale: Positive | None = None
    """scores are multiplied by this; left out, 1 / sqrt(H)"""
    attention_soft_cap: Positive | None = None
    """scores are squashed into ± this by tanh"""
    logit_scale: Positive = 1.0
    """logits are multiplied by this"""
    logit_soft_cap: Positive | None = None
    """logits are squashed into ± this by tanh"""

    init_stddev: Annotated[Positive, NOT_IN_WEIGHTS] = 0.02
    """standard deviation of the matrices at the start"""
    output_init: Annotated[Literal["scaled", "zero"], NOT_IN_WEIGHTS] = "scaled"
    """matrices that write into the residual stream start at init_stddev / sqrt(2 L), or at zero"""

    attention: Annotated[Literal["auto", "reference", "blockwise", "cudnn", "splash"], MAY_CHANGE, NOT_IN_WEIGHTS] = (
        "auto"
    )
    """the implementation of attention, all with the same numbers: reference is readable; auto is the fastest one"""
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], NOT_IN_WEIGHTS] = "float32"
    """what activations are computed in; params, norms, softmax and loss stay float32; float64 needs JAX_ENABLE_X64=1"""
    matmul_precision: Annotated[Literal["default", "highest"], NOT_IN_WEIGHTS] = "default"
    """digits of the factors of float32 products: default rounds them to TF32 on NVIDIA GPUs and to bfloat16 on TPUs,
    which is faster; highest keeps all; a CPU always does"""
    scan_layers: Annotated[bool, MAY_CHANGE, NOT_IN_WEIGHTS] = False
    """compiles one block and loops over it: compile time does not grow with depth, a step is slower on CPU"""
    remat: Annotated[Literal["none", "attention", "dots", "heads", "full"], MAY_CHANGE, NOT_IN_WEIGHTS] = "none"
    """what the backward pass computes again instead of keeping it: nothing; the scores of attention; all of a block but
    the outputs of its projections (dots), or but those of a fused kernel of attention (heads); or all of it, from its
    input alone, which takes a third more time (full)"""

    def with_vocab_size(self, vocab_size: int) -> Self:
        """The same model with V filled in where it was left out."""
        return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size)

    @property
    def kv_heads(self) -> int:
        """K, number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """H, width of one head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """F, width of the feed-forward layer."""
        return self.mlp_dim or 4 * self.embed_dim

    @property
    def normalises_before(self) -> bool:
        """Whether queries and keys are normalised before they are rotated."""
        return self.qk_norm != "none" and self.qk_norm_position == "before"

    @property
    def rotates_by_length(self) -> bool:
        """Whether the turn of a token depends on the length of its text, once that exceeds the original context."""
        return self.positions == "rotary" and self.rotary_scaling in ("dynamic", "longrope")

    @property
    def output_stddev(self) -> float:
        """Standard deviation, at the start, of the two matrices of each block that write into the residual stream.

        2 L such writes add up; dividing by sqrt(2 L) keeps the sum's size independent of depth (GPT-2).
        """
        return 0.0 if self.output_init == "zero" else self.init_stddev / math.sqrt(2 * self.num_layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens, None where a layer sees everything before it."""
        pattern = self.window_pattern
        return tuple(self.window if pattern[i % len(pattern)] else None for i in range(self.num_layers))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What is particular to each layer."""
        pattern = self.rotary_pattern
        return tuple(LayerKind(window, pattern[i % len(pattern)]) for i, window in enumerate(self.windows))

    def attention_obstacle(self, name: str) -> str | None:
        """Why an implementation of attention cannot compute this model without dropout; None if it can."""
        if name not in ("cudnn", "splash"):
            return None
        if self.positions == "alibi":
            return 'adds no bias to the scores, as positions = "alibi" does'
        if name == "splash":
            return None if self.dtype != "float64" else 'computes in float32 or bfloat16, not in dtype = "float64"'
        if self.dtype != "bfloat16":
            return f'computes in bfloat16, not in dtype = "{self.dtype}"'
        if self.attention_soft_cap is not None:
            return f"cannot squash scores, as attention_soft_cap = {self.attention_soft_cap} does"
        if self.head_width % 8 != 0 or self.head_width > 256:
            return f"knows heads whose width is a multiple of 8 up to 256, not head_dim = {self.head_width}"
        return None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        def refuse_if(wrong: bool, reason: str) -> None:
            if wrong:
                raise ValueError(reason)

        heads = self.num_heads
        refuse_if(
            self.head_dim is None and self.embed_dim % heads != 0,
            f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {heads}; change one, or give head_dim",
        )
        refuse_if(
            heads % self.kv_heads != 0, f"num_heads = {heads} is not a multiple of num_kv_heads = {self.kv_heads}"
        )
        rotary = self.positions == "rotary"
        rotated = int(self.head_width * self.rotary_fraction)
        refuse_if(
            rotary and (rotated < 2 or rotated % 2 != 0),
            f"rotary positions turn pairs of numbers, but head_dim = {self.head_width} times rotary_fraction = "
            f"{self.rotary_fraction} gives {rotated}, not an even number",
        )
        for name in ("rotary_short_factors", "rotary_long_factors") if self.rotary_scaling == "longrope" else ():
            refuse_if(
                len(getattr(self, name)) != rotated // 2,
                f"{name} has {len(getattr(self, name))} numbers, but {rotated // 2} pairs of a head are rotated",
            )
        refuse_if(
            self.rotary_scaling == "dynamic" and rotated <= 2,
            'rotary_scaling = "dynamic" stretches all pairs of a head but the first; here there is no other',
        )
        refuse_if(
            not rotary
            and (
                (self.rotary_scaling, self.rotary_fraction, self.rotary_pattern, self.rotary_query_scaling)
                != ("none", 1.0, (True,), 0.0)
            ),
            f'rotary settings need positions = "rotary", not "{self.positions}"',
        )
        refuse_if(
            self.rotary_window_base is not None and (not rotary or self.window is None),
            f"rotary_window_base = {self.rotary_window_base} needs rotary positions and a window",
        )
        refuse_if(
            self.rotary_low_frequency_factor >= self.rotary_high_frequency_factor,
            f"rotary_low_frequency_factor = {self.rotary_low_frequency_factor} must be under "
            f"rotary_high_frequency_factor = {self.rotary_high_frequency_factor}",
        )
        refuse_if(
            self.positions == "sinusoidal" and self.embed_dim % 2 != 0,
            f"sinusoidal positions come in pairs of sine and cosine, but embed_dim = {self.embed_dim} is odd",
        )
        no_shift = 'norm_bias = true needs norm = "layernorm": RMSNorm has no shift'
        refuse_if(self.norm == "rmsnorm" and self.norm_bias, no_shift)
        refuse_if(self.norm_bias and not self.norm_scale, "norm_bias = true needs norm_scale = true, or both false")
        refuse_if(
            self.qk_norm != "none" and self.qk_norm_bias and self.qk_norm_kind == "rmsnorm",
            'qk_norm_bias = true needs qk_norm_kind = "layernorm": RMSNorm has no shift',
        )
        refuse_if(
            self.qk_norm != "none" and self.qk_norm_bias and not self.norm_scale,
            "qk_norm_bias = true needs norm_scale = true, or both false",
        )
        refuse_if(
            self.parallel_residual and self.norm_position != "pre",
            f'parallel_residual = true needs norm_position = "pre", not "{self.norm_position}"',
        )
        refuse_if(
            self.qk_norm != "none" and self.qk_norm_position == "after" and not rotary,
            f'qk_norm_position = "after" needs positions = "rotary", not "{self.positions}"',
        )
        refuse_if(self.shared_norm and not self.parallel_residual, "shared_norm = true needs parallel_residual = true")
        refuse_if(
            self.window is None and self.window_pattern != (True,),
            "window_pattern says which layers have a window, but window is not set",
        )
        obstacle = self.attention_obstacle(self.attention)
        if self.dropout > 0 and self.attention not in ("auto", "reference"):
            obstacle = f"never holds the weights that dropout = {self.dropout} would zero"
        refuse_if(obstacle is not None, f'attention = "{self.attention}" {obstacle}; use attention = "auto"')
        return self


@dataclass(frozen=True, config=_RULES, repr=False)
class Source(_Shown):
    """One of the texts of a mixture."""

    path: Annotated[str | tuple[str, ...], BeforeValidator(_as_tuple)]
    """see `DataConfig`"""
    weight: Positive = 1.0
    """its part of all rows, beside the weights of the other sources"""


def _as_source(value: Any) -> Any:
    """TOML has a table."""
    if not isinstance(value, Mapping | Source):
        raise ValueError('a source is a table, such as {path = "books", weight = 1}')
    return value if isinstance(value, Source) else Source(**value)


@dataclass(frozen=True, config=_RULES, repr=False)
class DataConfig(_Shown):
    """The text, and how it becomes tokens."""

    # The text itself may not change.
    path: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_tuple), MAY_CHANGE, IS_PATH] = None
    """a file (.txt, .md, .jsonl, .parquet, .arrow; .gz and .zst of them; tokens in .bin or .npy), a folder of these, a
    glob, a list of these (.jsonl of conversations: these alone), or what `flax-decoder prepare` has written; left out:
    input.txt, else Python's help texts"""
    mixture: Annotated[
        tuple[Annotated[Source, BeforeValidator(_as_source)], ...] | None,
        BeforeValidator(_as_tuple),
        MAY_CHANGE,
        IS_PATH,
    ] = None
    """several texts in place of `path`: [{path = "books", weight = 3}, {path = "code", weight = 1}] takes three of four
    rows from the first, however long it is; the weights may not change on resume"""
    tokenizer: Annotated[str, IS_PATH] = "char"
    """char, byte, bpe (trained on the text), or the path of a tokenizer.json"""
    bpe_vocab_size: Annotated[int, Field(ge=257, le=2**24), _WITH_BPE] = 1024
    """number of tokens a bpe tokenizer is trained to have"""
    bpe_train_bytes: Annotated[int, Field(ge=1_000, lt=2**40), _WITH_BPE] = 50_000_000
    """bpe is trained on at most about this much of the training text, from all of its parts"""
    text_field: str = "text"
    """name of the text in lines of JSON and in tables"""
    document_separator: str | None = None
    """ends each document; left out, the tokenizer's end token, or a newline if it has none; "" is nothing"""
    document_mask: bool = False
    """a token sees its own document only, positions start anew in each, and no loss is asked across a border"""
    packing: bool = True
    """of conversations: several to a row, where they do not see each other; false: one a row, the rest is padding"""
    validation_path: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_tuple), IS_PATH] = None
    """texts for validation, as `path`; left out, the last documents of `path`"""
    validation_fraction: Annotated[float, Field(gt=0, lt=1), _WITHOUT_VALIDATION_PATH] = 0.1
    """the last part of all text that is kept for validation: whole documents, but one long text is cut"""

    @property
    def sources(self) -> tuple[tuple[Self, float], ...]:
        """The settings of each source, and its weight; the weights add up to 1. Without a mixture there is one."""
        if self.mixture is None:
            return ((self, 1.0),)
        total = sum(source.weight for source in self.mixture)
        return tuple(
            (dataclasses.replace(self, path=source.path, mixture=None), source.weight / total)
            for source in self.mixture
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mixture is None:
            return self
        count = len(self.mixture)
        for name in ("path", "validation_path"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} = {value!r} does not go with mixture, whose sources have theirs; give only one"
                )
        if not 2 <= count <= MAX_SOURCES:
            raise ValueError(f"mixture has {count} sources, but it takes 2 to {MAX_SOURCES}; path names a single one")
        for (_, weight), source in zip(self.sources, self.mixture, strict=True):
            if round(weight, 9) < MIN_WEIGHT:
                raise ValueError(
                    f"mixture: the weight {source.weight:g} of {source.path} is under a thousandth of all; raise it, "
                    "or leave the source out"
                )
        return self


@dataclass(frozen=True, config=_RULES, repr=False)
class OptimizerConfig(_Shown):
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention and feed-forward, AdamW for all else"""
    learning_rate: LearningRate = 1e-3
    """peak learning rate of AdamW"""
    muon_learning_rate: Annotated[LearningRate, _WITH_MUON] = 0.02
    """peak learning rate of Muon; it follows the same schedule"""
    muon_momentum: Annotated[Fraction, _WITH_MUON] = 0.95
    """decay of Muon's momentum"""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """learning rate after the warm-up; wsd (warm-up, stable, decay) stays at the peak, then falls in a line"""
    warmup_steps: CountOrZero | None = None
    """steps in which the learning rate rises from 0; left out, or not under num_steps, a twentieth of all steps"""
    decay_fraction: Annotated[float, Field(gt=0, le=1), _WITH_WSD] = 0.2
    """wsd: the last part of all steps, in which the rate falls"""
    final_fraction: Annotated[float, Field(ge=0, le=1), _WITH_A_FALL] = 0.1
    """learning rate at the last step, as a fraction of the peak"""
    restarts: Annotated[tuple[Count, ...], BeforeValidator(_as_steps), MAY_CHANGE, _WITH_A_FALL] = ()
    """steps at which the schedule begins anew: 2000, or [2000, 3000], gives steps that a finished run goes on with a
    warm-up and a fall of their own"""
    beta1: Fraction = 0.9
    """decay of AdamW's mean of gradients"""
    beta2: Fraction = 0.99
    """decay of AdamW's mean of squared gradients"""
    epsilon: Epsilon = 1e-8
    """added to the root in AdamW's denominator"""
    weight_decay: NonNegative = 0.1
    """decoupled weight decay, times the learning rate"""
    decay: Annotated[Literal["matrices", "all"], _WITH_WEIGHT_DECAY] = "matrices"
    """what decays: matrices and embeddings only, or biases and norms too"""
    clip_norm: NonNegative = 1.0
    """gradients with a larger global norm are scaled down to this norm; 0 is off"""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of AdamW's two moments and Muon's momentum; bfloat16, rounded at random, takes half the memory"""
    ema_decay: Fraction = 0.0
    """the run's model is a running mean of the weights, to which each step adds 1 - this of its own: evaluated, sampled
    and loaded in place of them; 0.99 to 0.9999; 0 is off"""


@dataclass(frozen=True, config=_RULES, repr=False)
class LoraConfig(_Shown):
    """Low-rank adapters: the weights that a run starts from stay as they are; two thin matrices beside each learn."""

    rank: Width | None = None
    """r, the width of an adapter: y = x W + (alpha / r) (x A) B, where W does not learn; left out, all weights learn"""
    alpha: Annotated[Positive, _WITH_LORA] = 16.0
    """what the adapters add is multiplied by alpha / rank"""
    rank_stabilised: Annotated[bool, _WITH_LORA] = False
    """multiply by alpha / sqrt(rank) instead, so that the rank does not change how fast adapters learn (rsLoRA)"""
    dropout: Annotated[Fraction, _WITH_LORA] = 0.0
    """probability of zeroing, in training, each number of the input of an adapter"""
    targets: Annotated[Targets | None, BeforeValidator(_as_tuple), _WITH_LORA] = None
    """which matrices of each layer have adapters, such as ["query", "value"]; left out, all that the model has"""

    @property
    def adapter(self) -> Adapter | None:
        """What a `Decoder` with these adapters is made with; None without any."""
        if self.rank is None:
            return None
        return Adapter(self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank), self.dropout)


@dataclass(frozen=True, config=_RULES, repr=False)
class TrainingConfig(_Shown):
    """How long to train, how much per step, and what is kept."""

    num_steps: Annotated[Count, MAY_CHANGE] = 2000
    """number of optimizer steps"""
    batch_size: Count = 12
    """B, sequences per step, over all devices"""
    accumulation_steps: Count = 1
    """the batch of a step is computed in this many parts, one after the other: less memory, the same result"""
    rows_per_device: Annotated[Count | None, MAY_CHANGE] = None
    """most sequences that a device computes at a time: accumulation_steps follow from it, whatever the number of
    devices; left out, they are as set"""
    eval_every: Annotated[Count, MAY_CHANGE] = 250
    """steps between evaluations"""
    eval_batches: Annotated[CountOrZero, MAY_CHANGE] = 0
    """batches an evaluation reads, evenly spaced, of each source of a mixture; 0 is the whole validation split"""
    patience: Annotated[CountOrZero, MAY_CHANGE] = 0
    """the run ends after this many evaluations in a row without a new lowest validation loss; 0 is off"""
    save_every: Annotated[Count, MAY_CHANGE] = 500
    """steps between checkpoints; the last step is always saved"""
    keep_newest: Annotated[Count, MAY_CHANGE] = 2
    """newest checkpoints to keep, beside the best one"""
    log_every: Annotated[Count, MAY_CHANGE] = 10
    """steps between lines in metrics.jsonl"""
    z_loss: NonNegative = 0.0
    """weight of log(Z)^2, which keeps the softmax's normaliser Z near 1 (PaLM uses 1e-4)"""
    nan: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """what follows a step whose loss or gradients are not finite, which never changes parameters: stop the run, or skip
    the batch"""
    skip_spikes: Annotated[NonNegative, AfterValidator(_is_off_or_over_one)] = 0.0
    """a batch whose loss is over this many times the running mean of losses is skipped; 0 is off"""
    skip_limit: Annotated[CountOrZero, MAY_CHANGE] = 10
    """most batches that may be skipped in all; one more ends the run"""
    loss_chunk_tokens: Annotated[CountOrZero | None, MAY_CHANGE] = None
    """a device computes the loss of this many tokens at a time, and holds no more logits: less memory, the same result;
    0: of all at once; left out: of as many as make 1 GiB"""
    sample_tokens: Annotated[CountOrZero, MAY_CHANGE] = 500
    """length of the text written after training, in tokens; 0 writes none"""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """on a GPU, compiles steps that give the same bits each time, which is slower; a CPU's always do"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of all randomness: weights, order of the text, dropout, sample"""

    def num_parts(self, num_devices: int) -> int:
        """In how many parts the batch of a step is computed if so many devices share its rows, which they divide."""
        if self.rows_per_device is None:
            return self.accumulation_steps
        rows = max(self.batch_size // num_devices, 1)
        return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= self.rows_per_device)


@dataclass(frozen=True, config=_RULES, repr=False)
class MeshConfig(_Shown):
    """How devices share the work: their number is the product of the four axes; one axis may be -1, the rest."""

    data: NumDevices | None = None
    """groups that each compute a part of the batch; left out, as many as the devices left and the batch allow"""
    fsdp: NumDevices = 1
    """like data, and parameters and optimizer state are split too: each device holds its part of them"""
    tensor: NumDevices = 1
    """parts of each matrix: attention heads, feed-forward width and vocabulary"""
    context: NumDevices = 1
    """parts of each sequence, for those that are too long for one device"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rest = [name for name, count in dataclasses.asdict(self).items() if count == -1]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are -1, but only one axis can be the rest of the devices")
        return self


@dataclass(frozen=True, config=_RULES, repr=False)
class DistributedConfig(_Shown):
    """The processes of a job that has more than one, if its launcher does not tell them of each other."""

    coordinator: str | None = None
    """HOST:PORT of the first process, the same for all; left out, the launcher says it, or there is only one"""
    num_processes: Count | None = None
    """how many processes there are; left out, the launcher says it"""
    process_id: CountOrZero | None = None
    """which of them this is, from 0; left out, the launcher says it"""
    heartbeat_seconds: Count = 100
    """a process that is silent for so long counts as dead, and the others end too"""
    join_seconds: Count = 300
    """how long to wait at the start until all processes are there"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator = {self.coordinator!r} must be HOST:PORT, such as node1:8476")
        if self.num_processes is not None and (self.process_id or 0) >= self.num_processes:
            raise ValueError(f"process_id = {self.process_id} must be under num_processes = {self.num_processes}")
        return self


@dataclass(frozen=True, config=_RULES, repr=False)
class LensConfig(_Shown):
    """What a run keeps of its attention while it learns: queries, keys and weights of one text."""

    every: CountOrZero = 100
    """steps between snapshots; 0 keeps none; doubled each time there are too many snapshots"""
    prompt: str | None = None
    """the text; left out, the first words of the validation split"""
    prompt_tokens: Annotated[int, Field(gt=0, le=256)] = 32
    """how many tokens of the text are recorded, at most context_length"""


@dataclass(frozen=True, config=_RULES, repr=False)
class RunConfig(_Shown):
    """Where a run is kept, and where its metrics go."""

    folder: Annotated[str | None, IS_PATH] = None
    """the folder of the run; left out, runs/<name of the config file>"""
    start_from: Annotated[str | None, IS_PATH] = None
    """a trained model to start from, with its settings, weights and tokenizer: a run folder, or one of Hugging Face"""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue where there is a checkpoint; never: refuse where there is one; must: refuse where there is none"""
    tensorboard: bool = False
    """also write TensorBoard events into the run folder (pip install "flax-decoder[tensorboard]")"""
    wandb: str | None = None
    """also send metrics to this Weights & Biases project (pip install "flax-decoder[wandb]")"""
    profile: Annotated[str, AfterValidator(_is_start_and_count)] | None = None
    """START:STEPS traces STEPS steps after step START, into profile/ of the run folder, for Perfetto or TensorBoard"""


@dataclass(frozen=True, config=_RULES, repr=False)
class Config(_Shown):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: Annotated[MeshConfig, MAY_CHANGE] = MeshConfig()
    distributed: Annotated[DistributedConfig, MAY_CHANGE] = DistributedConfig()
    lens: Annotated[LensConfig, MAY_CHANGE] = LensConfig()
    run: Annotated[RunConfig, MAY_CHANGE] = RunConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        batch, parts = self.training.batch_size, self.training.accumulation_steps
        if batch % parts != 0:
            raise ValueError(f"training.batch_size = {batch} is not a multiple of accumulation_steps = {parts}")
        if parts > 1 and self.training.rows_per_device is not None:
            raise ValueError(
                f"training.rows_per_device = {self.training.rows_per_device} says in how many parts a batch is "
                f"computed, and so does accumulation_steps = {parts}: leave one out"
            )
        length = self.model.context_length
        if batch * length >= 2**31:
            raise ValueError(
                f"training.batch_size = {batch} times model.context_length = {length} is {batch * length} tokens "
                f"per step, but the most is {2**31 - 1}"
            )
        optimizer, ends = self.optimizer, (0, *self.optimizer.restarts, self.training.num_steps)
        if any(end <= start for start, end in itertools.pairwise(ends)):
            raise ValueError(
                f"optimizer.restarts = {list(optimizer.restarts)} must rise and be under training.num_steps = "
                f"{self.training.num_steps}"
            )
        if self.lora.rank is not None and optimizer.name != "adamw":
            raise ValueError(f'optimizer.name = "{optimizer.name}" has no rule for adapters: lora.rank needs "adamw"')
        rates = {"learning_rate": optimizer.learning_rate}
        if optimizer.name == "muon":
            rates["muon_learning_rate"] = optimizer.muon_learning_rate
        for name, rate in rates.items():
            if rate * optimizer.weight_decay > 1:
                raise ValueError(
                    f"optimizer.{name} = {rate} times weight_decay = {optimizer.weight_decay} is more than 1, "
                    "but it is the part of each weight that a step takes away"
                )
        steps = profiled_steps(self.run)
        if steps and steps.stop > self.training.num_steps:
            raise ValueError(
                f"run.profile = {self.run.profile} is of steps up to {steps.stop}, but training.num_steps = "
                f"{self.training.num_steps}"
            )
        return self

    @model_validator(mode="after")
    def _with_a_warm_up_that_ends(self) -> Self:
        """Shortens a warm-up that is as long as the run, so that any config can be tried for a few steps."""
        steps, asked = self.training.num_steps, self.optimizer.warmup_steps
        warmup = warmup_within(asked, steps)
        if warmup != asked:
            warnings.warn(
                f"optimizer.warmup_steps = {asked} is not under training.num_steps = {steps}: "
                f"shortened to {warmup}, a twentieth of the steps",
                stacklevel=3,  # who makes the config
            )
            object.__setattr__(self, "optimizer", dataclasses.replace(self.optimizer, warmup_steps=warmup))
        return self


def profiled_steps(run: RunConfig) -> range:
    """The steps of `run.profile`, counted as steps completed before; empty if there are none."""
    start, count = (0, 0) if run.profile is None else map(int, run.profile.split(":"))
    return range(start, start + count)


def default_warmup_steps(num_steps: int) -> int:
    """The warm-up of a run that sets none: a twentieth of its steps."""
    return num_steps // 20


def warmup_within(warmup_steps: int | None, num_steps: int) -> int | None:
    """The warm-up of a run of `num_steps`: as set if it ends before the run does, else the default."""
    return warmup_steps if warmup_steps is None or warmup_steps < num_steps else default_warmup_steps(num_steps)


def _fields(section: Any) -> dict[str, Any]:
    fields: dict[str, Any] = section.__pydantic_fields__
    return fields


SECTIONS: dict[str, Any] = {name: field.annotation for name, field in _fields(Config).items()}


def fields_of(section: str) -> dict[str, Any]:
    """The fields of a config section by name, as pydantic describes them (annotation, default, description)."""
    return _fields(SECTIONS[section])


def fixed_fields() -> list[tuple[str, str]]:
    """Section and name of every field that, where it is used, must stay as it is when a run is resumed."""
    return [
        (section, name)
        for section, whole in _fields(Config).items()
        for name, field in fields_of(section).items()
        if MAY_CHANGE not in (*whole.metadata, *field.metadata)
    ]


def is_used(section: Any, name: str) -> bool:
    """Whether anything depends on a field of a section: muon_momentum counts for nothing if the optimizer is AdamW."""
    marks = [mark for mark in _fields(section)[name].metadata if isinstance(mark, UsedWhere)]
    return all(mark.test(section) for mark in marks)
