"""The lens page: what a model did with a text, as one HTML page that needs nothing else.

Its parts stand in `page_parts/`: the frame, the style, and plain JavaScript that draws. All numbers are in the page, in
packed arrays (see `packing`); no server, no network, no library.
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
from flax_decoder.nn.decoder import Decoder, check_tokens

if TYPE_CHECKING:
    from flax_decoder.lens.history import History

MAX_TOKENS = 256  # of a prompt: the scores and contributions grow with its square
# In the order in which they build on each other.
SCRIPTS = ("numbers", "unpack", "lens", "shapes", "prompt", "heads", "pattern", "story", "why", "learning", "main")


def write_lens_page(
    path: str | Path,
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer | None,
    tokens_T: ArrayLike,
    history: "History | None" = None,
) -> None:
    """Writes a page on which one can read what every head did with a text, and why the model would go on as it would.

    It shows, for each token, layer and head: the query, the keys it meets, scores, weights, values, and what was
    written; a map of all heads; the logits as sums of their parts; the guesses after each layer; and with a history,
    how the heads came to be. The numbers on it are the model's own, in float32, rounded to the digits shown.

    Args:
        path: the file, in a folder that exists; what is there is replaced.
        model: the model.
        params: its parameters.
        tokenizer: what the tokens mean; None shows their ids.
        tokens_T: the text, up to 256 tokens.
        history: what a run has kept while it learned; see `read_history`.

    Raises:
        UserError: no tokens, too many for the page or for the model's learned positions, a path that cannot be a file,
            a history of another model, or logits that are not finite.
        ValueError: token ids outside of the vocabulary.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_page_path(path)
    tokens_T = np.asarray(tokens_T)
    if tokens_T.ndim != 1:
        raise UserError(f"the prompt has the shape {tokens_T.shape}: give the tokens of one text, (T,)")
    check_page_length(model.config, len(tokens_T))
    check_tokens(tokens_T[None], model.config.vocab_size or 0)
    if history is not None and history.weights_MLNTS.shape[1:3] != (model.config.num_layers, model.config.num_heads):
        raise UserError(f"the history is of {history.weights_MLNTS.shape[1:3]} layers and heads, not of this model")
    write_text(path, render(page_data(model, params, tokenizer, tokens_T.astype(np.int32), history)))


def check_page_path(path: Path) -> None:
    """Raises UserError, before any work is done, where a page cannot be at a path."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: must name a file in a folder that exists")


def check_page_length(config: ModelConfig, num_tokens: int) -> None:
    """Raises UserError where a prompt has no tokens, or more than the page or the model can take."""
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
    """The page, from its parts and what `page_data` gave."""
    parts = resources.files("flax_decoder.lens") / "page_parts"

    def part(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    # In a script element, HTML looks for nothing but "<": no token's text can end it.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = "\n".join(part(f"{name}.js") for name in SCRIPTS)
    before_style, rest = part("page.html").split("/*{style}*/")
    before_data, rest = rest.split("/*{data}*/")
    before_script, after_script = rest.split("/*{script}*/")
    return "".join([before_style, part("page.css"), before_data, embedded, before_script, script, after_script])
