"""What nanoGPT's `train.py` needs, beside the model, to go on where a run of ours stands."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.config import Config, default_warmup_steps
from flax_decoder.huggingface.families import NANOGPT
from flax_decoder.huggingface.torch_file import torch_module
from flax_decoder.huggingface.weights import flatten, tensor_specs
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.checkpoint import OPTIMIZER, restore_state, steps_folder
from flax_decoder.training.manifest import read_manifest
from flax_decoder.training.step import TrainState, state_maker
from flax_decoder.training.torch_optimizer import adamw_to_torch

_NO_LOSS = 1e9  # nanoGPT's `best_val_loss` before the first evaluation


def training_entries(folder: Path, step: int, config: Config, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entries of a ckpt.pt beside `model`, which is `state_dict`, and `model_args`: of plain values and tensors.

    The optimizer starts anew if the checkpoint has none, or Muon.
    """
    manifest = read_manifest(steps_folder(folder) / str(step))
    has_adamw = OPTIMIZER in manifest["arrays"] and config.optimizer.name == "adamw"
    state = _restored(folder, step, config) if has_adamw else None
    loss = manifest["val_loss"]
    return {
        "optimizer": _optimizer(config, state, {name: t for name, t in state_dict.items() if name != NANOGPT.head}),
        "iter_num": step,
        "best_val_loss": _NO_LOSS if loss is None else float(loss),
        "config": _settings(config),
    }


def _restored(folder: Path, step: int, config: Config) -> TrainState:
    like = jax.eval_shape(state_maker(Decoder(config.model), config), jax.random.key(0))
    return restore_state(folder, step, like.replace(step=jnp.zeros((), jnp.int32)))


def _optimizer(config: Config, state: TrainState | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """The state of AdamW with nanoGPT's two groups: matrices, which decay, then vectors, which do not."""
    torch = torch_module("a checkpoint of nanoGPT")
    settings = config.optimizer

    def fresh(named: dict[str, Any]) -> Any:
        groups = [
            {"params": [t for t in named.values() if t.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [t for t in named.values() if t.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon).state_dict()

    # The order of the groups.
    parameters = dict(sorted(parameters.items(), key=lambda item: item[1].dim() < 2))
    empty: dict[str, Any] = fresh(parameters)
    if state is None:
        return empty
    shapes = {path: leaf.shape for path, leaf in flatten(state.params).items()}
    ours = {spec.name for spec in tensor_specs(NANOGPT, shapes)}
    known = {name: tensor for name, tensor in parameters.items() if name in ours}
    rows = adamw_to_torch(state, fresh(known), known, NANOGPT)["state"]
    by_name = {name: rows[index] for index, name in enumerate(known)} if rows else {}
    if not by_name:
        return empty
    step = next(iter(by_name.values()))["step"]
    for name, tensor in parameters.items():  # a bias that only nanoGPT has is zero, and so are its moments
        zeros = {part: torch.zeros_like(tensor) for part in ("exp_avg", "exp_avg_sq")}
        by_name.setdefault(name, {"step": step.clone(), **zeros})
    return empty | {"state": {index: by_name[name] for index, name in enumerate(parameters)}}


def _settings(config: Config) -> dict[str, Any]:
    """The settings of nanoGPT's training script, as far as ours have the same meaning."""
    optimizer, training = config.optimizer, config.training
    warmup = optimizer.warmup_steps
    settings: dict[str, Any] = {
        "learning_rate": optimizer.learning_rate,
        "min_lr": optimizer.learning_rate * optimizer.final_fraction,
        "warmup_iters": default_warmup_steps(training.num_steps) if warmup is None else warmup,
        "decay_lr": optimizer.schedule != "constant",
        "lr_decay_iters": training.num_steps,
        "max_iters": training.num_steps,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "grad_clip": optimizer.clip_norm,
        "batch_size": training.batch_size // training.num_parts(1),
        "gradient_accumulation_steps": training.num_parts(1),
        "eval_interval": training.eval_every,
        "log_interval": training.log_every,
        "dropout": config.model.dropout,
    }
    if isinstance(config.data.path, str):  # its sample.py looks for data/<dataset>/meta.pkl
        settings["dataset"] = Path(config.data.path).resolve().parent.name
    return settings
