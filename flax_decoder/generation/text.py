"""Token ids to text, as they are generated."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from flax_decoder.data.tokenizer import Tokenizer

# What a tokenizer gives for bytes that are not a character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Of a prompt, as many last tokens are decoded with the new ones: a word and its bytes need far fewer.
MAX_CONTEXT_TOKENS = 32


def decode_streams(
    tokenizer: Tokenizer,
    chunks: Iterable[np.ndarray],
    num_rows: int,
    stop: Sequence[str] = (),
    prompt: Sequence[int] = (),
) -> Iterator[tuple[int, str]]:
    """Decodes rows of tokens that are generated together, to be printed one after the other.

    Args:
        tokenizer: decodes the tokens; its end tokens end a row.
        chunks: token ids, each (num_rows, C) with any C. Not read further when all rows have ended.
        num_rows: number of rows.
        stop: texts that end a row; they are not part of it.
        prompt: the tokens before each row, without which a decoder may drop the space before the first word.

    Yields:
        The index of a row, and the next piece of its text, which no later token can change. All pieces of a row come
        before those of the next: the first unfinished row is streamed, later rows wait for it.
    """
    decoders = [TextDecoder(tokenizer, stop, prompt) for _ in range(num_rows)]
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
    """Decodes one row of tokens piece by piece; all pieces together are what decoding all tokens at once gives.

    The text ends at an end token of the tokenizer, or before the first stop text, even if that spans several tokens.

    Attributes:
        has_ended: whether an end token or a stop text was reached.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.has_ended = False
        self._tokenizer, self._stop = tokenizer, stop
        self._context = [*prompt[-MAX_CONTEXT_TOKENS:]]
        self._context_text = tokenizer.decode(self._context)
        self._tokens: list[int] = []
        self._num_settled = self._num_returned = 0  # characters that no token can change; of them, those returned

    def add(self, tokens: np.ndarray) -> str:
        """Adds tokens; returns the text that is new and that no later token can change."""
        if self.has_ended:
            return ""
        new = tokens.tolist()
        ends = [index for index, token in enumerate(new) if token in self._tokenizer.end_ids]
        self._tokens.extend(new[: min(ends, default=len(new))])
        text = self._text(self._tokens)
        if ends:
            self.has_ended = True
            return self._next(text)
        if not self._may_change(text):
            self._num_settled = len(text)
        return self._next(text[: self._num_settled])

    def rest(self) -> str:
        """The remaining text if no more tokens come."""
        if self.has_ended:
            return ""
        self.has_ended = True
        return self._next(self._text(self._tokens))

    def _text(self, tokens: list[int]) -> str:
        """The text of new tokens, with the space before them."""
        text = self._tokenizer.decode(self._context + tokens)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._tokenizer.decode(tokens)  # bytes that the prompt ends with

    def _may_change(self, text: str) -> bool:
        """Whether later tokens may change the end of the text of all tokens.

        Bytes that are no character yet show as U+FFFD. Some decoders show a whole run of byte tokens so if a single
        byte lacks, finished characters too: whether one more byte would do that is tried.
        """
        if text.endswith(REPLACEMENT):
            return True
        byte = self._tokenizer.lone_byte_id
        return byte is not None and not self._text([*self._tokens, byte]).startswith(text)

    def _next(self, text: str) -> str:
        """What comes next of a text that stays, up to a stop text or what may begin one."""
        stops = [index for index in map(text.find, self._stop) if index >= 0]
        end = len(text)
        if stops:
            self.has_ended, end = True, min(stops)
        elif not self.has_ended:
            end -= max((_length_begun(text, stop) for stop in self._stop), default=0)
        piece, self._num_returned = text[self._num_returned : end], end
        return piece


def _length_begun(text: str, stop: str) -> int:
    """The number of characters at the end of a text that begin a stop text, but are not all of it."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
