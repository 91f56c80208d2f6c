"""Conversations and instructions as data: a line of JSON -> token ids, and which of them carry loss.

Only what the assistant says is learned, with the token that ends its turn. A message is text: a special token that
somebody has typed into one stays the characters it is written with.
"""

import array
import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from flax_decoder.data.chat_template import ChatTemplate, Message
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.data.windows import Examples
from flax_decoder.errors import UserError
from flax_decoder.io.strict_json import Limits, parse_object, shown

LINE = Limits(10_000_000, 100_000_000)
"""One example: a long conversation has some 100,000 bytes."""
_KINDS = ({"messages"}, {"prompt", "completion"})
_ADVICE = "each line must be one JSON object: of an array, jq -c '.[]' OLD.json > NEW.jsonl makes lines"
_KEYS = 'the keys of an example are "messages", or "prompt" and "completion"'
# Characters that no text has: Unicode gives them to nobody.
_UNUSED = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Example:
    """One line of data.

    Attributes:
        source: file and line, the start of error messages.
        messages: a conversation that ends with an answer.
        is_prompt: it was given as "prompt" and "completion", which are text where there is no template.
    """

    source: str
    messages: tuple[Message, ...]
    is_prompt: bool = False


def begins_with_example(file: BinaryIO, text_field: str) -> bool:
    """Whether the first line of a file is an example, by its keys; one with the field `text_field` is a text."""
    lines = (line.removeprefix(codecs.BOM_UTF8) for line in iter(lambda: file.readline(LINE.num_bytes), b""))
    try:
        document = json.loads(next(filter(bytes.strip, lines), b""))
    except (ValueError, RecursionError):
        return False
    is_object = isinstance(document, dict) and text_field not in document
    return is_object and any(keys <= document.keys() for keys in _KINDS)


def read_examples(file: BinaryIO, name: str) -> Iterator[Example]:
    """The examples in a file of JSON lines; lines without content are passed over.

    Args:
        file: open for reading; it is read line by line.
        name: of the file, for error messages.

    Raises:
        UserError: a line is no example (the message has its number), or there is none.
    """
    found = False
    for number in itertools.count(1):
        line = file.readline(LINE.num_bytes + 1)
        if not line:
            break
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            found = True
            source = f"{name}, line {number}"
            yield example_of(parse_object(line, source, LINE, _ADVICE), source)
    if not found:
        raise UserError(f"{name}: has no example; {_ADVICE}")


def example_of(document: dict[str, Any], source: str) -> Example:
    """The example in a JSON object: {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}.

    Args:
        document: the parsed object.
        source: start of error messages, such as a file and a line.

    Raises:
        UserError: a key is unknown or missing, a text is none, or the roles are out of order.
    """
    keys = document.keys()
    if keys == _KINDS[0]:
        return Example(source, _checked_messages(document["messages"], source))
    if keys == _KINDS[1]:
        for key in ("prompt", "completion"):
            _require_text(document[key], key, source)
        roles = {"user": document["prompt"], "assistant": document["completion"]}
        return Example(source, tuple({"role": role, "content": text} for role, text in roles.items()), is_prompt=True)
    unknown = sorted(keys - set().union(*_KINDS))
    if unknown:
        raise UserError(f"{source}: has the unknown key {shown(unknown[0])}; {_KEYS}")
    raise UserError(f"{source}: has {', '.join(map(shown, sorted(keys))) or 'no key'}; {_KEYS}")


def _checked_messages(messages: Any, source: str) -> tuple[Message, ...]:
    """The messages of a conversation: a system message or none, then user and assistant in turn, an answer last."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{source}: messages = {shown(messages)} must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UserError(f'{source}: message {number} is {shown(message)}, but must have "role" and "content" only')
        _require_text(message["content"], f"the content of message {number}", source)
    first = 1 if messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[first:]):
        wanted = "user" if index % 2 == 0 else "assistant"
        if message["role"] != wanted:
            raise UserError(
                f"{source}: message {first + index + 1} has the role {shown(message['role'])}, but it is the turn of "
                f'"{wanted}": after "system", which may be left out, "user" and "assistant" take turns'
            )
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{source}: the last message must be of the assistant: only what it says is learned")
    return tuple(messages)


def _require_text(value: Any, what: str, source: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{source}: {what} = {shown(value)} must be a text")


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    context_length: int,
    name: str = "the conversations",
) -> Examples:
    """Examples as tokens. One longer than a window is cut at its end; one of which nothing can be learned is dropped.

    Args:
        examples: read one by one.
        tokenizer: of the model.
        template: of the model; without one, only prompts and completions can be encoded, as text.
        context_length: T; a window has T + 1 tokens.
        name: start of the error message if none is left.

    Raises:
        UserError: an example cannot be encoded, or none is left.
    """
    tokens, learned, ends = array.array("i"), bytearray(), array.array("q")
    num_truncated = num_dropped = 0
    for example in examples:
        ids, is_learned = encode_example(example, tokenizer, template)
        kept, is_kept = ids[: context_length + 1], is_learned[: context_length + 1]
        if not any(is_kept[1:]):  # the first token of a window is no target
            num_dropped += 1
            continue
        num_truncated += len(kept) < len(ids)
        tokens.extend(kept)
        learned.extend(is_kept)
        ends.append(len(tokens))
    if not ends:
        raise UserError(
            f"{name}: no example is left of {num_dropped}: within model.context_length = {context_length} none has an "
            "answer; use a larger one or shorter examples"
        )
    return Examples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(learned, np.bool_),
        np.frombuffer(ends, np.int64),
        num_truncated,
        num_dropped,
    )


def encode_example(
    example: Example, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[list[int], list[bool]]:
    """The tokens of an example, and for each whether it is learned.

    A conversation is rendered by the template, whose marks `{% generation %}` say what is learned. Without marks it is
    what follows the prompt of an answer, up to the special token that ends the turn. A prompt and its completion are a
    conversation too; without a template they are one text, after which the end token of the tokenizer is learned.

    Raises:
        UserError: there is no template for a conversation, the template refuses it, or the prompt of an answer is not
            how the conversation begins, in its text or in its tokens.
    """
    try:
        if template is None:
            return _encode_text(example, tokenizer)
        return _encode_conversation(_Said(example.messages, tokenizer), template)
    except UserError as error:
        raise UserError(f"{example.source}: {error}") from None


def turn_ends(examples: Examples, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end answers, ascending: at them generation must end, whatever a folder names."""
    is_last = np.append(~examples.learned[1:], True)
    is_last[examples.ends - 1] = True
    special = [tokenizer.token_id(token) for token in tokenizer.special_tokens]
    return tuple(id for id in np.unique(examples.tokens[examples.learned & is_last]).tolist() if id in special)


