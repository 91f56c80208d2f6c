"""The same network in PyTorch: `flax_decoder.nn`, side by side, for those who know PyTorch.

Modules have the names of our parameters, and `TABLE` says which tensor is which. What no class of `transformers` can
express is compared with this; nothing is shared with our network but its config.
"""

import math
from typing import Any

import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from torch import nn
from torch.nn import functional as F  # noqa: N812

from flax_decoder.config import LayerKind, ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family, Rule, linear_rules, norm_rules
from flax_decoder.huggingface.weights import export_tensors, flatten, split, tensor_specs
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_NORMS = (
    *("attention_norm", "attention_output_norm", "feed_forward_norm", "feed_forward_output_norm"),
    *("attention/query_norm", "attention/key_norm"),
)
_PROJECTIONS = (
    *("attention/query", "attention/key", "attention/value", "attention/out"),
    *("feed_forward/gate", "feed_forward/up", "feed_forward/down"),
)


def _in_layers(path: str) -> str:
    """The module of each layer that has our name."""
    return f"layers.{{}}.{path.replace('/', '.')}"


TABLE = Family(
    model_type="flax_decoder",
    architecture="TorchDecoder",
    constants={},
    settings=(),
    rules=(
        Rule("embedding.weight", ("embedding",)),
        Rule("positions.weight", ("positions",)),
        *(rule for path in _NORMS for rule in norm_rules(_in_layers(path), f"layers/{path}")),
        *(rule for path in _PROJECTIONS for rule in linear_rules(_in_layers(path), path)),
        *norm_rules("embedding_norm", "embedding_norm"),
        *norm_rules("final_norm", "final_norm"),
        Rule("head.bias", ("head_bias",)),
    ),
    prefix="",
    head="head.weight",
)


class TorchDecoder(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size or 0, config.embed_dim)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context_length, config.embed_dim)
        if config.embedding_norm:
            self.embedding_norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
        self.final_norm = make_norm(config) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.embed_dim, config.vocab_size or 0, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens (B, T) to logits (B, T, V)."""
        x = self.embedding(tokens) * self.config.embed_scale
        x = self.embedding_norm(x) if self.config.embedding_norm else x
        if self.config.positions == "learned":
            x = x + self.positions(torch.arange(tokens.shape[1]))
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal(tokens.shape[1], self.config.embed_dim, x.dtype)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.final_norm(x)) * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.position, self.parallel = config.norm_position, config.parallel_residual
        self.has_shared_norm, self.scale = config.shared_norm, config.residual_scale
        self.attention, self.feed_forward = SelfAttention(config, kind), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        if self.position != "output":
            self.attention_norm = make_norm(config)
            if not config.shared_norm:
                self.feed_forward_norm = make_norm(config)
        if self.position in ("both", "output"):
            self.attention_output_norm, self.feed_forward_output_norm = make_norm(config), make_norm(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        if self.position == "post":
            x = self.attention_norm(x + self.written(self.attention(x)))
            return self.feed_forward_norm(x + self.written(self.feed_forward(x)))
        if self.position == "output":
            x = x + self.written(self.attention_output_norm(self.attention(x)))
            return x + self.written(self.feed_forward_output_norm(self.feed_forward(x)))
        if self.position == "both":
            x = x + self.written(self.attention_output_norm(self.attention(self.attention_norm(x))))
            return x + self.written(self.feed_forward_output_norm(self.feed_forward(self.feed_forward_norm(x))))
        normal = self.attention_norm(x)
        attended = x + self.written(self.attention(normal))
        if not self.has_shared_norm:
            normal = self.feed_forward_norm(x if self.parallel else attended)
        return attended + self.written(self.feed_forward(normal))

    def written(self, h: torch.Tensor) -> torch.Tensor:
        """What a part of the block adds to the residual stream."""
        return self.dropout(h * self.scale)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        D, N, K, H = config.embed_dim, config.num_heads, config.kv_heads, config.head_width
        self.query = nn.Linear(D, N * H, bias=config.attention_in_bias)
        self.key = nn.Linear(D, K * H, bias=config.attention_in_bias)
        self.value = nn.Linear(D, K * H, bias=config.attention_in_bias)
        self.out = nn.Linear(N * H, D, bias=config.attention_out_bias)
        self.dot_product = DotProductAttention(config, kind.window)
        if config.qk_norm != "none":
            self.query_norm, self.key_norm = make_qk_norm(config, N * H), make_qk_norm(config, K * H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.config.qkv_clip is not None:
            q, k, v = (y.clamp(-self.config.qkv_clip, self.config.qkv_clip) for y in (q, k, v))
        if self.config.qk_norm == "all" and self.config.qk_norm_position == "before":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.view(B, T, -1, self.config.head_width) for y in (q, k, v))
        before = self.config.qk_norm_position == "before"
        if self.config.qk_norm in ("head", "each_head") and before:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.positions == "rotary" and self.kind.rotates:
            frequencies = rotary_frequencies(self.config, self.kind.window, T)
            q, k = (rotate(y, frequencies, self.config.rotary_layout) for y in (q, k))
            is_stretched = self.kind.window is None or self.config.rotary_window_base is None
            if self.config.rotary_scaling in ("yarn", "longrope") and is_stretched:
                factors = torch.ones(self.config.head_width, dtype=q.dtype)
                factors[: 2 * len(frequencies)] = self.config.rotary_magnitude
                q, k = q * factors, k * factors
        if self.config.qk_norm in ("head", "each_head") and not before:
            q, k = self.query_norm(q), self.key_norm(k)
        elif self.config.qk_norm == "all" and not before:
            q, k = self.query_norm(q.flatten(2)).view_as(q), self.key_norm(k.flatten(2)).view_as(k)
        contexts = torch.arange(T).div(self.config.rotary_original_context, rounding_mode="floor").to(q.dtype)
        q = q * (1 + self.config.rotary_query_scaling * torch.log1p(contexts))[:, None, None]
        heads, _ = self.dot_product(q, k, v)
        return self.out(heads.reshape(B, T, -1))


class HeadNorm(nn.Module):
    """A norm over the width of each head (B, T, N, H), with a scale and perhaps a shift (N, H) for each."""

    def __init__(self, config: ModelConfig, num_heads: int) -> None:
        super().__init__()
        self.norm = F.rms_norm if config.qk_norm_kind == "rmsnorm" else F.layer_norm
        self.epsilon, shape = config.norm_epsilon, (num_heads, config.head_width)
        self.weight = nn.Parameter(torch.ones(shape)) if config.norm_scale else None
        self.bias = nn.Parameter(torch.zeros(shape)) if config.qk_norm_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, N, H) to (B, T, N, H)."""
        x = self.norm(x, x.shape[-1:], eps=self.epsilon)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


class DotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(H)) V: of queries (B, T, N, H), keys and values (B, T, K, H), the heads and the weights."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.config, self.window, self.dropout = config, window, nn.Dropout(config.dropout)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns heads (B, T, N, H) and weights (B, N, T, T)."""
        config, T = self.config, q.shape[1]
        # Neighbouring query heads share a key and a value.
        k, v = (y.repeat_interleave(config.num_heads // config.kv_heads, dim=2) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) * (config.attention_scale or config.head_width**-0.5)
        if config.attention_soft_cap is not None:
            scores = config.attention_soft_cap * torch.tanh(scores / config.attention_soft_cap)
        distance = torch.arange(T)[:, None] - torch.arange(T)[None]
        if config.positions == "alibi":
            scores = scores - alibi_slopes(config.num_heads, scores.dtype)[:, None, None] * distance
        unseen = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        weights = F.softmax(scores.masked_fill(unseen, -math.inf), dim=-1)
        return (self.dropout(weights) @ v).transpose(1, 2), weights


class FeedForward(nn.Module):
    """down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.feed_forward]
        self.has_gate = config.feed_forward in ("swiglu", "geglu", "geglu_tanh")
        self.up = nn.Linear(config.embed_dim, config.mlp_width, bias=config.mlp_bias)
        if self.has_gate:
            self.gate = nn.Linear(config.embed_dim, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.embed_dim, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        h = self.activation(self.gate(x)) * self.up(x) if self.has_gate else self.activation(self.up(x))
        return self.down(h)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of a residual stream."""
    return norm_of(config, config.norm, config.norm_bias, config.embed_dim)


def make_qk_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm of queries or keys, of this width in all heads."""
    if config.qk_norm == "each_head":
        return HeadNorm(config, width // config.head_width)
    own = config.head_width if config.qk_norm == "head" else width
    return norm_of(config, config.qk_norm_kind, config.qk_norm_bias, own)


def norm_of(config: ModelConfig, kind: str, bias: bool, width: int) -> nn.Module:
    """A norm over so many numbers."""
    settings: Any = {"eps": config.norm_epsilon, "elementwise_affine": config.norm_scale}
    return nn.RMSNorm(width, **settings) if kind == "rmsnorm" else nn.LayerNorm(width, bias=bias, **settings)


def sinusoidal(length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Fixed position vectors (T, D): a sine and a cosine of each wave beside each other (Vaswani et al. 2017)."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length)[:, None] * frequencies.to(dtype)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(length, width)


def rotary_frequencies(config: ModelConfig, window: int | None, length: int) -> torch.Tensor:
    """Radians per position of each rotated pair (Su et al. 2021), stretched as the config says."""
    width = int(config.head_width * config.rotary_fraction)
    exponents = -torch.arange(0, width, 2, dtype=torch.float64) / width
    if window is not None and config.rotary_window_base is not None:
        return config.rotary_window_base**exponents
    frequencies = config.rotary_base**exponents
    stretched = frequencies / config.rotary_scaling_factor
    if config.rotary_scaling == "linear":
        return stretched
    if config.rotary_scaling == "llama3":
        low, high = config.rotary_low_frequency_factor, config.rotary_high_frequency_factor
        kept = (config.rotary_original_context * frequencies / (2 * math.pi) - low) / (high - low)
        return torch.lerp(stretched, frequencies, kept.clamp(0, 1))
    if config.rotary_scaling == "yarn":
        low, high = (
            width
            * math.log(config.rotary_original_context / (2 * math.pi * turns))
            / (2 * math.log(config.rotary_base))
            for turns in (config.rotary_high_frequency_factor, config.rotary_low_frequency_factor)
        )
        if config.rotary_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / (high - low if high != low else 0.001)
        return torch.lerp(frequencies, stretched, ramp.clamp(0, 1))
    original = config.rotary_original_context
    if config.rotary_scaling == "longrope":
        factors = config.rotary_long_factors if length > original else config.rotary_short_factors
        return frequencies / torch.tensor(factors, dtype=torch.float64)
    if config.rotary_scaling == "dynamic" and length > original:
        growth = config.rotary_scaling_factor * (length / original - 1) + 1
        base: float = config.rotary_base * growth ** (width / (width - 2))
        return base**exponents
    return frequencies


def rotate(x: torch.Tensor, frequencies: torch.Tensor, layout: str) -> torch.Tensor:
    """Turns pairs of numbers of each head by position times frequency; x is (B, T, N, H).

    A pair is number i and number i + R / 2, or if interleaved number 2 i and number 2 i + 1.
    """
    angles = torch.arange(x.shape[1])[:, None, None] * frequencies.to(x.dtype)
    half = len(frequencies)
    if layout == "interleaved":
        pairs = torch.view_as_complex(x[..., : 2 * half].unflatten(-1, (half, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat([turned, x[..., 2 * half :]], dim=-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def alibi_slopes(num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """How much the scores of each head fall per position (Press et al. 2021)."""
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * n / below) for n in range(1, below + 1)]
    slopes += [2 ** (-4 * n / below) for n in range(1, 2 * below + 1, 2)]
    return torch.tensor(slopes[:num_heads], dtype=dtype)


def make_twin(config: ModelConfig, params: Any) -> TorchDecoder:
    """The PyTorch twin of a model, in float32, with its parameters.

    Args:
        config: the model; its `vocab_size` must be set.
        params: those of our `Decoder`, stacked.

    Raises:
        UserError: `params` are not those of this config.
    """
    module, leaves = TorchDecoder(config), flatten(params)
    specs = tensor_specs(TABLE, {path: leaf.shape for path, leaf in leaves.items()})
    tensors = (torch.from_numpy(np.array(tensor)) for tensor in export_tensors(specs, leaves))
    state = {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
    if config.tied_head:
        state["head.weight"] = state["embedding.weight"]
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the parameters are not those of this model: {error}") from None
    return module


def params_of_twin(module: TorchDecoder) -> Any:
    """The parameters of a twin, trained or not, as those of our `Decoder`: NumPy arrays, stacked."""
    leaves = flatten(abstract_params(Decoder(module.config)))
    state = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    arrays: dict[str, list[np.ndarray]] = {path: [] for path in leaves}
    for spec in tensor_specs(TABLE, {path: leaf.shape for path, leaf in leaves.items()}):
        for path, array in zip(spec.rule.paths, split(spec.rule, state[spec.name], spec.param_shapes), strict=True):
            arrays[path].append(array)
    stacked = {path: np.stack(parts) if path.startswith("layers/") else parts[0] for path, parts in arrays.items()}
    return unflatten_dict(stacked, sep="/")
