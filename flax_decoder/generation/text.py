"""Tokens to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_decoder.data.tokenizer import Tokenizer

# What a decoder shows in place of bytes that are no character, or not one yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most three can wait for their last one.
LONGEST_UNFINISHED = 3


def decode_stream(tokenizer: Tokenizer, chunks: Iterable[np.ndarray], stop: Sequence[str] = ()) -> Iterator[str]:
    """Decodes tokens piece by piece; the pieces joined are the text of all tokens. See `TextDecoder`.

    Args:
        tokenizer: what the tokens mean.
        chunks: arrays of token ids, one-dimensional.
        stop: texts that end the text; they are not part of it.

    Yields:
        Text that no later token can change.
    """
    decoder = TextDecoder(tokenizer, stop)
    for chunk in chunks:
        piece = decoder.add(chunk)
        if piece:
            yield piece
        if decoder.has_ended:
            return
    yield decoder.rest()


def decode_streams(
    tokenizer: Tokenizer, chunks: Iterable[np.ndarray], num_rows: int, stop: Sequence[str] = ()
) -> Iterator[tuple[int, str]]:
    """The same for rows of tokens that are made at once, to be read one after the other.

    Args:
        tokenizer: what the tokens mean.
        chunks: arrays of token ids, (num_rows, some).
        num_rows: how many rows there are.
        stop: texts that end a row; no more chunks are asked for when all rows have ended.

    Yields:
        The number of a row and a piece of its text; all pieces of a row come before those of the next. The first row
        that has not ended comes piece by piece, and those behind it as soon as it has.
    """
    decoders = [TextDecoder(tokenizer, stop) for _ in range(num_rows)]
    waiting, current = [""] * num_rows, 0
    for chunk in chunks:
        for row, decoder in enumerate(decoders):
            waiting[row] += "" if decoder.has_ended else decoder.add(chunk[row])
        while current < num_rows:
            if waiting[current]:
                yield current, waiting[current]
                waiting[current] = ""
            if not decoders[current].has_ended:
                break
            current += 1
        if current == num_rows:
            return
    for row in range(current, num_rows):
        text = waiting[row] + ("" if decoders[row].has_ended else decoders[row].rest())
        if text:
            yield row, text


class TextDecoder:
    """Tokens to text, piece by piece.

    No character of several bytes is cut in two. The text ends before the first of the stop strings, also where one
    comes in several tokens, or at one of the tokenizer's end tokens.

    Attributes:
        has_ended: whether a stop string or an end token has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.has_ended = False
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: np.ndarray) -> str:
        """Takes the next tokens, and gives the text that no later token can change and was not given yet."""
        tokenizer, stop = self._tokenizer, self._stop
        new = tokens.tolist()
        ends = [place for place, token in enumerate(new) if token in tokenizer.end_ids]
        self._tokens.extend(new[: min(ends, default=len(new))])
        text = tokenizer.decode(self._tokens)
        places = [place for place in (text.find(end) for end in stop) if place >= 0]
        if places or ends:
            self.has_ended = True
            return text[self._shown : min(places, default=len(text))]
        # The last characters may become part of a stop string, or change when their last bytes come.
        settled = len(text) - (max((len(end) for end in stop), default=1) - 1)
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        settled = max(min(settled, len(text) - min(unfinished, LONGEST_UNFINISHED)), self._shown)
        piece, self._shown = text[self._shown : settled], settled
        return piece

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._tokenizer.decode(self._tokens)[self._shown :]
