"""Talking to a model: messages in, an answer out, and no message read twice."""

from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from flax_decoder.data.chat_template import ChatTemplate
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import UserError
from flax_decoder.generation.generate import prefill
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.stream import Prefix, rolls, stream
from flax_decoder.generation.text import decode_stream
from flax_decoder.nn.decoder import Decoder, unstack_layers


class Chat:
    """A conversation.

    Attributes:
        messages: what was said, each with "role" and "content".
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        rng: jax.Array,
        sampling: Sampling,
        *,
        system: str | None = None,
        max_new_tokens: int = 1000,
    ):
        """Begins a conversation.

        Args:
            model: the network.
            params: its parameters.
            tokenizer: what its tokens mean; its end tokens end an answer.
            template: how messages become text.
            rng: random key.
            sampling: how tokens are chosen.
            system: what the model is told before the first message.
            max_new_tokens: the most that an answer can have.
        """
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._num_kept = len(self.messages)
        self._model, self._params = model, unstack_layers(params)
        self._tokenizer, self._template = tokenizer, template
        self._rng, self._sampling, self._max_new_tokens = rng, sampling, max_new_tokens
        self._prefix: Prefix | None = None

    def answer(self, message: str) -> Generator[str, None, None]:
        """Says something, and yields the answer piece by piece.

        What was yielded is part of the conversation, also where the rest is not waited for.

        Raises:
            UserError: the template refuses the message, or it is longer than a context that has an end.
        """
        self.messages.append({"role": "user", "content": message})
        tokens = self._tokens()
        pieces: list[str] = []
        try:
            self._prefix = prefill(self._model, self._params, tokens, prefix=self._prefix)
            written = stream(
                self._model,
                self._params,
                [tokens],
                self._max_new_tokens,
                self._rng,
                self._sampling,
                end_ids=self._tokenizer.end_ids,
                prefix=self._prefix,
            )
            for piece in decode_stream(self._tokenizer, (part.tokens_BC[0] for part in written)):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _tokens(self) -> np.ndarray:
        """The conversation; where the context ends, without the oldest messages that do not fit."""
        config = self._model.config
        while True:
            tokens = np.asarray(self._tokenizer.encode(self._template.render(self.messages)), np.int32)
            if rolls(config) or len(tokens) < config.context_length:
                return tokens
            if len(self.messages) <= self._num_kept + 1:
                self.messages.pop()
                raise UserError(f"the message has {len(tokens)} tokens, the context only {config.context_length}")
            del self.messages[self._num_kept : self._num_kept + 2]
