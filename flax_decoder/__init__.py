"""A decoder-only transformer in JAX and Flax Linen: readable attention, real training.

model, params, tokenizer = flax_decoder.load("runs/default")
logits_BTV = model.apply({"params": params}, tokens_BT)
"""

import importlib
from typing import TYPE_CHECKING, Any

from flax_decoder.allocator import keep_freed_memory
from flax_decoder.config import Config
from flax_decoder.config_file import load_config
from flax_decoder.errors import FaultError, UserError

if TYPE_CHECKING:
    from flax_decoder.generation.generate import complete, generate, prefill
    from flax_decoder.generation.speculative import Draft, PromptLookup
    from flax_decoder.lens.attribution import Attribution, attribute
    from flax_decoder.lens.capture import capture
    from flax_decoder.lens.head_scores import head_scores
    from flax_decoder.lens.history import History, read_history
    from flax_decoder.lens.page import write_lens_page
    from flax_decoder.lens.pictures import plot_attention
    from flax_decoder.loading import compare, load
    from flax_decoder.nn.cache import KVCache, empty_cache
    from flax_decoder.nn.decoder import Decoder, unstack_layers
    from flax_decoder.training.metrics import plot_losses
    from flax_decoder.training.step import TrainState, eval_step, init_state, train_step

# Here, as it must come before JAX computes anything.
keep_freed_memory()

# Names whose modules import JAX come when first used: a wrong setting is refused, and help shown, without that wait.
_HOMES = {
    "Attribution": "lens.attribution",
    "Decoder": "nn.decoder",
    "Draft": "generation.speculative",
    "History": "lens.history",
    "KVCache": "nn.cache",
    "PromptLookup": "generation.speculative",
    "TrainState": "training.step",
    "attribute": "lens.attribution",
    "capture": "lens.capture",
    "compare": "loading",
    "empty_cache": "nn.cache",
    "complete": "generation.generate",
    "eval_step": "training.step",
    "generate": "generation.generate",
    "head_scores": "lens.head_scores",
    "init_state": "training.step",
    "load": "loading",
    "plot_attention": "lens.pictures",
    "plot_losses": "training.metrics",
    "prefill": "generation.generate",
    "read_history": "lens.history",
    "train_step": "training.step",
    "unstack_layers": "nn.decoder",
    "write_lens_page": "lens.page",
}

__all__ = [
    "Attribution",
    "Config",
    "Decoder",
    "Draft",
    "FaultError",
    "History",
    "KVCache",
    "PromptLookup",
    "TrainState",
    "UserError",
    "attribute",
    "capture",
    "compare",
    "complete",
    "empty_cache",
    "eval_step",
    "generate",
    "head_scores",
    "init_state",
    "load",
    "load_config",
    "plot_attention",
    "plot_losses",
    "prefill",
    "read_history",
    "train_step",
    "unstack_layers",
    "write_lens_page",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
