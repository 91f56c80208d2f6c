"""GPT-2's architecture in PyTorch, twice: as small as PyTorch allows, and Hugging Face's."""

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel


class PlainBlock(torch.nn.Module):
    """A pre-norm block with PyTorch's fused attention, without biases."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = torch.nn.LayerNorm(width, bias=False)
        self.norm2 = torch.nn.LayerNorm(width, bias=False)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, 4 * width, bias=False)
        self.down = torch.nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        B, T, D = x.shape
        heads = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainModel(torch.nn.Module):
    """A decoder as small in code as PyTorch allows."""

    def __init__(self, vocab_size: int, num_layers: int, width: int, num_heads: int, context: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.positions = torch.nn.Embedding(context, width)
        self.blocks = torch.nn.ModuleList(PlainBlock(width, num_heads) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(width, bias=False)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens (B, T) to logits (B, T, V)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def make_model(name: str, vocab_size: int, shape: tuple[int, ...]) -> torch.nn.Module:
    """A model with random weights and no dropout.

    Args:
        name: "fused attention" or "GPT2LMHeadModel".
        vocab_size: V.
        shape: layers, width, heads, context, batch.
    """
    num_layers, width, num_heads, context, _ = shape
    if name == "fused attention":
        return PlainModel(vocab_size, num_layers, width, num_heads, context)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)