def prompt_tokens(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The tokens of a conversation up to the start of the next answer, as `encode_example` has them.

    Raises:
        UserError: the template refuses the messages.
    """
    said = _Said(messages, tokenizer)
    return said.encode(template.render(said.messages))


def _encode_text(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not example.is_prompt:
        raise UserError(
            "is a conversation, but the model has no chat template;\n"
            'put a chat_template.jinja beside its tokenizer.json, or give "prompt" and "completion"'
        )
    prompt, completion = (message["content"] for message in example.messages)
    ids = tokenizer.encode_prompt(prompt + completion)
    num_before = _num_tokens(tokenizer.encode_prompt(prompt), ids)
    ids += tokenizer.end_ids[:1]
    return ids, [index >= num_before for index in range(len(ids))]


def _encode_conversation(said: "_Said", template: ChatTemplate) -> tuple[list[int], list[bool]]:
    text, spans = _marked_spans(said, template) or _answer_spans(said, template)
    ids = said.encode(text)
    is_learned = [False] * len(ids)
    for start, end in spans:
        first, before_end = _num_tokens(said.encode(text[:start]), ids), said.encode(text[:end])
        last = _num_common(before_end, ids)
        last += last < len(before_end)  # a token that the end is in
        is_learned[first:last] = [True] * (last - first)
    return ids, is_learned


def _num_tokens(first: list[int], ids: list[int]) -> int:
    """How many tokens a beginning has. Raises UserError if they are not those that the whole begins with."""
    if ids[: len(first)] != first:
        raise UserError(
            "the tokenizer joins the end of a prompt with the start of its answer;\n"
            "end the prompt without white space, or begin the answer without it"
        )
    return len(first)


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The number of equal elements at the start of both."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])


class _Said:
    """Messages in which special tokens are parted by a character, the joint, that leaves no token.

    So those that somebody has typed are text, and those that the template writes are tokens.
    """

    def __init__(self, messages: Sequence[Message], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        contents = [message["content"] for message in messages]
        unused = [character for character in _UNUSED if not any(character in content for content in contents)]
        if len(unused) < 2:
            raise UserError("the messages have all characters from U+FDD0 to U+FDEF, which Unicode gives to nobody")
        self._joint, self.mark = unused[:2]
        pattern = _pattern(tokenizer.special_tokens)
        self._is_parted = pattern is not None and any(map(pattern.search, contents))
        if pattern is not None and self._is_parted:
            contents = [pattern.sub(lambda found: found[0][0] + self._joint + found[0][1:], text) for text in contents]
        self.messages = [{**message, "content": text} for message, text in zip(messages, contents, strict=True)]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that has these messages in it."""
        return self.tokenizer.encode_parted(text, self._joint) if self._is_parted else self.tokenizer.encode(text)


@functools.lru_cache(8)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds any of some texts, the longest first; None if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


Spans = tuple[str, list[tuple[int, int]]]
"""The text of a conversation, and start and end of each part of it that is learned."""


def _marked_spans(said: _Said, template: ChatTemplate) -> Spans | None:
    """What the template marks; None if it has no marks."""
    parts = template.render(said.messages, add_generation_prompt=False, mark=said.mark).split(said.mark)
    if len(parts) == 1:
        return None
    text, ends = "".join(parts), [*itertools.accumulate(map(len, parts))]
    if text != template.render(said.messages, add_generation_prompt=False):
        raise UserError(f"{template.name}: its text depends on its {{% generation %}} marks; put them around all of it")
    return text, [*zip(ends[:-1:2], ends[1::2], strict=True)]


def _answer_spans(said: _Said, template: ChatTemplate) -> Spans:
    """What follows the prompt of each answer, up to the special token that ends it."""
    text = template.render(said.messages, add_generation_prompt=False)
    special = _pattern((*said.tokenizer.special_tokens, *template.special_tokens))
    spans = list[tuple[int, int]]()
    for index, message in enumerate(said.messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(said.messages[:index])
        with_answer = template.render(said.messages[: index + 1], add_generation_prompt=False)
        start, border = len(prompt), _num_common(with_answer, text)
        content = message["content"].strip()
        found = text.find(content, start, border)
        after = start if found < 0 else found + len(content)
        end = special and special.search(text, after, border)
        if not text.startswith(prompt) or (found > start and special and special.search(text, start, found)):
            reason = "the prompt of an answer is not how the conversation with it begins"
        elif not end and border < len(with_answer):
            reason = "an answer is not the same once messages follow it"
        else:
            spans.append((start, end.end() if end else border))
            continue
        raise UserError(
            f"{template.name}: cannot tell what is learned of message {index + 1}: {reason};\n"
            "put {% generation %} and {% endgeneration %} around what it says, or give each answer a line of its own"
        )
    return text, spans
