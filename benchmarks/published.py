"""The difference between our logits and those of `transformers` for published settings, old and new.

    pip install -e ".[test,torch]" && python benchmarks/published.py

The settings are those of tests/test_published.py, at small sizes with random weights. Prints a row of a table for each
family: how many open, the largest difference of a logit over the largest logit, and why the others do not open.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import numpy as np
from test_published import NOT_IN_TRANSFORMERS, OPENS, REFUSED, TOKENS_BT, torch_logits, torch_model

import flax_decoder as fd


def difference(document: dict[str, Any]) -> float:
    """The largest difference over the largest logit, for the settings of a config.json."""
    theirs = torch_model(document)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        Path(folder, "config.json").write_text(json.dumps(document), encoding="utf-8")
        ours, params, _ = fd.load(folder)
    theirs_BTV = torch_logits(theirs)
    ours_BTV = np.asarray(jax.jit(ours.apply)({"params": params}, TOKENS_BT.astype(np.int32)))
    return float(np.abs(ours_BTV - theirs_BTV).max() / np.abs(theirs_BTV).max())


def main() -> None:
    """Prints a row of a table for each family, then a line for each that is refused."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    differences = defaultdict(list)
    for name, document in OPENS.items():
        if name not in NOT_IN_TRANSFORMERS:
            differences[document["model_type"]].append(difference(document))
    print("| Family | Published settings that open | Largest difference |\n|---|---|---|")
    for model_type, found in differences.items():
        print(f"| `{model_type}` | {len(found)} | {max(found):.1e} |", flush=True)
    print("\n| Refused | Because of |\n|---|---|")
    for name, (_, reason) in REFUSED.items():
        print(f"| {name} | {reason} |")


if __name__ == "__main__":
    main()
