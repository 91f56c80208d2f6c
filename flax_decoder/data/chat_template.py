"""Chat templates: conversations to text.

A template is a Jinja program, by the convention of Hugging Face `transformers`: it formats the messages with the
special tokens that the model was trained on. It is downloaded code, so it runs in a sandbox.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flax_decoder.data.corpus import decode_text
from flax_decoder.data.special_tokens import read_special_tokens, read_tokenizer_config
from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_inside, read_content

_MAX_TEMPLATE_BYTES = 1_000_000  # real ones have up to 20,000

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the model is trained to write. It changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements up to `{% endgeneration %}`, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


class ChatTemplate:
    """Formats a conversation as the text that a model continues with its answer."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = "chat template"):
        """Compiles a template.

        Args:
            source: the Jinja program.
            special_tokens: its further variables, such as bos_token, with their texts.
            name: start of error messages.

        Raises:
            UserError: the program cannot be compiled.
        """
        self._name, self._special_tokens = name, dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja compiles to Python, whose compiler can fail in other ways
            raise UserError(f"{name}: cannot be used: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to the start of the next answer.

        Raises:
            UserError: the template refuses the messages, for example a system message, or fails.
        """
        try:
            # Templates ask whether there are tools and documents, which a conversation here never has.
            variables = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special_tokens}
            return self._template.render(messages=messages, **variables)
        except Exception as error:  # a template is a program: anything can fail
            raise UserError(f"{self._name}: refuses these messages: {error}") from None


def load_chat_template(folder: Path) -> ChatTemplate:
    """Reads the chat template of a model folder: chat_template.jinja, or "chat_template" in tokenizer_config.json.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    document = read_tokenizer_config(folder)
    source = document.get("chat_template")
    if os.path.lexists(file):
        content = read_content(open_inside(folder, file.name), _MAX_TEMPLATE_BYTES, str(file))
        source = decode_text(content, str(file), "get it again")
    if isinstance(source, list):  # several named templates
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: has no chat template: no chat_template.jinja, no chat_template in tokenizer_config.json;\n"
            f"a model that was not trained on conversations can continue a text: flax-decoder generate {folder}"
        )
    special_tokens = read_special_tokens(folder, document)
    return ChatTemplate(source, special_tokens, str(file if os.path.lexists(file) else path))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
