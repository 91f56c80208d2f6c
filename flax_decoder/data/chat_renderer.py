"""Renders chat templates: in a process of its own, which the system ends when it takes too much memory or time.

A template is somebody else's program. The sandbox of Jinja keeps it from files, but not from `'a' * 2000000000`, which
Jinja may compute when it compiles. The process imports nothing of this package, and its environment is empty. It reads
requests and writes replies, one JSON object a line, until its standard input ends.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 500_000_000
"""Memory of the process; Python and Jinja take 40 MB of it."""
MAX_SECONDS = 5
"""Processor time of one request; real ones take milliseconds."""
MAX_CHARACTERS = 20_000_000
"""Of a rendered text, well above any context."""
_MAX_REASON_CHARACTERS = 500


MARK = "generation_mark"
"""The variable that stands at both ends of what the model is trained to write."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the model is trained to write. It changes nothing of the text but for the mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements up to `{% endgeneration %}`, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (jinja2.nodes.Output([jinja2.nodes.Name(MARK, "load")], lineno=line) for _ in range(2))
        return [start, jinja2.nodes.Scope(body, lineno=line), end]


@functools.lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment.from_string(source)


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


def reply_to(request: Mapping[str, Any]) -> dict[str, str]:
    """Compiles a template and, if the request has variables, renders it.

    Args:
        request: "source", and "variables" or None.

    Returns:
        "text", or "error": the reason why there is none.
    """
    try:
        template = _compiled(request["source"])
        text = "" if request["variables"] is None else template.render(request["variables"])
        if len(text) > MAX_CHARACTERS:
            return {"error": f"it makes a text of {len(text):,} characters, over the limit of {MAX_CHARACTERS:,}"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it takes over {MAX_BYTES:,} bytes of memory"}
    except Exception as error:  # a template is a program: anything can fail, and so can the compiler of Python
        return {"error": " ".join(str(error).split())[:_MAX_REASON_CHARACTERS] or type(error).__name__}


def main(max_seconds: float) -> None:
    """Replies to requests, each in at most `max_seconds` of processor time, until there are no more."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, max_seconds)  # its signal ends the process, whatever it is doing
        reply = json.dumps(reply_to(request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
