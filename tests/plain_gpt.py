"""A GPT in PyTorch with the tensor names and the optimizer groups of nanoGPT, and its checkpoints."""

import torch
from torch import nn
from torch.nn import functional

MODEL_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 14, "block_size": 11, "bias": True, "vocab_size": 5, "dropout": 0.0}
CONFIG = {
    **{"learning_rate": 3e-3, "min_lr": 1e-3, "warmup_iters": 0, "lr_decay_iters": 50, "max_iters": 50},
    **{"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.3, "grad_clip": 0.5, "decay_lr": True, "dataset": "letters"},
    **{"batch_size": 2, "gradient_accumulation_steps": 2, "eval_interval": 25, "log_interval": 1},
}


class Attention(nn.Module):
    def __init__(self, n_head, n_embd, bias):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, n_head, n_embd, bias):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_head, n_embd, bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias=bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias=bias)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainGPT(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_head, n_embd, bias) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def make_gpt(seed=0, **changes):
    """A model with weights that differ all over, and its settings."""
    torch.manual_seed(seed)
    model_args = MODEL_ARGS | changes
    model = PlainGPT(**model_args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("ln_f.weight") else 0.0, 0.1)
    return model, model_args


def make_optimizer(model, config=CONFIG):
    """AdamW with two groups: matrices, which decay, and vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config["learning_rate"],
        betas=(config["beta1"], config["beta2"]),
    )


def checkpoint(model, model_args, optimizer=None, iter_num=0):
    """The content of a ckpt.pt, of a model that was compiled."""
    return {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": (optimizer or make_optimizer(model)).state_dict(),
        "model_args": model_args,
        "iter_num": iter_num,
        "best_val_loss": torch.tensor(1.5),
        "config": CONFIG,
    }
