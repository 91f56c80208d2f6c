"""Token ids to text, as they are generated."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_decoder.data.tokenizer import Tokenizer

# What a tokenizer gives for bytes that are not a character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so at most three wait for the last one.
MAX_UNFINISHED = 3


def decode_streams(
    tokenizer: Tokenizer, chunks: Iterable[np.ndarray], num_rows: int, stop: Sequence[str] = ()
) -> Iterator[tuple[int, str]]:
    """Decodes rows of tokens that are generated together, to be printed one after the other.

    Args:
        tokenizer: decodes the tokens; its end tokens end a row.
        chunks: token ids, each (num_rows, C) with any C. Not read further when all rows have ended.
        num_rows: number of rows.
        stop: texts that end a row; they are not part of it.

    Yields:
        The index of a row, and the next piece of its text, which no later token can change. All pieces of a row come
        before those of the next: the first unfinished row is streamed, later rows wait for it.
    """
    decoders = [TextDecoder(tokenizer, stop) for _ in range(num_rows)]
    waiting, current = [""] * num_rows, 0
    for chunk in chunks:
        for row, decoder in enumerate(decoders):
            waiting[row] += decoder.add(chunk[row])
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
        text = waiting[row] + decoders[row].rest()
        if text:
            yield row, text


class TextDecoder:
    """Decodes one row of tokens piece by piece.

    Multi-byte characters are never split. The text ends at an end token of the tokenizer, or before the first stop
    text, even if that spans several tokens.

    Attributes:
        has_ended: whether an end token or a stop text was reached.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.has_ended = False
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._num_returned = 0  # characters

    def add(self, tokens: np.ndarray) -> str:
        """Adds tokens; returns the text that is new and that no later token can change."""
        if self.has_ended:
            return ""
        new = tokens.tolist()
        ends = [index for index, token in enumerate(new) if token in self._tokenizer.end_ids]
        self._tokens.extend(new[: min(ends, default=len(new))])
        text = self._tokenizer.decode(self._tokens)
        stops = [index for index in map(text.find, self._stop) if index >= 0]
        if stops or ends:
            self.has_ended = True
            return text[self._num_returned : min(stops, default=len(text))]
        # The last characters may begin a stop text, or change when their last bytes come.
        num_held_by_stop = max(map(len, self._stop), default=1) - 1
        num_unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_UNFINISHED)
        settled = max(len(text) - max(num_held_by_stop, num_unfinished), self._num_returned)
        piece, self._num_returned = text[self._num_returned : settled], settled
        return piece

    def rest(self) -> str:
        """The remaining text if no more tokens come."""
        return "" if self.has_ended else self._tokenizer.decode(self._tokens)[self._num_returned :]
