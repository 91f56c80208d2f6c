"""Tokens to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_decoder.data.tokenizer import Tokenizer

# What a decoder shows in place of bytes that are no character, or not one yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most three can wait for their last one.
LONGEST_UNFINISHED = 3


def decode_stream(tokenizer: Tokenizer, chunks: Iterable[np.ndarray], stop: Sequence[str] = ()) -> Iterator[str]:
    """Decodes tokens piece by piece; the pieces joined are the text of all tokens.

    No character of several bytes is cut in two. The text ends before the first of the stop strings, also where one
    comes in several tokens, or at one of the tokenizer's end tokens.

    Args:
        tokenizer: what the tokens mean.
        chunks: arrays of token ids, one-dimensional.
        stop: texts that end the text; they are not part of it.

    Yields:
        Text that no later token can change.
    """
    tokens: list[int] = []
    shown = 0
    longest_stop = max((len(text) for text in stop), default=1)
    for chunk in chunks:
        tokens.extend(chunk.tolist())
        ends = [place for place, token in enumerate(tokens) if token in tokenizer.end_ids]
        tokens = tokens[: min(ends, default=len(tokens))]
        text = tokenizer.decode(tokens)
        places = [place for place in (text.find(end) for end in stop) if place >= 0]
        if places or ends:
            yield text[shown : min(places, default=len(text))]
            return
        # The last characters may become part of a stop string, or change when their last bytes come.
        settled = len(text) - (longest_stop - 1)
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        settled = min(settled, len(text) - min(unfinished, LONGEST_UNFINISHED))
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    yield tokenizer.decode(tokens)[shown:]
