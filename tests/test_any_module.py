"""Any module of PyTorch, written as its users write it, is compared as the models of transformers are."""

import itertools
import math
import pickle
import sys
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
# ruff: noqa: E402
import reference
from faults.model_folder import Bomb
from test_ledger import observe_forward
from torch import nn
from torch.nn import functional as F  # noqa: N812

import flax_decoder as fd
from flax_decoder import cli
from flax_decoder.comparison import compare as comparison
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import CharTokenizer
from flax_decoder.errors import UserError
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.weights import export_tensors, flatten, tensor_specs
from flax_decoder.training.run_folder import write_run

V, C, L, D, N = 31, 23, 2, 24, 4
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


@pytest.mark.full
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


class CausalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, N, D // N).transpose(1, 2) for y in self.c_attn(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class GPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(D), CausalAttention(), nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """In the style of nanoGPT: names, a tied head, and without targets the logits of the last position only."""

    def __init__(self):
        super().__init__()
        parts = {"wte": nn.Embedding(V, D), "wpe": nn.Embedding(C, D), "h": nn.ModuleList(GPTBlock() for _ in range(L))}
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(D)})
        self.lm_head = nn.Linear(D, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        parts = self.transformer
        x = parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1]))
        for block in parts["h"]:
            x = block(x)
        x = parts["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1))


def test_a_model_like_nanogpt_needs_no_map():
    model = fd.Decoder(ModelConfig(**SIZES, **BIASES))
    params = reference.random_params(model)
    leaves = flatten(params)
    module, state = GPT(), {}
    specs = tensor_specs(FAMILIES["gpt2"], {path: leaf.shape for path, leaf in leaves.items()})
    for spec, tensor in zip(specs, export_tensors(specs, leaves), strict=True):
        # The file of GPT-2 has matrices as (in, out).
        is_matrix = spec.rule.paths[0].endswith("kernel")
        state[spec.name] = torch.tensor(np.ascontiguousarray(tensor.T if is_matrix else tensor))
    module.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    with mock.patch.object(comparison, "observe", observe_forward):
        ledger = fd.compare(model=model, params=params, torch_model=module, length=19)
    assert ledger.holds and not ledger.notes, ledger.conclusion
    assert {"layers.1.attention.scores", "layers.1.attention.heads", "logits"} <= {row.name for row in ledger.rows}


# --- Planted mistakes ---


class NoMask(MultiHeadAttention):
    def __init__(self, fused):
        super().__init__(fused)
        self.mask = torch.ones(C, C)


class Peek(MultiHeadAttention):
    def __init__(self, fused):
        super().__init__(fused)
        self.mask = torch.tril(torch.ones(C, C), diagonal=1)


class Swapped(MultiHeadAttention):
    def project(self, x):
        q, k, v = super().project(x)
        return q, v, k


class Attend(MultiHeadAttention):
    """Attention whose steps can be replaced."""

    scale, axis = 1 / math.sqrt(D // N), -1

    def forward(self, x):
        T = x.shape[1]
        q, k, v = (self.split(y) for y in self.project(x))
        scores = (q @ k.transpose(-2, -1) * self.scale).masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        weights = F.softmax(scores, dim=self.axis)
        return self.w_o(self.merge(torch.nan_to_num(weights) @ v))

    def split(self, y):
        return y.view(*y.shape[:2], N, D // N).transpose(1, 2)

    def merge(self, heads):
        B, _, T, _ = heads.shape
        return heads.transpose(1, 2).reshape(B, T, D)


class NoScale(Attend):
    scale = 1.0


class WidthScale(Attend):
    scale = 1 / math.sqrt(D)


class OverQueries(Attend):
    axis = -2


class NoTranspose(Attend):
    def merge(self, heads):
        B, _, T, _ = heads.shape
        return heads.reshape(B, T, D)


class MixedSplit(Attend):
    def split(self, y):
        return y.view(y.shape[0], N, y.shape[1], D // N)


class MeanOfHeads(Attend):
    def merge(self, heads):
        return heads.mean(1).repeat(1, 1, N)


class Dropping(FeedForward):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1)


class NoResidual(Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return self.ff(self.norm2(x))


class SameNorm(Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm1(x))


class HalvesSwapped(PositionalEncoding):
    def __init__(self):
        super().__init__()
        self.pe = torch.stack([self.pe[..., 1::2], self.pe[..., 0::2]], -1).reshape(1, C, D)


class FromOne(PositionalEncoding):
    def __init__(self):
        super().__init__()
        self.pe = sinusoids(C + 1, D)[None, 1:]


class Unscaled(Tutorial):
    def forward(self, ids):
        x = self.positions(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.fc_out(self.norm(x))


class OverPositions(nn.Module):
    """A LayerNorm over the axis of positions."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        return centred / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5) * self.weight + self.bias


def replacing(name, kind):
    """Puts a class of its own into every layer of a module, before it gets its numbers."""

    def edit(module):
        for block in module.blocks:
            old = getattr(block, name)
            setattr(block, name, kind(old.fused) if isinstance(old, MultiHeadAttention) else kind())

    return edit


def blocks_of(kind):
    """Changes the class of the layers."""

    def edit(module):
        for block in module.blocks:
            block.__class__ = kind

    return edit


def set_parts(name, make):
    def edit(module):
        for block in module.blocks:
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, make(block.get_submodule(name)))

    return edit


def setting(name, attribute, value):
    """Sets an attribute of a part."""
    return lambda module: setattr(module.get_submodule(name), attribute, value)


def set_positions(kind):
    return lambda module: setattr(module, "positions", kind())


def tie(module):
    module.fc_out.weight = module.embed.weight


def swap_weights(module):
    attention = module.blocks[1].attn
    with torch.no_grad():
        for key, value in zip(attention.w_k.parameters(), attention.w_v.parameters(), strict=True):
            kept = key.clone()
            key.copy_(value)
            value.copy_(kept)


def change_one(module):
    with torch.no_grad():
        module.blocks[1].attn.w_o.weight.mul_(1.01)


def transpose_weight(module):
    with torch.no_grad():
        module.blocks[0].attn.w_o.weight.copy_(module.blocks[0].attn.w_o.weight.clone().T)


def in_first(name):
    return f"layers.0.{name}"


SCORES, HIDDEN = in_first("attention.scores"), in_first("feed_forward.hidden")
# Of each: how the module differs, the row, and the cause.
PLANTED = {
    "no scale": (replacing("attn", NoScale), SCORES, "not divided by the root of the head width, 2.449, in PyTorch"),
    "scale of the width": (replacing("attn", WidthScale), SCORES, "ours are 2 times PyTorch's"),
    "no mask": (replacing("attn", NoMask), SCORES, "the mask: PyTorch lets positions see later ones"),
    "mask off by one": (replacing("attn", Peek), SCORES, "the mask: PyTorch lets positions see later ones"),
    "softmax over queries": (
        *(replacing("attn", OverQueries), in_first("attention.weights")),
        "weights of PyTorch do not add up to 1",
    ),
    "keys and values swapped in code": (
        *(replacing("attn", Swapped), SCORES),
        "keys and values are swapped behind their projections in PyTorch",
    ),
    "no transposition after attention": (
        *(replacing("attn", NoTranspose), in_first("attention.heads")),
        "PyTorch reshapes the heads without transposing them before",
    ),
    "heads split without transposition": (replacing("attn", MixedSplit), SCORES, None),
    "mean of heads": (replacing("attn", MeanOfHeads), in_first("attention.heads"), None),
    "dropout left on": (set_parts("ff", lambda ff: _as(ff, Dropping)), in_first("residual"), None),
    "no residual": (blocks_of(NoResidual), in_first("residual"), "what goes into feed-forward is not added in PyTorch"),
    "one norm for both": (blocks_of(SameNorm), in_first("feed_forward.up"), None),
    "sinusoids swapped": (set_positions(HalvesSwapped), "embeddings", "the vectors of positions differ"),
    "positions from one": (set_positions(FromOne), "embeddings", "or are counted from another number"),
    "no embedding scale": (setting("", "__class__", Unscaled), "embeddings", "by 4.89898 in ours, by 1 in PyTorch"),
    "no bias of queries": (
        setting("blocks.0.attn.w_q", "bias", None),
        in_first("attention.q"),
        "a bias is missing in PyTorch",
    ),
    "no bias of the head": (setting("fc_out", "bias", None), "logits", "a bias differs, or is missing"),
    "epsilon": (
        *(set_parts("norm1", lambda _: nn.LayerNorm(D, eps=1e-3)), in_first("attention_norm")),
        "epsilon of the norm: ours 1e-05, PyTorch's 0.001",
    ),
    "GELU for ReLU": (
        *(set_parts("ff.net.1", lambda _: nn.GELU()), HIDDEN),
        "the activation: ours is ReLU, PyTorch's GELU by erf",
    ),
    "norm over positions": (set_parts("norm1", lambda _: OverPositions()), in_first("attention_norm"), None),
}
# Those that change the numbers it has.
OF_NUMBERS = {
    "keys and values swapped in weights": (swap_weights, "layers.1.attention.k", "keys and values are swapped"),
    "one weight differs": (change_one, "layers.1.attention.out", "the weights differ"),
    "a weight is transposed": (transpose_weight, in_first("attention.out"), "the matrix is transposed"),
    "tied by accident": (tie, "logits", "tied head: PyTorch takes the embedding for its head"),
}
PLANTED |= OF_NUMBERS


def _as(part, kind):
    part.__class__ = kind
    return part


def planted(name):
    model, params, _ = sides()
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    def make():
        module, edit = Tutorial(), PLANTED[name][0]
        if name in OF_NUMBERS:
            edit(load(module, leaves))
            return module
        edit(module)
        return load(module, leaves)

    with mock.patch.object(comparison, "observe", observe_forward):
        return fd.compare(model=model, params=params, torch_model=make, length=19)


@pytest.mark.short("no mask")
@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_a_module_is_found_at_its_row(name):
    _, row, cause = PLANTED[name]
    ledger = planted(name)
    assert ledger.first_failure is not None and ledger.first_failure.name == row, str(ledger)
    assert cause is None or cause in ledger.cause, ledger.cause


@pytest.mark.full
@pytest.mark.parametrize(("post", "row"), [(False, "layers.0.attention.q"), (True, "layers.0.attention_norm")])
def test_post_for_pre_is_found(post, row):
    model, params, _ = sides(post=not post)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    ledger = fd.compare(model=model, params=params, torch_model=load(Tutorial(post=post), leaves), length=19)
    assert ledger.first_failure.name == row and "the place of the norm: in PyTorch" in ledger.cause, ledger.conclusion


# --- Names, modules that do not fit, and the command ---


class Own(nn.Module):
    """Names that say nothing, and matrices of one shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(V, D), nn.Linear(D, V)
        self.parts = nn.ModuleList(nn.ModuleDict({x: nn.Linear(D, D) for x in "abcd"}) for _ in range(L))

    def forward(self, ids):
        return self.b(self.a(ids))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.fc_out = nn.Embedding(V, D), nn.LSTM(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, ids):
        return self.fc_out(self.rnn(self.embed(ids))[0])


class Failing(Tutorial):
    def forward(self, ids, mask):
        return super().forward(ids)


class Last(Tutorial):
    def forward(self, ids):
        return super().forward(ids)[:, -1]


class Small(Tutorial):
    def __init__(self):
        super().__init__()
        self.embed, self.fc_out = nn.Embedding(V + 1, D), nn.Linear(D, V + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Own, "could be .*: neither names nor numbers tell"),
        (Recurrent, r"of theirs rnn.weight_ih_l0 \(96, 24\).*; of ours layers/attention/key/kernel .*\ngive a map"),
        (Failing, "Failing cannot be called; it must take token ids .*\nTypeError: .*mask"),
        (Last, "Last gives"),
        (Small, r"of theirs embed.weight \(32, 24\)"),
        (lambda: 3, "must be a torch.nn.Module, or a function that makes one, not 3"),
        (lambda: 1 / 0, "failed:\nZeroDivisionError"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(make, message):
    model, params, _ = sides()
    with pytest.raises(UserError, match=message) as refused:
        fd.compare(model=model, params=params, torch_model=make)
    assert len(str(refused.value).splitlines()) <= 2


@pytest.mark.full
def test_the_module_stays_as_it_is_and_a_map_may_be_given():
    model, params, make = sides()
    module = make().train()
    module.embed.weight.grad = torch.ones(V, D)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    names = {
        name if name.endswith("weight") else f"{name}.weight": (
            path if path in ("embedding", "head") else f"{path}/scale" if path.endswith("norm") else f"{path}/kernel"
        )
        for name, path in NAMES.items()
        if isinstance(path, str) and path not in ("positions", "head_bias")
    }
    with mock.patch.object(comparison, "observe", observe_forward):
        ledger = fd.compare(model=model, params=params, torch_model=module, names=names, length=19)
    # The map has no biases: those of the module are used, but not compared.
    assert ledger.holds, ledger.conclusion
    assert "Without a counterpart, computed with but not compared" in ledger.notes[0]
    assert module.training and not module._forward_hooks and (module.embed.weight.grad == 1).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_the_command_runs_the_users_file(tmp_path, capsys, monkeypatch):
    model, params, make = sides()
    run = str(tmp_path / "run")
    write_run(tmp_path / "run", model.config, params, CharTokenizer("abc"), {})
    torch.save({"model": {f"_orig_mod.{name}": t for name, t in make().state_dict().items()}}, tmp_path / "ckpt.pt")
    file = tmp_path / "my_own_model.py"
    file.write_text("from test_any_module import Tutorial\ndef make_model():\n    return Tutorial()\nNUMBER = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(comparison, "observe", observe_forward)
    torch_arguments = ["compare", run, "--length", "19", "--torch", f"{file}:make_model"]
    assert cli.main([*torch_arguments, "--checkpoint", str(tmp_path / "ckpt.pt")]) == 0
    assert "rows hold" in capsys.readouterr().out
    names = tmp_path / "names.toml"
    names.write_text('[names]\n"embed.weight" = "embeding"\n')
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "canary")}))
    for arguments, message in (
        ([*torch_arguments, "--names", str(names)], "names: embed.weight: the model has no parameter embeding"),
        ([*torch_arguments, "--checkpoint", str(tmp_path / "hostile.pt")], "hostile.pt: is not a file of torch.save"),
        (["compare", run, "--torch", f"{file}:make"], "has no function make; it has make_model"),
        (["compare", run, "--torch", f"{file}"], "must be FILE.py:FUNCTION"),
        (["compare", run, "--torch", "none.py:make"], "there is no file none.py"),
        (["compare", run, "--torch", f"{tmp_path / 'bad.py'}:make"], "failed, line 2:\nSystemExit: 3"),
        (["compare", run, "--names", str(names)], "give --torch FILE.py:FUNCTION"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) <= 2, error
    assert not (tmp_path / "canary").exists()
