"""Scripts in docs/notebooks/ as pages: what a cell says in comments becomes text, its code a block of code.

`# %%` begins a cell of code, and `# %% [markdown]` one of text, as editors know them. The docstring of a script, and
comments that stand alone at the start of a cell, are text.

`python docs/hooks/scripts.py` writes them as Jupyter notebooks, too.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CELL = re.compile(r"^# ?%%[ \t]*(?P<kind>\[markdown\])?(?P<title>.*)$", re.MULTILINE)

INSTALL = """# Where the library is missing, as on Colab: what pip takes it from, "git+https://..." or a wheel.
SOURCE = ""
try:
    import flax_decoder
except ModuleNotFoundError:
    assert SOURCE, "set SOURCE first"
    %pip install --quiet {SOURCE}"""


def script_page(source: str, path: str) -> str:
    """The Markdown of a script.

    Args:
        source: the script.
        path: where it is in the repository; the page says so.
    """
    parts = []
    for text, code in cells(source):
        parts += [text] if text else []
        parts += [f"```python\n{code}\n```"] if code else []
    parts.append(f"The whole script: [`{path}`](../../{path}).")
    return "\n\n".join(parts) + "\n"


def notebook(source: str) -> str:
    """The script as a Jupyter notebook, whose first cell installs the library where it is missing."""
    (title, _), *rest = cells(source)
    written = [(title, INSTALL), *rest]
    content = [
        cell
        for text, code in written
        for cell in ([_cell("markdown", text)] if text else []) + ([_cell("code", code)] if code else [])
    ]
    for number, cell in enumerate(content):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    document = {"cells": content, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _cell(kind: str, text: str) -> dict[str, Any]:
    of_code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True), **of_code}


def cells(source: str) -> Iterator[tuple[str, str]]:
    """Text and code of each cell, the docstring first; one of them may be empty."""
    doc = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = doc.removeprefix("# ").partition("\n")
    if doc:
        yield f"# {title.removesuffix('.')}\n\n{rest.strip()}".strip(), ""
    body = re.sub(r'\A(?:#!.*\n)?\s*(?:r?""".*?"""|r?".*?")[ \t]*\n', "", source, flags=re.DOTALL) if doc else source
    marks = list(CELL.finditer(body))
    begins = [0, *(mark.end() for mark in marks)]
    ends = [*(mark.start() for mark in marks), len(body)]
    for mark, begin, end in zip([None, *marks], begins, ends, strict=True):
        text, code = _split(body[begin:end].strip("\n"), all_text=mark is not None and mark["kind"] is not None)
        if mark is not None and mark["title"].strip():
            text = f"## {mark['title'].strip()}\n\n{text}".strip()
        if text or code:
            yield text, code


def _split(cell: str, all_text: bool) -> tuple[str, str]:
    """The comments at the start of a cell as text, and its code."""
    lines = cell.splitlines()
    # A comment right above code is about that code, unless the cell is said to be text.
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if not all_text and count < len(lines) and lines[count].strip():
        count = 0
    text = "\n".join(line[1:].removeprefix(" ") for line in lines[:count])
    return text.strip(), "\n".join(lines[count:]).strip("\n")


if __name__ == "__main__":
    for script in sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.py")):
        script.with_suffix(".ipynb").write_text(notebook(script.read_text(encoding="utf-8")), encoding="utf-8")
