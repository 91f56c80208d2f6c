"""Invalid settings: refused before JAX is imported and before anything is written."""

import subprocess
import sys

import pytest

from flax_decoder.cli import main

# Settings, and a part of the message.
CASES = [
    (["optimizer.learning_rate=-0.001"], "optimizer.learning_rate = -0.001"),
    (["optimizer.learning_rate=nan"], "optimizer.learning_rate = nan"),
    (["optimizer.learning_rate=1e30", "optimizer.weight_decay=0"], "optimizer.learning_rate = 1e+30"),
    (["optimizer.weight_decay=1e6"], "weight_decay = 1000000.0 is more than 1"),
    (["training.num_steps=0"], "training.num_steps = 0"),
    (["model.embed_dim=16", "model.num_heads=3"], "embed_dim = 16 is not a multiple of num_heads = 3"),
    (["model.context_length=0"], "model.context_length = 0"),
    (["model.vocab_size=1000000000000"], "model.vocab_size = 1000000000000"),
    (["training.num_stepz=10"], "training.num_stepz"),
]
# Runs each line of stdin as a command; prints its exit code and whether JAX or NumPy was imported.
RUN_ALL = """
import sys
from flax_decoder.cli import main
for line in sys.stdin:
    code = main(line.rstrip("\\n").split("\\t"))
    print(f"{code} {'jax' in sys.modules or 'numpy' in sys.modules}", file=sys.stderr)
    print("---", file=sys.stderr)
"""


ROW = "Values: negative rate, zero steps, NaN, 1e30, heads not dividing, context 0"


@pytest.mark.fault(ROW)
def test_values_are_refused_before_anything_is_allocated(text, tmp_path, count_cases):
    lines = [
        "\t".join(["train", f"--data.path={text}", "--run.folder=run", *(f"--{setting}" for setting in settings)])
        for settings, _ in CASES
    ]
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    ends = run.stderr.split("---\n")[:-1]
    for (_, words), end in zip(CASES, ends, strict=True):
        *message, outcome = end.splitlines()
        assert outcome == "2 False", end
        assert message[0].startswith("error: ") and words in message[0] and len(message) <= 2, end
    assert list(tmp_path.iterdir()) == []
    count_cases(len(CASES))


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("model", [{"vocab_size": 2**24, "embed_dim": 2**24}, {"mlp_dim": 2**24, "num_layers": 9999}])
def test_a_model_larger_than_the_machine_is_refused(text, tmp_path, capsys, model):
    settings = [f"--model.{name}={value}" for name, value in model.items()]
    assert main(["train", f"--data.path={text}", f"--run.folder={tmp_path / 'run'}", *settings]) == 2
    error = capsys.readouterr().err
    assert "its weights and their gradients take at least" in error and error.count("\n") == 2
    assert not (tmp_path / "run").exists()
