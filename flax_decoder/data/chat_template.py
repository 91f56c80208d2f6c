"""Chat templates: conversations to text.

A template is a Jinja program, by the convention of Hugging Face `transformers`: it formats the messages with the
special tokens that the model was trained on. It is downloaded code, so it runs in a sandbox, in a process of its own.
"""

import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_decoder.data import chat_renderer
from flax_decoder.data.formats.texts import decode_text
from flax_decoder.data.special_tokens import read_special_tokens, read_tokenizer_config
from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.line_process import LineProcess

# Of the environment of the process that renders: where Python and its libraries are, and the time of day.
_PASSED_ON = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
CHAT_TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1_000_000  # real ones have up to 20,000

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class _Renderer:
    """The process of `chat_renderer.py`: started with the first request, and again after one that has ended it."""

    def __init__(self) -> None:
        self._process: LineProcess | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, source: str, variables: Mapping[str, Any] | None) -> str:
        """The text of a template; without variables it is only compiled.

        Raises:
            ValueError: the reason why there is none.
        """
        with self._lock:
            try:
                reply = self._exchange({"source": source, "variables": variables})
            except BaseException:  # such as Ctrl-C: the reply would be taken for that of the next request
                self.close()
                raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return str(reply["text"])

    def _exchange(self, request: dict[str, Any]) -> dict[str, str]:
        process = self._process = self._process or self._start()
        reply = process.exchange(request)
        if reply is not None:
            return dict(reply)
        code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return {"error": f"it takes over {chat_renderer.MAX_SECONDS} seconds"}
        return {"error": f"the process that renders it ended with code {code}"}

    def _start(self) -> LineProcess:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        arguments = ["-P", chat_renderer.__file__, str(chat_renderer.MAX_SECONDS)]
        return LineProcess(arguments, environment, is_quiet=True)

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.close()


_renderer = functools.cache(_Renderer)


class ChatTemplate:
    """Formats a conversation as the text that a model continues with its answer.

    Attributes:
        name: start of error messages.
        special_tokens: the texts of its special tokens.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = "chat template"):
        """Compiles a template.

        Args:
            source: the Jinja program.
            special_tokens: its further variables, such as bos_token, with their texts.
            name: start of error messages.

        Raises:
            UserError: the program cannot be compiled.
        """
        self.name, self._variables = name, dict(special_tokens)
        self.special_tokens = tuple(self._variables.values())
        self._source = source
        self._render(None, "cannot be used")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, mark: str = "") -> str:
        """The text of a conversation.

        Args:
            messages: in order.
            add_generation_prompt: ends it with the start of the next answer.
            mark: stands at both ends of each `{% generation %}` block.

        Raises:
            UserError: the template refuses the messages, for example a system message, or fails.
        """
        # Templates ask whether there are tools and documents, which a conversation here never has.
        variables = {"tools": None, "documents": None, **self._variables, chat_renderer.MARK: mark}
        conversation = {"add_generation_prompt": add_generation_prompt, "messages": list(map(dict, messages))}
        return self._render(variables | conversation, "refuses these messages")

    def _render(self, variables: Mapping[str, Any] | None, complaint: str) -> str:
        try:
            return _renderer().render(self._source, variables)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.name}: {complaint}: {error}") from None


def load_chat_template(folder: Path) -> ChatTemplate:
    """Reads the chat template of a model folder.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    template = find_chat_template(folder)
    if template is None:
        raise UserError(
            f"{folder}: has no chat template: no chat_template.jinja, no chat_template in tokenizer_config.json;\n"
            f"a model that was not trained on conversations can continue a text: flax-decoder generate {folder}"
        )
    return template


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a model folder: chat_template.jinja, or "chat_template" in tokenizer_config.json; else None.

    Raises:
        UserError: it cannot be used.
    """
    path, file = folder / "tokenizer_config.json", folder / CHAT_TEMPLATE
    document = read_tokenizer_config(folder)
    source = document.get("chat_template")
    if os.path.lexists(file):
        content = read_content(open_inside(folder, file.name), MAX_TEMPLATE_BYTES, str(file))
        source = decode_text(content, str(file), "get it again")
    if isinstance(source, list):  # several named templates
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        return None
    special_tokens = read_special_tokens(folder, document)
    return ChatTemplate(source, special_tokens, str(file if os.path.lexists(file) else path))
