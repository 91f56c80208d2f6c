"""Links from pages to lines of source, which cannot rot: the line is looked up by the name of what stands there.

A page links to a file of the repository as any Markdown does, `[text](../flax_decoder/nn/attention.py)`, and to what is
in it by a name behind it: `#SelfAttention.__call__`, or `#SelfAttention.__call__.q_BTNH` for the line where that
function first sets q_BTNH. Where the repository is browsed the link opens the file. In the site it leads to the line in
a page that shows the file. A file or a name that is not there is a ValueError.
"""

import ast
import html
import posixpath
import re
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

# A block of code, which may be indented and ends as it began; or a link.
BLOCK_OR_LINK = re.compile(
    r"(?P<block>^(?P<indent> *)(?P<ticks>```+).*?^(?P=indent)(?P=ticks) *$)"
    r"|\]\((?P<path>[^)\s#]+)(?:#(?P<name>[^)\s]*))?\)",
    re.DOTALL | re.MULTILINE,
)
# What a browser loads by itself, from another server.
FOREIGN = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def rewrite_links(markdown: str, page: str, root: Path) -> tuple[str, set[str]]:
    """Turns links to files of the repository into links to the pages that show them.

    Args:
        markdown: a page.
        page: its path in docs/, which links are relative to.
        root: the repository.

    Returns:
        The page, and the paths in the repository of the files it links to.

    Raises:
        ValueError: a link to a file, or to a name in one, that is not there.
    """
    linked = set()

    def rewrite(match: re.Match[str]) -> str:
        path = match["path"]
        if match["block"] or ":" in path or path.startswith("/"):
            return match[0]
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
        if target.startswith("docs/") and not target.endswith(".py"):
            return match[0]
        if not (root / target).is_file():
            raise ValueError(f"docs/{page}: the link to {path} leads to no file")
        if target.startswith("docs/notebooks/"):  # it has a page, which says where the script is
            rendered = target.removeprefix("docs/").removesuffix(".py") + ".md"
            if rendered != page:
                return f"]({posixpath.relpath(rendered, posixpath.dirname(page) or '.')})"
        linked.add(target)
        try:
            anchor = f"#L{line_of(root / target, match['name'])}" if match["name"] else ""
        except ValueError as error:
            raise ValueError(f"docs/{page}: the link to {path}#{match['name']}: {error}") from None
        return f"]({posixpath.relpath(page_of(target), posixpath.dirname(page) or '.')}{anchor})"

    return BLOCK_OR_LINK.sub(rewrite, markdown), linked


def page_of(path: str) -> str:
    """The page in docs/ that shows a file of the repository."""
    return f"source/{path}.md"


def line_of(file: Path, name: str) -> int:
    """The line, from 1 on, on which a file defines a name such as `SelfAttention.__call__.q_BTNH`.

    Raises:
        ValueError: there is no such name in it.
    """
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        section, _, field = name.rpartition(".")
        text, start = source, 0
        if section:
            head = re.search(rf"^\[{re.escape(section)}\]$", source, re.MULTILINE)
            text, start = (source[head.end() :].partition("\n[")[0], head.end()) if head else ("", 0)
        found = re.search(rf"^{re.escape(field)} *=|^\[{re.escape(field)}\]$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"there is no {name} in {file.name}")
        return source.count("\n", 0, start + found.start()) + 1
    if file.suffix != ".py":
        raise ValueError("only Python and TOML have names; link to the file alone")
    place: ast.AST = ast.parse(source)
    for part in name.split("."):
        found_node = next((node for node in _statements(place) if part in _names(node)), None)
        if found_node is None:
            raise ValueError(f"there is no {part} of {name} in {file.name}")
        place = found_node
    return place.lineno


def _statements(place: ast.AST) -> list[ast.AST]:
    """What stands in a module, class or function in the order of lines, but not inside of its classes and functions."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(place):
        if isinstance(node, ast.stmt | ast.arg | ast.NamedExpr):
            found.append(node)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found.extend(_statements(node))
    return sorted(found, key=lambda node: node.lineno)


def _names(node: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For | ast.NamedExpr):
        targets = [node.target]
    elif isinstance(node, ast.With):
        targets = [item.optional_vars for item in node.items if item.optional_vars is not None]
    else:
        return set()
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def source_page(path: str, root: Path) -> str:
    """A page that shows a file of the repository; line n has the anchor `Ln`, as on most code hosts."""
    source = (root / path).read_text(encoding="utf-8")
    # Without a wrapper, every line comes with its own tags, opened and closed.
    lines = highlight(source, get_lexer_for_filename(path, stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    width = len(str(len(lines)))
    shown = "\n".join(
        f'<span id="L{n}"><a href="#L{n}" data-linenos="{n:{width}} "></a>{line}</span>'
        for n, line in enumerate(lines, start=1)
    )
    return (
        f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# `{path}`\n\n"
        f'<div class="highlight source" data-path="{html.escape(path)}"><pre><code>{shown}\n</code></pre></div>\n'
    )


def foreign_loads(page: str) -> list[str]:
    """What a page of HTML would load from other servers."""
    return FOREIGN.findall(page)
