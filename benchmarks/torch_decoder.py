"""The PyTorch side of the training benchmarks: a decoder and its training step, written for speed in plain PyTorch.

Params are float32, products are in the dtype of the config; query, key and value are one product, gate and up another.
It supports the configs of the benchmarks: GPT-2 and Llama.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from flax_decoder.config import Config, ModelConfig


class Linear(nn.Linear):
    """A product in the dtype of its input, with float32 weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.ones(config.embed_dim))
        self.bias = nn.Parameter(torch.zeros(config.embed_dim)) if config.norm_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to the same shape and dtype."""
        width, epsilon = self.scale.shape, self.config.norm_epsilon
        if self.config.norm == "layernorm":
            return F.layer_norm(x.float(), width, self.scale, self.bias, epsilon).to(x.dtype)
        return F.rms_norm(x.float(), width, self.scale, epsilon).to(x.dtype)


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, H, F_ = config.embed_dim, config.head_width, config.mlp_width
        self.num_up = 2 if config.feed_forward == "swiglu" else 1
        self.attention_norm, self.feed_forward_norm = Norm(config), Norm(config)
        self.qkv = Linear(D, (config.num_heads + 2 * config.kv_heads) * H, bias=config.attention_in_bias)
        self.out = Linear(config.num_heads * H, D, bias=config.attention_out_bias)
        self.up = Linear(D, self.num_up * F_, bias=config.mlp_bias)
        self.down = Linear(F_, D, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor, waves: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D); `waves` are the cosines and sines of rotary positions."""
        (B, T, _), N, K = x.shape, self.config.num_heads, self.config.kv_heads
        heads = self.qkv(self.attention_norm(x)).view(B, T, N + 2 * K, -1).transpose(1, 2)
        q, k, v = heads.split((N, K, K), dim=1)
        if waves is not None:
            q, k = rotate(q, *waves), rotate(k, *waves)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K < N)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, -1))
        h = self.up(self.feed_forward_norm(x))
        if self.num_up == 2:
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate="tanh" if self.config.feed_forward == "gelu_tanh" else "none")
        return x + self.down(h)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates channels i and i + H/2 of each head together, in float32; x is (B, N, T, H)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Decoder(nn.Module):
    """The model and its loss, so that torch.compile sees both."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.dtype = config, getattr(torch, config.dtype)
        T, D, H = config.context_length, config.embed_dim, config.head_width
        self.embedding = nn.Parameter(0.02 * torch.randn(config.vocab_size, D))
        self.positions = nn.Parameter(0.02 * torch.randn(T, D)) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = Norm(config)
        if config.positions == "rotary":
            frequencies = config.rotary_base ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
            angles = torch.arange(T)[:, None] * frequencies
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps tokens and targets, both (B, T), to the mean loss in nats per token."""
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        if self.positions is not None:
            x = x + self.positions.to(self.dtype)
        waves = (self.cos, self.sin) if self.positions is None else None
        for block in self.blocks:
            x = block(x, waves)
        logits = F.linear(self.final_norm(x), self.embedding.to(self.dtype))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def copy_params(params: Any, model: Decoder) -> None:
    """Copies the params of a Flax model to the PyTorch model."""
    layers = params["layers"]
    attention, feed_forward = layers["attention"], layers["feed_forward"]
    config = model.config
    D = config.embed_dim

    def put(target: torch.Tensor, *arrays: Any) -> None:
        joined = np.concatenate([np.asarray(array) for array in arrays])
        assert joined.shape == tuple(target.shape), (joined.shape, target.shape)
        with torch.no_grad():
            target.copy_(torch.from_numpy(joined))

    def put_linear(target: nn.Linear, parts: list[Any], layer: int, width: int) -> None:
        put(target.weight, *(part["kernel"][layer].reshape(width, -1).T for part in parts))
        if target.bias is not None:
            put(target.bias, *(part["bias"][layer].reshape(-1) for part in parts))

    def put_norm(target: Norm, scale_and_bias: Any, layer: int | None = None) -> None:
        for name, array in scale_and_bias.items():
            put(getattr(target, name), array if layer is None else array[layer])

    put(model.embedding, params["embedding"])
    if model.positions is not None:
        put(model.positions, params["positions"])
    put_norm(model.final_norm, params["final_norm"])
    for layer, block in enumerate(model.blocks):
        put_linear(block.qkv, [attention[name] for name in ("query", "key", "value")], layer, D)
        put_linear(block.out, [attention["out"]], layer, config.num_heads * config.head_width)
        put_linear(block.up, [feed_forward[name] for name in ("gate", "up") if name in feed_forward], layer, D)
        put_linear(block.down, [feed_forward["down"]], layer, config.mlp_width)
        put_norm(block.attention_norm, layers["attention_norm"], layer)
        put_norm(block.feed_forward_norm, layers["feed_forward_norm"], layer)


def steps_of(
    config: Config, model: Decoder, batches: np.ndarray, attention: str, compiled: bool
) -> Callable[[], list[float]]:
    """A function that takes a step on each batch of (steps, B, T + 1) and returns the losses.

    Args:
        config: optimizer and clipping.
        model: on the device that computes.
        batches: on the host.
        attention: the name of an `SDPBackend`.
        compiled: whether to use torch.compile.
    """
    device = model.embedding.device
    forward = torch.compile(model) if compiled else model
    optimized = config.optimizer
    # Matrices decay, as in ours; norms and biases do not.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optimized.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optimized.beta1, optimized.beta2)
    optimizer = torch.optim.AdamW(groups, optimized.learning_rate, betas, optimized.epsilon, fused=True)

    def call() -> list[float]:
        tokens = torch.from_numpy(batches).to(device, torch.int64)
        losses = []
        for inputs, targets in zip(tokens[:, :, :-1].contiguous(), tokens[:, :, 1:].contiguous(), strict=True):
            with sdpa_kernel(getattr(SDPBackend, attention)):
                loss = forward(inputs, targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optimized.clip_norm)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()  # waits for the GPU

    return call
