"""The scripts in docs/notebooks run as their readers run them; what they claim, they assert themselves."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
from xla_flags import QUICK

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_a_jupyter_notebook_is_that_of_its_script(script: Path) -> None:
    written = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == scripts.notebook(script.read_text(encoding="utf-8")), "python docs/hooks/scripts.py writes it"
    cells = json.loads(written)["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    assert "%pip install" in cells[1]["source"][-1]
    code = "\n".join("".join(cell["source"]) for cell in cells[2:] if cell["cell_type"] == "code")
    whole = ast.parse(script.read_text(encoding="utf-8")).body[1:]  # without the docstring
    assert ast.dump(ast.Module(ast.parse(code).body, [])) == ast.dump(ast.Module(whole, []))


def test_there_are_notebooks() -> None:
    assert {"attention_by_hand", "induction"} <= {notebook.stem for notebook in NOTEBOOKS}


@pytest.mark.short("attention_by_hand")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_and_leaves_nothing_behind(notebook: Path, tmp_path: Path) -> None:
    # Where a model is trained, the programs must be fast ones.
    environment = os.environ | {"XLA_FLAGS": "" if notebook.stem == "induction" else QUICK}
    command = [sys.executable, "-W", "error", str(notebook)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
