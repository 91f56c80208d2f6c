"""The difference between our logits and PyTorch's for each model family, in float32 on CPU.

    pip install -e ".[test,torch]" && python benchmarks/parity.py

The models are those of tests/test_families.py: random weights of a realistic scale, several shapes per family. Prints
the largest difference of a logit over the largest logit, for the worst shape of each family.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import numpy as np
import torch
from test_families import CONTEXT, SHAPES, V, loaded, torch_model


def difference(model_type: str, number: int) -> float:
    """The largest difference over the largest logit, for one shape of a family."""
    model, params, _ = loaded(model_type, number)
    tokens_BT = np.random.default_rng(1).integers(0, V, (2, CONTEXT)).astype(np.int32)
    with torch.no_grad():
        theirs_BTV = torch_model(model_type, number)(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()
    ours_BTV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT))
    return float(np.abs(ours_BTV - theirs_BTV).max() / np.abs(theirs_BTV).max())


def main() -> None:
    """Prints a row of a table for each family."""
    for model_type, shapes in SHAPES.items():
        worst = max(difference(model_type, number) for number in range(len(shapes)))
        print(f"| `{model_type}` | {len(shapes)} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    main()
