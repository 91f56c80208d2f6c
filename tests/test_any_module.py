"""Any module of PyTorch, written as its users write it, is compared as the models of transformers are."""

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
# ruff: noqa: E402
import reference
from torch import nn

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.huggingface.weights import flatten

V, C, L, D, N = 31, 24, 2, 16, 4
SIZES = {"vocab_size": V, "context_length": C, "num_layers": L, "embed_dim": D, "num_heads": N}
BIASES = dict.fromkeys(("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias"), True)
PLAIN = {"tied_head": False, **BIASES, "embed_scale": math.sqrt(D)}


def sinusoids(length, width):
    """The table of nearly every tutorial, in whatever is the default dtype."""
    position = torch.arange(length).float().unsqueeze(1)
    waves = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2], table[:, 1::2] = torch.sin(position * waves), torch.cos(position * waves)
    return table


class PositionalEncoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("pe", sinusoids(C, D).unsqueeze(0))

    def forward(self, x):
        return x + self.pe[:, : x.size(1)]


class LearnedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_emb = nn.Embedding(C, D)

    def forward(self, x):
        return x + self.pos_emb(torch.arange(x.size(1), device=x.device))


class MultiHeadAttention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        if fused:
            self.qkv = nn.Linear(D, 3 * D)
        else:
            self.w_q, self.w_k, self.w_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.fused, self.w_o, self.drop = fused, nn.Linear(D, D), nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(C, C)))

    def project(self, x):
        return self.qkv(x).chunk(3, dim=-1) if self.fused else (self.w_q(x), self.w_k(x), self.w_v(x))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, N, D // N).transpose(1, 2) for y in self.project(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(D // N)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, -1e9)
        weights = self.drop(torch.softmax(scores, dim=-1))
        return self.w_o((weights @ v).transpose(1, 2).contiguous().view(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 4 * D), activation, nn.Linear(4 * D, D), nn.Dropout(0.1))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, fused, post, activation):
        super().__init__()
        self.attn, self.ff, self.post = MultiHeadAttention(fused), FeedForward(activation), post
        self.norm1, self.norm2, self.drop = nn.LayerNorm(D), nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, x):
        if self.post:
            x = self.norm1(x + self.drop(self.attn(x)))
            return self.norm2(x + self.drop(self.ff(x)))
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.ff(self.norm2(x)))


class Tutorial(nn.Module):
    """A decoder as tutorials have it."""

    def __init__(self, *, fused=False, post=False, head_bias=True, final_norm=True, learned=False, gelu=False):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.positions = LearnedPositions() if learned else PositionalEncoding()
        activation = nn.GELU() if gelu else nn.ReLU()
        self.blocks = nn.ModuleList([Block(fused, post, activation) for _ in range(L)])
        self.norm = nn.LayerNorm(D) if final_norm else nn.Identity()
        self.fc_out = nn.Linear(D, V, bias=head_bias)

    def forward(self, ids):
        x = self.positions(self.embed(ids) * math.sqrt(D))
        for block in self.blocks:
            x = block(x)
        return self.fc_out(self.norm(x))


def config_of(*, fused=False, post=False, head_bias=True, final_norm=True, learned=False, gelu=False, **changes):
    """Our model of the same."""
    settings = {"norm_position": "post" if post else "pre", "head_bias": head_bias, "final_norm": final_norm}
    settings |= {"positions": "learned" if learned else "sinusoidal", "feed_forward": "gelu" if gelu else "relu"}
    return ModelConfig(**SIZES | PLAIN | settings | changes)


NAMES = {
    "embed.weight": "embedding",
    "positions.pos_emb.weight": "positions",
    "blocks.{}.attn.qkv": ["layers/attention/query", "layers/attention/key", "layers/attention/value"],
    "blocks.{}.attn.w_q": "layers/attention/query",
    "blocks.{}.attn.w_k": "layers/attention/key",
    "blocks.{}.attn.w_v": "layers/attention/value",
    "blocks.{}.attn.w_o": "layers/attention/out",
    "blocks.{}.ff.net.0": "layers/feed_forward/up",
    "blocks.{}.ff.net.2": "layers/feed_forward/down",
    "blocks.{}.norm1": "layers/attention_norm",
    "blocks.{}.norm2": "layers/feed_forward_norm",
    "norm": "final_norm",
    "fc_out.weight": "head",
    "fc_out.bias": "head_bias",
}


def load(module, leaves):
    """Gives a module our numbers, written out by hand: a Linear of PyTorch is (out, in)."""
    state = module.state_dict()
    for name in state:
        if name.endswith(("pe", "mask")):
            continue
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        pattern = name.replace(f".{layer}.", ".{}.", 1)
        found = NAMES.get(pattern) or NAMES[pattern.rpartition(".")[0]]
        parts = []
        for path in [found] if isinstance(found, str) else found:
            kinds = [path, f"{path}/bias" if name.endswith("bias") else f"{path}/kernel", f"{path}/scale"]
            leaf = leaves[next(kind for kind in kinds if kind in leaves)]
            leaf = leaf[layer] if path.startswith("layers/") else leaf
            if name.endswith("bias"):
                parts.append(leaf.reshape(-1))
            elif leaf.ndim == 1 or path in ("embedding", "positions"):
                parts.append(leaf)
            else:
                parts.append((leaf.reshape(-1, D) if path.endswith("out") else leaf.reshape(leaf.shape[0], -1)).T)
        state[name] = torch.tensor(np.concatenate(parts))
    module.load_state_dict(state)
    return module


def sides(changes=None, **kinds):
    """Our model with random parameters, and a function that makes the module with the same."""
    model = fd.Decoder(config_of(**kinds, **changes or {}))
    params = reference.random_params(model)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return model, params, lambda: load(Tutorial(**kinds), leaves)


KINDS = ("fused", "post", "head_bias", "final_norm", "learned", "gelu")
ALL = [dict(zip(KINDS, values, strict=True)) for values in itertools.product((False, True), repeat=len(KINDS))]


def name_of(kinds):
    return "-".join(kind for kind, value in kinds.items() if value) or "none"


@pytest.mark.short("post-head_bias", "fused-final_norm-learned-gelu")
@pytest.mark.parametrize("kinds", ALL, ids=name_of)
def test_the_decoder_of_tutorials(kinds):
    model, params, make = sides(**kinds)
    ledger = fd.compare(model=model, params=params, torch_model=make, steps=10, length=19)
    assert ledger.holds, ledger.conclusion
    rows = {row.name: row for row in ledger.rows}
    assert rows["logits"].relative <= 2e-6
    # Scores of a query move alike with a bias of keys: its gradient is zero.
    exact = {row.name: row.float64 for row in ledger.rows if row.float64 is not None and "key.bias" not in row.name}
    assert all(value <= 1e-10 for name, value in exact.items() if "step" not in name)
    inside = ("attention_norm", "attention.q", "attention.k", "attention.v", "attention.scores", "attention.weights")
    inside += ("attention.heads", "attention.out", "feed_forward_norm", "feed_forward.up", "feed_forward.hidden")
    wanted = {f"layers.{layer}.{name}" for layer in range(L) for name in (*inside, "feed_forward.down", "residual")}
    wanted |= {"embeddings", "logits", "loss", "step 10 params"} | ({"final_norm"} if kinds["final_norm"] else set())
    assert wanted <= rows.keys()
    assert {f"gradient {name}" for name in ("embedding", "head", "layers.1.attention.out.bias")} <= rows.keys()
    assert not ledger.notes or "lifted" in str(ledger.notes), ledger.notes
