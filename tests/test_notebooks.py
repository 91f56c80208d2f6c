"""The scripts in docs/notebooks run as their readers run them; what they claim, they assert themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import QUICK

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.py"))


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
