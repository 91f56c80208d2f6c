"""A decoder-only transformer in JAX and Flax Linen: readable attention, real training.

model, params, tokenizer = flax_decoder.load("runs/default")
logits_BTV = model.apply({"params": params}, tokens_BT)
"""

import importlib
from typing import TYPE_CHECKING, Any

from flax_decoder.allocator import keep_freed_memory
from flax_decoder.config import Config, ModelConfig
from flax_decoder.config_file import load_config
from flax_decoder.errors import FaultError, UserError
from flax_decoder.platforms import skip_missing_tpu
from flax_decoder.version import __version__ as __version__

if TYPE_CHECKING:  # the names of `_LAZY`, for type checkers and editors; a test compares the two
    from flax_decoder.data.shards import load_corpus
    from flax_decoder.generation.generate import complete, generate, prefill
    from flax_decoder.generation.harness import harness_model
    from flax_decoder.generation.score import score
    from flax_decoder.generation.speculative import Draft, PromptLookup
    from flax_decoder.huggingface.families import register_family
    from flax_decoder.lens.attribution import Attribution, attribute
    from flax_decoder.lens.capture import capture
    from flax_decoder.lens.head_scores import head_scores
    from flax_decoder.lens.history import History, read_history
    from flax_decoder.lens.page import write_lens_page
    from flax_decoder.lens.pictures import plot_attention
    from flax_decoder.loading import compare, load
    from flax_decoder.nn.cache import KVCache, empty_cache
    from flax_decoder.nn.decoder import Decoder
    from flax_decoder.nn.params import unstack_layers
    from flax_decoder.training.metrics import plot_losses
    from flax_decoder.training.step import TrainState, eval_step, init_state, train_step
    from flax_decoder.training.torch_optimizer import adamw_from_torch, adamw_to_torch

# Before JAX computes anything: its threads keep the settings that they start with.
keep_freed_memory()
skip_missing_tpu()

# These modules import JAX, so they are imported when a name is first used: `--help` and bad input do not wait for JAX.
_LAZY = {
    "data.shards": ("load_corpus",),
    "generation.generate": ("complete", "generate", "prefill"),
    "generation.harness": ("harness_model",),
    "generation.score": ("score",),
    "generation.speculative": ("Draft", "PromptLookup"),
    "huggingface.families": ("register_family",),
    "lens.attribution": ("Attribution", "attribute"),
    "lens.capture": ("capture",),
    "lens.head_scores": ("head_scores",),
    "lens.history": ("History", "read_history"),
    "lens.page": ("write_lens_page",),
    "lens.pictures": ("plot_attention",),
    "loading": ("compare", "load"),
    "nn.cache": ("KVCache", "empty_cache"),
    "nn.decoder": ("Decoder",),
    "nn.params": ("unstack_layers",),
    "training.metrics": ("plot_losses",),
    "training.step": ("TrainState", "eval_step", "init_state", "train_step"),
    "training.torch_optimizer": ("adamw_from_torch", "adamw_to_torch"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

# Spelled out for type checkers, to which an import is no export.
__all__ = [
    "Attribution",
    "Config",
    "Decoder",
    "Draft",
    "FaultError",
    "History",
    "KVCache",
    "ModelConfig",
    "PromptLookup",
    "TrainState",
    "UserError",
    "adamw_from_torch",
    "adamw_to_torch",
    "attribute",
    "capture",
    "compare",
    "complete",
    "empty_cache",
    "eval_step",
    "generate",
    "harness_model",
    "head_scores",
    "init_state",
    "load",
    "load_config",
    "load_corpus",
    "plot_attention",
    "plot_losses",
    "prefill",
    "read_history",
    "register_family",
    "score",
    "train_step",
    "unstack_layers",
    "write_lens_page",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
