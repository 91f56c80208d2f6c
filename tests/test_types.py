"""What a type checker sees of the library, in a script of a user."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flax_decoder

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import jax
import numpy as np

import flax_decoder as fd

config = fd.load_config("tiny")
model = fd.Decoder(config.model)
state = fd.init_state(model, config, rng=jax.random.key(0))
tokens_BT = np.zeros((2, 9), np.int32)
state, metrics = fd.train_step(state, {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]})
reveal_type(state)
reveal_type(metrics)
reveal_type(metrics["loss"])
reveal_type(fd.eval_step(state, {"inputs": tokens_BT, "targets": tokens_BT}))
loaded, params, tokenizer = fd.load("runs/default")
reveal_type(loaded)
reveal_type(tokenizer)
reveal_type(fd.generate(model, params, [[1, 2], [3]], 5, jax.random.key(0)))
reveal_type(fd.complete(model, params, [[1, 2], [3]], 5))
reveal_type(fd.compare("runs/default"))
reveal_type(fd.empty_cache(config.model, 2, 9))
reveal_type(state.replace(step=state.step))
reveal_type(fd.__version__)
"""
SEEN = [
    "TrainState",
    "dict[str, Array]",
    "Array",
    "dict[str, Array]",
    "Decoder",
    "Tokenizer | None",
    "Array | list[Array]",
    "list[list[Completion]]",
    "Ledger",
    "KVCache",
    "TrainState",
    "str",
]


def test_the_package_says_that_it_has_types():
    assert (ROOT / "flax_decoder/py.typed").is_file()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setuptools["package-data"]["flax_decoder"] == ["py.typed"]
    assert setuptools["package-dir"] == {"": "."}  # or an editable install is a hook, which checkers cannot follow
    assert {"Decoder", "__version__"} <= set(dir(flax_decoder))


@pytest.mark.full
def test_a_script_is_checked_strictly_and_sees_no_any(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "script.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    for long in (
        "jax._src.basearray.",
        "flax_decoder.",
        "training.step.",
        "nn.decoder.",
        "nn.cache.",
        "data.tokenizer.",
        "generation.generate.",
        "comparison.ledger.",
    ):
        lines = [line.replace(long, "") for line in lines]
    assert [line.partition('type is "')[2].rstrip('"') for line in lines[:-1]] == SEEN, result.stdout
    assert result.returncode == 0
