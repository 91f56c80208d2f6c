"""The lens page: the activations of a model for one text, as a single HTML file.

`page_parts/` has the HTML, the style and plain JavaScript. The numbers are embedded as packed arrays (see `packing`);
the page needs no server, network or library.
"""

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import UserError
from flax_decoder.io.files import write_text
from flax_decoder.lens.page_data import page_data
from flax_decoder.nn.arguments import as_array, check_tokens
from flax_decoder.nn.decoder import Decoder

if TYPE_CHECKING:
    from flax_decoder.lens.history import History

MAX_TOKENS = 256  # the size of scores and contributions grows with the square of it
# Each script uses those before it.
SCRIPTS = ("numbers", "unpack", "lens", "shapes", "prompt", "heads", "pattern", "story", "why", "learning", "main")


def write_lens_page(
    path: str | Path,
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer | None,
    tokens_T: ArrayLike,
    history: "History | None" = None,
) -> None:
    """Writes an interactive HTML page of what every head computes for a text, and why the model predicts what it does.

    For each token, layer and head it shows query, keys, scores, weights, values and the head's write; a map of all
    heads; the logits as sums of contributions; the predictions after each layer; and, with a history, the heads over
    training. The numbers are computed in float32 and rounded to the digits shown.

    Args:
        path: the file, in an existing folder; an existing file is replaced.
        model: the model.
        params: its parameters.
        tokenizer: gives the text of tokens; None shows their ids.
        tokens_T: the tokens, at most 256.
        history: snapshots of a training run, from `read_history`.

    Raises:
        UserError: no tokens, too many for the page or for the model's learned positions, a path that cannot be a file,
            a history of another model, or logits that are not finite.
        ValueError: token ids outside the vocabulary.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: must name a file in a folder that exists")
    tokens_T = np.asarray(as_array(tokens_T, "the prompt"))
    if tokens_T.ndim != 1:
        raise UserError(f"the prompt has the shape {tokens_T.shape}: give the tokens of one text, (T,)")
    check_page_length(model.config, len(tokens_T))
    check_tokens(tokens_T[None], model.config.vocab_size or 0)
    if history is not None and history.weights_MLNTS.shape[1:3] != (model.config.num_layers, model.config.num_heads):
        raise UserError(f"the history is of {history.weights_MLNTS.shape[1:3]} layers and heads, not of this model")
    if history is not None and history.tokens_T.max() >= (model.config.vocab_size or 0):
        raise UserError(f"the history is of a text with the token id {history.tokens_T.max()}, which this model lacks")
    write_text(path, render(page_data(model, params, tokenizer, tokens_T.astype(np.int32), history)))


def check_page_length(config: ModelConfig, num_tokens: int) -> None:
    """Raises UserError if a prompt has no tokens, or too many for the page or the model."""
    if num_tokens == 0:
        raise UserError("the prompt has no tokens; give a text of at least one")
    if num_tokens > MAX_TOKENS:
        raise UserError(f"the prompt has {num_tokens} tokens, and a page at most {MAX_TOKENS}; give a shorter one")
    if config.positions == "learned" and num_tokens > config.context_length:
        raise UserError(
            f"the prompt has {num_tokens} tokens, more than the model's {config.context_length} learned positions; "
            "give a shorter one"
        )


def render(data: dict[str, Any]) -> str:
    """The HTML of the page; `data` is from `page_data`."""
    parts = resources.files("flax_decoder.lens") / "page_parts"

    def part(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    # Without "<" no token's text can end the script element.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = "\n".join(part(f"{name}.js") for name in SCRIPTS)
    before_style, rest = part("page.html").split("/*{style}*/")
    before_data, rest = rest.split("/*{data}*/")
    before_script, after_script = rest.split("/*{script}*/")
    return "".join([before_style, part("page.css"), before_data, embedded, before_script, script, after_script])
