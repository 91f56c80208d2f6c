"""Scripts in docs/notebooks/ as pages: what a cell says in comments becomes text, its code a block of code.

`# %%` begins a cell of code, and `# %% [markdown]` one of text, as editors know them. The docstring of a script, and
comments that stand alone at the start of a cell, are text.
"""

import ast
import re

CELL = re.compile(r"^# ?%%[ \t]*(?P<kind>\[markdown\])?(?P<title>.*)$", re.MULTILINE)


def script_page(source: str, path: str) -> str:
    """The Markdown of a script.

    Args:
        source: the script.
        path: where it is in the repository; the page says so.
    """
    doc = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = doc.removeprefix("# ").partition("\n")
    parts = [f"# {title.removesuffix('.')}", rest.strip()] if doc else []
    body = re.sub(r'\A(?:#!.*\n)?\s*(?:r?""".*?"""|r?".*?")[ \t]*\n', "", source, flags=re.DOTALL) if doc else source
    marks = list(CELL.finditer(body))
    begins = [0, *(mark.end() for mark in marks)]
    ends = [*(mark.start() for mark in marks), len(body)]
    for mark, begin, end in zip([None, *marks], begins, ends, strict=True):
        if mark is not None and mark["title"].strip():
            parts.append(f"## {mark['title'].strip()}")
        text, code = _split(body[begin:end].strip("\n"), all_text=mark is not None and mark["kind"] is not None)
        parts += [text] if text else []
        parts += [f"```python\n{code}\n```"] if code else []
    parts.append(f"The whole script: [`{path}`](../../{path}).")
    return "\n\n".join(filter(None, parts)) + "\n"


def _split(cell: str, all_text: bool) -> tuple[str, str]:
    """The comments at the start of a cell as text, and its code."""
    lines = cell.splitlines()
    # A comment right above code is about that code, unless the cell is said to be text.
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if not all_text and count < len(lines) and lines[count].strip():
        count = 0
    text = "\n".join(line[1:].removeprefix(" ") for line in lines[:count])
    return text.strip(), "\n".join(lines[count:]).strip("\n")
