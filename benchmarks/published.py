"""The difference between our logits and those of `transformers` for published settings, old and new.

    pip install -e ".[test,torch]" && python benchmarks/published.py [docs/hugging_face.md]

The settings are those of tests/test_published.py, at small sizes with random weights. Prints a row of a table for each
family: how many open, the largest difference of a logit over the largest logit, and why the others do not open. Given
the page, it writes the table there.
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

import numpy as np
from test_published import NOT_IN_TRANSFORMERS, OPENS, REFUSED, TOKENS_BT, torch_logits, torch_model

import flax_decoder as fd

HEADER = "| Family | Published settings that open | Largest difference |"


def difference(document: dict[str, Any]) -> float:
    """The largest difference over the largest logit, for the settings of a config.json."""
    theirs = torch_model(document)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        Path(folder, "config.json").write_text(json.dumps(document), encoding="utf-8")
        ours, params, _ = fd.load(folder)
    theirs_BTV = torch_logits(theirs)
    ours_BTV = np.asarray(ours.apply({"params": params}, TOKENS_BT.astype(np.int32)))  # compiling 150 takes longer
    return float(np.abs(ours_BTV - theirs_BTV).max() / np.abs(theirs_BTV).max())


def main() -> None:
    """Prints a row of a table for each family, then a line for each that is refused; writes the table into a page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    differences = defaultdict(list)
    for name, document in OPENS.items():
        if name not in NOT_IN_TRANSFORMERS:
            differences[document["model_type"]].append(difference(document))
    table = [HEADER, "|---|---|---|"]
    table += [f"| `{model_type}` | {len(found)} | {max(found):.1e} |" for model_type, found in differences.items()]
    print(*table, sep="\n")
    for page in map(Path, sys.argv[1:]):
        before, _, rest = page.read_text(encoding="utf-8").partition(HEADER)
        after = rest[rest.index("\n\n") :]
        page.write_text(before + "\n".join(table) + after, encoding="utf-8")
    print("\n| Refused | Because of |\n|---|---|")
    for name, (_, reason) in REFUSED.items():
        print(f"| {name} | {reason} |")


if __name__ == "__main__":
    main()
