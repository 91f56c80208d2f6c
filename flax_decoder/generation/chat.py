"""Conversations with a model: messages in, streamed answers out. Earlier messages stay in the key/value cache."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from flax_decoder.data.chat_template import ChatTemplate
from flax_decoder.data.conversations import prompt_tokens
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import UserError
from flax_decoder.generation.generate import prefill
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.stream import Prefix, stream, supports_rolling_context
from flax_decoder.generation.text import decode_streams
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers


@dataclass(eq=False)
class Chat:
    """A conversation.

    Attributes:
        model: the network.
        params: its parameters.
        tokenizer: encodes messages and decodes answers; its end tokens end an answer.
        template: renders messages as text.
        rng: random key.
        sampling: how tokens are chosen.
        system: system message; it is never dropped.
        max_new_tokens: maximum length of an answer.
        messages: the conversation so far, each message with "role" and "content".
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    template: ChatTemplate
    rng: jax.Array
    sampling: Sampling
    system: str | None = field(default=None, kw_only=True)
    max_new_tokens: int = field(default=1000, kw_only=True)
    messages: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.params = unstack_layers(self.params)
        self._prefix: Prefix | None = None

    def answer(self, message: str) -> Generator[str, None, None]:
        """Adds a user message and yields the answer piece by piece.

        The pieces yielded so far are added to `messages` even if the generator is closed early.

        Raises:
            UserError: the template refuses the message, or it is longer than a context that cannot roll.
        """
        self.messages.append({"role": "user", "content": message})
        tokens = self._tokens()
        pieces: list[str] = []
        try:
            self._prefix = prefill(self.model, self.params, tokens, prefix=self._prefix)
            chunks = stream(
                self.model,
                self.params,
                [tokens],
                self.max_new_tokens,
                self.rng,
                self.sampling,
                end_ids=self.tokenizer.end_ids,
                prefix=self._prefix,
            )
            for _, piece in decode_streams(self.tokenizer, (chunk.tokens_BC for chunk in chunks), num_rows=1):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _tokens(self) -> np.ndarray:
        """The conversation as tokens; drops the oldest messages if a context that cannot roll is full."""
        config = self.model.config
        while True:
            tokens = np.asarray(prompt_tokens(self.messages, self.tokenizer, self.template), np.int32)
            if supports_rolling_context(config) or len(tokens) < config.context_length:
                return tokens
            oldest = 0 if self.system is None else 1
            if len(self.messages) <= oldest + 1:
                self.messages.pop()
                raise UserError(f"the message has {len(tokens)} tokens, the context only {config.context_length}")
            del self.messages[oldest : oldest + 2]
